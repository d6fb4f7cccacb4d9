"""Compares two recipes, or the settings of two stores: which keys differ, and which of those change the outcome of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

FREE_KEYS = (
    "optim.micro_batch_size", "optim.tokens_per_micro_batch", "optim.shard", "optim.gradient_checkpointing", "optim.log_every",
    "optim.eval_every", "optim.checkpoint_every", "optim.keep_checkpoints", "optim.data_workers", "capture.batch_size",
    "generation.batch_size", "evaluation", "decode",
)  # fmt: skip
"""Keys that may change before a run is resumed. They decide how it is computed or shown, but not what its result is."""


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns the dotted keys in which two nested mappings differ. `prefix` is put in front of every key."""
    keys = []
    for key in sorted(set(a) | set(b)):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            keys += differing_keys(x, y, f"{prefix}{key}.")
        elif _plain(x) != _plain(y):
            keys.append(f"{prefix}{key}")
    return keys


def deciding_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Returns those of the differing keys that decide the outcome of a run."""
    return [
        key for key in differing_keys(a, b) if not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
    ]


def _plain(value: Any) -> Any:
    """Returns a value as it would come back from a JSON file, where a tuple has become a list.

    One of the two mappings was usually read from such a file, so that a tuple must be equal to a list with the same content.
    """
    return json.loads(json.dumps(value))
