"""Compiles the target without its head by torch.compile: one graph, which serves forward passes of any size.

A module that compiles itself in place keeps its name and those of its weights, so that checkpoints and the written model are those of
a target that is not compiled. There is one graph for every way in which the target is called: in training and in evaluation, padded
and packed, and with a single row, which torch always takes for a case of its own.
"""

from __future__ import annotations

import torch

from profuser.errors import ConfigError, first_line, is_lack_of_memory
from profuser.fusion_model import FusionModel
from profuser.models.head import uses_flash_attention, without_head

BACKEND = "inductor"


def check_compile(device: torch.device, *, sharded: bool) -> None:
    """Finds out before anything is prepared whether torch.compile works here, with a small function.

    Raises:
        ConfigError: it does not, mostly for lack of a compiler; or the target is to be sharded.
    """
    if sharded:
        raise ConfigError(
            "a compiled target must not be sharded, got a launcher that asks for FSDP or DeepSpeed; launch with torchrun or "
            "--multi_gpu, or leave optim.compile out"
        )
    try:
        torch.compile(lambda x: x.sin() + 1, backend=BACKEND)(torch.ones(2, device=device))
    except Exception as error:  # every part of torch.compile raises its own kinds
        if is_lack_of_memory(error):
            raise
        raise ConfigError(
            f"optim.compile needs a torch.compile that works, here it fails ({first_line(error)}); install a C++ compiler, or set "
            "optim.compile: false"
        ) from error


def compile_target(fusion: FusionModel) -> None:
    """Compiles the target without its head in place, at the first forward pass of each kind."""
    # With gradient checkpointing transformers lets the embeddings need a gradient, for an older way of it that is not used here. In a
    # graph no tensor of its own can.
    fusion.model.disable_input_require_grads()
    # flash-attention's own functions cannot be part of a graph everywhere; there torch may leave the graph for them.
    whole = not uses_flash_attention(fusion.model)
    without_head(fusion.model).compile(backend=BACKEND, dynamic=True, fullgraph=whole)
