"""Which implementation of attention a model uses, whether it keeps packed sequences apart, and how they are therefore laid out."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    DataCollatorWithFlattening,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import is_flash_attn_2_available

from profuser.models.head import FLASH, evaluating, hidden_states, in_its_precision, uses_flash_attention
from profuser.models.packing import Layout


def flash_attention(config: PreTrainedConfig, device: torch.device | str) -> str | None:
    """Returns FLASH where flash-attn is installed, and can be used for such a model on this device; else None."""
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    supported = getattr(architecture, "_supports_flash_attn", False)
    return FLASH if supported and torch.device(device).type == "cuda" and is_flash_attn_2_available() else None


def packed_layout(model: PreTrainedModel, apart: bool, budget: int) -> tuple[Layout, str]:
    """Returns how a model's sequences are laid into passes of `budget` tokens, and what a user is told of it.

    Args:
        apart: what `keeps_apart` says of the model with its own attention.
    """
    if not apart:
        return "padded", f"padded and not packed: {type(model).__name__} would let each see the one before it"
    if uses_flash_attention(model):
        return "flat", f"packed into passes of {budget:,} tokens, flash-attention over the bounds of the sequences"
    return "packed", f"packed into passes of {budget:,} tokens, attention with a mask of blocks"


def keeps_apart(model: PreTrainedModel, flattened: bool) -> bool:
    """Whether packed examples see nothing of those before them: many architectures ignore the restarts of position_ids.

    It is found by the gradient of the second examples' hidden states in the embeddings of the first, which must be exactly 0.

    Args:
        flattened: whether a batch is one row and comes with what a flattening collator adds. Else it has two rows, whose examples
            begin at different places.
    """
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=flattened, return_seq_idx=flattened)
    embedding = cast("nn.Embedding", model.get_input_embeddings())
    begins = [4] if flattened else [4, 3]  # where the second example of each row begins
    ids = [token % embedding.weight.shape[0] for token in range(1, 9)]
    rows = [collate([{"input_ids": ids[:n]}, {"input_ids": ids[n:]}], return_tensors="pt") for n in begins]
    joined = {name: torch.cat([cast("Tensor", row[name]) for row in rows]) for name in ("input_ids", "position_ids")}
    batch: dict[str, Any] = rows[0] | joined
    batch = {k: x.to(model.device) if isinstance(x, Tensor) else x for k, x in batch.items() if k != "labels"}
    embedded: list[Tensor] = []

    def embed(layer: nn.Module, args: Any, out: Tensor) -> Tensor:
        embedded.append(out.detach().requires_grad_())
        return embedded[-1]

    hook = embedding.register_forward_hook(embed)
    try:
        with evaluating(model), torch.enable_grad(), in_its_precision(model):
            hidden = hidden_states(model, attention_mask=None, **batch)
            second = torch.cat([of_row[begin:] for of_row, begin in zip(hidden, begins, strict=True)])
            (grad,) = torch.autograd.grad(second.float().square().sum(), embedded[:1])
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model that takes no position_ids, or lacks what these kernels need; each raises its own kinds
        return False
    finally:
        hook.remove()
    return not any(of_row[:begin].any() for of_row, begin in zip(grad, begins, strict=True))
