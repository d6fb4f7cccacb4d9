"""Puts sequences of a store together as one rectangular batch for FusionModel, padded or packed.

Where the source of every sequence is chosen, this is done before anything is padded: the batch holds the winner's distributions
alone, (1, B, T, K), however many sources there are. Where sources are mixed it holds those of all.
Letters: S sources, B rows, T tokens of a row, K kept entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from profuser.kernels.common import IGNORE_INDEX
from profuser.models.batch import batch_of, placed
from profuser.models.packing import Layout
from profuser.ragged import slots_of
from profuser.recipe.schedule import Mode
from profuser.train.targets import TargetSequence

Weights = Mapping[Mode, float]
"""The weight of a label token, by the mode of its sequence."""


def collate(
    rows: Sequence[Sequence[TargetSequence]],
    ce_weight: Weights,
    kd_weight: Weights,
    pad_id: int,
    top_k: int,
    layout: Layout = "padded",
    mixing: float | None = None,
) -> dict[str, np.ndarray]:
    """Returns a batch whose rows hold sequences end to end and are padded at the right.

    In every array with an axis of tokens, the place (b, t) is about the token that stands there itself. FusionModel shifts the
    arrays against the hidden states.

    Args:
        pad_id, layout: as in batch_of. top_k: K, the most entries that a distribution can have.
        mixing: the temperature at which the sources are weighed by their cross-entropy; None chooses the one where it is lowest, unless
            the sequences say how much each source counts.

    Returns:
        What batch_of returns, and labels (B, T) int64, ce_weight, kd_weight (B, T) fp32. Unless all of `kd_weight` is 0 there are
        also source_ids (1, B, T, K) int32, where -1 is padding, source_logprobs (1, B, T, K) fp32 at temperature 1, and source_tail
        (1, B, T) fp32; where sources are mixed the first axis is S, and there is source_weight (S, B, T) fp32. Where no source takes
        part there are no entries.
    """
    batch = batch_of(rows, pad_id, layout)
    B, T = shape = batch["input_ids"].shape
    labels = np.full(shape, IGNORE_INDEX, np.int64)
    weights = np.zeros((2, *shape), np.float32)
    for b, place, sequence in placed(rows):
        labels[b, place][sequence.label_mask] = sequence.input_ids[sequence.label_mask]
        weights[:, b, place] = [[ce_weight[sequence.mode]], [kd_weight[sequence.mode]]]
    batch |= {"labels": labels, "ce_weight": weights[0], "kd_weight": weights[1]}
    if any(kd_weight.values()):
        batch |= sources_of(rows, B, T, top_k, mixing)
    return batch


def sources_of(
    rows: Sequence[Sequence[TargetSequence]], B: int, T: int, K: int, mixing: float | None
) -> dict[str, np.ndarray]:
    """Returns the distributions of each sequence's winner, or of all its sources and their weights, as `collate` describes."""
    mixed = rows[0][0].weights(mixing) is not None
    S = len(rows[0][0].source_ce) if mixed else 1
    source_ids = np.full((S, B, T, K), -1, np.int32)
    source_logprobs = np.zeros((S, B, T, K), np.float32)
    source_tail = np.zeros((S, B, T), np.float32)
    source_weight = np.zeros((S, B, T), np.float32)
    for b, place, sequence in placed(rows):
        if sequence.winner is None:
            continue
        # The entries of all sources lie end to end: put each at its source, its position and its place there.
        if (weights := sequence.weights(mixing)) is None:
            kept_rows, axis = sequence.row_source == sequence.winner, np.zeros_like(sequence.row_source)
        else:
            source_weight[:, b, place] = weights[:, None]
            kept_rows, axis = weights[sequence.row_source] > 0, sequence.row_source
        row, slot = slots_of(sequence.entry_offsets)
        kept = kept_rows[row]
        source, position, slot = axis[row[kept]], place.start + sequence.row_position[row[kept]], slot[kept]
        source_ids[source, b, position, slot] = sequence.entry_ids[kept]
        source_logprobs[source, b, position, slot] = sequence.entry_logprobs[kept]
        source_tail[axis[kept_rows], b, place.start + sequence.row_position[kept_rows]] = sequence.row_tail[kept_rows]
    found = {"source_ids": source_ids, "source_logprobs": source_logprobs, "source_tail": source_tail}
    return found | {"source_weight": source_weight} if mixed else found
