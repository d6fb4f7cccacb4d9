"""Reads metrics.jsonl of a finished run, and works out what each stage did to the loss.

The file is written by profuser.train. A training line is the mean over the optimizer steps since the training line before it.
A validation line is the result of one pass over the validation prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

from profuser.recipe.schedule import NAMED, Mode
from profuser.store.sealed import unsealed
from profuser.train.metrics_log import REWARD
from profuser.typed import COUNT, NUMBER, parsed

LINE = {"step": COUNT, "stage": COUNT, "eval?": {str: (NUMBER, None)}, str: (NUMBER, None)}
"""The shape of a line of metrics.jsonl."""


class Change(NamedTuple):
    """The values of a quantity at the beginning and at the end of a stage."""

    first: float
    last: float


class OnePoint(NamedTuple):
    """The only value that a stage has of a quantity, from which no change can be told."""

    value: float


@dataclass(frozen=True, slots=True)
class Metrics:
    """The content of metrics.jsonl: its training and validation lines by ascending step, and how many lines are damaged."""

    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    unreadable: int = 0


@dataclass(frozen=True, slots=True)
class StageRow:
    """A row of the table of stages: one quantity, with a number, a text, a Change, a OnePoint or None for every stage."""

    group: str
    label: str
    values: list[Any]


def read_metrics(content: bytes) -> Metrics:
    """Reads the lines of metrics.jsonl. Those that are not what was written, by their seals, are left out and counted."""
    training, validation, unreadable = {}, {}, 0
    for line in filter(bytes.strip, content.splitlines()):
        try:
            entry = unsealed(parsed(line), LINE)
            (validation if "eval" in entry else training)[entry["step"], entry["stage"]] = entry
        except ValueError:
            unreadable += 1
    by_step = itemgetter("step")
    return Metrics(sorted(training.values(), key=by_step), sorted(validation.values(), key=by_step), unreadable)


def stage_table(metrics: Metrics, recipe: Mapping[str, Any]) -> list[StageRow]:
    """Returns the table of a run's stages: how each weighed the modes, and how it changed CE and KL."""
    return compared_stages([(metrics, recipe)])


def compared_stages(runs: Sequence[tuple[Metrics, Mapping[str, Any]]]) -> list[StageRow]:
    """Returns the tables of several runs, given by their metrics and recipes, as one, in which a run's stages follow those of the run
    before it. A row without values is left out.
    """
    judges = judges_of([metrics for metrics, _ in runs])
    rows = [
        StageRow(of_runs[0].group, of_runs[0].label, [value for row in of_runs for value in row.values])
        for of_runs in zip(*(_all_rows(metrics, recipe, judges) for metrics, recipe in runs))
    ]
    return [row for row in rows if any(value is not None for value in row.values)]


def judges_of(runs: Sequence[Metrics]) -> list[str]:
    """Returns the names of the judges whose scores of the target's answers were logged by any of some runs."""
    keys = dict.fromkeys(key for metrics in runs for line in metrics.validation for key in line["eval"])
    return [key.removeprefix(REWARD) for key in keys if key.startswith(REWARD)]


def value_of(line: Mapping[str, Any], key: str) -> float | None:
    """Returns a quantity of a line; None where it has none.

    A loss of 0 means that its mode had no tokens, or that there was no KL. A judge's score may be 0.
    """
    value = line.get(key)
    return value if value or key.startswith(REWARD) else None


def count_stages(metrics: Metrics) -> int:
    """Returns how many stages were logged."""
    return sum(1 for _ in groupby(metrics.training, key=itemgetter("stage")))


def _all_rows(metrics: Metrics, recipe: Mapping[str, Any], judges: Sequence[str]) -> list[StageRow]:
    """Returns all rows of the table of a run's stages, also those without values, with one for each of some judges.

    In training, a change goes from the mean of the first tenth of a stage's lines to the mean of its last tenth; in validation,
    from the last pass before the stage to the last pass in it.
    """
    # The stages as they were logged, each with its first and last step and its entry in the recipe.
    stages = [list(lines) for _, lines in groupby(metrics.training, key=itemgetter("stage"))]
    stops = [lines[-1]["step"] for lines in stages]
    starts = [0, *stops[:-1]]
    schedule = recipe["schedule"]
    configs = [vars(c) for c in NAMED[schedule]] if isinstance(schedule, str) else schedule
    configs = [configs[lines[0]["stage"]] if lines[0]["stage"] < len(configs) else {} for lines in stages]
    beta = recipe.get("optim", {}).get("beta")

    # The rows: what the recipe says, then what was measured.
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
    for label, key in (("left out, the largest", "left_out_share"), ("columns kept, the most", "kept_share")):
        rows.append(StageRow("Shares of the gradient", label, [_tenths(lines, key) for lines in stages]))
    for judge in judges:
        changes = [_passes(metrics.validation, REWARD + judge, start, stop) for start, stop in zip(starts, stops)]
        rows.append(StageRow("Judges' mean scores", judge, changes))
    return rows


def _tenths(lines: Sequence[Mapping[str, Any]], key: str) -> Change | OnePoint | None:
    """Returns a quantity's mean over the first and over the last tenth of some training lines; None where it has no values."""
    values = [value for line in lines if (value := value_of(line, key)) is not None]
    if not values:
        return None
    if len(values) == 1:
        return OnePoint(values[0])
    tenth = max(1, len(values) // 10)
    return Change(sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth)


def _passes(validation: Sequence[Mapping[str, Any]], key: str, start: int, stop: int) -> Change | None:
    """Returns a quantity in the last validation up to step `start` and in the last one up to step `stop`, if there are both."""
    values = [(line["step"], value) for line in validation if (value := value_of(line["eval"], key)) is not None]
    before = [value for step, value in values if step <= start]
    after = [value for step, value in values if start < step <= stop]
    return Change(before[-1], after[-1]) if before and after else None
