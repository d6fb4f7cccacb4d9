"""Sequences of a store as a rectangular batch for FusionModel.

The source of every sequence is chosen here, before anything is padded: the batch holds the winner's distributions alone,
(B, T, K), however many sources there are. Letters: B sequences, T tokens, K kept entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from profuser.kernels.common import IGNORE_INDEX
from profuser.ragged import slots_of
from profuser.recipe.schedule import Mode
from profuser.train.targets import TargetSequence

Weights = Mapping[Mode, float]
"""A weight per label token, by the mode of its sequence."""


def collate(
    sequences: Sequence[TargetSequence], ce_weight: Weights, kd_weight: Weights, pad_id: int, top_k: int
) -> dict[str, np.ndarray]:
    """A right-padded batch. Row (b, t) of every per-token tensor speaks of token t itself; FusionModel shifts.

    Returns:
        input_ids, attention_mask, labels (B, T) int64 and ce_weight, kd_weight (B, T) fp32. Unless every kd_weight is 0
        also source_ids (1, B, T, K) int32 with -1 = padding, source_logprobs (1, B, T, K) fp32 at temperature 1,
        source_tail (1, B, T) fp32, and source_index (B,) int64: 0, or -1 where no source takes part.
    """
    shape = len(sequences), max(len(s.input_ids) for s in sequences)
    input_ids = np.full(shape, pad_id, np.int64)
    attention_mask = np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORE_INDEX, np.int64)
    weights = np.zeros((2, *shape), np.float32)
    for b, s in enumerate(sequences):
        n = len(s.input_ids)
        input_ids[b, :n] = s.input_ids
        attention_mask[b, :n] = 1
        labels[b, :n][s.label_mask] = s.input_ids[s.label_mask]
        weights[:, b] = [[ce_weight[s.mode]], [kd_weight[s.mode]]]
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "ce_weight": weights[0],
        "kd_weight": weights[1],
    }
    if any(kd_weight.values()):
        batch |= winning_sources(sequences, *shape, top_k)
    return batch


def winning_sources(sequences: Sequence[TargetSequence], B: int, T: int, K: int) -> dict[str, np.ndarray]:
    """Each sequence's distributions by its winner, with the leading axis of one source that the loss expects."""
    source_ids = np.full((1, B, T, K), -1, np.int32)
    source_logprobs = np.zeros((1, B, T, K), np.float32)
    source_tail = np.zeros((1, B, T), np.float32)
    source_index = np.full(B, -1, np.int64)
    for b, s in enumerate(sequences):
        if s.winner is None:
            continue
        source_index[b] = 0
        of_winner = s.row_source == s.winner
        row, slot = slots_of(s.entry_offsets)
        kept = of_winner[row]
        position, slot = s.row_position[row[kept]], slot[kept]
        source_ids[0, b, position, slot] = s.entry_ids[kept]
        source_logprobs[0, b, position, slot] = s.entry_logprobs[kept]
        source_tail[0, b, s.row_position[of_winner]] = s.row_tail[of_winner]
    return {
        "source_ids": source_ids,
        "source_logprobs": source_logprobs,
        "source_tail": source_tail,
        "source_index": source_index,
    }
