"""Loads the target as a process trains it: all of it or its share, with an adapter if the recipe has one, and the loss around it."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from profuser.errors import ConfigError
from profuser.fusion_model import FusionModel
from profuser.models.attention import packed_layout
from profuser.models.head import head_layer, uses_flash_attention
from profuser.models.load import check_vocabulary, load_model, load_without_weights
from profuser.models.packing import Layout
from profuser.recipe.schema import Recipe
from profuser.text.chat import ChatFormat
from profuser.train import zero
from profuser.train.adapter import with_adapter
from profuser.train.checkpoint import weights_of
from profuser.train.compiled import compile_target
from profuser.train.quantized import load_quantized
from profuser.train.sharding import agreed, is_main, is_sharded, load_into_shards, whole, whole_model


def load_target(
    recipe: Recipe, chat: ChatFormat, accelerator: Accelerator, *, sharded: bool
) -> tuple[FusionModel, PreTrainedModel | None]:
    """Loads the target onto this process's device, or divides it among the processes if it is to be `sharded`.

    Returns:
        The target with its loss; and of a divided one the whole that it was made of, on the main process.
    Raises:
        ConfigError: the recipe's adapter does not fit the target, or its loss does not fit the target.
        DataError: the target cannot be loaded, or does not fit its tokenizer or the loss.
    """
    config = recipe.target_config
    in_bf16 = accelerator.mixed_precision == "bf16"
    # Weights that an adapter freezes need no more digits than they are computed with.
    dtype = torch.bfloat16 if in_bf16 and recipe.adapter is not None else torch.float32
    if not sharded:
        packs = recipe.optim.tokens_per_micro_batch is not None and in_bf16
        in_4_bits = recipe.adapter is not None and recipe.adapter.quantize is not None
        loaded = (load_quantized if in_4_bits else load_model)(config, dtype, accelerator.device, packs=packs)
        fusion = _with_loss(loaded, recipe, chat)
        if recipe.optim.compile:
            compile_target(fusion)
        return fusion, None

    # The main process has the weights. What has to be proven with them, it proves for all.
    target, keeps_apart = None, {}
    if is_main():
        alone = _with_loss(load_model(config, dtype), recipe, chat)
        target, keeps_apart = alone.model, alone.keeps_apart
    fusion = _with_loss(load_without_weights(config, dtype), recipe, chat)
    fusion.keeps_apart = agreed(keeps_apart)
    load_into_shards(fusion, target, accelerator)
    way, what = "FSDP2", "weights, gradients and moments"
    if zero.is_asked_for():
        way = f"ZeRO-{zero.stage_of(accelerator)}"
        what = what if way == "ZeRO-3" else "gradients, moments and weights in fp32"
    accelerator.print(
        f"{way}: of the processes each holds 1/{accelerator.num_processes} of the target's {what}", flush=True
    )
    return fusion, target


def _with_loss(target: PreTrainedModel, recipe: Recipe, chat: ChatFormat) -> FusionModel:
    check_vocabulary(recipe.target_config.name, chat, len(head_layer(target).weight))
    if recipe.adapter is not None:
        target = with_adapter(target, recipe.adapter)
    if recipe.optim.gradient_checkpointing:
        target.gradient_checkpointing_enable()
    return _fusion(target, recipe)


def _fusion(target: PreTrainedModel, recipe: Recipe) -> FusionModel:
    try:
        return FusionModel(target, **recipe.optim.loss_options)
    except ValueError as error:  # options of which the target's softcap allows one only
        raise ConfigError(f"optim.{error}") from None


def check_loss(recipe: Recipe) -> None:
    """Finds out before anything is prepared whether the target can be trained with the recipe's loss. It reads no weights.

    Raises:
        ConfigError: the target's softcap does not go with the loss.
        DataError: the target is no causal language model, or its loss is not its cross-entropy alone.
    """
    _fusion(load_without_weights(recipe.target_config, torch.float32), recipe)


@torch.no_grad()
def whole_target(
    fusion: FusionModel, recipe: Recipe, dtype: torch.dtype, accelerator: Accelerator
) -> PreTrainedModel | None:
    """Returns the trained target as it is without division. It does what `whole_model` does, and is called in the same way.

    Of a divided target with an adapter the adapter alone is gathered: the frozen weights are read again.
    """
    if recipe.adapter is None or not is_sharded(fusion):
        return whole_model(fusion.model, dtype, accelerator)
    trained = ((name, p) for name, p in fusion.model.named_parameters() if p.requires_grad)
    gathered = {name: whole(parameter).detach() for name, parameter in trained}
    if not accelerator.is_main_process:
        return None
    target = with_adapter(load_model(recipe.target_config, torch.float32), recipe.adapter)
    for name, tensor in weights_of(target).items():
        tensor.copy_(gathered[name])
    return target


def layout_for(fusion: FusionModel, budget: int | None) -> Layout:
    """Chooses how sequences are laid into passes of `budget` tokens, and says so once. None pads passes of instructions."""
    if budget is None:
        return "padded"
    layout, said = packed_layout(fusion.model, fusion.keeps_apart[uses_flash_attention(fusion.model)], budget)
    if is_main():
        print(f"sequences are {said}", flush=True)
    return layout
