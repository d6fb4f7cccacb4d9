"""The rows with a label, brought together without waiting for a GPU to count them: the caller has an upper bound of their number.

Dimension letters: N rows, n rows of the bound.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .common import IGNORE_INDEX
from .fused_loss_types import Operands, Options, Outputs, Winner


class Compacted(NamedTuple):
    """Which rows are computed."""

    rows: Tensor  # (n,) int64, those with a label first, each kind in ascending order
    overfull: Tensor  # () bool: more rows have a label than the bound says
    among: int  # N

    @classmethod
    def of(cls, labels: Tensor, bound: int) -> Compacted:
        """The rows of `labels` (N,), of which at most `bound` should have a label."""
        ignored = labels == IGNORE_INDEX
        rows = ignored.to(torch.int8).argsort(stable=True)[: max(bound, 1)]  # one at least, for NaN to come from
        return cls(rows, (~ignored).sum() > bound, labels.shape[0])

    def select(self, operands: Operands, winner: Winner) -> tuple[Operands, Winner]:
        """What these rows have of the operands, and of the choice among the sources. If a row was left out, all become NaN."""
        by_row = {name: getattr(operands, name)[self.rows] for name in ("hidden", "labels", "ce_weight", "kd_weight")}
        if operands.temperature_of_row is not None:
            by_row["temperature_of_row"] = operands.temperature_of_row[self.rows]
        for name in ("ce_weight", "kd_weight"):
            by_row[name] = torch.where(self.overfull, torch.nan, by_row[name])
        sources = {
            name: value[:, self.rows]
            for name in ("source_ids", "source_logprobs", "source_tail")
            if (value := getattr(operands, name)) is not None
        }
        of_row = None if winner.of_row is None else winner.of_row[self.rows]
        weight_of_row = None if winner.weight_of_row is None else winner.weight_of_row[:, self.rows]
        chosen = winner._replace(of_row=of_row, weight_of_row=weight_of_row)
        return operands._replace(**by_row, **sources), chosen

    def expand(self, outputs: Outputs, options: Options) -> Outputs:
        """The outputs of all N rows, with zeros for those that were left out, or NaN if one of them has a label."""
        by_row = ["ce", "kd", "source_mass", "target_mass"]
        by_row += ["source_entropy", "target_entropy"] if options.entropies else []
        by_row += ["loss"] if options.per_row else []
        by_row += ["dhidden"] if options.grad_hidden else []
        return outputs._replace(**{name: self._of_all_rows(getattr(outputs, name)) for name in by_row})

    def _of_all_rows(self, value: Tensor) -> Tensor:
        absent = torch.where(self.overfull, torch.nan, 0.0).to(value.dtype)
        return absent.expand(self.among, *value.shape[1:]).index_copy(0, self.rows, value)
