"""The losses of one optimizer step: added up by mode, and traced to the sequence that is to blame where one is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from profuser.errors import NonFiniteError
from profuser.recipe.schedule import Mode, Stage
from profuser.train.steps import MicroBatch, Origin, StepBatch


@dataclass(frozen=True, slots=True)
class SequenceLosses:
    """What each token of a step adds to the losses on this rank, left on the device.

    origins: where each sequence comes from. sequences: one tensor per forward pass with the sequence of each token, -1 for padding,
    (N,) int64. ce, kd: alike, with what the tokens add, (N,).
    """

    origins: list[Origin] = field(default_factory=list)
    sequences: list[Tensor] = field(default_factory=list)
    ce: list[Tensor] = field(default_factory=list)
    kd: list[Tensor] = field(default_factory=list)

    def add(self, micro: MicroBatch, ce: Tensor, kd: Tensor) -> None:
        """Adds a forward pass. `ce` and `kd` hold one value per token that is predicted, (B * (T - 1),)."""
        of_token = torch.from_numpy(micro.sequence_of_token())
        of_token = torch.where(of_token >= 0, of_token + len(self.origins), -1)
        self.origins.extend(micro.origins)
        self.sequences.append(of_token.to(ce.device, non_blocking=True))
        self.ce.append(ce)
        self.kd.append(kd)

    def by_mode(self) -> Tensor:
        """Returns the sums of ce and of kd by mode, (2, modes) fp64."""
        both = torch.stack([torch.cat(self.ce), torch.cat(self.kd)]).double()
        # The last one stands for padding, to which the number -1 leads.
        modes = torch.tensor([*(origin.mode for origin in self.origins), -1], device=both.device)
        mode = modes[torch.cat(self.sequences)]
        return torch.stack([both.where(mode == number, 0).sum(1) for number in Mode], 1)

    def not_finite(self, step: int) -> NonFiniteError:
        """Returns the error that names the first sequence whose loss is not finite."""
        at = f"at step {step + 1}"
        for name, values in (("ce", self.ce), ("kd", self.kd)):
            bad = torch.cat(self.sequences)[~torch.cat(values).isfinite()]
            for origin in (self.origins[number] for number in bad[:1].tolist()):
                return NonFiniteError(
                    f"the loss must be finite, {name} is not {at}: training example {origin.example}, {origin.mode.key} "
                    f"mode, source {origin.source}; lower optim.lr, or look at that example in the store's samples.parquet"
                )
        return NonFiniteError(f"the loss must be finite, another process's is not {at}; its message names the example")


def step_losses(sums: Sequence[float], batch: StepBatch, stage: Stage) -> dict[str, float]:
    """Returns the mean losses of a step's label tokens by mode, and the weighted sum that was optimised.

    z-loss and label smoothing are left out of all of them, so that runs with and without can be compared.

    Args:
        sums: the sum of ce for each mode, then the sum of kd for each mode, over all ranks.
    """
    metrics, loss = {}, 0.0
    for mode, count in batch.labels.items():
        if count:
            ce, kd = sums[mode] / count, sums[len(Mode) + mode] / count
            metrics |= {f"ce_{mode.key}": ce, f"kd_{mode.key}": kd, f"loss_{mode.key}": ce + stage.beta * kd}
            loss += stage.weight(mode) * (ce + stage.beta * kd)
    return {"loss": loss, **metrics}
