"""A chunk's backward products from a number of its columns that is given, without reading back which ones they are.

left_out.py keeps as many columns as a share of the mass needs, for which the host has to know their number. Here it is an argument, so
that no shape depends on data and nothing waits for a GPU. The columns are chosen, and the stand-in is made, from the gradient G
as it was written: kept are the columns of greatest mass Σ_n |G_nj|, those with a lifted entry before all others. In place of the
others stands t_n·r_j, with t_n = Σ_j G_nj over them, and r_j the column's share of their mass. Where T = 1 the entries of a row that
were not lifted have one sign, and this is the stand-in of left_out.py; where T ≠ 1 there is one for both exponentials.

Dimension letters: C rows of a chunk, D hidden, V vocabulary, k columns that are kept, L slots of a row's lifted ids, s columns of the
sketch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .common import chunk_rows, chunk_rows_gpu, product_into
from .fused_loss_types import Options
from .left_out import GATHERED, LeftOutColumns, StandIn

BLOCK = 16384
"""How many kept columns are multiplied at a time: their rows of the head are gathered, which must not make a second head."""
STEPS = 1 << 40
"""What the whole mass of a chunk is where shares of it are integers."""
ALIGNED = 8
"""Matrices that are multiplied have a multiple of so many columns."""


def lifted_at_most(rows: int, slots: int, vocabulary: int) -> int:
    """How many columns can have a lifted entry in a chunk of `rows` rows with `slots` kept ids and label each."""
    return min(rows * slots, vocabulary)


def least_capacity(impl: str, rows: int, vocabulary: int, width: int, *, entries: int) -> int:
    """The smallest `left_out_capacity` that the loss takes for so many rows with a label, where it chooses the chunks itself.

    Args:
        impl: "torch" or "triton". width: D. entries: how many ids the sources of a row have kept together, at most.
    """
    if impl == "triton":
        chunk = chunk_rows_gpu(rows, vocabulary, width)
    else:
        chunk = chunk_rows(rows, vocabulary, 4)
    return lifted_at_most(chunk, entries + 1, vocabulary)


def check_capacity(options: Options, rows: int, slots: int, vocabulary: int) -> None:
    """Raises ValueError unless all lifted entries of a chunk of `rows` rows find a place among the kept columns."""
    capacity = options.left_out_capacity
    assert capacity is not None
    if capacity < lifted_at_most(rows, slots, vocabulary):
        raise ValueError(
            f"left_out_capacity must be at least rows of a chunk x kept ids and label = {rows} x {slots}, because those are never left "
            f"out, got {capacity}; raise it, or lower chunk_size"
        )


class CappedProducts(LeftOutColumns):
    """The gradients of the operands from `left_out_capacity` columns of each chunk and a stand-in; and what is known of the error."""

    def add(self, at: slice | Tensor, h: Tensor, grad: Tensor, lifted: Tensor, even: Tensor | None) -> None:
        """Adds the gradients of a chunk, whose rows of all are `at`.

        h (C, D) are hidden states and grad (C, V) is the gradient in the logits, both in the dtype of the products. `lifted` (C, L)
        holds the columns with a lifted entry, -1 for none. `even` (C, 1) is what label smoothing takes from every column; it is not
        yet in grad.
        """
        with torch.autocast(h.device.type, enabled=False):
            self._add(at, h, grad, lifted, even)

    def _add(self, at: slice | Tensor, h: Tensor, grad: Tensor, lifted: Tensor, even: Tensor | None) -> None:
        """What `add` does, where autocast converts nothing."""
        kept, light, shares = self.choose(grad, lifted)

        # What is left out: its stand-in, and the error of that.
        sketch = self.sketch_without(kept)
        along = light[:, None] if sketch is None else torch.cat([light[:, None], sketch], 1)
        along = torch.nn.functional.pad(along, (0, -along.shape[1] % ALIGNED)).to(grad.dtype)
        sums = grad.new_empty(grad.shape[0], along.shape[1], dtype=self.dtype)
        product_into(sums, grad, along)
        total = sums[:, :1]
        self.stand_ins.append(StandIn(at, total, (total.t() @ h.to(self.dtype))[0]))
        self.shares.append(shares[0])
        if sketch is not None:
            of_sketch = along[:, 1 : 1 + sketch.shape[1]].to(self.dtype)  # as the product took it
            error = sums[:, 1 : 1 + sketch.shape[1]] - total * (shares @ of_sketch)
            self.squares += error.square().sum()

        # What is kept: the gradient's columns, side by side.
        dh = h.new_zeros(h.shape, dtype=self.dtype)
        for columns in kept.split(BLOCK):
            g = grad.index_select(1, columns)
            if self.options.grad_hidden:
                product_into(dh, g, self.head.weight.index_select(0, columns).to(g.dtype), accumulate=True)
            if self.options.grad_weight:
                dw = g.new_empty(g.shape[1], self.width, dtype=self.dtype)
                product_into(dw, g.t(), h)
                self.dweight.index_add_(0, columns, dw)
        if self.options.grad_bias:
            self.dbias.add_(grad.sum(0, dtype=self.dtype))

        # Label smoothing's part, alike in all columns.
        if even is not None:
            self.even_pulled += even.t() @ h.to(self.dtype)
            self.even_total += even.sum()
            if self.options.grad_hidden:
                dh -= even * self.sum_of_head()
        if self.options.grad_hidden:
            self.dhidden[at] = dh
        if len(self.stand_ins) >= GATHERED:
            self.multiply_stand_ins()

    def choose(self, grad: Tensor, lifted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The kept columns (k,), ascending; 1 in the columns that are left out, else 0, (V,); and the stand-in's r, (1, V)."""
        assert self.options.left_out_capacity is not None
        count = max(self.vocabulary - self.options.left_out_capacity, 0)
        mass = torch.linalg.vector_norm(grad, 1, 0, dtype=self.dtype)
        total = mass.sum()
        # One column more, for the slots without an entry.
        ranked = torch.nn.functional.pad(mass, (0, 1))
        ranked.index_fill_(0, torch.where(lifted >= 0, lifted, self.vocabulary).flatten().long(), torch.inf)
        ascending, order = ranked[:-1].sort(stable=True)
        # Cumulated as integers, because torch calls a sum of floats on a GPU not deterministic. A NaN or a lifted entry is too large.
        shares = (ascending / total.where(total != 0, torch.ones_like(total))).nan_to_num(nan=2.0, posinf=2.0)
        light_enough = (shares.double() * STEPS).long().cumsum(0) <= int(self.options.left_out * STEPS)
        needed = self.vocabulary - light_enough.sum()
        kept = order[count:].sort().values
        light = torch.ones_like(mass).index_fill_(0, kept, 0)
        left = (mass * light)[None]
        of_all = left.sum()
        self.mass += total
        self.mass_left_out += of_all
        self.columns_needed = torch.maximum(self.columns_needed, needed.to(self.columns_needed.dtype))
        self.columns += grad.shape[0] * self.vocabulary
        self.columns_kept += grad.shape[0] * (self.vocabulary - count)
        return kept, light, left / of_all.where(of_all > 0, torch.ones_like(of_all))
