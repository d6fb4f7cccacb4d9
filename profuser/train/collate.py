"""Puts sequences of a store together as one rectangular batch for FusionModel.

The source of every sequence is chosen before anything is padded: the batch holds the winner's distributions alone, (B, T, K),
however many sources there are. Letters: B sequences, T tokens, K kept entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from profuser.kernels.common import IGNORE_INDEX
from profuser.ragged import slots_of
from profuser.recipe.schedule import Mode
from profuser.train.targets import TargetSequence

Weights = Mapping[Mode, float]
"""The weight of a label token, by the mode of its sequence."""


def collate(
    sequences: Sequence[TargetSequence], ce_weight: Weights, kd_weight: Weights, pad_id: int, top_k: int
) -> dict[str, np.ndarray]:
    """Returns a batch that is padded at the right.

    In every array with an axis of tokens, the place (b, t) is about token t of sequence b itself. FusionModel shifts the arrays
    against the hidden states.

    Args:
        pad_id: the id of the padding in input_ids. top_k: K, the most entries that a distribution can have.

    Returns:
        input_ids, attention_mask, labels (B, T) int64 and ce_weight, kd_weight (B, T) fp32. Unless all of `kd_weight` is 0
        there are also source_ids (1, B, T, K) int32, where -1 is padding, source_logprobs (1, B, T, K) fp32 at temperature 1,
        source_tail (1, B, T) fp32, and source_index (B,) int64, which is 0, or -1 where no source takes part.
    """
    shape = len(sequences), max(len(s.input_ids) for s in sequences)
    input_ids = np.full(shape, pad_id, np.int64)
    attention_mask = np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORE_INDEX, np.int64)
    weights = np.zeros((2, *shape), np.float32)
    for b, sequence in enumerate(sequences):
        length = len(sequence.input_ids)
        input_ids[b, :length] = sequence.input_ids
        attention_mask[b, :length] = 1
        labels[b, :length][sequence.label_mask] = sequence.input_ids[sequence.label_mask]
        weights[:, b] = [[ce_weight[sequence.mode]], [kd_weight[sequence.mode]]]
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
    """Returns the distributions of each sequence's winner. The loss expects an axis of sources in front, which is of length 1."""
    source_ids = np.full((1, B, T, K), -1, np.int32)
    source_logprobs = np.zeros((1, B, T, K), np.float32)
    source_tail = np.zeros((1, B, T), np.float32)
    source_index = np.full(B, -1, np.int64)
    for b, sequence in enumerate(sequences):
        if sequence.winner is None:
            continue
        source_index[b] = 0
        # The entries of all sources lie end to end: keep the winner's, and put each at its position and its place there.
        of_winner = sequence.row_source == sequence.winner
        row, slot = slots_of(sequence.entry_offsets)
        kept = of_winner[row]
        position, slot = sequence.row_position[row[kept]], slot[kept]
        source_ids[0, b, position, slot] = sequence.entry_ids[kept]
        source_logprobs[0, b, position, slot] = sequence.entry_logprobs[kept]
        source_tail[0, b, sequence.row_position[of_winner]] = sequence.row_tail[of_winner]
    return {
        "source_ids": source_ids,
        "source_logprobs": source_logprobs,
        "source_tail": source_tail,
        "source_index": source_index,
    }
