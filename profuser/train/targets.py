"""Reads one split of a store for the trainer, as a Dataset with one item per instruction.

Only an index of a few bytes per sequence is held in memory. The sequences stay in the files, which are mapped read-only: they
take up page cache, which all processes share. At the start only the headers and index columns of the shards are checked; the
sha256 of a shard is checked when one of its sequences is read for the first time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from profuser.ragged import offsets_of
from profuser.recipe.data import Split
from profuser.recipe.schedule import Mode
from profuser.store import layout
from profuser.store.marks import labels_of, rows_of
from profuser.store.store import Store


@dataclass(frozen=True, slots=True)
class TargetSequence:
    """One training sequence: a conversation in target tokens, with the sources' distributions of its labels.

    T is the number of its tokens, S the number of sources, and R the number of its rows. A row is one source's distribution of
    one token.

    example: the number of its example in the split. mode: whether it teaches the ground truth or the response that won.
    input_ids: (T,) int. label_mask: (T,) bool, true for the response's tokens and the end of turn.
    source_ce: (S,) float32, each source's cross-entropy in nats per byte or token; +inf where the source does not take part.
    response_bytes: the length of the response.
    source_weight: (S,) float32, how much each source counts beside the others, where the data say so; None elsewhere.
    row_position: (R,) int, the index in input_ids of the token that the row is about. row_source: (R,) int, the row's source.
    row_tail: (R,) float32, the linear mass outside the row's entries.
    entry_offsets: (R + 1,) int64, where each row's entries begin in entry_ids and entry_logprobs.
    entry_ids: target tokens. entry_logprobs: float16, their natural log-probabilities at temperature 1.
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
    source_weight: np.ndarray | None = None

    @property
    def labels(self) -> int:
        """The number of label tokens."""
        return int(self.label_mask.sum())

    @property
    def winner(self) -> int | None:
        """The source with the lowest cross-entropy; None where no source takes part."""
        return layout.winner_of(self.source_ce)

    def weights(self, mixing: float | None = None) -> np.ndarray | None:
        """Returns the weight of each source, (S,) float32, which sum to 1 over those that take part, or are all 0 if none does.

        They are what the data say, or else softmax(-source_ce / mixing). Without either there are none, and one source is chosen.
        """
        if self.source_weight is not None:
            weights = np.where(np.isfinite(self.source_ce), self.source_weight, 0.0)
            return (weights / (weights.sum() or 1.0)).astype(np.float32)
        if mixing is None:
            return None
        logits = np.where(np.isfinite(self.source_ce), -self.source_ce / mixing, -np.inf)
        if not np.isfinite(logits).any():
            return np.zeros(len(logits), np.float32)
        weights = np.exp(logits - logits.max())
        return (weights / weights.sum()).astype(np.float32)

    def unlabelled(self) -> TargetSequence:
        """Returns the same conversation without any label. A rank that has no sequence left passes it, to stay in step."""
        return replace(self, label_mask=np.zeros_like(self.label_mask))


class Targets(Dataset[list[TargetSequence]]):
    """The instructions of a split. An item is the list of an instruction's sequences, one for each mode that it has.

    Attributes:
        sources: the names of the sources, in the order in which `row_source` numbers them.
        top_k: K, the most entries that a row can have.
        modes, lengths: the mode and the number of tokens of every sequence.
    Raises:
        DataError: a shard's file does not have the length, the header or the index that was written. When an item is read:
            its content is not what was written.
    """

    def __init__(self, store: Store, split: Split):
        kind = layout.targets(split)
        settings = store.settings.sources
        self.sources: list[str] = settings["source_names"]
        self.top_k: int = settings["capture"]["top_k"]
        self._store, self._kind = store, kind
        self._weighed = settings["capture"].get("choice") == "weights"
        self._numbers = store.numbers(kind)
        self._open: dict[int, dict[str, np.ndarray]] = {}
        # For every sequence: its shard, its place there, its mode and its length.
        indexes = [store.index(kind, number) for number in self._numbers]
        sizes = [len(index["example"]) for index in indexes]
        nothing = [np.zeros(0, np.int64)]
        self._shard_of = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        self._place = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes] or nothing)
        self.modes = np.concatenate([index["mode"] for index in indexes] or nothing)
        self.lengths = np.concatenate([np.diff(index["offsets"]).astype(np.int32) for index in indexes] or nothing)
        examples = np.concatenate([index["example"] for index in indexes] or nothing)
        # The instructions in the order of their examples. The sequences of one stay in the order in which they were written.
        self._by_example = np.argsort(examples, kind="stable")
        self._instructions = offsets_of(np.unique(examples, return_counts=True)[1])

    def __len__(self) -> int:
        """The number of instructions."""
        return len(self._instructions) - 1

    def __getitem__(self, index: int) -> list[TargetSequence]:
        """The sequences of the instruction with this number."""
        if not 0 <= index < len(self):
            raise IndexError(f"instructions are numbered 0..{len(self) - 1}, got {index}")
        first, stop = self._instructions[index : index + 2]
        return [self.sequence(int(n)) for n in self._by_example[first:stop]]

    def sequence(self, n: int) -> TargetSequence:
        """Returns the n-th sequence of the split, in the order of `modes` and `lengths`."""
        shard, b = self._shard(int(self._shard_of[n])), int(self._place[n])
        tokens = slice(*shard["offsets"][b : b + 2])
        rows = slice(*shard["row_offsets"][b : b + 2])
        entries = slice(*shard["entry_offsets"][b : b + 2])
        marks = shard["marks"][tokens]
        row_source, row_position = rows_of(marks, len(self.sources))
        return TargetSequence(
            example=int(shard["example"][b]),
            mode=Mode(int(shard["mode"][b])),
            input_ids=shard["input_ids"][tokens],
            label_mask=labels_of(marks),
            source_ce=shard["source_ce"][b],
            source_weight=shard["source_weight"][b] if self._weighed else None,
            response_bytes=int(shard["response_bytes"][b]),
            row_position=row_position,
            row_source=row_source,
            row_tail=shard["row_tail"][rows],
            entry_offsets=offsets_of(shard["entry_counts"][rows]),
            entry_ids=shard["entry_ids"][entries],
            entry_logprobs=shard["entry_logprobs"][entries],
        )

    def _shard(self, n: int) -> dict[str, np.ndarray]:
        """Returns the arrays of the split's n-th shard, which is opened when it is first asked for."""
        if n not in self._open:
            self._open[n] = self._store.get(self._kind, self._numbers[n])
        return self._open[n]

    def __getstate__(self) -> dict[str, Any]:
        """What is sent to a worker process: all but the open shards, whose files the process maps anew."""
        return self.__dict__ | {"_open": {}}
