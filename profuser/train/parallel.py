"""Sets up the processes of a training run: a single one, or the ranks of DDP, FSDP2 or DeepSpeed under torchrun or accelerate launch."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from transformers.integrations import unset_hf_deepspeed_config

from profuser.errors import ConfigError, Stopped, first_line
from profuser.recipe.optim import OptimConfig
from profuser.stopping import KINDS
from profuser.train import zero
from profuser.train.determinism import set_environment


def settled_precision(name: str) -> str:
    """Returns the arithmetic that `optim.precision` means; "auto" is bf16 on CUDA and fp32 elsewhere."""
    return name if name != "auto" else ("bf16" if torch.cuda.is_available() else "fp32")


def launch(precision: str, *, deterministic: bool = False) -> Accelerator:
    """Returns the Accelerator of this run, in the arithmetic fp32 or bf16.

    Raises:
        ConfigError: the environment rules out what is to be `deterministic`; or the launcher asked for something else than one
            process, DDP, FSDP or DeepSpeed, or for DeepSpeed with a configuration that accelerate refuses.
        ModuleNotFoundError: the launcher asked for DeepSpeed, which is missing.
    """
    if deterministic:
        set_environment()
    # A process may have prepared its share of the store days before the last one has.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    on_cpu = not torch.cuda.is_available()
    if with_zero := zero.is_asked_for():
        zero.check_launched()
        if on_cpu:
            # With cpu=True accelerate would take DDP, and without a backend every process would be alone.
            patience.backend = "gloo"
    try:
        accelerator = Accelerator(
            mixed_precision="bf16" if precision == "bf16" else "no",
            cpu=on_cpu and not with_zero,
            # The gradients lie in the buffers that DDP sends, so that there is no second copy of them.
            kwargs_handlers=[patience, DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    except ValueError as error:
        if not with_zero:
            raise
        raise ConfigError(
            f"DeepSpeed's configuration must be one that accelerate takes, got one that it refuses ({first_line(error)}); leave out what "
            "the recipe says"
        ) from error
    if accelerator.distributed_type.value not in ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP", "DEEPSPEED"):
        raise ConfigError(
            f"training runs on one process, under DDP, FSDP or DeepSpeed, got {accelerator.distributed_type.value}; launch with torchrun "
            "or --multi_gpu, and set optim.shard: true where the model is too large for one GPU"
        )
    if with_zero:
        unset_hf_deepspeed_config()  # else transformers would divide every model that is loaded, sources and judges among them
    return accelerator


def shards(optim: OptimConfig, accelerator: Accelerator) -> bool:
    """Whether the target is divided among the processes: if the recipe or the launcher asks for it, and there are several.

    A single process of a launcher counts as several, so that this path can be tried on one device.
    """
    asked = optim.shard or accelerator.distributed_type.value in ("FSDP", "DEEPSPEED")
    return asked and dist.is_initialized()


def agreed_stop(own: Stopped | None) -> Stopped | None:
    """Returns what a signal to any of the processes has asked for, the same on all of them.

    A signal reaches the processes at different moments. If each acted on its own, one would wait for a step that another does not
    take any more. All must call this after every step.
    """
    if not dist.is_initialized():
        return own
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    code = torch.tensor(0 if own is None else own.exit_code, device=device)
    dist.all_reduce(code, dist.ReduceOp.MAX)
    return own or next((kind() for kind in KINDS.values() if kind.exit_code == int(code)), None)
