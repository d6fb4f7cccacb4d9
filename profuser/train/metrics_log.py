"""Writes metrics.jsonl, which has a sealed line per logged step and per validation. profuser.report.metrics reads it back.

Every checkpoint keeps a copy of the file, which a resumed run goes on with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from profuser.recipe.schedule import Stage
from profuser.store.files import writing
from profuser.store.sealed import sealed

FEWEST = 10
"""How many lines a stage has at least, if it has so many steps."""

REWARD = "reward_"
"""What the names of the judges' mean scores begin with in the line of a validation."""


def is_due(done: int, stage: Stage, log_every: int) -> bool:
    """Whether a line is due after so many steps of the run, the last of which is one of this stage.

    In a stage that is too short for FEWEST lines every `log_every` steps, lines come as much more often as it needs. A stage always
    ends with one.
    """
    every = min(log_every, max((stage.stop - stage.first) // FEWEST, 1))
    return done % every == 0 or done == stage.stop


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Adds one line to the file."""
    text = json.dumps(sealed(line)) + "\n"
    with writing(path, len(text)), open(path, "a", encoding="utf-8") as file:
        file.write(text)


def validations(content: bytes) -> dict[int, float]:
    """Returns the CE of every validation after a step of training, by the number of steps done, from the file's content.

    One that is not finite is left out. The file must be as it was written, as that of a checkpoint is.
    """
    lines = [json.loads(line) for line in content.splitlines()]
    found = {line["step"]: line["eval"]["ce"] for line in lines if "eval" in line and line["step"] > 0}
    return {step: ce for step, ce in found.items() if math.isfinite(ce)}


def ranking(validated: Mapping[int, float]) -> list[int]:
    """Returns the steps of some validations by their CE, the lowest first; of equal ones the earlier."""
    return sorted(validated, key=lambda step: (validated[step], step))


LARGEST = ("left_out_share", "kept_share")
"""The metrics of which a line has the largest, because a mean would hide a step that left out too much."""


def summary(window: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the mean of each metric over those steps of the window that have it, or the largest of those in LARGEST."""
    keys = dict.fromkeys(key for metrics in window for key in metrics)
    found = {key: [metrics[key] for metrics in window if key in metrics] for key in keys}
    return {key: float(max(values) if key in LARGEST else np.mean(values)) for key, values in found.items()}
