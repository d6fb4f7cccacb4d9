"""Sets up the processes of a training run: a single one, or the ranks of DDP under torchrun or accelerate launch."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from profuser.errors import ConfigError


def settled_precision(name: str) -> str:
    """Returns the arithmetic that `optim.precision` means; "auto" is bf16 on CUDA and fp32 elsewhere."""
    return name if name != "auto" else ("bf16" if torch.cuda.is_available() else "fp32")


def launch(precision: str) -> Accelerator:
    """Returns the Accelerator of this run, in the arithmetic fp32 or bf16.

    Raises:
        ConfigError: the launcher asked for something else than one process or DDP, such as FSDP or DeepSpeed.
    """
    # The main process prepares the store, which may take days, while the other ranks wait for it.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[patience],
    )
    if accelerator.distributed_type.value not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise ConfigError(
            f"training runs on one process or under DDP, got {accelerator.distributed_type.value}; launch with torchrun or "
            "--multi_gpu"
        )
    return accelerator
