"""metrics.jsonl of a finished run, read back: its lines, and what each stage did to the loss.

A training line is the mean over the optimizer steps since the one before it; a validation line is one pass over the
validation prompts. Written by profuser.train.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from profuser.errors import DataError
from profuser.recipe.schedule import NAMED, Mode


class Change(NamedTuple):
    """A quantity at the beginning and at the end of a stage."""

    first: float
    last: float


@dataclass(frozen=True, slots=True)
class Metrics:
    """metrics.jsonl: its training and validation lines in the order of steps, and how many lines are unreadable."""

    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    unreadable: int = 0


@dataclass(frozen=True, slots=True)
class StageRow:
    """One quantity of the stages' table; values: one per stage, a number, text, a Change or None."""

    group: str
    label: str
    values: list[Any]


def read_metrics(path: Path) -> Metrics:
    """The lines of a run; of a step that a resumed run repeats, the last."""
    training, validation, unreadable = {}, {}, 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(
            f"a report needs metrics.jsonl, {path}: {error.strerror}; let the run finish or give its directory"
        ) from None
    for line in filter(str.strip, lines):
        try:
            entry = json.loads(line)
            (validation if "eval" in entry else training)[entry["step"], entry["stage"]] = entry
        except (ValueError, KeyError, TypeError):  # a line torn by a killed process
            unreadable += 1
    by_step = itemgetter("step")
    return Metrics(sorted(training.values(), key=by_step), sorted(validation.values(), key=by_step), unreadable)


def stage_table(metrics: Metrics, recipe: Mapping[str, Any]) -> list[StageRow]:
    """What each stage weighed and did; a row without any value is left out.

    Training changes are from the mean of the first tenth of a stage's lines to that of its last tenth; validation changes
    from the last pass before the stage to its last one.
    """
    stages = [list(lines) for _, lines in groupby(metrics.training, key=itemgetter("stage"))]
    stops = [lines[-1]["step"] for lines in stages]
    starts = [0, *stops[:-1]]
    schedule = recipe["schedule"]
    configs = [vars(c) for c in NAMED[schedule]] if isinstance(schedule, str) else schedule
    configs = [configs[lines[0]["stage"]] if lines[0]["stage"] < len(configs) else {} for lines in stages]
    beta = recipe.get("optim", {}).get("beta")
    rows = [
        StageRow("", "optimizer steps", [f"{start + 1}–{stop}" for start, stop in zip(starts, stops)]),
        StageRow("Weight", "inference", [c.get("inference_weight") for c in configs]),
        StageRow("Weight", "training", [c.get("training_weight") for c in configs]),
        StageRow("Weight", "KL (β)", [beta if c.get("beta") is None else c["beta"] for c in configs]),
    ]
    for quantity, key in (("Cross-entropy", "ce"), ("KL to the source", "kd")):
        for mode in (Mode.INFERENCE, Mode.TRAINING):
            rows.append(StageRow(quantity, mode.key, [_tenths(lines, f"{key}_{mode.key}") for lines in stages]))
        changes = [_passes(metrics.validation, key, start, stop) for start, stop in zip(starts, stops)]
        rows.append(StageRow(quantity, "validation", changes))
    return [row for row in rows if any(value is not None for value in row.values)]


def _tenths(lines: Sequence[Mapping[str, Any]], key: str) -> Change | None:
    values = [line[key] for line in lines if line.get(key)]  # zero: the mode had no tokens, or there was no KL
    if not values:
        return None
    tenth = max(1, len(values) // 10)
    return Change(sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth)


def _passes(validation: Sequence[Mapping[str, Any]], key: str, start: int, stop: int) -> Change | None:
    before = [line["eval"][key] for line in validation if line["step"] <= start and line["eval"].get(key)]
    after = [line["eval"][key] for line in validation if start < line["step"] <= stop and line["eval"].get(key)]
    return Change(before[-1], after[-1]) if before and after else None
