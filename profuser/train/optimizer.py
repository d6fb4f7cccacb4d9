"""Makes the optimizer: AdamW with its moments in fp32, or in 8 bits (arXiv 2110.02861) by the package bitsandbytes.

In 8 bits a block of 256 moments has one scale in fp32. Tensors of fewer than 4096 numbers keep theirs in fp32, as bitsandbytes has it.
So do embeddings, whose gradients differ most from row to row: the paper found training to be unstable otherwise, and Hugging Face's
Trainer does the same. Each number goes with its block, so that these moments are not divided among processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from profuser.errors import ConfigError
from profuser.recipe.optim import EIGHT_BIT, OptimConfig
from profuser.train.tried import must_work
from profuser.train.zero import shape_of

FEWEST = 4096
"""A tensor of fewer numbers has no moments in 8 bits."""
MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")
"""What an optimizer keeps of a parameter beside its count of steps: torch's two moments; or those of bitsandbytes and, in 8 bits, their
scales."""


def check_optimizer(optim: OptimConfig, device: torch.device, *, sharded: bool) -> None:
    """Finds out before anything is prepared whether the recipe's optimizer works here, with a small tensor.

    Raises:
        ConfigError: bitsandbytes does not work on this device; or the target is to be sharded.
        ModuleNotFoundError: bitsandbytes is missing.
    """
    if optim.name != EIGHT_BIT:
        return
    if sharded:
        raise ConfigError(
            f"optim.name: {EIGHT_BIT} must not be sharded, got a launcher that asks for FSDP or DeepSpeed; launch with torchrun or "
            "--multi_gpu, or leave optim.name out"
        )
    import bitsandbytes

    with must_work(f"optim.name: {EIGHT_BIT}", device):
        parameter = nn.Parameter(torch.ones(FEWEST, device=device))
        parameter.grad = torch.ones_like(parameter)
        bitsandbytes.optim.AdamW8bit([parameter]).step()


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Returns the optimizer that the recipe names, for the parameters of a model that are trained."""
    groups = parameter_groups(model, optim.weight_decay)
    if optim.name != EIGHT_BIT:
        # Fused it makes one pass over a parameter, on a CPU in a quarter of the time.
        return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)
    import bitsandbytes

    optimizer = bitsandbytes.optim.AdamW8bit(groups, lr=optim.lr, betas=optim.betas, min_8bit_size=FEWEST)
    # The process's only manager knows parameters by their address, also those that are gone, whose addresses others have by now.
    # This optimizer therefore has a manager of its own.
    optimizer.mng = bitsandbytes.optim.GlobalOptimManager.__new__(bitsandbytes.optim.GlobalOptimManager)
    optimizer.mng.initialize()
    optimizer.mng.override_config(list(embeddings(model)), "optim_bits", 32)
    return optimizer


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns AdamW's parameter groups: matrices with weight decay, and norms and biases without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if len(shape_of(p)) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if len(shape_of(p)) < 2], "weight_decay": 0.0},
    ]


def embeddings(model: nn.Module) -> set[Tensor]:
    """Returns the weights of a model's embeddings, a head that is tied to one among them."""
    return {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}


def in_eight_bits(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters whose moments `adamw_8bit` holds in 8 bits."""
    whole = embeddings(model)
    return [p for p in model.parameters() if p.requires_grad and p not in whole and p.numel() >= FEWEST]


def begin_moments(optimizer: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Gives an optimizer the state of these parameters, as if it had not changed them yet, and of no others.

    A checkpoint's is then copied into it. A parameter whose first gradient came after the checkpoint has none there.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # within accelerate's
    wanted = set(parameters)
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            optimizer.state.pop(parameter, None)
            if parameter not in wanted:
                continue
            if is_of_torch(optimizer):
                optimizer.state[parameter] = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            else:
                optimizer.state[parameter] = {}
                optimizer.init_state(group, parameter, number, place)


def set_step(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, step: Tensor) -> None:
    """Sets a parameter's count of steps in the form that the optimizer keeps it in.

    torch's is a tensor, on the CPU unless it is fused, and that of bitsandbytes a number.
    """
    device = parameter.device if optimizer.defaults.get("fused") else "cpu"
    optimizer.state[parameter]["step"] = step.to(device, copy=True) if is_of_torch(optimizer) else int(step)


def is_of_torch(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is torch's own AdamW."""
    return "fused" in optimizer.defaults
