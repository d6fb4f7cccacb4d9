"""Which implementation of attention a model uses, as far as packed sequences depend on it."""

from __future__ import annotations

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

FLASH = "flash_attention_2"
"""transformers' name of the implementation that takes the bounds of sequences and computes nothing between them."""


def flash_attention(config: PreTrainedConfig, device: torch.device | str) -> str | None:
    """Returns FLASH where flash-attn is installed, and can be used for such a model on this device; else None."""
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    supported = getattr(architecture, "_supports_flash_attn", False)
    return FLASH if supported and torch.device(device).type == "cuda" and is_flash_attn_2_available() else None


def uses_flash_attention(model: PreTrainedModel) -> bool:
    """Whether a model was loaded with flash-attention."""
    return model.config.get_text_config()._attn_implementation == FLASH
