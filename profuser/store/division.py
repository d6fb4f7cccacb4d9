"""How the examples of a split are divided among the shards of a store: by a hash of the prompt, and not by their place in the data.

Where rows are added, changed or taken out, only the shards to which their prompts belong are other ones. A store therefore keeps the
number of shards that it was begun with, whatever becomes of its data. A shard has its examples in the order of the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Part:
    """The examples of a split that one shard covers.

    examples: their numbers in the split, in ascending order. digest: the sha256 of their rows.
    """

    number: int
    examples: list[int]
    digest: str

    def __len__(self) -> int:
        return len(self.examples)

    def of(self, items: Sequence[T]) -> list[T]:
        """Returns the items of this part, from a sequence with one item per example of the split."""
        return [items[example] for example in self.examples]


@dataclass(frozen=True)
class Division:
    """The division of a split.

    shards: how many numbers of shards there are. Without examples of its own, a number has no shard.
    shard_of: (E,) int32, the number of the shard that covers each example. rows: the sha256 of each example's row, as 32 bytes.
    """

    shards: int
    shard_of: np.ndarray
    rows: Sequence[bytes]

    @classmethod
    def of(cls, prompts: Sequence[bytes], rows: Sequence[bytes], shards: int) -> Division:
        """Divides examples.

        Args:
            prompts: a digest of each prompt. Examples with the same one share a shard. rows: the sha256 of each row.
        """
        numbers = [int.from_bytes(prompt[:8], "little") % shards for prompt in prompts]
        return cls(shards, np.array(numbers, np.int32), rows)

    @cached_property
    def parts(self) -> list[Part]:
        """The parts that have examples, by their numbers."""
        order = np.argsort(self.shard_of, kind="stable")
        numbers, first = np.unique(self.shard_of[order], return_index=True)
        return [self._part(int(number), part.tolist()) for number, part in zip(numbers, np.split(order, first[1:]))]

    def _part(self, number: int, examples: list[int]) -> Part:
        return Part(number, examples, hashlib.sha256(b"".join(self.rows[example] for example in examples)).hexdigest())


def places(shard_of: np.ndarray) -> np.ndarray:
    """Returns the place of each example where the shards follow each other by their numbers, each with its examples.

    Args:
        shard_of: (E,), as in Division.
    """
    found = np.empty(len(shard_of), np.int64)
    found[np.argsort(shard_of, kind="stable")] = np.arange(len(shard_of))
    return found
