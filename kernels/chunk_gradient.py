"""The gradient of a chunk of rows in its logits, before it takes the place of the exponentials that it is made of.

Dimension letters: C rows of a chunk, V vocabulary, L ids that a row's sources name.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ChunkGradient(NamedTuple):
    """In each row a number times exponentials, and something of its own in the few columns that were lifted."""

    dense: Tensor  # (C, 1), of the exponentials at T = 1
    dense_T: Tensor | None  # (C, 1), of those at T, where they have a buffer of their own
    even: Tensor | None  # (C, 1), which label smoothing takes from every column
    columns: Tensor  # (C, L + 1) int64 that were lifted; all slots of one column have the same value
    lifted: Tensor  # (C, L + 1), the gradient there
    once: Tensor | None  # (C, L + 1) bool: one slot for each lifted column; None where each has one slot anyway
    mass: Tensor | None = (
        None  # (P, V), of each column Σ |dense|·e over the rows, at T = 1 and at T; None where it has to be computed
    )

    def write(self, z: Tensor, wide: Tensor, exps_T: Tensor | None, slope: Tensor | None) -> None:
        """Scales the exponentials z (C, V), 0 in the lifted columns, to gradients, and writes those of the lifted ids in their places.

        `wide` and `exps_T` are those of `chunk_losses`. `slope` (C, V) is the derivative of a softcap, None without one.
        """
        if exps_T is not None and self.dense_T is not None:
            exps_T.mul_(self.dense_T)
        z.mul_(self.dense)
        if exps_T is not None:
            z.add_(exps_T)
        if self.even is not None:
            z.sub_(self.even)
        wide.scatter_(1, self.columns, self.lifted)
        if slope is not None:
            z.mul_(slope)

    def through(self, slope: Tensor, z: Tensor, exps_T: Tensor | None) -> ChunkGradient:
        """The same ahead of a softcap whose derivative is `slope` (C, V), by which the exponentials are multiplied in place."""
        for exps in (z, exps_T):
            if exps is not None:
                exps.mul_(slope)
        return self._replace(lifted=self.lifted * slope.gather(1, self.columns), mass=None)
