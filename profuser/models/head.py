"""Takes a causal language model apart into what computes its hidden states and the head that turns these into logits.

The model is used as `hidden = base(input_ids)` and `logits = head(hidden)`, so that the logits of a whole batch need never
exist at once. A final softcap, a logit scale and a bias belong to the head; `head_of` reads them from the model's
configuration. It compares the result with the model's own logits once, and refuses a model that it cannot reproduce.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from profuser.errors import DataError
from profuser.kernels.head import Head

FLASH = "flash_attention_2"
"""transformers' name of the implementation that takes the bounds of sequences and computes nothing between them."""


def head_of(model: PreTrainedModel) -> Head:
    """Returns the head of a causal language model, after checking it against the model's own logits.

    Raises:
        DataError: the model is not a decoder with a plain head, or its hidden states and this head do not give its logits.
        TypeError: `model` is not a loaded model.
    """
    if not (isinstance(model, nn.Module) and hasattr(model, "config")):
        raise TypeError(
            f"a model must be a loaded one, not wrapped, got {type(model).__name__}; AutoModelForCausalLM.from_pretrained "
            "loads it"
        )
    if model.config.is_encoder_decoder:
        raise DataError(f"a model must be a decoder only, {type(model).__name__} has an encoder; use another model")
    layer = head_layer(model)

    # Model families have different names for the factor of the logits and for their softcap.
    config = model.config.get_text_config()
    scale = 1.0
    for key in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if isinstance(value := getattr(config, key, None), int | float):
            scale = float(value)
    if scaling := getattr(config, "logits_scaling", None):  # a divisor in every family but one
        scale = float(scaling) if config.model_type == "hyperclovax" else scale / float(scaling)
    softcaps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    softcap = next((cap for key in softcaps if (cap := getattr(config, key, None))), None)
    head = Head(layer.weight, getattr(layer, "bias", None), softcap, scale)
    if not layer.weight.is_meta:  # a model without weights is checked where they are
        with evaluating(model):
            check_head_logits(head, model, layer)
    return head


def uses_flash_attention(model: PreTrainedModel) -> bool:
    """Whether a model was loaded with flash-attention."""
    return model.config.get_text_config()._attn_implementation == FLASH


def in_its_precision(model: PreTrainedModel) -> torch.autocast:
    """The autocast in which a model can be tried: flash-attention computes in 16 bits only, as it will under the trainer's autocast."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=uses_flash_attention(model))


@torch.no_grad()
def check_head_logits(head: Head, model: PreTrainedModel, layer: nn.Linear) -> None:
    """Raises DataError unless `head`, which was read from `layer` and the model's config, gives the model's own logits."""
    # Our logits of eight tokens, computed in fp32.
    ids = torch.arange(1, 9, device=model.device)[None] % head.weight.shape[0]
    with in_its_precision(model):
        hidden = hidden_states(model, ids, None).to(head.weight.device)
    product = hidden.float() @ head.weight.float().T
    product = product if head.bias is None else product + head.bias.float()
    # The products are enlarged so that the largest is 50: the small logits of an untrained model would not show a softcap.
    most = min(torch.finfo(dtype).max for dtype in (head.weight.dtype, product.dtype))
    enlarge = (50 / product.abs().max()).clamp(max=most / 2)
    ours = head.logit_scale * enlarge * product
    ours = ours if head.softcap is None else head.softcap * torch.tanh(ours / head.softcap)

    # The model's own logits. A hook enlarges the output of its head by the same factor.
    hook = layer.register_forward_hook(lambda layer, args, out: out * enlarge.to(out))
    try:
        with in_its_precision(model):
            own = model(input_ids=ids, use_cache=False).logits.to(product.device).float()
    finally:
        hook.remove()

    # The two must be finite, of equal shape, and equal up to rounding.
    if not own.isfinite().all():
        raise DataError(
            f"a model's logits must be finite, {type(model).__name__}'s are not; its weights are damaged, or too large for "
            f"{model.dtype}"
        )
    if own.shape[-1] != ours.shape[-1]:
        raise DataError(
            f"a model must give one logit per row of its head, {type(model).__name__} gives {own.shape[-1]} for "
            f"{ours.shape[-1]}; use another model"
        )
    if own.shape != ours.shape:
        raise DataError(
            f"a model must give one row of logits per token, {type(model).__name__} gives {own.shape[1]} for "
            f"{ours.shape[1]}; prompt tuning is not supported, use LoRA"
        )
    coarsest = torch.bfloat16 if uses_flash_attention(model) else head.weight.dtype
    rounding = max(8 * torch.finfo(coarsest).eps, 1e-3)
    if not torch.allclose(own, ours, rtol=0, atol=rounding * own.abs().max().item()):
        raise DataError(
            f"a model's logits must be softcap·tanh(scale·head(hidden)/softcap) as its config says, "
            f"{type(model).__name__}'s differ by {(own - ours).abs().max():.3g}; use another model"
        )


def head_layer(model: PreTrainedModel) -> nn.Linear:
    """Returns the linear layer that computes a model's logits.

    Raises:
        DataError: the model has no such layer, the layer is quantised, or an adapter was added to it.
    """
    layer: Any = model.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise DataError(
            f"a model must have a linear language-model head, {type(model).__name__} has none; use another model"
        )
    if not weight.dtype.is_floating_point:
        raise DataError(
            f"a head must be floating point, {type(model).__name__}'s is {weight.dtype}; leave lm_head unquantised"
        )
    if hasattr(layer, "base_layer"):
        raise DataError(
            "a head must be one linear layer, this one has an adapter, which the fused loss would not see; take lm_head out "
            "of LoRA's target_modules, or train it whole with modules_to_save=['lm_head']"
        )
    return layer


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Puts all modules of a model into evaluation mode, and each back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def hidden_states(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, **inputs: Any
) -> torch.Tensor:
    """Returns the last hidden states (B, T, D) of a causal language model without computing its logits.

    Raises:
        DataError: the model does not say which part of it is the model without its head.
    """
    inputs = {name: value for name, value in inputs.items() if value is not None}  # not every model takes every input
    out = without_head(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs)
    return out.last_hidden_state


def without_head(model: PreTrainedModel) -> nn.Module:
    """Returns the part of a causal language model that computes its hidden states.

    Raises:
        DataError: the model does not say which part that is.
    """
    unwrap: Any = getattr(model, "get_base_model", None)
    if unwrap is not None:  # peft wraps a model whose layers hold the adapters, so nothing is lost without the wrapper
        model = unwrap()
    if model.base_model is model:
        raise DataError(
            f"a model must be a base model and a head, {type(model).__name__} names no base model; use another model"
        )
    return model.base_model
