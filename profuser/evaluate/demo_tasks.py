"""What the bundled tasks of lm-evaluation-harness in tasks/ call: the demo's held-out rows, and the demo's own match."""

from __future__ import annotations

from typing import Any

import datasets

from profuser.evaluate.match import load_match
from profuser.prepare.data import Row, load_examples
from profuser.recipe.data import DataConfig

HELDOUT = "demo:heldout.jsonl"
MATCH = "profuser.demo.verify:exact_match"
"""The match of the demo's recipe."""


def rows(*, skill: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The held-out rows of one skill, as the split `test`."""
    examples = load_examples(DataConfig(train=HELDOUT), HELDOUT, None, "heldout")
    return {"test": datasets.Dataset.from_list([row for row in examples if row["skill"] == skill])}


def verdict(row: Row, responses: list[str]) -> dict[str, float]:
    """Whether the answer to a row is right, as 1 or 0."""
    return {"acc": float(load_match(MATCH)(row, responses[0]))}
