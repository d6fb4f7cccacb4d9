"""The target with the fused loss inside one root forward, which is what keeps DDP, FSDP2, compile and checkpointing right."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from profuser.loss import fused_linear_fusion_loss
from profuser.models import Head, hidden_states


class FusionModel(nn.Module):
    """Wraps a causal language model: tokens, labels and source distributions in, loss out; logits are never formed.

    Per-token inputs speak of the token they stand at, as Hugging Face labels do; the shift by one happens here. Each row of
    the batch is one sequence: packed examples are not told apart.

    Args:
        model: the target; its final softcap, logit scale and head bias are honoured (or the model is refused).
        beta, temperature, tail: as in fused_linear_fusion_loss; beta only where forward gets no kd_weight.
    Raises:
        DataError: the model's logits are not a linear head on its hidden states.
    """

    def __init__(
        self, model: PreTrainedModel, *, beta: float | None = None, temperature: float = 1.0, tail: str = "bucket"
    ):
        super().__init__()
        head = Head.of(model)
        self.model = model
        self.softcap, self.logit_scale = head.softcap, head.logit_scale
        self.beta, self.temperature, self.tail = beta, temperature, tail

    @property
    def config(self):
        return self.model.config

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        source_ids: torch.Tensor | None = None,
        source_logprobs: torch.Tensor | None = None,
        source_tail: torch.Tensor | None = None,
        source_ce: torch.Tensor | None = None,
        source_index: torch.Tensor | None = None,
        ce_weight: torch.Tensor | None = None,
        kd_weight: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        reduction: str = "mean",
        return_stats: bool = False,
    ):
        """Args:
            input_ids, labels: (B, T) int64, labels unshifted, IGNORE_INDEX where nothing is learnt.
            source_ids, source_logprobs: (S, B, T, K); source_tail: (S, B, T); source_ce: (S, B); source_index: (B,).
            ce_weight, kd_weight: (B, T) fp32.

        Returns:
            {"loss": scalar}; with return_stats also the statistics of fused_linear_fusion_loss, over B * (T - 1) rows.
        """
        hidden = hidden_states(self.model, input_ids, attention_mask)
        B, T = input_ids.shape
        labels = labels[:, 1:]
        head = self.model.get_output_embeddings()
        sources = {}
        if source_ids is not None:
            S, K = source_ids.shape[0], source_ids.shape[-1]
            sources = {
                "source_ids": source_ids[:, :, 1:].reshape(S, -1, K),
                "source_logprobs": source_logprobs[:, :, 1:].reshape(S, -1, K),
                "source_tail": None if source_tail is None else source_tail[:, :, 1:].reshape(S, -1),
                "source_ce": source_ce,
                "source_index": source_index,
                "cu_seqlens": torch.arange(B + 1, device=input_ids.device, dtype=torch.int32) * (T - 1),
            }
        result = fused_linear_fusion_loss(
            hidden[:, :-1].reshape(-1, hidden.shape[-1]),
            head.weight,
            labels.reshape(-1),
            sources.pop("source_ids", None),
            sources.pop("source_logprobs", None),
            **sources,
            ce_weight=None if ce_weight is None else ce_weight[:, 1:].reshape(-1),
            kd_weight=None if kd_weight is None else kd_weight[:, 1:].reshape(-1),
            beta=self.beta if kd_weight is None else None,
            temperature=self.temperature,
            tail=self.tail,
            bias=getattr(head, "bias", None),
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            reduction=reduction,
            num_items_in_batch=num_items_in_batch,
            return_stats=return_stats,
        )
        loss, stats = result if return_stats else (result, {})
        return {"loss": loss, **stats}
