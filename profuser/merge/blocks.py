"""One parameter of all models, read a block of rows at a time, so that memory holds some blocks and never a whole tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 18
"""A block has so many elements, or one row where a row has more. They fit into a core's cache."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """The tensors of one parameter in all models. Iterating, as often as one likes, gives the next rows of all of them.

    A block is a matrix whose rows are those of the first dimension, or a vector where the parameter is one, and is fp32, or fp64
    where a tensor is. It may share memory with its tensor: it is for reading.

    tensors: the parameter in every model, as stored; tensors that are mapped from a file take no memory of their own.
    rows: for every model which of its rows stands beside each row of the first tensor, -1 for none, which gives the first tensor's
        own row; None where the rows are the same.
    """

    tensors: Sequence[Tensor]
    rows: Sequence[Tensor | None]

    def __iter__(self) -> Iterator[list[Tensor]]:
        dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in self.tensors) else torch.float32
        first, *others = (t.flatten(1) if t.dim() > 1 else t.reshape(-1) for t in self.tensors)
        step = max(1, BLOCK // max(1, first[:1].numel()))
        for begin in range(0, len(first), step):
            at = slice(begin, begin + step)
            block = first[at].to(dtype)
            yield [block, *(beside(block, other, rows, at) for other, rows in zip(others, self.rows[1:], strict=True))]


def beside(first: Tensor, tensor: Tensor, rows: Tensor | None, at: slice) -> Tensor:
    """The rows of a tensor that stand beside a block of the first one, at a slice of its rows."""
    if rows is None:
        return tensor[at].to(first.dtype)
    found = rows[at]
    return torch.where(found[:, None] >= 0, tensor[found.clamp_min(0)].to(first.dtype), first)
