"""Divides the target among the processes, by PyTorch's FSDP2: each holds its share of the weights, gradients and moments.

A block of the model is gathered when it is computed. Embeddings, the last norm and the head belong to FusionModel itself, whose
forward holds the loss: they are gathered once per forward pass and stay until its backward pass is through.

Where the launcher asks for DeepSpeed, its ZeRO divides the target instead (profuser.train.zero). What is said here of a divided target
is true of both.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from profuser.fusion_model import FusionModel, tied_names
from profuser.train import zero

T = TypeVar("T")


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the blocks of a model's layers, which transformers names as those that may not be split.

    Of blocks that lie in each other, such as a Mamba's layer and its mixer, the outer one is taken. Those that share weights with
    another part of the model, as some of Zamba's do, are left out: FSDP2 gathers a weight in one place.
    """
    names, blocks = set(model._no_split_modules or ()), []
    inside: set[nn.Module] = set()
    everywhere = _uses(model)
    for module in model.modules():  # the outer ones come first
        if type(module).__name__ in names and module not in inside:
            inside.update(module.modules())
            if all(everywhere[weight] == count for weight, count in _uses(module).items()):
                blocks.append(module)
    return blocks


def _uses(module: nn.Module) -> Counter[int]:
    """Returns under how many names a module has each of its parameters, by their ids."""
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))


def load_into_shards(fusion: FusionModel, loaded: PreTrainedModel | None, accelerator: Accelerator) -> None:
    """Gives a model without weights those of another one, which only the main process has, and divides it among the processes.

    No process but the main one ever holds more than its shares and one block. What the main process holds stays on the CPU.

    Args:
        fusion: the target on the meta device. Its weights are then on the process's device.
        loaded: the same model with its weights, on the main process; None on the others.
    """
    device, source = accelerator.device, {} if loaded is None else _tensors(loaded)
    divide = _divider(accelerator)
    # DeepSpeed keeps the weights in fp32 beside those that are computed with.
    rounded = torch.bfloat16 if zero.is_asked_for() and accelerator.mixed_precision == "bf16" else None
    tie_as(fusion.model, agreed({} if loaded is None else tied_names(loaded)))
    names = {id(module): name for name, module in fusion.model.named_modules()}
    for block in blocks_of(fusion.model):
        _fill(block, f"{names[id(block)]}.", source, device, rounded)
        divide(block)
    _fill(fusion.model, "", source, device, rounded)
    if loaded is not None:
        fusion.model.generation_config = loaded.generation_config
    divide(fusion)


def _divider(accelerator: Accelerator) -> Callable[[nn.Module], object]:
    """Returns what divides a module that is whole, but for the parts of it that are divided already."""
    if zero.is_asked_for():
        return zero.divide if zero.stage_of(accelerator) == 3 else lambda module: None
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if accelerator.mixed_precision == "bf16" else None,
        reduce_dtype=torch.float32 if accelerator.mixed_precision == "bf16" else None,
        cast_forward_inputs=False,  # the sources' log-probabilities and the weights of the tokens stay in fp32
    )
    return partial(fully_shard, mesh=mesh, mp_policy=policy)


def tie_as(model: nn.Module, ties: dict[str, str]) -> None:
    """Ties the parameters of a model that are tied in another one, and no others.

    What a configuration says of ties does not always hold: a head of its own beside the embedding is loaded as such.

    Args:
        ties: tied_names of the other model.
    """
    for name in {**tied_names(model), **ties}:
        part, _, key = name.rpartition(".")
        old = model.get_parameter(name)
        alone = nn.Parameter(torch.empty_like(old), old.requires_grad)
        setattr(model.get_submodule(part), key, model.get_parameter(ties[name]) if name in ties else alone)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns all parameters and buffers, tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _fill(
    module: nn.Module, prefix: str, source: dict[str, Tensor], device: torch.device, rounded: torch.dtype | None
) -> None:
    """Replaces what is on the meta device by the main process's tensors. Weights that are tied within the module stay tied.

    `prefix` is the name of the module in the model. Parameters are `rounded` to a dtype if one is given.
    """
    # The old and the new tensors, by the id of the old one, which is kept so that no other tensor gets this id.
    placed: dict[int, tuple[Tensor, Tensor]] = {}
    for name, part in module.named_modules(prefix=prefix.removesuffix(".")):
        kinds: tuple[dict[str, Any], ...] = part._parameters, part._buffers
        for of_part in kinds:
            for key, old in of_part.items():
                if old is None or isinstance(old, DTensor) or not old.is_meta:
                    continue
                if id(old) not in placed:
                    dtype = rounded if rounded is not None and isinstance(old, nn.Parameter) else old.dtype
                    full = torch.empty(old.shape, dtype=dtype, device=device)
                    if source:
                        full.copy_(source[f"{name}.{key}" if name else key])
                    dist.broadcast(full, 0)
                    new = nn.Parameter(full, old.requires_grad) if isinstance(old, nn.Parameter) else full
                    placed[id(old)] = old, new
                of_part[key] = placed[id(old)][1]


def is_main() -> bool:
    """Whether this is the only process or the main one of several."""
    return not dist.is_initialized() or dist.get_rank() == 0


def agreed(value: T, group: dist.ProcessGroup | None = None) -> T:
    """Returns the main process's value on every process. `group` is what they talk through, None for what they train with."""
    if not dist.is_initialized():
        return value
    held = [value]
    dist.broadcast_object_list(held, 0, group)
    return held[0]


def is_sharded(model: nn.Module) -> bool:
    """Whether a model is divided among the processes."""
    return isinstance(model, FSDPModule) or zero.is_zero(model)


def divide_again(model: nn.Module) -> None:
    """Frees what a forward pass without a backward pass, such as a validation's, has left gathered.

    The parameters of a module that is gathered are not those that the optimizer knows.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


@contextlib.contextmanager
def gathered(model: nn.Module) -> Generator[None]:
    """Holds what belongs to FusionModel itself whole in a `with` block, so that the wrapped model can be called by itself.

    Its blocks are gathered as always. The model must have been called as a whole before. If it is divided, all processes must do this,
    and then compute the same.
    """
    if isinstance(model, FSDPModule):
        model.unshard()
    try:
        yield
    finally:
        divide_again(model)


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor as it is without division. If it is divided, all processes must call this."""
    if zero.is_zero(tensor):
        return zero.whole(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole_model(model: PreTrainedModel, dtype: torch.dtype, accelerator: Accelerator) -> PreTrainedModel | None:
    """Returns a model as it is without division, on the CPU and rounded to `dtype` if it was divided.

    All processes must call it. Of a divided model only the main process gets the whole; the others get None.
    """
    tensors = model.state_dict(keep_vars=True)
    if not any(isinstance(tensor, DTensor) or zero.is_zero(tensor) for tensor in tensors.values()):
        return model
    gathered: dict[str, Tensor] = {}
    by_id: dict[int, Tensor] = {}  # tied weights are gathered once
    for name, tensor in tensors.items():
        if id(tensor) not in by_id:
            full = whole(tensor).detach()
            rounded = dtype if full.is_floating_point() else full.dtype
            by_id[id(tensor)] = full.to("cpu", rounded) if accelerator.is_main_process else torch.empty(0)
        gathered[name] = by_id[id(tensor)]
    if not accelerator.is_main_process:
        return None
    with torch.device("meta"):
        plain = type(model)(model.config)
    tie_as(plain, ties := tied_names(model))
    plain.load_state_dict(gathered, assign=True)
    tie_as(plain, ties)  # assigning has given each name a parameter of its own
    plain.generation_config = model.generation_config
    return plain
