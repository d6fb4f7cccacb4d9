"""The processes of a training run: one, or DDP ranks under torchrun or accelerate launch."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from profuser.errors import ConfigError


def settled_precision(name: str) -> str:
    """`optim.precision` without "auto": bf16 on CUDA, fp32 elsewhere."""
    return name if name != "auto" else ("bf16" if torch.cuda.is_available() else "fp32")


def launch(precision: str) -> Accelerator:
    """The processes of this run. precision: fp32 or bf16.

    Raises:
        ConfigError: a launcher asked for FSDP or DeepSpeed.
    """
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))  # the other ranks wait while the first one prepares
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[patience],
    )
    if accelerator.distributed_type.value not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise ConfigError(
            f"training runs on one process or under DDP, got {accelerator.distributed_type.value}; launch with torchrun or --multi_gpu"
        )
    return accelerator
