"""Writes metrics.jsonl, which has a line per logged step and per validation. profuser.report.metrics reads it back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from profuser.store.files import write_atomic


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Adds one line to the file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def drop_lines_after(path: Path, step: int) -> None:
    """Takes out the lines of later steps, which a resumed run will write again. With step 0 the file becomes empty."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if step and step_of(line) <= step]
        write_atomic(path, "".join(f"{line}\n" for line in kept).encode())


def step_of(line: str) -> float:
    """Returns the step of a line, or +inf for a line that was cut short when the process was killed."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def means(window: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the mean of each metric over those steps of the window that have it."""
    keys = dict.fromkeys(key for metrics in window for key in metrics)
    return {key: float(np.mean([metrics[key] for metrics in window if key in metrics])) for key in keys}
