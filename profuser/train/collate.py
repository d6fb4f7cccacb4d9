"""Puts sequences of a store together as one rectangular batch for FusionModel, padded or packed.

Where the source of every sequence is chosen, this is done before anything is padded: the batch holds the winner's distributions
alone, (1, B, T, K), however many sources there are. Where sources are mixed it holds those of all.
Letters: S sources, B rows, T tokens of a row, K kept entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from profuser.kernels.common import IGNORE_INDEX
from profuser.ragged import slots_of
from profuser.recipe.schedule import Mode
from profuser.train.packing import Layout
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
        pad_id: the id of the padding in input_ids. top_k: K, the most entries that a distribution can have.
        layout: with "padded" every row must hold one sequence, and the batch has an attention_mask. Else it has position_ids
            that begin anew with every sequence, which keep them apart. Padding is at position 0, because it can be longer than
            any sequence, and the longest position decides about some models' frequencies.
        mixing: the temperature at which the sources are weighed by their cross-entropy; None chooses the one where it is lowest, unless
            the sequences say how much each source counts.

    Returns:
        input_ids, labels (B, T) int64 and ce_weight, kd_weight (B, T) fp32; attention_mask or position_ids (B, T) int64. Unless
        all of `kd_weight` is 0 there are also source_ids (1, B, T, K) int32, where -1 is padding, source_logprobs (1, B, T, K)
        fp32 at temperature 1, and source_tail (1, B, T) fp32; where sources are mixed the first axis is S, and there is source_weight
        (S, B, T) fp32. Where no source takes part there are no entries. With "flat"
        cu_seq_lens_q, cu_seq_lens_k (n + 1,) int32 and max_length_q, max_length_k () are what flash-attention takes.
    """
    lengths = [[len(sequence.input_ids) for sequence in row] for row in rows]
    shape = len(rows), max(map(sum, lengths))
    input_ids = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, IGNORE_INDEX, np.int64)
    weights = np.zeros((2, *shape), np.float32)
    for b, place, sequence in placed(rows):
        input_ids[b, place] = sequence.input_ids
        labels[b, place][sequence.label_mask] = sequence.input_ids[sequence.label_mask]
        weights[:, b, place] = [[ce_weight[sequence.mode]], [kd_weight[sequence.mode]]]
    batch = {"input_ids": input_ids, "labels": labels, "ce_weight": weights[0], "kd_weight": weights[1]}
    if layout == "padded":
        batch["attention_mask"] = (np.arange(shape[1]) < [[length] for (length,) in lengths]).astype(np.int64)
    else:
        batch["position_ids"] = np.zeros(shape, np.int64)
        for b, place, sequence in placed(rows):
            batch["position_ids"][b, place] = np.arange(len(sequence.input_ids))
    if layout == "flat":
        bounds = np.cumsum([0, *lengths[0]], dtype=np.int32)
        longest = np.int64(max(lengths[0]))
        batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    if any(kd_weight.values()):
        batch |= sources_of(rows, *shape, top_k, mixing)
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


def placed(rows: Sequence[Sequence[TargetSequence]]) -> Iterator[tuple[int, slice, TargetSequence]]:
    """Goes through the sequences of a batch with the row and the place in it that each of them has."""
    for b, row in enumerate(rows):
        begin = 0
        for sequence in row:
            yield b, slice(begin, begin := begin + len(sequence.input_ids)), sequence
