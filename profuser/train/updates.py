"""The optimizer steps of a target that one process holds, that DDP copies to each process, or that FSDP2 divides among them.

`profuser.train.zero` has the same for a target that DeepSpeed divides.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.utils import clip_grads_with_norm_
from transformers import PreTrainedModel

from profuser.fusion_model import FusionModel
from profuser.recipe.optim import OptimConfig
from profuser.train import zero
from profuser.train.optimizer import make_optimizer
from profuser.train.sharding import whole


class Updates(Protocol):
    """What changes a target's weights.

    optimizer: what holds AdamW's moments. Its param_groups say the learning rate of the next update.
    """

    optimizer: torch.optim.Optimizer

    def run(self, inputs: dict[str, Any], *, last: bool) -> dict[str, Tensor]:
        """Does a forward and a backward pass, whose gradients are added to those of the passes before it.

        Args:
            inputs: what FusionModel.forward takes. last: whether it is the last pass before `update`.
        Returns:
            what FusionModel.forward returned.
        """
        ...

    def update(self) -> float:
        """Clips the gradient, changes the weights, and forgets the gradient.

        Returns:
            the norm of the gradient before it was clipped. If it is not finite, the weights are left as they were.
        """
        ...


class OwnUpdates:
    """The updates of one process, under DDP, or under FSDP2 if the target is `sharded`."""

    def __init__(
        self,
        fusion: FusionModel,
        optimizer: torch.optim.Optimizer,
        grad_clip: float,
        accelerator: Accelerator,
        *,
        sharded: bool,
    ):
        self.fusion, self.accelerator, self.sharded, self.grad_clip = fusion, accelerator, sharded, grad_clip
        self.model, self.optimizer = (fusion, optimizer) if sharded else accelerator.prepare(fusion, optimizer)

    def run(self, inputs: dict[str, Any], *, last: bool) -> dict[str, Tensor]:
        # Only in the last pass does DDP exchange the gradients between the ranks; a sharded model adds them up in every pass, because
        # no rank has room for all of them.
        exchanged = last or self.sharded
        with contextlib.nullcontext() if exchanged else self.accelerator.no_sync(self.model):
            out = self.model(**inputs)
            self.accelerator.backward(out["loss"])
        return out

    def update(self) -> float:
        parameters = list(self.fusion.parameters())
        of_all = gradient_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        clip_grads_with_norm_(parameters, self.grad_clip, of_all.float())
        norm = float(of_all)
        if math.isfinite(norm):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return norm


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Returns the norm of all gradients together, fp64, the same on all processes if they are divided.

    Only a row is added up in fp32. torch's own norm adds up a whole tensor so on a CPU, which for the 28 million numbers of an embedding
    is wrong by 0.15 %, and for half of them by less: how far a gradient is clipped would depend on how the target is divided.
    """
    of_tensors = [vector_norm(vector_norm(gradient, dim=-1).double()) for gradient in gradients]
    return whole(vector_norm(torch.stack(of_tensors)))


def make_updates(
    fusion: FusionModel, loaded: PreTrainedModel | None, optim: OptimConfig, accelerator: Accelerator, *, sharded: bool
) -> Updates:
    """Returns the updates of a target in the way that the launcher asks for.

    `fusion` and `loaded` are what `load_target` has returned.
    """
    optimizer = make_optimizer(fusion, optim)
    if zero.is_asked_for():
        return zero.ZeroUpdates(fusion, loaded, optimizer, optim.grad_clip, accelerator)
    return OwnUpdates(fusion, optimizer, optim.grad_clip, accelerator, sharded=sharded)
