"""Holds the weights that an adapter freezes in 4 bits: NF4 of QLoRA (arXiv 2305.14314), by the package bitsandbytes.

Linear layers are quantised while they are loaded, in blocks of 64 weights whose scales are quantised as well. The head, the embeddings
and the norms are not. A layer's weights are made whole again for each product.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel

from profuser.errors import ConfigError
from profuser.models.load import load_model, weights_of
from profuser.models.merged_adapter import adapter_folder
from profuser.recipe.schema import SourceConfig
from profuser.train.tried import must_work


def check_quantize(target: SourceConfig, device: torch.device) -> None:
    """Finds out whether the target can be held in 4 bits here. It reads no weights.

    Raises:
        ConfigError: the target's files are quantised already, or bitsandbytes cannot do it on this device.
        ModuleNotFoundError: bitsandbytes is missing.
    """
    import bitsandbytes

    if adapter_folder(target) is not None:
        raise ConfigError(
            f"adapter.quantize must go with a whole model, the target {target.model} is itself an adapter; merge it, or leave it out"
        )
    location, options = weights_of(target)
    if "gguf_file" in options or hasattr(AutoConfig.from_pretrained(location, **options), "quantization_config"):
        raise ConfigError(
            f"adapter.quantize must go with weights that are not quantised yet, those of {location} are; leave it out, or take the "
            "model as it was before"
        )
    with must_work("adapter.quantize", device):
        layer: Any = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to(device)
        layer(torch.ones(2, 64, device=device, requires_grad=True)).sum().backward()


def load_quantized(target: SourceConfig, dtype: torch.dtype, device: torch.device, *, packs: bool) -> PreTrainedModel:
    """Loads the target with its linear layers in NF4, which compute in `dtype`. The arguments are those of `load_model`."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = load_model(target, dtype, device, packs=packs, quantization=nf4)
    # On some CPUs a layer's weights would be repacked at the first evaluation, for a product that has no gradient.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyrefly: ignore[bad-argument-type]  # a plain attribute
    return model
