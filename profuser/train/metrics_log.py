"""metrics.jsonl as it is written: a line per logged step or validation pass (read back by profuser.report.metrics)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from profuser.store.files import write_atomic


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def drop_lines_after(path: Path, step: int) -> None:
    """Take out what a resumed run will write again; a run that begins anew (step 0) begins an empty file."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if step and step_of(line) <= step]
        write_atomic(path, "".join(f"{line}\n" for line in kept).encode())


def step_of(line: str) -> float:
    """The step of a line; +inf for one that a crash tore."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def means(window: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the steps that have it."""
    keys = dict.fromkeys(key for metrics in window for key in metrics)
    return {key: float(np.mean([metrics[key] for metrics in window if key in metrics])) for key in keys}
