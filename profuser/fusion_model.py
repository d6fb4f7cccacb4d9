"""The target with the fused loss inside its forward. DDP, FSDP2, torch.compile and checkpointing need loss and head in there.

Hugging Face's Trainer takes it as its model.
Dimension letters: S sources, B rows of the batch, T tokens of a row, K kept entries, N = B·(T − 1) shifted rows, E examples
(B of them, or more where rows are packed).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from profuser.errors import DataError
from profuser.kernels.common import IGNORE_INDEX, check_scalars, check_tensors
from profuser.kernels.divergences import FORWARD_KL
from profuser.kernels.fused_loss_types import MIN_CE
from profuser.kernels.tails import BUCKET
from profuser.loss import at_temperature, fused_linear_fusion_loss
from profuser.loss_arguments import check_family, check_options, check_source_temperature
from profuser.models.attention import keeps_apart
from profuser.models.head import head_layer, head_of, hidden_states

# Collators that flatten a batch may add these for the attention. They are passed on to the model.
FLATTENED = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


class FusionModel(nn.Module):
    """Wraps a causal language model: tokens, labels and source distributions go in, the loss comes out.

    Logits are never formed. What is given for a token speaks of the token that it stands at, as Hugging Face's labels do: the
    shift by one happens here. A row of the batch is one example, or several packed ones whose position_ids restart. Packed
    examples come without an attention_mask, as transformers' DataCollatorWithFlattening gives them, and none of them is
    predicted from the one before it, or attends to it.

    Whatever is not defined here is the wrapped model's: config, save_pretrained, generate and so on. A LoRA model (peft) goes
    inside: FusionModel(get_peft_model(model, …)).

    Args:
        model: the target. Its final softcap, logit scale and head bias are honoured, or else the model is refused.
        beta: as in fused_linear_fusion_loss. It counts where forward gets no kd_weight.
        temperature, tail, divergence, divergence_beta, combine, combine_temperature, z_loss, label_smoothing, left_out,
            left_out_capacity: as in fused_linear_fusion_loss. combine counts where forward gets a source_ce.
        source_temperature: the temperature of the source_logprobs that forward is given, if it is not `temperature`: 1.0 for
            those of `align` and of a store. They are then brought to `temperature`, and a source_tail that comes along is
            left out unless tail="bucket".
    Raises:
        DataError: the model's logits are not a linear head on its hidden states, or it adds a router's loss to its own.
        ValueError: an option is out of range, or source_temperature is not `temperature` and the tail is "bucket".

    Example:
        >>> import torch
        >>> from profuser import FusionModel
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        >>> fusion = FusionModel(model, beta=0.3)
        >>> input_ids = torch.randint(50, (2, 7))  # two examples of 7 tokens
        >>> logprobs, ids = torch.randn(1, 2, 7, 50).log_softmax(-1).topk(4)  # one source: (S, B, T, K)
        >>> loss = fusion(input_ids, labels=input_ids, source_ids=ids, source_logprobs=logprobs)["loss"]
        >>> loss.backward()
        >>> model.lm_head.weight.grad.shape
        torch.Size([50, 16])
    """

    accepts_loss_kwargs = True  # the Trainer passes num_items_in_batch …
    loss_type = "ForCausalLM"  # … and counts those without each row's first label, which the shift drops
    is_quantized = False  # else the Trainer looks at the wrapper for the adapters of a quantized model

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        beta: float | None = None,
        temperature: float = 1.0,
        tail: str = BUCKET,
        divergence: str = FORWARD_KL,
        divergence_beta: float = 0.5,
        combine: str = MIN_CE,
        combine_temperature: float = 1.0,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        left_out: float = 0.0,
        left_out_capacity: int | None = None,
        source_temperature: float | None = None,
    ):
        super().__init__()
        check_scalars(temperature, None, 1.0, None)
        check_options(tail, "mean", None, beta, None, None)
        if source_temperature is not None:
            check_source_temperature(source_temperature, temperature, tail)
        head = head_of(model)
        check_family(
            tail, divergence=divergence, divergence_beta=divergence_beta, combine=combine, combine_temperature=combine_temperature,
            z_loss=z_loss, label_smoothing=label_smoothing, left_out=left_out,
            left_out_capacity=left_out_capacity, softcap=head.softcap,
        )  # fmt: skip
        if getattr(model.config.get_text_config(), "output_router_logits", False):
            raise DataError(
                f"a model's loss must be its cross-entropy, {type(model).__name__} adds its router's (output_router_logits); set "
                "model.config.output_router_logits = False"
            )
        self.model = model
        # A model without weights, on the meta device, is told by whoever loads them.
        self.keeps_apart = (
            {} if head.weight.is_meta else {flattened: keeps_apart(model, flattened) for flattened in (False, True)}
        )
        self.softcap, self.logit_scale = head.softcap, head.logit_scale
        self.beta, self.temperature, self.tail, self.combine = beta, temperature, tail, combine
        self.loss_options: dict[str, Any] = {
            "divergence": divergence, "divergence_beta": divergence_beta, "combine_temperature": combine_temperature,
            "z_loss": z_loss, "label_smoothing": label_smoothing, "left_out": left_out,
            "left_out_capacity": left_out_capacity,
        }  # fmt: skip
        self.source_temperature = source_temperature
        self.register_state_dict_post_hook(drop_tied)
        self.register_load_state_dict_pre_hook(restore_tied)

    def __getattr__(self, name: str) -> Any:
        if name == "base_model":  # a trainer would use it to compute a loss of its own, as TRL's do
            raise AttributeError(
                "FusionModel's loss must be taken from its own forward, got a caller that asks for its base_model, which knows no "
                "sources; with TRL >= 1.15 set compute_loss = transformers.Trainer.compute_loss"
            )
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        source_ids: Tensor | None = None,
        source_logprobs: Tensor | None = None,
        source_tail: Tensor | None = None,
        source_ce: Tensor | None = None,
        source_index: Tensor | None = None,
        source_weight: Tensor | None = None,
        ce_weight: Tensor | None = None,
        kd_weight: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        valid_rows: int | None = None,
        reduction: str = "mean",
        return_stats: bool = False,
        **flattened: Tensor | int,
    ) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            input_ids: (B, T) int64.
            labels: (B, T) int64, not shifted, IGNORE_INDEX where nothing is learnt.
            attention_mask, position_ids: (B, T), as the model takes them.
            source_ids, source_logprobs: (S, B, T, K).
            source_tail: (S, B, T).
            source_ce: (S, E), one column per example in the order of the tokens.
            source_index: (E,), one source number per example.
            source_weight: (S, E) or (S, B, T), the weights of mixed sources, of each example or of each token.
            ce_weight, kd_weight: (B, T) fp32.
            num_items_in_batch: number of labels in the whole optimizer step, the divisor of reduction="mean". The Trainer counts
                them. Label the first tokens of packed examples IGNORE_INDEX, or it counts those, too.
            valid_rows: an upper bound of the number of labels that are predicted, which saves a GPU the others.
            reduction, return_stats: as in fused_linear_fusion_loss.
            flattened: what a flattening collator adds for the attention, cu_seq_lens_q and others, beside position_ids.

        Returns:
            {"loss": scalar}; with return_stats also the statistics of fused_linear_fusion_loss, over B·(T − 1) rows.
        Raises:
            ValueError: shapes contradict each other; examples are packed under an attention_mask, or for a model that does not
                keep them apart. For such a model position_ids are read, which waits for the device and breaks the full graph.
            TypeError: there are no labels, or an argument is not known.
            DataError: the head has got an adapter.
        """
        if labels is None:
            raise TypeError(
                "FusionModel needs labels, got none; a Trainer keeps them to itself under label_smoothing_factor or "
                "compute_loss_func: leave those out (FusionModel takes a label_smoothing of its own)"
            )
        if unknown := flattened.keys() - FLATTENED:
            raise TypeError(
                f"FusionModel.forward takes its own arguments and {sorted(FLATTENED)}, got {sorted(unknown)}; "
                "fix the name, or drop it from the batch; peft goes inside: FusionModel(get_peft_model(model, config))"
            )
        B, T = input_ids.shape
        check_tensors(source_weight=source_weight)
        weight_of_token = source_weight if source_weight is not None and source_weight.dim() != 2 else None
        for name, value, axes in (
            ("labels", labels, "(B, T)"), ("ce_weight", ce_weight, "(B, T)"), ("kd_weight", kd_weight, "(B, T)"),
            ("source_ids", source_ids, "(S, B, T, K)"), ("source_logprobs", source_logprobs, "(S, B, T, K)"),
            ("source_tail", source_tail, "(S, B, T)"),
            ("source_weight", weight_of_token, "(S, B, T)"),
        ):  # fmt: skip
            check_tokens(name, value, axes, (B, T))
        if source_ids is None and kd_weight is None and self.beta != 0 and self.training:
            warn_without_sources()
        if position_ids is None:
            if flattened:
                raise ValueError(
                    f"position_ids must come with {sorted(flattened)}, got none; let the collator return them"
                )
            begins = None
        else:
            if position_ids.dim() != 2:
                raise ValueError(f"position_ids must be (B, T), got {tuple(position_ids.shape)}; give one per token")
            begins = packed_begins(position_ids.expand(B, T), attention_mask)
            if attention_mask is None and not self.keeps_apart[bool(flattened)] and begins.any():
                raise ValueError(
                    f"a row must hold one example, got packed ones for {type(self.model).__name__}, which would let each attend "
                    "to the one before it; pad instead, or load it with an attn_implementation that keeps them apart"
                )
        hidden = hidden_states(self.model, input_ids, attention_mask, position_ids=position_ids, **flattened)
        labels = labels[:, 1:]
        if begins is not None:
            labels = labels.masked_fill(begins, IGNORE_INDEX)
        bounds = torch.arange(B + 1, device=input_ids.device) * (T - 1)
        weight_of_example = source_weight if weight_of_token is None else None
        of_example = (
            ("source_ce", source_ce, "(S, E)"), ("source_index", source_index, "(E,)"),
            ("source_weight", weight_of_example, "(S, E) or (S, B, T)"),
        )  # fmt: skip
        if begins is not None and attention_mask is None and any(choice is not None for _, choice, _ in of_example):
            # The number of examples is read from the device: a choice for other examples than these must always be an error.
            bounds = torch.cat([bounds, begins.flatten().nonzero()[:, 0]]).sort().values
        for name, choice, axes in of_example:
            if choice is not None and choice.shape[-1] != len(bounds) - 1:
                raise ValueError(
                    f"{name} must be {axes} with E={len(bounds) - 1} examples of this batch, got {tuple(choice.shape)}; give "
                    "one per example"
                )
        if self.source_temperature is not None and source_logprobs is not None:
            source_logprobs, source_tail = at_temperature(
                source_logprobs,
                source_tail,
                source_temperature=self.source_temperature,
                temperature=self.temperature,
                tail=self.tail,
            )
        head = head_layer(self.model)
        result = fused_linear_fusion_loss(
            hidden[:, :-1].flatten(0, 1),
            head.weight,
            labels.flatten(),
            *(None if x is None else x[:, :, 1:].flatten(1, 2) for x in (source_ids, source_logprobs)),
            source_tail=None if source_tail is None else source_tail[:, :, 1:].flatten(1),
            source_ce=source_ce,
            source_index=source_index,
            source_weight=source_weight if weight_of_token is None else weight_of_token[:, :, 1:].flatten(1),
            cu_seqlens=None if source_ids is None else bounds.int(),
            ce_weight=None if ce_weight is None else ce_weight[:, 1:].flatten(),
            kd_weight=None if kd_weight is None else kd_weight[:, 1:].flatten(),
            beta=self.beta if kd_weight is None else None,
            temperature=self.temperature,
            tail=self.tail,
            combine=MIN_CE if source_ce is None else self.combine,
            **self.loss_options,
            bias=getattr(head, "bias", None),
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            reduction=reduction,
            num_items_in_batch=num_items_in_batch,
            valid_rows=valid_rows,
            return_stats=return_stats,
        )
        if isinstance(result, Tensor):
            return {"loss": result}
        loss, stats = result
        return {"loss": loss, **stats}


def check_tokens(name: str, value: Tensor | None, axes: str, tokens: tuple[int, int]) -> None:
    """Raises ValueError unless `value` has these axes, with B and T of input_ids."""
    if value is None:
        return
    first = int(axes.startswith("(S"))
    if value.dim() != len(axes.split(",")) or value.shape[first : first + 2] != tokens:
        raise ValueError(
            f"{name} must be {axes} with (B, T) = {tokens} of input_ids, got {tuple(value.shape)}; give one for every "
            "token, not shifted"
        )


def packed_begins(position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, T - 1) bool: whether token t + 1 is the first of an example, by transformers' own rule.

    Raises:
        ValueError: examples are packed under a 2-D attention_mask: transformers then ignores the restarts, and every example
            would attend to the one before it. A value is read only where both arguments are given.
    """
    begins = position_ids.diff() != 1
    if attention_mask is not None and attention_mask.dim() == 2:
        real = attention_mask.bool()
        if (begins & real[:, 1:] & real[:, :-1]).any():
            raise ValueError(
                "attention_mask must be None where position_ids restart inside a row, got both; drop the attention_mask "
                "of packed examples"
            )
    return begins


def warn_without_sources() -> None:
    """Says that a training step got no source, which is mostly a collator or Trainer that has dropped the columns."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            "FusionModel got no source_ids and trains on cross-entropy alone: keep the columns (remove_unused_columns=False) and "
            "collate them; beta=0 says that this is meant",
            stacklevel=3,
        )


def tied_names(module: nn.Module) -> dict[str, str]:
    """Every further name of a parameter → its first name."""
    first: dict[int, str] = {}
    names = ((name, first.setdefault(id(p), name)) for name, p in module.named_parameters(remove_duplicate=False))
    return {name: kept for name, kept in names if name != kept}


def drop_tied(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict) -> None:
    """Leaves one name of a tied weight in a state dict: the Trainer writes it with safetensors, which takes no second one."""
    for name in tied_names(module):
        state.pop(prefix + name, None)


def restore_tied(module: nn.Module, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Gives a tied weight in a state dict its other names back."""
    for name, kept in tied_names(module).items():
        if prefix + kept in state:
            state.setdefault(prefix + name, state[prefix + kept])
