"""Writes metrics.jsonl, which has a sealed line per logged step and per validation. profuser.report.metrics reads it back.

Every checkpoint keeps a copy of the file, which a resumed run goes on with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from profuser.store.files import writing
from profuser.store.sealed import sealed


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Adds one line to the file."""
    text = json.dumps(sealed(line)) + "\n"
    with writing(path, len(text)), open(path, "a", encoding="utf-8") as file:
        file.write(text)


def means(window: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the mean of each metric over those steps of the window that have it."""
    keys = dict.fromkeys(key for metrics in window for key in metrics)
    return {key: float(np.mean([metrics[key] for metrics in window if key in metrics])) for key in keys}
