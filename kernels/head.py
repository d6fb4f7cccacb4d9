"""The language-model head: the description that both ops share, and its computation for a chunk of rows at a time.

Dimension letters: C rows of a chunk, D hidden, V vocabulary.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .common import product_into

PART = 512
"""How many columns of logits a CPU computes at a time."""


@dataclass(frozen=True, slots=True)
class Head:
    """What turns hidden states into logits: softcap·tanh(logit_scale·(hidden Wᵀ + bias)/softcap).

    Without a softcap the logits are logit_scale·(hidden Wᵀ + bias).
    """

    weight: Tensor
    """(V, D)"""
    bias: Tensor | None = None
    """(V,)"""
    softcap: float | None = None
    logit_scale: float = 1.0


class ChunkedHead:
    """A head that is applied in `dtype` to chunks of at most `chunk` rows.

    A weight of another dtype is converted block by block, so that a second [V, D] copy of it never exists.
    """

    def __init__(self, head: Head, dtype: torch.dtype, chunk: int):
        self.weight, self.softcap, self.logit_scale = head.weight, head.softcap, head.logit_scale
        self.bias = None if head.bias is None else head.bias.to(dtype)
        self.dtype = dtype
        vocabulary, width = head.weight.shape
        if head.weight.dtype == dtype:
            self.block = vocabulary
        else:
            # A converted block takes no more memory than the chunk's logits, but has at least 64 rows: with fewer the
            # matrix product would be slow.
            self.block = min(vocabulary, max(64, chunk * vocabulary // width))

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of the weight in the compute dtype, each with the columns of the logits that it gives."""
        for begin in range(0, self.weight.shape[0], self.block):
            columns = slice(begin, begin + self.block)
            yield columns, self.weight[columns].to(self.dtype)

    def logits_into(self, logits: Tensor, hidden: Tensor, slope: Tensor | None = None) -> Tensor:
        """Writes the logits of `hidden` (C, D) into `logits` (C, V) and returns them.

        `slope` (C, V), where it is given, receives the derivative 1 − tanh² of the softcap. It is computed from the tanh
        itself, because 1 − (logit/softcap)² has lost those digits.
        """
        for columns, weight in self.blocks():
            # With out= and in place, autocast does not convert the operands.
            into = logits[:, columns]
            for part in self.parts(weight.shape[0]):
                torch.mm(hidden, weight[part].t(), out=into[:, part])
        if self.bias is not None:
            logits.add_(self.bias)
        if self.softcap is None:
            return logits if self.logit_scale == 1.0 else logits.mul_(self.logit_scale)
        logits.mul_(self.logit_scale / self.softcap).tanh_()
        if slope is not None:
            torch.mul(logits, logits, out=slope).neg_().add_(1)
        return logits.mul_(self.softcap)

    def parts(self, columns: int) -> list[slice]:
        """The parts of a block whose logits are computed at a time.

        On a CPU a product into so few columns stays in the cache, which takes a tenth of its time away. In fp32 the
        bits were the same where that was measured (AMD EPYC); products of other dtypes are left whole.
        """
        parts = 1 if self.dtype != torch.float32 or self.weight.device.type != "cpu" else max(1, columns // PART)
        bounds = [part * PART for part in range(parts)] + [columns]
        return [slice(begin, end) for begin, end in itertools.pairwise(bounds)]

    def pull_back(self, grad_product: Tensor) -> Tensor:
        """The gradient (C, D) of the hidden states from the gradient (C, V) of hidden Wᵀ + bias."""
        grad = grad_product.new_empty(grad_product.shape[0], self.weight.shape[1])
        for columns, weight in self.blocks():
            product_into(grad, grad_product[:, columns], weight, accumulate=columns.start > 0)
        return grad
