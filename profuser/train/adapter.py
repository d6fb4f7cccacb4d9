"""Trains an adapter instead of all weights of the target: LoRA (arXiv 2106.09685), by the package peft."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from profuser.errors import ConfigError, first_line
from profuser.models.head import head_layer
from profuser.models.load import load_model, load_without_weights
from profuser.recipe.adapter import ALL_LINEAR, AdapterConfig
from profuser.recipe.schema import Recipe
from profuser.train.quantized import check_quantize

FOLDER = "adapter"
"""Where a run keeps the adapter alone, beside the model into which it is merged."""


def check_adapter(recipe: Recipe, device: torch.device, *, sharded: bool) -> None:
    """Finds out before anything is prepared whether a recipe's adapter can be trained. It reads no weights.

    Raises:
        ConfigError: the adapter does not fit the target, or the target cannot be quantised here or is to be sharded as well.
        ModuleNotFoundError: peft is missing, or bitsandbytes for a quantised target.
    """
    if recipe.adapter is not None:
        if sharded and recipe.adapter.quantize is not None:
            raise ConfigError(
                "a quantised target must not be sharded, got a launcher that asks for FSDP or DeepSpeed; launch with torchrun or "
                "--multi_gpu, or leave adapter.quantize out"
            )
        with_adapter(load_without_weights(recipe.target_config, torch.float32), recipe.adapter)
        if recipe.adapter.quantize is not None:
            check_quantize(recipe.target_config, device)


def with_adapter(target: PreTrainedModel, config: AdapterConfig) -> PreTrainedModel:
    """Puts LoRA layers into a model, whose own weights are frozen, and returns peft's model around it.

    The layers' weights are fp32. At first they change nothing: B is 0.

    Raises:
        ConfigError: adapter.target_modules names no layer of the model, or the head, which the fused loss reads itself.
    """
    import peft

    named = dict(target.named_modules())
    head = next(name for name, module in named.items() if module is head_layer(target))
    linear = {name: module for name, module in named.items() if isinstance(module, torch.nn.Linear) and name != head}
    wanted = config.target_modules
    if wanted != ALL_LINEAR:
        ends = sorted({name.rpartition(".")[2] for name in linear})
        for end in wanted:
            if end == head.rpartition(".")[2]:
                raise ConfigError(f"adapter.target_modules must not have the head, got {end}; leave it out")
            if end not in ends:
                raise ConfigError(
                    f"adapter.target_modules must name layers of the target, got {end}; it has {', '.join(ends)}"
                )
        linear = {name: module for name, module in linear.items() if name.rpartition(".")[2] in wanted}
    if not linear:
        raise ConfigError(
            f"adapter must have linear layers to adapt, {type(target).__name__} has none; train all weights without an adapter"
        )
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,  # pyrefly: ignore[bad-argument-type]  # it is only divided
        lora_dropout=config.dropout,
        target_modules=sorted(linear),
    )
    try:
        adapted = peft.get_peft_model(target, lora)
    except ValueError as error:  # such as layers of a Mamba, which peft does not adapt
        raise ConfigError(
            f"adapter must fit the target, {first_line(error)}; name other layers in adapter.target_modules"
        ) from None
    return adapted  # pyrefly: ignore[bad-return]  # it stands for the model wherever FusionModel uses it


def is_adapted(model: torch.nn.Module) -> bool:
    """Whether a model is peft's around another one."""
    return hasattr(model, "merge_and_unload")


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Writes the adapter alone, which peft's `PeftModel.from_pretrained` puts into the target again."""
    model.save_pretrained(folder)
    # peft writes the layers' names in the order of a set, which differs from one process to the next.
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def merged(model: PreTrainedModel, recipe: Recipe, folder: Path) -> PreTrainedModel:
    """Returns the model with the adapter's changes added to its weights, in fp32. Without an adapter it is the model itself.

    If the model was quantised for the training, the changes are added to its weights as they were before, on the CPU.

    Args:
        folder: where the adapter alone has been written.
    """
    if not is_adapted(model):
        return model
    if recipe.adapter is not None and recipe.adapter.quantize is not None:
        import peft

        model = peft.PeftModel.from_pretrained(load_model(recipe.target_config, torch.float32), folder)  # pyrefly: ignore[bad-assignment]  # as in with_adapter
    whole = model.float().merge_and_unload()  # pyrefly: ignore[not-callable]  # peft's
    whole.requires_grad_(True)
    return whole
