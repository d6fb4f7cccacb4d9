"""Finds out before anything is prepared whether the target can be trained as the recipe says."""

from __future__ import annotations

import torch

from profuser.recipe.schema import Recipe
from profuser.train.adapter import check_adapter
from profuser.train.compiled import check_compile
from profuser.train.optimizer import check_optimizer
from profuser.train.target import check_loss
from profuser.train.trackers import check_trackers


def check_training(recipe: Recipe, device: torch.device, *, sharded: bool) -> None:
    """Checks target, loss, adapter, optimizer and trackers on the device that will train. It reads no weights.

    Raises:
        ConfigError: the loss, the adapter or the optimizer does not fit the target or the device, one of them cannot be sharded, the target
            cannot be compiled here, or a tracker's package is missing.
        DataError: the target is no model that the fused loss can train.
        ModuleNotFoundError: peft or bitsandbytes is missing.
    """
    check_loss(recipe)
    check_adapter(recipe, device, sharded=sharded)
    check_optimizer(recipe.optim, device, sharded=sharded)
    if recipe.optim.compile:
        check_compile(device, sharded=sharded)
    check_trackers(recipe.optim.trackers)
