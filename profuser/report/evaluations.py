"""Reads what `profuser evaluate RUN --data FILE` has found out about a run, for the report's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profuser.errors import DataError
from profuser.report.intervals import Score
from profuser.report.scores import in_order
from profuser.train.run_record import EVALUATIONS
from profuser.typed import COUNT, NUMBER, checked, parsed

SHAPE = {
    "data": str,
    "counts": {str: COUNT},
    "comparison": {
        str: {
            "scores": {str: {"value": NUMBER, "low": NUMBER, "high": NUMBER}},
            "pairs": [{"a": str, "b": str, "difference": NUMBER, "p": NUMBER}],
        }
    },
}


@dataclass(frozen=True, slots=True)
class Row:
    """A model that was scored.

    scores: for every skill, and for "mean". difference, p: of the fused model's mean to this one's; None for the fused model itself.
    """

    model: str
    scores: Mapping[str, Score]
    difference: float | None
    p: float | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The scores of a run's models and of others on one file.

    data: the file. prompts: how many it has. skills: the table's columns, "mean" the last. rows: the fused model is the first.
    """

    data: str
    prompts: int
    skills: list[str]
    rows: Sequence[Row]


def read_evaluations(run_dir: Path, skills: Sequence[str]) -> list[Evaluation]:
    """Reads all of a run's evaluations on further files, by the files' names. `skills` are those of the run, which come first.

    Raises:
        DataError: one is damaged.
    """
    found = []
    for path in sorted((run_dir / EVALUATIONS).glob("*.json")):
        try:
            found.append(_evaluation(checked(parsed(path.read_bytes()), SHAPE), skills))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{path} must hold an evaluation, got {error}; remove it, and `python -m profuser.evaluate {run_dir} --data FILE` "
                "makes it again"
            ) from None
    return found


def _evaluation(content: dict[str, Any], skills: Sequence[str]) -> Evaluation:
    columns = content["comparison"]
    differences = {
        pair[other]: (pair["difference"] if other == "b" else -pair["difference"], pair["p"])
        for pair in columns["mean"]["pairs"]
        for other, fused in (("a", "b"), ("b", "a"))
        if pair[fused] == "fused"
    }
    models = columns["mean"]["scores"]
    rows = [
        Row(
            model,
            {
                skill: Score(**{k: column["scores"][model][k] for k in Score._fields})
                for skill, column in columns.items()
            },
            *differences.get(model, (None, None)),
        )
        for model in sorted(models, key=lambda model: model != "fused")
    ]
    return Evaluation(content["data"], sum(content["counts"].values()), in_order(columns, skills), rows)
