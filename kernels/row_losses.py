"""The losses of a chunk and their gradient on a CPU, by the C++ extension (`csrc/rows_loss.cpp`), row by row.

A row of logits is read, becomes exponentials, and is scaled to its gradient while it is in the cache. In torch each of these is a pass
through memory, and the few numbers of the lifted columns take some 350 calls, which is what a small vocabulary's time goes to.

Dimension letters: n rows with a label, C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import rows
from .chunk_gradient import ChunkGradient
from .fused_loss_types import Options
from .kept import Kept
from .tails import CONDITIONAL


class RowLosses:
    """What `chunk_losses` does, alone or together with `ChunkGradient.write`, for rows of whole fp32 logits."""

    def __init__(self, gold: Tensor, kept: Kept | None, a: Tensor, b: Tensor, T: float | Tensor, options: Options):
        """Of all rows: labels (n,), the sources' entries, weights (n,) in the gradient, and the temperature, one number or (n, 1)."""
        T_of_row = T[:, 0].double() if isinstance(T, Tensor) else torch.full(gold.shape, T, dtype=torch.float64)
        # NumPy's arrays are sliced in a tenth of the time, which counts where a vocabulary is small.
        self.of_rows = [x.numpy() for x in (gold, a, b, T_of_row)]
        entries = () if kept is None else (kept.ids, kept.inside, kept.p, kept.log_p, kept.weight, kept.apart)
        self.entries = [x.numpy() for x in entries]
        self.once = None if kept is None else torch.nn.functional.pad(kept.apart, (0, 1), value=True)
        self.options = options

    @staticmethod
    def take(logits: Tensor) -> bool:
        """Whether the extension is built and reads such logits."""
        return rows.extension_takes(logits)

    def write(self, chunk: slice, z: Tensor, losses: Tensor, slope: Tensor | None) -> None:
        """Writes some rows' losses into `losses`, (5, C) in the order of `ChunkLosses`, from their logits z (C, V).

        z becomes its gradient where the options ask for one. `slope` (C, V) is the derivative of a softcap, None without one.
        """
        self._call(chunk, z, losses, None)
        if slope is not None and self.options.any_grad:
            z.mul_(slope)

    def parts(
        self, chunk: slice, z: Tensor, losses: Tensor, exps_T: Tensor | None, *, with_mass: bool
    ) -> ChunkGradient:
        """Writes the losses as `write` does, but leaves exponentials in z (C, V) and in `exps_T`, and returns what the gradient is made of.

        Lifted columns have 0 there. `exps_T` (C, V) is None where no row has a temperature other than 1. `with_mass` asks for the
        columns' mass.
        """
        size, V = z.shape
        slots = 1 if self.once is None else self.once.shape[1]
        scalars, lifted = z.new_empty(size, 3), z.new_empty(size, slots)
        columns = torch.empty(size, slots, dtype=torch.int64)
        mass = z.new_empty(1 if exps_T is None else 2, V) if with_mass else None
        written = (scalars, lifted, columns, exps_T, mass)
        self._call(chunk, z, losses, tuple(None if x is None else x.numpy() for x in written))
        dense, dense_T, even = scalars.split(1, 1)
        return ChunkGradient(
            dense,
            None if exps_T is None else dense_T,
            even if self.options.label_smoothing else None,
            columns,
            lifted,
            None if self.once is None else self.once[chunk],
            mass,
        )

    def _call(self, chunk: slice, z: Tensor, losses: Tensor, parts: tuple | None) -> None:
        assert rows._rows is not None
        options = self.options
        gold, a, b, T = (x[chunk] for x in self.of_rows)
        rows._rows.loss_rows(
            z.numpy(),
            gold,
            tuple(x[chunk] for x in self.entries) or None,
            a,
            b,
            T,
            options.divergence,
            options.divergence_beta,
            options.tail == CONDITIONAL,
            options.label_smoothing,
            options.z_loss,
            options.entropies,
            options.any_grad,
            losses.numpy(),
            parts,
            torch.get_num_threads(),
        )
