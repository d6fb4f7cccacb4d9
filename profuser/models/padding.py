"""Pads token sequences of unequal length to one rectangular batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def padded(sequences: Sequence[Sequence[int]], pad_id: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Returns (input_ids, attention_mask), both (B, T) int64, for B sequences of which the longest has T tokens.

    The padding is at the right. `left` puts it at the left, as generation needs it: the model goes on from the last column.
    """
    width = max(map(len, sequences))
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        place = slice(width - len(ids), width) if left else slice(0, len(ids))
        input_ids[row, place] = torch.as_tensor(ids)
        attention_mask[row, place] = 1
    return input_ids, attention_mask
