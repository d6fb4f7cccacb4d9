"""What the trainer reads: sequences in target tokens with the sources' distributions of their labels.

`TargetBuilder` writes the arrays of a `targets/` shard (CSR: sequences -> rows -> entries), `Targets` reads them back and
makes padded batches. A row is one source's distribution of one token: K entries and the tail, the mass outside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from profuser.alignment.types import KINDS, Aligned
from profuser.capture import REASONS
from profuser.chat import Encoded
from profuser.config import OptimConfig
from profuser.kernels.common import IGNORE_INDEX
from profuser.store import Store, id_dtype, ragged

TRAIN, INFER = 0, 1
"""Modes: a sequence's label is the ground truth (training mode) or the voted winner's response (inference mode)."""
MODE_NAMES = ("train", "infer")


class TargetBuilder:
    """Collects aligned sequences into the arrays of one `targets` shard (CSR), with the counts of the alignment."""

    def __init__(self, sources: int, vocabulary: int):
        self.sources, self.vocabulary = sources, vocabulary
        self.example, self.mode, self.response_bytes, self.source_ce = [], [], [], []
        self.input_ids, self.label_mask = [], []
        self.row_position, self.row_source, self.row_tail, self.row_reliability = [], [], [], []
        self.entry_counts, self.entry_ids, self.entry_logprobs = [], [], []
        self.skipped = np.zeros((2, len(REASONS)), np.int64)
        self.kinds = np.zeros((2, sources, len(KINDS)), np.int64)
        self.covered = np.zeros((2, sources), np.int64)
        self.mapped_mass = np.zeros((2, sources), np.float64)
        self.reliability = np.zeros((2, sources, 10), np.int64)

    def skip(self, mode: int, reason: int) -> None:
        self.skipped[mode, reason] += 1

    def add(
        self,
        example: int,
        mode: int,
        encoded: Encoded,
        positions: list[int],
        source_ce,
        response_bytes: int,
        aligned: list[Aligned | None],
    ) -> None:
        """One sequence; positions are its labels' indices in input_ids, `aligned` has one entry a source over them."""
        positions = np.array(positions)
        mask = np.zeros(len(encoded.input_ids), np.uint8)
        mask[positions] = 1
        self.example.append(example)
        self.mode.append(mode)
        self.response_bytes.append(response_bytes)
        self.source_ce.append(source_ce)
        self.input_ids.append(np.array(encoded.input_ids))
        self.label_mask.append(mask)
        rows_position, rows_source, rows_tail, rows_reliability = [], [], [], []
        for s, a in enumerate(aligned):
            if a is None:
                continue
            counts = np.diff(a.offsets)
            kept = np.flatnonzero(counts)
            rows_position.append(positions[kept])
            rows_source.append(np.full(len(kept), s))
            rows_tail.append(a.tail[kept])
            rows_reliability.append(np.round(a.reliability[kept] * 255))
            self.entry_counts.append(counts[kept])
            self.entry_ids.append(a.ids)
            self.entry_logprobs.append(a.logprobs)
            self.kinds[mode, s] += np.bincount(a.kind, minlength=len(KINDS))
            self.covered[mode, s] += len(kept)
            self.mapped_mass[mode, s] += (1 - a.tail[kept]).sum(dtype=np.float64)
            self.reliability[mode, s] += np.histogram(a.reliability[kept], bins=10, range=(0, 1))[0]
        for store, rows in (
            (self.row_position, rows_position),
            (self.row_source, rows_source),
            (self.row_tail, rows_tail),
            (self.row_reliability, rows_reliability),
        ):
            store.append(np.concatenate(rows or [np.zeros(0)]))

    def arrays(self) -> dict[str, np.ndarray]:
        offsets, input_ids = ragged(self.input_ids, id_dtype(self.vocabulary))
        row_offsets, row_position = ragged(self.row_position, np.int32)
        counts = np.concatenate(self.entry_counts or [np.zeros(0, np.int64)])
        return {
            "example": np.array(self.example, np.int32),
            "mode": np.array(self.mode, np.uint8),
            "response_bytes": np.array(self.response_bytes, np.int32),
            "source_ce": np.array(self.source_ce, np.float32).reshape(-1, self.sources),
            "offsets": offsets,
            "input_ids": input_ids,
            "label_mask": ragged(self.label_mask, np.uint8)[1],
            "row_offsets": row_offsets,
            "row_position": row_position,
            "row_source": ragged(self.row_source, np.uint8)[1],
            "row_tail": ragged(self.row_tail, np.float32)[1],
            "row_reliability": ragged(self.row_reliability, np.uint8)[1],
            "entry_offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            "entry_ids": ragged(self.entry_ids, id_dtype(self.vocabulary))[1],
            "entry_logprobs": ragged(self.entry_logprobs, np.float16)[1],
            "skipped": self.skipped,
            "kinds": self.kinds,
            "covered": self.covered,
            "mapped_mass": self.mapped_mass,
            "reliability": self.reliability,
        }


@dataclass(slots=True)
class TargetSequence:
    """One training sequence: a conversation in target tokens with the source distributions of its labels."""

    example: int
    mode: int
    input_ids: np.ndarray  # int [T]
    label_mask: np.ndarray  # bool [T]: response tokens and the end of turn
    source_ce: np.ndarray  # float32 [S], nats per unit; +inf = does not take part
    response_bytes: int
    row_position: np.ndarray  # int [R]: index in input_ids of the token whose distribution the row is
    row_source: np.ndarray  # int [R]
    row_tail: np.ndarray  # float32 [R], linear mass
    entry_offsets: np.ndarray  # int64 [R + 1]
    entry_ids: np.ndarray
    entry_logprobs: np.ndarray

    @property
    def labels(self) -> int:
        """Number of trained tokens."""
        return int(self.label_mask.sum())


class Targets:
    """The trainer's view of one split of a store: sequences of both modes, grouped by instruction."""

    def __init__(self, store: Store, split: str):
        self.sources: list[str] = store.manifest["settings"]["capture"]["source_names"]
        self.top_k = 1
        self.sequences: list[TargetSequence] = []
        for name in store.shards(f"targets/{split}"):
            self._add(store.get(name))
        by_example: dict[int, list[TargetSequence]] = {}
        for sequence in self.sequences:
            by_example.setdefault(sequence.example, []).append(sequence)
        self.instructions = [by_example[e] for e in sorted(by_example)]

    def _add(self, shard: dict[str, np.ndarray]) -> None:
        for b in range(len(shard["example"])):
            t0, t1 = shard["offsets"][b : b + 2]
            r0, r1 = shard["row_offsets"][b : b + 2]
            entries = shard["entry_offsets"][r0 : r1 + 1]
            if r1 > r0:
                self.top_k = max(self.top_k, int(np.diff(entries).max()))
            self.sequences.append(
                TargetSequence(
                    example=int(shard["example"][b]),
                    mode=int(shard["mode"][b]),
                    input_ids=shard["input_ids"][t0:t1],
                    label_mask=shard["label_mask"][t0:t1].astype(bool),
                    source_ce=shard["source_ce"][b],
                    response_bytes=int(shard["response_bytes"][b]),
                    row_position=shard["row_position"][r0:r1],
                    row_source=shard["row_source"][r0:r1],
                    row_tail=shard["row_tail"][r0:r1],
                    entry_offsets=entries - entries[0] if len(entries) else np.zeros(1, np.int64),
                    entry_ids=shard["entry_ids"][entries[0] : entries[-1]] if r1 > r0 else shard["entry_ids"][:0],
                    entry_logprobs=shard["entry_logprobs"][entries[0] : entries[-1]]
                    if r1 > r0
                    else shard["entry_logprobs"][:0],
                )
            )

    def batch(
        self,
        sequences: Sequence[TargetSequence],
        ce_weight: Sequence[float],
        kd_weight: Sequence[float],
        pad_id: int,
        optim: OptimConfig,
    ) -> dict[str, torch.Tensor]:
        """`collate` as the fused loss wants it with this tail and temperature; log-probabilities are stored at temperature 1."""
        tensors = self.collate(sequences, ce_weight, kd_weight, pad_id)
        if optim.tail == "renormalize":
            del tensors["source_tail"]
            tensors["source_logprobs"] /= optim.temperature
        return tensors

    def collate(
        self, sequences: Sequence[TargetSequence], ce_weight: Sequence[float], kd_weight: Sequence[float], pad_id: int
    ) -> dict[str, torch.Tensor]:
        """A right-padded batch for FusionModel. Row (b, t) of every per-token tensor speaks of token t itself.

        Args:
            ce_weight, kd_weight: by mode (TRAIN, INFER).

        Returns:
            input_ids, attention_mask, labels (B, T) int64; ce_weight, kd_weight (B, T) fp32; source_ids (S, B, T, K)
            int32 with -1 = padding; source_logprobs (S, B, T, K), source_tail (S, B, T), source_ce (S, B) fp32.
        """
        B, T = len(sequences), max(len(s.input_ids) for s in sequences)
        S, K = len(self.sources), self.top_k
        input_ids = np.full((B, T), pad_id, np.int64)
        attention_mask = np.zeros((B, T), np.int64)
        labels = np.full((B, T), IGNORE_INDEX, np.int64)
        weight = np.zeros((2, B, T), np.float32)
        source_ids = np.full((S, B, T, K), -1, np.int32)
        source_logprobs = np.zeros((S, B, T, K), np.float32)
        source_tail = np.zeros((S, B, T), np.float32)
        source_ce = np.empty((S, B), np.float32)
        for b, s in enumerate(sequences):
            n = len(s.input_ids)
            input_ids[b, :n] = s.input_ids
            attention_mask[b, :n] = 1
            labels[b, :n][s.label_mask] = s.input_ids[s.label_mask]
            weight[0, b], weight[1, b] = ce_weight[s.mode], kd_weight[s.mode]
            source_ce[:, b] = s.source_ce
            counts = np.diff(s.entry_offsets)
            row = np.repeat(np.arange(len(counts)), counts)
            slot = np.arange(len(row)) - np.repeat(s.entry_offsets[:-1], counts)
            at = (s.row_source[row], b, s.row_position[row], slot)
            source_ids[at] = s.entry_ids
            source_logprobs[at] = s.entry_logprobs
            source_tail[s.row_source, b, s.row_position] = s.row_tail
        arrays = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "ce_weight": weight[0],
            "kd_weight": weight[1],
            "source_ids": source_ids,
            "source_logprobs": source_logprobs,
            "source_tail": source_tail,
            "source_ce": source_ce,
        }
        return {k: torch.from_numpy(v) for k, v in arrays.items()}
