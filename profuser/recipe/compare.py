"""In which keys two recipes, or the settings of two stores, differ; and which of these keys decide what comes out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

FREE_KEYS = (
    "optim.micro_batch_size", "optim.gradient_checkpointing", "optim.log_every", "optim.eval_every", "optim.checkpoint_every",
    "optim.keep_checkpoints", "optim.data_workers", "capture.batch_size", "generation.batch_size", "evaluation",
)  # fmt: skip
"""Keys that may change between a run and its resumption: they decide how it is computed or shown, not what comes out."""


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two nested mappings differ."""
    keys = []
    for key in sorted(set(a) | set(b)):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            keys += differing_keys(x, y, f"{prefix}{key}.")
        elif _plain(x) != _plain(y):
            keys.append(f"{prefix}{key}")
    return keys


def deciding_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The differing keys that decide the outcome of a run."""
    return [
        key for key in differing_keys(a, b) if not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
    ]


def _plain(value: Any) -> Any:
    """A value as a JSON file gives it back: tuples are lists."""
    return json.loads(json.dumps(value))
