"""Compares recipes, or the settings of two stores: which keys differ, and which of those change the outcome of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

FREE_KEYS = (
    "optim.micro_batch_size", "optim.tokens_per_micro_batch", "optim.deterministic", "optim.shard", "optim.compile",
    "optim.gradient_checkpointing", "optim.log_every", "optim.eval_every", "optim.eval_rewards", "optim.checkpoint_every",
    "optim.async_checkpoints", "optim.keep_checkpoints", "optim.keep_best", "optim.export", "optim.trackers", "optim.data_workers",
    "capture.batch_size", "capture.tokens_per_batch", "capture.layout", "generation.batch_size", "generation.engine",
    "generation.python", "evaluation", "decode", "hub",
)  # fmt: skip
"""Keys that may change before a run is resumed. They decide how it is computed or shown, but not what its result is."""

FREE_OF_MODELS = (
    "device_map", "generation.batch_size", "generation.engine", "generation.python",
    "server.url", "server.key_variable", "server.concurrency", "server.timeout", "server.retries",
)  # fmt: skip
"""The same of every source and judge."""


def differing_values(mappings: Sequence[Mapping[str, Any]], prefix: str = "") -> dict[str, list[Any]]:
    """Returns the dotted keys in which some nested mappings differ, each with the value that every mapping has for it.

    A key that is missing counts as null. `prefix` is put in front of every key.
    """
    differing: dict[str, list[Any]] = {}
    for key in sorted({key for mapping in mappings for key in mapping}):
        values = [mapping.get(key) for mapping in mappings]
        nested = [value for value in values if isinstance(value, dict)]
        if len(nested) == len(values):
            differing |= differing_values(nested, f"{prefix}{key}.")
        elif any(_plain(value) != _plain(values[0]) for value in values):
            differing[f"{prefix}{key}"] = values
    return differing


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns the dotted keys in which two nested mappings differ. `prefix` is put in front of every key."""
    return list(differing_values([a, b], prefix))


def decides(key: str) -> bool:
    """Whether a dotted key decides the outcome of a run."""
    return not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def deciding_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Returns those of two recipes' differing keys that decide the outcome of a run."""
    return [key for key in differing_keys(_without_free_parts(a), _without_free_parts(b)) if decides(key)]


def _without_free_parts(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a recipe whose sources and judges lack what may change before a run is resumed, such as where a server is."""
    kept: dict[str, Any] = _plain(dict(recipe))
    models = [model for key in ("sources", "judges") if isinstance(kept.get(key), list) for model in kept[key]]
    for model in [model for model in models if isinstance(model, dict)]:
        for key in FREE_OF_MODELS:
            group, _, name = key.rpartition(".")
            holder = model.get(group) if group else model
            if isinstance(holder, dict):
                holder.pop(name, None)
        if not any(value is not None for value in (model.get("generation") or {}).values()):
            model["generation"] = None  # it says no more than one that is not there
    return kept


def _plain(value: Any) -> Any:
    """Returns a value as it would come back from a JSON file, where a tuple has become a list.

    One of the two mappings was usually read from such a file, so that a tuple must be equal to a list with the same content.
    """
    return json.loads(json.dumps(value))
