"""A chunk's backward products without its lightest columns, in whose place a rank-one matrix stands.

Apart from the lifted entries, row n of a chunk's gradient is c_n·e_n: a number, of either sign, times exponentials. The columns of
least mass Σ_n |c_n| e_nj that hold a share of the chunk's mass are left out together. The stand-in c_n·T_n·r_j takes their place,
with T_n = Σ_j e_nj over these columns, and r_j the column's share of their mass. It keeps every row's sum, and its products
are a vector times the head, and outer products that are gathered over chunks into one thin product. Columns with a lifted entry are
never left out. Where too many columns would be kept, the chunk is computed as a whole. left_out_capped.py keeps a number of columns that
is given instead, of which the host need know nothing more.

README.md derives it, with the bound on the error of hidden's gradient.
Dimension letters: C rows of a chunk, D hidden, V vocabulary, k columns that are kept, P pairs of exponentials and numbers (1, or 2
where T ≠ 1), s columns of the sketch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .chunk_gradient import ChunkGradient
from .common import product_into
from .fused_loss_types import Options
from .head import ChunkedHead

STATISTICS = ("left_out_share", "kept_share", "hidden_error_bound", "columns_needed")
"""What is said of it: the share of the mass that was left out, that of the columns that were kept, the bound, and the largest number of
columns that a chunk has to keep if no more than `left_out` shall be left out."""

PAYS = 0.7
"""The largest share of kept columns that is computed without the others: gathering them costs time, too."""
BLOCK = 4096
"""How many kept columns are multiplied at a time: their rows of the head are gathered, which must not make a second head."""
GATHERED = 32
"""How many stand-ins are multiplied at a time. Each is held as (V,) numbers until then."""

SCALE = 1024
"""What a column's share is multiplied by before it is rounded to the dtype of a product: fp16 has no digits left for one of 1e-6."""

SKETCH = 16
"""How many random directions the error is measured along."""
TAIL_OF_SKETCH = 0.05
"""The share δ of its mean that the sketch falls short of with a probability of at most (δ·e^(1 − δ))^(SKETCH / 2) = 8e-8."""


def nothing_left_out(like: Tensor) -> Tensor:
    """The statistics (4,) where nothing was left out, in the dtype and on the device of `like`."""
    statistics = like.new_zeros(len(STATISTICS))
    statistics[1].fill_(1)
    return statistics


class Chosen(NamedTuple):
    """The columns of a chunk that are kept."""

    kept: Tensor  # (k,) int64, ascending
    place: Tensor  # (V,) int64: where a kept column stands among those; of the others anything
    left: Tensor  # (V, 1): 1 in the columns that are left out, else 0
    shares: Tensor  # (P, V), the stand-in's r; 0 in the kept columns


class StandIn(NamedTuple):
    """What is left to multiply of a chunk's stand-in T·r, for one of the P."""

    at: slice | Tensor  # which rows of all
    of_row: Tensor  # (C, 1), c_n·T_n
    pulled: Tensor  # (D,), Σ_n c_n·T_n·h_n


class LeftOutColumns:
    """What becomes of the columns that are left out: their stand-ins, what label smoothing takes from all alike, and the error."""

    def __init__(self, head: ChunkedHead, options: Options, dhidden: Tensor, dweight: Tensor, dbias: Tensor):
        self.head, self.options = head, options
        self.dhidden, self.dweight, self.dbias = dhidden, dweight, dbias
        self.vocabulary, self.width = head.weight.shape
        self.dtype = dhidden.dtype
        self.stand_ins: list[StandIn] = []
        self.shares: list[Tensor] = []
        self.head_sum: Tensor | None = None  # (1, D), the sum of the head's rows, for label smoothing
        self.even_pulled = head.weight.new_zeros(1, self.width, dtype=self.dtype)
        self.even_total = head.weight.new_zeros((), dtype=self.dtype)
        self.head_sketch: Tensor | None = None  # (V, s), the head along random directions
        self.columns = self.columns_kept = 0  # of all rows
        zero = head.weight.new_zeros((), dtype=torch.float64)
        self.mass, self.mass_left_out, self.squares = zero.clone(), zero.clone(), zero.clone()
        self.columns_needed = zero.clone()

    def sketch_without(self, kept: Tensor) -> Tensor | None:
        """The head along random directions (V, s), with zeros for the kept columns; None where the bound is not asked for."""
        if not (self.options.grad_hidden and self.options.left_out_bound):
            return None
        if self.head_sketch is None:
            # The same directions in every call, which do not depend on the operands. Drawn where they are used: to copy them there,
            # the host would have to wait.
            generator = torch.Generator(self.dhidden.device).manual_seed(0)
            directions = torch.randn(self.width, SKETCH, generator=generator, device=self.dhidden.device).to(self.dtype)
            parts = (part for _, weight in self.head.blocks() for part in weight.split(BLOCK))
            self.head_sketch = torch.cat([part.to(self.dtype) @ directions for part in parts])
        return self.head_sketch.index_fill(0, kept, 0)

    def sum_of_head(self) -> Tensor:
        """The sum of the head's rows, (1, D)."""
        if self.head_sum is None:
            parts = [weight.sum(0, keepdim=True, dtype=self.dtype) for _, weight in self.head.blocks()]
            self.head_sum = torch.stack(parts).sum(0)
        return self.head_sum

    def multiply_stand_ins(self) -> None:
        """Adds the products of all stand-ins since the last time, in one pass over the head and one over its gradient."""
        shares = torch.stack(self.shares)
        if self.options.grad_hidden:
            products = shares.new_zeros(len(shares), self.width)
            for columns, weight in self.head.blocks():
                product_into(products, (SCALE * shares[:, columns]).to(weight.dtype), weight, accumulate=True)
            products /= SCALE
            for stand_in, product in zip(self.stand_ins, products, strict=True):
                self.dhidden[stand_in.at] += stand_in.of_row * product
        if self.options.grad_weight:
            self.dweight.addmm_(shares.t(), torch.stack([stand_in.pulled for stand_in in self.stand_ins]))
        self.stand_ins, self.shares = [], []

    def finish(self) -> Tensor:
        """Completes the gradients, and returns the statistics (4,) in the compute dtype."""
        if self.stand_ins:
            self.multiply_stand_ins()
        if self.options.label_smoothing and self.options.grad_weight:
            self.dweight.sub_(self.even_pulled)
        if self.options.label_smoothing and self.options.grad_bias:
            self.dbias.sub_(self.even_total)
        share = torch.where(self.mass == 0, 0, self.mass_left_out / self.mass)
        kept = 1.0 if self.columns == 0 else self.columns_kept / self.columns
        bound = (self.squares / (SKETCH * TAIL_OF_SKETCH)).sqrt()
        return torch.stack([share, torch.full_like(share, kept), bound, self.columns_needed]).to(self.dtype)


class ThinnedProducts(LeftOutColumns):
    """The gradients of the operands, of those chunks in which columns are left out; and what is known of the error."""

    def add(self, at: slice | Tensor, h: Tensor, z: Tensor, exps_T: Tensor | None, gradient: ChunkGradient) -> bool:
        """Adds the gradients of a chunk, whose rows of all are `at`, and says whether it did; else the chunk is to be computed whole.

        h (C, D) are hidden states, and z and `exps_T` (C, V) exponentials, 0 in the lifted columns.
        """
        with torch.autocast(h.device.type, enabled=False):
            return self._add(at, h, z, exps_T, gradient)

    def _add(self, at: slice | Tensor, h: Tensor, z: Tensor, exps_T: Tensor | None, gradient: ChunkGradient) -> bool:
        """What `add` does, where autocast converts nothing."""
        parts = [(z, gradient.dense)]
        if exps_T is not None and gradient.dense_T is not None:
            parts.append((exps_T, gradient.dense_T))
        chosen = self.choose(parts, gradient)
        if chosen is None:
            return False

        # What is left out: its stand-in, and the error of that.
        sketch = self.sketch_without(chosen.kept)
        error = h.new_zeros(())
        for (exps, factor), shares in zip(parts, chosen.shares, strict=True):
            total = exps @ chosen.left
            self.stand_ins.append(StandIn(at, factor * total, ((factor * total).t() @ h)[0]))
            self.shares.append(shares)
            if sketch is not None:
                error = error + factor * (exps @ sketch - total * (shares @ sketch))
            if self.options.grad_bias:
                self.dbias.add_((factor.t() @ exps)[0] * chosen.left[:, 0])
        self.squares += error.square().sum()

        # What is kept: the gradient's columns, side by side.
        kept = chosen.kept
        g = z.index_select(1, kept).mul_(gradient.dense)
        for exps, factor in parts[1:]:
            g.addcmul_(exps.index_select(1, kept), factor)
        lifted = gradient.lifted if gradient.even is None else gradient.lifted + gradient.even
        g.scatter_(1, chosen.place[gradient.columns], lifted)
        dh = h.new_zeros(h.shape) if self.options.grad_hidden else None
        for begin in range(0, kept.shape[0], BLOCK):
            block = slice(begin, begin + BLOCK)
            if dh is not None:
                dh.addmm_(g[:, block], self.head.weight.index_select(0, kept[block]).to(h.dtype))
            if self.options.grad_weight:
                self.dweight.index_add_(0, kept[block], g[:, block].t() @ h)
        if self.options.grad_bias:
            self.dbias.index_add_(0, kept, g.sum(0))

        # Label smoothing's part, alike in all columns.
        if gradient.even is not None:
            self.even_pulled += gradient.even.t() @ h
            self.even_total += gradient.even.sum()
            if dh is not None:
                dh.sub_(gradient.even * self.sum_of_head())
        if dh is not None:
            self.dhidden[at] = dh
        if len(self.stand_ins) >= GATHERED:
            self.multiply_stand_ins()
        return True

    def choose(self, parts: list[tuple[Tensor, Tensor]], gradient: ChunkGradient) -> Chosen | None:
        """The columns to keep; None where those are too many."""
        mass_of_part = gradient.mass
        if mass_of_part is None:
            mass_of_part = torch.cat([factor.abs().t() @ exps for exps, factor in parts])
        mass = mass_of_part.sum(0)
        lifted = gradient.lifted.abs() if gradient.once is None else gradient.lifted.abs() * gradient.once
        total = mass.sum() + lifted.sum()
        self.mass += total
        self.columns += gradient.dense.shape[0] * self.vocabulary
        mass[gradient.columns.flatten()] = torch.inf
        ascending, order = mass.sort()
        # False for NaN, so that a row which is NaN makes its chunk whole, and shows.
        count = int((ascending.cumsum(0) <= self.options.left_out * total).sum())
        self.columns_needed = self.columns_needed.clamp_min(self.vocabulary - count)
        if self.vocabulary - count > PAYS * self.vocabulary:
            self.columns_kept += gradient.dense.shape[0] * self.vocabulary
            return None
        self.columns_kept += gradient.dense.shape[0] * (self.vocabulary - count)
        self.mass_left_out += ascending[:count].sum()
        is_kept = torch.ones_like(mass, dtype=torch.bool)
        is_kept[order[:count]] = False
        left = mass_of_part.masked_fill_(is_kept, 0)
        of_all = left.sum(1, keepdim=True)
        shares = left / of_all.where(of_all > 0, torch.ones_like(of_all))
        return Chosen(is_kept.nonzero()[:, 0], is_kept.cumsum(0) - 1, (~is_kept).to(mass)[:, None], shares)
