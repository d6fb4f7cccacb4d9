"""How several processes make one store together: each claims a shard, makes it, and claims the next.

A shard follows from its examples and the recipe alone, not from who makes it nor from what was made before. The processes know of
each other by their leases on the store (profuser.store.lease), which also hold their claims, and by the shards that are there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState

from profuser.prepare.origins import Origins
from profuser.progress import Progress
from profuser.recipe.schema import Recipe
from profuser.store.division import Part
from profuser.store.layout import Kind
from profuser.store.lease import Lease

T = TypeVar("T")


PATIENCE = timedelta(days=7)
"""How long the processes of a launcher wait for each other. Before one may go on, another may have days of work."""


@dataclass(frozen=True, slots=True)
class ShardTook:
    """How many seconds this process worked on a shard, and how many tokens it computed for it, as far as they are counted."""

    kind: Kind
    part: Part
    seconds: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Took:
    """How long this process took for shards of some kinds.

    label: what the work is called. begun: the seconds until what it needs was there, such as a model.
    """

    label: str
    begun: float
    shards: list[ShardTook] = field(default_factory=list)


class Sharing:
    """The shards that this process makes of a store.

    Args:
        lease: this process's lease on the store, in which it works.
    Attributes:
        took: how long what this process has made took, in its order.
    """

    def __init__(self, origins: Origins, lease: Lease):
        self.origins, self.lease = origins, lease
        self.took: list[Took] = []

    def missing(self, kinds: Iterable[Kind]) -> dict[str, tuple[Kind, Part]]:
        """Returns the shards of some kinds that are still to be made, by their names."""
        return {
            kind.shard(part.number): (kind, part)
            for kind in kinds
            for part in self.origins.inputs.parts(kind.split)
            if not self.origins.is_made(kind, part)
        }

    def claimed(
        self, label: str, unit: str, kinds: Iterable[Kind], begin: Callable[[], T]
    ) -> Generator[tuple[Kind, Part, T, Progress]]:
        """Yields the shards of some kinds that this process has to make, one after the other, until none is free.

        Args:
            label, unit: what the progress is called and counts. It is that of all processes together.
            begin: makes what the work needs, such as a model. It is called when the first shard has been claimed, and its
                result comes with every shard.
        """
        free, done_elsewhere = self.missing(kinds), 0
        total = sum(len(part) for _, part in free.values())

        def is_done(name: str) -> bool:
            nonlocal done_elsewhere
            kind, part = free[name]
            if not self.origins.is_made(kind, part):
                return False
            del free[name]
            done_elsewhere += len(part)
            return True

        name = self.lease.claim([*free], is_done) if free else None
        if name is None:
            return
        start = time.monotonic()
        needed = begin()
        took = Took(label, time.monotonic() - start)
        self.took.append(took)
        with Progress(label, total, unit) as bar:
            while name is not None:
                bar.update(done_elsewhere)
                done_elsewhere = 0
                start, tokens = time.monotonic(), bar.tokens
                kind, part = free.pop(name)
                yield kind, part, needed, bar
                name = self.lease.claim([*free], is_done)
                took.shards.append(ShardTook(kind, part, time.monotonic() - start, bar.tokens - tokens))
            left = sum(len(part) for _, part in free.values())
            bar.update(done_elsewhere, note=f"other processes are at the last {left}" if left else "")


def in_turn(models: Sequence[T]) -> list[T]:
    """Returns the sources or judges of a phase in the order in which this process goes through them.

    Each process of a launcher begins with another one, so that they do not all load the same; then it helps the others.
    """
    first = int(os.environ.get("RANK", "0")) % max(1, len(models))
    return [*models[first:], *models[:first]]


def takes_part(recipe: Recipe, state: PartialState) -> bool:
    """Whether a process of a launcher takes part in a preparation: all do, unless a source takes all GPUs of a machine."""
    spread = torch.cuda.is_available() and any(source.device_map is not None for source in recipe.sources)
    return state.is_local_main_process or not spread
