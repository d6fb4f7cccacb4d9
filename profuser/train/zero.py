"""Divides the target among the processes by DeepSpeed's ZeRO (arXiv 1910.02054), and takes its optimizer steps there.

ZeRO-2 divides gradients, AdamW's moments and the weights in fp32, and leaves the weights that are computed with whole on each process.
ZeRO-3 divides these as well. What is divided is reached through DeepSpeed's own accessors (deepspeed.utils.safe_get_full_fp32_param and
its like), one parameter at a time, so that checkpoints and the fused model are written as ever. Nothing is left to DeepSpeed's own
checkpoints, which are pickles, nor to its schedules.

DeepSpeed divides a gradient by the number of processes, which the weights of the tokens expect (profuser.train.steps), and by its
number of accumulation steps, which is therefore 1: the trainer says itself which pass is the last of a step.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import PreTrainedModel

from profuser.errors import ConfigError
from profuser.fusion_model import FusionModel
from profuser.recipe.optim import OptimConfig

KINDS = ("exp_avg", "exp_avg_sq")
"""The moments of torch's AdamW."""

OURS = {"gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 1}
"""What DeepSpeed is told of a step, whose passes the recipe divides itself."""

LEFT = {
    "steps_per_print", "wall_clock_breakdown", "zero_optimization.stage", "zero_optimization.overlap_comm",
    "zero_optimization.contiguous_gradients", "zero_optimization.reduce_scatter", "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_partitions", "zero_optimization.allgather_bucket_size", "zero_optimization.sub_group_size",
    "zero_optimization.stage3_prefetch_bucket_size", "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_max_live_parameters", "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
}  # fmt: skip
"""The keys of a DeepSpeed configuration that may have any value: how it sends what it sends."""


def is_asked_for() -> bool:
    """Whether the launcher asks for DeepSpeed, in the way of `accelerate launch`."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def check_launched() -> None:
    """Finds out whether DeepSpeed is there and its processes are, and keeps it from saying what nobody can do anything about.

    Raises:
        ConfigError: no launcher has started this process.
        ModuleNotFoundError: DeepSpeed is missing.
    """
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            "DeepSpeed must be started by a launcher, got ACCELERATE_USE_DEEPSPEED without one; start it with accelerate launch or "
            "torchrun, or unset the variable"
        )
    # It calls functions by their old names.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if on_cpu:
        # Else it would compile an exchange of its own beside gloo. A process that is killed meanwhile leaves a lock, on which all later
        # ones would wait for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def config_of(accelerator: Any) -> dict[str, Any]:
    """Returns the configuration that DeepSpeed will get, which may still be changed."""
    return accelerator.deepspeed_plugin.deepspeed_config


def check_zero(accelerator: Accelerator, optim: OptimConfig) -> None:
    """Raises ConfigError where the launcher's DeepSpeed configuration asks for something that the recipe says, or that is not done."""
    config = config_of(accelerator)
    stage = config["zero_optimization"].get("stage")
    if stage not in (2, 3):
        raise ConfigError(f"DeepSpeed must divide by ZeRO-2 or ZeRO-3, got zero_stage: {stage}; set it to 2 or 3")
    allowed = OURS | {
        "gradient_clipping": optim.grad_clip,
        "train_batch_size": accelerator.num_processes,
        "bf16.enabled": accelerator.mixed_precision == "bf16",
        "fp16.enabled": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization.offload_optimizer.device": "none",
        "zero_optimization.offload_param.device": "none",
    }
    for key, value in _flat(config):
        if key in LEFT or value in ("auto", None) or (key in allowed and value == allowed[key]):
            continue
        raise ConfigError(
            f"DeepSpeed's {key} must be what the recipe says, or be left to DeepSpeed, got {value!r}; take it out of its configuration"
            + (f", or set it to {allowed[key]!r}" if key in allowed else "")
        )


def _flat(config: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yields the values of nested dicts, with their keys joined by dots."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def stage_of(accelerator: Accelerator) -> int:
    """Returns 2 or 3: whether the weights that are computed with are whole on each process, or divided as well."""
    return config_of(accelerator)["zero_optimization"]["stage"]


class ZeroUpdates:
    """The updates of a target that DeepSpeed divides; see `Updates`.

    Args:
        fusion: the target, which `divide` has divided if the stage is 3.
        loaded: the whole that it was made of, on the main process; None on the others.
        optimizer: AdamW for its parameters. grad_clip: the norm to which a gradient is scaled down.
    """

    def __init__(
        self,
        fusion: FusionModel,
        loaded: PreTrainedModel | None,
        optimizer: torch.optim.Optimizer,
        grad_clip: float,
        accelerator: Accelerator,
    ):
        in_bf16 = accelerator.mixed_precision == "bf16"
        config = config_of(accelerator)
        config |= OURS | {"gradient_clipping": grad_clip}
        # Gradients are added in fp32, those of the ranks and those of a step's passes.
        config["communication_data_type"] = "fp32"
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        if in_bf16:
            config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        self.engine, self.optimizer = accelerator.prepare(fusion, optimizer)
        _begin_moments(self.optimizer)
        if in_bf16:  # the weights in fp32 have been made of the rounded ones
            for name, parameter in _trained(fusion.model):
                full = torch.empty(shape_of(parameter), dtype=torch.float32, device=accelerator.device)
                if loaded is not None:
                    full.copy_(loaded.get_parameter(name))
                dist.broadcast(full, 0)
                _put(parameter, full)

    def run(self, inputs: dict[str, Any], *, last: bool) -> dict[str, Tensor]:
        self.engine.set_gradient_accumulation_boundary(last)
        out = self.engine(**inputs)
        self.engine.backward(out["loss"])
        return out

    def update(self) -> float:
        # It measures the norm first, and does nothing where that is not finite.
        self.engine.step()
        return float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else math.inf


def divide(module: nn.Module) -> None:
    """Divides the weights of a module among the processes, as ZeRO-3 has it. All must have the same, and call it."""
    import deepspeed

    deepspeed.zero.Init(module=module)


def is_zero(thing: nn.Module | Tensor) -> bool:
    """Whether a model, or a parameter of it, is divided by DeepSpeed."""
    if isinstance(thing, nn.Module):
        return any(map(is_zero, thing.parameters()))
    return hasattr(thing, "ds_id") or hasattr(thing, "_hp_mapping")


def shape_of(parameter: Tensor) -> torch.Size:
    """Returns the shape of a parameter as it is without division."""
    return getattr(parameter, "ds_shape", parameter.shape)


@torch.no_grad()
def whole(parameter: Tensor) -> Tensor:
    """Returns a parameter as it is without division: in fp32 if it is trained. All processes must call it."""
    import deepspeed

    if parameter.requires_grad:
        return deepspeed.utils.safe_get_full_fp32_param(parameter)
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


@torch.no_grad()
def state_of(model: nn.Module, optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Returns what a checkpoint holds of a divided target: each process's share of the weights and moments, on the CPU, and the counts.

    A share is a part of the rows, as FSDP2's is, and not the part that DeepSpeed lets this process change.
    """
    import deepspeed

    weights, moments, steps = {}, {}, {}
    mesh, count = _mesh(model), _steps_done(optimizer)
    for name, parameter in _trained(model):
        weights[name] = _share(deepspeed.utils.safe_get_full_fp32_param(parameter), mesh)
        if count:
            steps[f"{name}/step"] = torch.tensor(float(count))
            for kind in KINDS:
                full = deepspeed.utils.safe_get_full_optimizer_state(parameter, kind)
                moments[f"{name}/{kind}"] = _share(full, mesh)
    return weights, moments, steps


def empty_state(model: nn.Module, steps: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns room for the shares of the weights and moments that a checkpoint holds. `steps` are its counts."""
    mesh, tensors = _mesh(model), {}
    for name, parameter in _trained(model):
        kinds = KINDS if f"{name}/step" in steps else ()
        for key in (name, *(f"{name}/{kind}" for kind in kinds)):
            tensors[key] = _share(torch.zeros(shape_of(parameter)), mesh)
    return tensors


@torch.no_grad()
def put_state(model: nn.Module, optimizer: Any, tensors: dict[str, Tensor], steps: dict[str, Tensor]) -> None:
    """Gives a divided target the state of a checkpoint: what `empty_state` returned, once it is filled.

    Raises:
        ConfigError: the parameters were not changed equally often, which DeepSpeed's AdamW cannot go on with.
    """
    counts = {float(step) for step in steps.values()}
    if len(counts) > 1:
        raise ConfigError(
            f"all weights must have been changed equally often under DeepSpeed, got {len(counts)} different counts in the checkpoint; go "
            "on with torchrun and optim.shard: true"
        )
    adamw, flat = _adamw(optimizer)
    for tensor in flat:
        adamw.state[tensor]["step"].fill_(max(counts, default=0.0))
    for name, parameter in _trained(model):
        _put(parameter, _full(tensors[name], parameter))
        for kind in KINDS:
            moment = tensors.get(f"{name}/{kind}")  # none if the parameter never had a gradient
            full = parameter.new_zeros(shape_of(parameter)) if moment is None else _full(moment, parameter)
            _put(parameter, full, kind)


def _trained(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _mesh(model: nn.Module) -> DeviceMesh:
    """Returns all processes in a row."""
    return init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))


def _share(full: Tensor, mesh: DeviceMesh) -> Tensor:
    """Returns this process's share of the rows of a tensor that all processes have, on the CPU."""
    placement = Shard(0) if full.dim() else Replicate()
    return distribute_tensor(full, mesh, [placement], src_data_rank=None).to("cpu", copy=True)


def _full(share: Tensor, parameter: Tensor) -> Tensor:
    """Returns what `_share` took a share of, on the device of its parameter."""
    return share.to(parameter.device).full_tensor()  # pyrefly: ignore[missing-attribute]  # a DTensor


def _put(parameter: Any, full: Tensor, kind: str | None = None) -> None:
    """Sets a trained parameter, or one of its moments, to what all processes have."""
    import deepspeed

    if hasattr(parameter, "ds_id"):
        # A share's end may be padding.
        held = parameter.ds_tensor.ds_numel
        padded = nn.functional.pad(full.flatten(), (0, held * dist.get_world_size() - full.numel()))
        own = padded.narrow(0, held * dist.get_rank(), held)
        if kind is not None:
            deepspeed.utils.safe_set_local_optimizer_state(parameter, own, kind)
            return
        deepspeed.utils.safe_set_local_fp32_param(parameter, own)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(full)
    elif kind is not None:
        deepspeed.utils.safe_set_full_optimizer_state(parameter, full, kind)
    else:
        deepspeed.utils.safe_set_full_fp32_param(parameter, full)
        parameter.data.copy_(full)  # the one that is computed with


def _begin_moments(optimizer: Any) -> None:
    """Gives AdamW the moments that it would make in its first step.

    ZeRO-2 notes where the moments of its parameters are when the first group of them has been changed, and finds none of the others.
    """
    adamw, flat = _adamw(optimizer)
    for tensor in flat:
        moments = {kind: torch.zeros_like(tensor) for kind in KINDS}
        adamw.state[tensor] = moments | {"step": torch.zeros((), device=tensor.device)}
    if hasattr(optimizer.optimizer, "single_partition_of_fp32_groups"):
        optimizer.optimizer._lazy_init_hp_params_optimizer_state()


def _steps_done(optimizer: Any) -> int:
    """Returns AdamW's count of steps, which is one for all parameters."""
    adamw, flat = _adamw(optimizer)
    return int(adamw.state[flat[0]]["step"])


def _adamw(optimizer: Any) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """Returns torch's own optimizer, and what it changes: a flat tensor for each of several groups of parameters."""
    zero = optimizer.optimizer  # within accelerate's
    flat = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
    return zero.optimizer, flat
