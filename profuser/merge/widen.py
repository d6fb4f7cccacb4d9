"""WIDEN (arXiv 2408.03092): task vectors weighted by how much each column's magnitude and direction change in each model.

A column is the weights that leave one input; its magnitude changes by |‖w‖ - ‖w_0‖|, its direction by 1 - cos(w, w_0). Within a
model both changes are ranked over the columns, as shares in [0, 1), and a softmax over the models turns the ranks into importances.
An importance is 1 where the rank is above the model's mean. A column's weight is the mean of the two. The rows of the input's
embedding, of which each belongs to a token, take the place of columns, and so do the elements of a vector, which are ranked by
|w - w_0|.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from profuser.merge.blocks import Blocks

TINY = 1e-8
"""A column that is shorter has no direction."""


def widen(blocks: Blocks, *, by_row: bool = False) -> Iterator[Tensor]:
    """The base plus the weighted task vectors, as the other methods give it.

    Args:
        by_row: the tensor is a table of token embeddings, whose rows take the place of columns.
    """
    weights, begin = column_weights(changes(blocks, by_row)), 0
    for base, *tensors in blocks:
        merged, end = base.clone(), begin + len(base)
        for of_model, tensor in zip(weights, tensors, strict=True):
            own = of_model if base.dim() > 1 and not by_row else of_model[begin:end]
            merged.addcmul_(own[:, None] if base.dim() > 1 and by_row else own, tensor - base)
        yield merged
        begin = end


def changes(blocks: Blocks, by_row: bool) -> Tensor:
    """Returns how much each of n columns changes in each model, (models, kinds of change, n). Norms are summed in fp64."""
    parts: list[Tensor] = []  # one after the other, or their sum
    for base, *tensors in blocks:
        if base.dim() < 2:
            parts.append(torch.stack([(tensor - base).abs()[None] for tensor in tensors]))
            continue
        w0, dim = base.double(), 1 if by_row else 0
        part = torch.stack([products(w0, tensor.double(), dim) for tensor in tensors])
        if parts and not by_row:
            parts[0] += part
        else:
            parts.append(part)
    found = torch.cat(parts, -1)
    if found.shape[1] == 1:
        return found
    norm0, norm, inner = found.unbind(1)
    norm0, norm = norm0.sqrt(), norm.sqrt()
    cosine = inner / norm0.clamp_min(TINY) / norm.clamp_min(TINY)
    return torch.stack([(norm - norm0).abs(), 1 - cosine], 1)


def products(w0: Tensor, w: Tensor, dim: int) -> Tensor:
    """The inner products of two matrices' columns or rows, each matrix's with itself and then with each other, (3, n)."""
    return torch.stack([(w0 * w0).sum(dim), (w * w).sum(dim), (w * w0).sum(dim)])


def column_weights(changed: Tensor) -> Tensor:
    """The weight of every column in every model, (models, n), from `changes`."""
    n = changed.shape[-1]
    ranks = changed.argsort(stable=True).argsort(stable=True)
    importance = (ranks.double() / n).softmax(0)
    importance[2 * ranks > n - 1] = 1.0  # the mean of the ranks 0 to n - 1 is (n - 1) / 2
    return importance.mean(1)
