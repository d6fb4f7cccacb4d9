"""Puts sequences together as one rectangular batch, padded or packed, and brings it to a model's device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from profuser.models.packing import Layout, S


def batch_of(rows: Sequence[Sequence[S]], pad_id: int, layout: Layout) -> dict[str, np.ndarray]:
    """Returns a batch whose B rows hold sequences end to end and are padded at the right to the T tokens of the longest.

    Args:
        pad_id: the id of the padding in input_ids.
        layout: with "padded" every row must hold one sequence, and the batch has an attention_mask. Else it has position_ids
            that begin anew with every sequence, which keep them apart. Padding is at position 0, because it can be longer than
            any sequence, and the longest position decides about some models' frequencies.

    Returns:
        input_ids and either attention_mask or position_ids, (B, T) int64. With "flat" cu_seq_lens_q, cu_seq_lens_k (n + 1,) int32 and
        max_length_q, max_length_k () are what flash-attention takes.
    """
    lengths = [[len(sequence.input_ids) for sequence in row] for row in rows]
    shape = len(rows), max(map(sum, lengths))
    batch: dict[str, np.ndarray] = {"input_ids": np.full(shape, pad_id, np.int64)}
    for b, place, sequence in placed(rows):
        batch["input_ids"][b, place] = sequence.input_ids
    if layout == "padded":
        batch["attention_mask"] = (np.arange(shape[1]) < [[length] for (length,) in lengths]).astype(np.int64)
        return batch
    batch["position_ids"] = np.zeros(shape, np.int64)
    for b, place, sequence in placed(rows):
        batch["position_ids"][b, place] = np.arange(len(sequence.input_ids))
    if layout == "flat":
        bounds = np.cumsum([0, *lengths[0]], dtype=np.int32)
        longest = np.array(max(lengths[0]))
        batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return batch


def placed(rows: Sequence[Sequence[S]]) -> Iterator[tuple[int, slice, S]]:
    """Goes through the sequences of a batch with the row and the place in it that each of them has."""
    for b, row in enumerate(rows):
        begin = 0
        for sequence in row:
            yield b, slice(begin, begin := begin + len(sequence.input_ids)), sequence


def on_device(batch: Mapping[str, np.ndarray | Tensor], device: torch.device) -> dict[str, Tensor | int]:
    """Returns a batch as a model on this device takes it. Single numbers stay numbers."""
    return {
        name: torch.as_tensor(array).to(device, non_blocking=True) if array.ndim else int(array)
        for name, array in batch.items()
    }
