"""One split of a store as the trainer reads it: a Dataset over memory-mapped shards, one item per instruction.

What is held in memory is an index of a few bytes per sequence; the sequences themselves stay in the files, which are
mapped read-only, so that they take page cache that other processes share and no memory of their own. At the start only
the shards' headers and index columns are checked; a shard's sha256 is checked when a sequence of it is first read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from profuser.ragged import offsets_of
from profuser.recipe.schedule import Mode
from profuser.recipe.schema import Split
from profuser.store import layout
from profuser.store.store import Store


@dataclass(frozen=True, slots=True)
class TargetSequence:
    """One training sequence: a conversation in target tokens with the source distributions of its labels.

    input_ids: (T,) int. label_mask: (T,) bool, the response's tokens and the end of turn.
    source_ce: (S,) float32 nats per unit; +inf = does not take part. response_bytes: of the response.
    row_position: (R,) int, index in input_ids of the token whose distribution the row is. row_source: (R,) int.
    row_tail: (R,) float32, linear mass outside the entries.
    entry_offsets: (R + 1,) int64 into entry_ids and entry_logprobs, natural log at temperature 1.
    """

    example: int
    mode: Mode
    input_ids: np.ndarray
    label_mask: np.ndarray
    source_ce: np.ndarray
    response_bytes: int
    row_position: np.ndarray
    row_source: np.ndarray
    row_tail: np.ndarray
    entry_offsets: np.ndarray
    entry_ids: np.ndarray
    entry_logprobs: np.ndarray

    @property
    def labels(self) -> int:
        """Number of trained tokens."""
        return int(self.label_mask.sum())

    @property
    def winner(self) -> int | None:
        """The source of lowest cross-entropy, the first of several; None where no source takes part."""
        ce = np.where(np.isfinite(self.source_ce), self.source_ce, np.inf)
        return int(ce.argmin()) if np.isfinite(ce).any() else None

    def unlabelled(self) -> TargetSequence:
        """The same conversation with nothing to learn: it keeps a rank in step that has no sequence left."""
        return replace(self, label_mask=np.zeros_like(self.label_mask))


class Targets(Dataset[list[TargetSequence]]):
    """Item i: the sequences of the i-th instruction, one per mode that it has.

    Attributes:
        sources: names, as `row_source` numbers them. top_k: K, the most entries that a row has.
    Raises:
        DataError: a shard's file has another length, header or index than was written; when an item is read, another
            content.
    """

    def __init__(self, store: Store, split: Split):
        kind = layout.targets(split)
        settings = store.settings.sources
        self.sources: list[str] = settings["source_names"]
        self.top_k: int = settings["capture"]["top_k"]
        self._store, self._kind = store, kind
        self._numbers = store.numbers(kind)
        self._open: dict[int, dict[str, np.ndarray]] = {}
        # Of every sequence its shard, its place there, its mode and its length.
        indexes = [store.index(kind, number) for number in self._numbers]
        sizes = [len(index["example"]) for index in indexes]
        nothing = [np.zeros(0, np.int64)]
        self._shard_of = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        self._place = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes] or nothing)
        self.modes = np.concatenate([index["mode"] for index in indexes] or nothing)
        self.lengths = np.concatenate([np.diff(index["offsets"]).astype(np.int32) for index in indexes] or nothing)
        examples = np.concatenate([index["example"] for index in indexes] or nothing)
        # Instructions by ascending example; the sequences of one stay in the order in which they were written.
        self._by_example = np.argsort(examples, kind="stable")
        self._instructions = offsets_of(np.unique(examples, return_counts=True)[1])

    def __len__(self) -> int:
        """The number of instructions."""
        return len(self._instructions) - 1

    def __getitem__(self, index: int) -> list[TargetSequence]:
        if not 0 <= index < len(self):
            raise IndexError(f"instructions are numbered 0..{len(self) - 1}, got {index}")
        first, stop = self._instructions[index : index + 2]
        return [self.sequence(int(n)) for n in self._by_example[first:stop]]

    def sequence(self, n: int) -> TargetSequence:
        """The n-th sequence of the split, in the order of `modes` and `lengths`."""
        shard, b = self._shard(int(self._shard_of[n])), int(self._place[n])
        tokens = slice(*shard["offsets"][b : b + 2])
        rows = slice(*shard["row_offsets"][b : b + 2])
        offsets = shard["entry_offsets"][rows.start : rows.stop + 1]
        entries = slice(offsets[0], offsets[-1])
        return TargetSequence(
            example=int(shard["example"][b]),
            mode=Mode(int(shard["mode"][b])),
            input_ids=shard["input_ids"][tokens],
            label_mask=shard["label_mask"][tokens].astype(bool),
            source_ce=shard["source_ce"][b],
            response_bytes=int(shard["response_bytes"][b]),
            row_position=shard["row_position"][rows],
            row_source=shard["row_source"][rows],
            row_tail=shard["row_tail"][rows],
            entry_offsets=offsets - offsets[0],
            entry_ids=shard["entry_ids"][entries],
            entry_logprobs=shard["entry_logprobs"][entries],
        )

    def _shard(self, n: int) -> dict[str, np.ndarray]:
        if n not in self._open:
            self._open[n] = self._store.get(self._kind, self._numbers[n])
        return self._open[n]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # another process maps the files anew
