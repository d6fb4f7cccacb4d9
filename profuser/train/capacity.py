"""Chooses how many columns the loss keeps in its backward products on a GPU, from what the steps before have needed.

How many columns hold all but the share optim.left_out of a gradient depends on data, and a GPU would have to be waited for. The loss
therefore takes the number as an argument, `left_out_capacity`, and says how many would have been enough (kernels/README.md, "A
capacity"). Here each optimizer step sets the number of the next one. It goes up at once and down slowly, in steps of a 32nd of the
vocabulary, so that the sizes of matrices seldom change. Where it would come to most of the vocabulary, gathering the columns costs more
than it saves: then the gradient is exact, and every now and then a step keeps all columns and counts those that it needed.

The numbers follow from the statistics alone, and are part of a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from profuser.kernels.common import choose_impl
from profuser.kernels.left_out import PAYS
from profuser.kernels.left_out_capped import least_capacity
from profuser.train.steps import MicroBatch

MARGIN = 1 / 8
"""How many more columns are kept than were needed, as a share of those."""
SIZES, ALIGNED = 32, 128
"""There are about so many different capacities, all multiples of so many columns."""
PATIENCE = 8
"""The capacity goes down when a smaller one would have been enough in so many steps in a row."""
EXACT_STEPS = 50
"""So many exact steps come between two that count their columns."""


def is_chosen_on(device: torch.device) -> bool:
    """Whether the capacity is chosen ahead. A CPU need not be waited for: there the loss keeps what each chunk of rows needs."""
    return device.type == "cuda"


@dataclass(slots=True)
class Capacity:
    """How many columns each chunk of rows keeps in the next optimizer step, and what decides when that changes.

    vocabulary, width: the rows and columns of the head.
    columns: the capacity; the whole vocabulary at first. It pays unless it is most of that.
    fewer, enough: in how many steps in a row a smaller one would have been enough, and the largest of these smaller ones.
    exact_steps: how many exact steps are still to come before the next one that counts its columns, while the capacity does not pay.
    """

    vocabulary: int
    width: int
    columns: int = 0
    fewer: int = 0
    enough: int = 0
    exact_steps: int = 0

    def __post_init__(self) -> None:
        self.columns = self.columns or self.vocabulary

    @property
    def state(self) -> dict[str, int]:
        """What a checkpoint keeps, and `restore` takes."""
        return {name: getattr(self, name) for name in STATE}

    def restore(self, state: dict[str, int] | None) -> None:
        """Goes on from the state of a checkpoint, or begins where that has none, because it was made on a CPU."""
        begun = Capacity(self.vocabulary, self.width).state if state is None else state
        for name in STATE:
            setattr(self, name, begun[name])

    def options(self, share: float, micro: MicroBatch, device: torch.device) -> dict[str, Any]:
        """What the loss is told for one forward pass in training: how many columns it keeps, or that it leaves none out.

        A pass may need more than the capacity, because the loss never leaves out a column that can have a label or a kept id.

        Args:
            share: optim.left_out.
        """
        least = least_capacity(
            choose_impl(None, device, None), micro.label_rows, self.vocabulary, self.width, entries=micro.entries
        )
        columns = self.of_pass(least)
        return {"left_out": 0.0 if columns is None else share, "left_out_capacity": columns}

    def of_pass(self, least: int) -> int | None:
        """The columns that a pass keeps which must keep `least` of them; None where it is to be exact."""
        if self._pays(self.columns):
            columns = max(self.columns, self._rounded(least))
            return columns if self._pays(columns) else None
        return self.vocabulary if self.exact_steps == 0 else None

    def update(self, needed: int) -> None:
        """Takes an optimizer step into account.

        Args:
            needed: the largest `columns_needed` of the step, over all forward passes and ranks; 0 where all passes were exact.
        """
        if needed == 0:
            self.exact_steps = max(self.exact_steps - 1, 0)
            return
        wanted = self._rounded(math.ceil(needed * (1 + MARGIN)))
        if self._pays(self.columns) and wanted < self.columns:
            self.fewer, self.enough = self.fewer + 1, max(self.enough, wanted)
            if self.fewer < PATIENCE:
                return
            wanted = self.enough
        self.columns, self.fewer, self.enough = wanted, 0, 0
        self.exact_steps = 0 if self._pays(wanted) else EXACT_STEPS

    def _rounded(self, columns: int) -> int:
        step = math.ceil(self.vocabulary / (SIZES * ALIGNED)) * ALIGNED
        return min(math.ceil(columns / step) * step, self.vocabulary)

    def _pays(self, columns: int) -> bool:
        return columns <= PAYS * self.vocabulary


STATE = ("columns", "fewer", "enough", "exact_steps")
"""The names of the numbers that change."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What the forward passes of a step on one rank say of the columns that they left out, on the device.

    passes: (3,) fp64 for each pass with a label: the share of the gradient that was left out, the share of the columns that were kept,
    and the number that was needed.
    """

    device: torch.device
    passes: list[Tensor] = field(default_factory=list)

    def add(self, micro: MicroBatch, out: dict[str, Tensor]) -> None:
        """Adds a forward pass, of which `out` is what the model returned."""
        if not micro.label_rows:
            return
        if "columns_needed" in out:
            said = torch.stack([out[name] for name in ("left_out_share", "kept_share", "columns_needed")]).double()
        else:  # an exact one
            said = torch.zeros(3, dtype=torch.float64, device=self.device)
            said[1].fill_(1)
        self.passes.append(said)

    def largest(self) -> Tensor:
        """Returns the largest of each over the passes, (3,) fp64; zeros where no pass had a label."""
        return torch.stack([torch.zeros(3, dtype=torch.float64, device=self.device), *self.passes]).amax(0)


def left_out_metrics(largest: Sequence[float]) -> dict[str, float]:
    """Returns the metrics of a step from its `largest`, over all ranks."""
    return dict(zip(("left_out_share", "kept_share"), largest))
