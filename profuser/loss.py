"""The fused linear fusion loss, L = CE + β·KL(P_source ‖ P_target) on the winner's kept entries (arXiv 2408.04998).

Computes the loss from hidden states and the head; logits exist only a chunk at a time. With one source it is top-k
distillation, with none fused linear cross-entropy. This module checks arguments and reduces; values and gradients are
computed by kernels/fused_loss.py (on a GPU fused_loss_triton.py beside it) and derived in kernels/README.md. Alignment of
tokenizers happens before.
Dimension letters: N rows, D hidden, V vocabulary, S sources, K kept entries, B sequences.
"""

import math

import torch
from torch import Tensor, nn

from .kernels.common import (
    IGNORE_INDEX,
    check_device,
    check_head,
    check_numbers,
    check_scalars,
    check_tensors,
    choose_impl,
    compute_dtype,
)
from .kernels.fused_loss import fused_loss
from .kernels.fused_loss_types import Operands, Options
from .kernels.tails import BUCKET, TAILS

DEFAULT_BETA = 0.1 / 0.9  # FuseLLM's cross-entropy weight of 0.9, as the ratio of KD to CE

REDUCTIONS = ("mean", "sum", "none")
STATS = ("ce", "kd", "source_mass", "target_mass", "winner")


def fused_linear_fusion_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    source_ids: Tensor | None = None,
    source_logprobs: Tensor | None = None,
    *,
    source_tail: Tensor | None = None,
    source_ce: Tensor | None = None,
    source_index: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ce_weight: Tensor | None = None,
    kd_weight: Tensor | None = None,
    beta: float | None = None,
    temperature: float = 1.0,
    tail: str = BUCKET,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    chunk_size: int | None = None,
    max_chunk_bytes: int | None = None,
    impl: str | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy plus sparse KL to the winning source, without ever forming [N, V] logits.

    Row n adds ce_weight[n]·CE + kd_weight[n]·T²·KL, CE at temperature 1. Logits are softcap·tanh(logit_scale·(h Wᵀ +
    bias)/softcap), each part only when given. Differentiable once, in hidden, weight and bias, by backward: a second
    derivative is an error, forward-mode differentiation and torch.func are not supported.

    Args:
        hidden: (N, D) bf16/fp16/fp32/fp64, last hidden states; row n predicts labels[n], so they are already shifted.
        weight: (V, D) language-model head; logits, sums and its gradient are computed in fp32 (fp64 if either is fp64).
            With impl "triton" the operands of the matrix products are in hidden's dtype, or in autocast's.
        labels: (N,) int64 or int32; IGNORE_INDEX rows add nothing, whatever else they hold.
        source_ids: (S, N, K) int32 or int64 in [0, V), -1 = padding; duplicates in a row are merged by adding mass.
            None = cross-entropy alone.
        source_logprobs: (S, N, K) natural log, at `temperature`; bf16 is too coarse for the bucket, give fp16 or fp32.
        source_tail: (S, N) linear mass in [0, 1] outside the entries; the entries are scaled to sum to 1 - tail.
            Without it the tail is what the entries lack of 1. Only with tail="bucket".
        source_ce: (S, B) nats; each sequence takes its source of lowest CE (NaN and infinite = missing, ties to the
            lowest index, all missing = no KD).
        source_index: (B,) or (N,) int, the source to take instead, -1 = no KD; (B,) where B = N. Excludes source_ce; one is
            needed if S > 1.
        cu_seqlens: (B+1,) int, from 0 to N: where sequences begin; required when B > 1.
        ce_weight: (N,) weight of each row's CE, ones by default.
        kd_weight: (N,) weight of each row's KL, beta·ce_weight by default. Excludes beta.
        beta: KD weight relative to ce_weight, 0.1/0.9 by default.
        temperature: T > 0 of the KL.
        tail: "bucket": the mass outside the entries is matched as one bucket; "renormalize": it is divided out.
        bias: (V,) head bias.
        softcap, logit_scale: the model's final logit softcap and scale.
        reduction: "mean" over num_items_in_batch or the valid rows (0 when there are none), "sum", or "none": (N,).
        num_items_in_batch: divisor of "mean", for a step of several batches.
        chunk_size: rows whose logits exist at a time; chosen by V when None. max_chunk_bytes caps their bytes.
        impl: "triton" (CUDA from sm_80, or under TRITON_INTERPRET=1), "torch" (anywhere), or None: triton on CUDA unless an
            operand is fp64, else torch. Triton reads no value back, so there a value out of range gives no error: its
            row's loss is NaN. It spends time on ignored rows, torch does not.
        return_stats: also return a dict of detached tensors, (N,), unweighted and 0 where a row lacks them: ce,
            kd (= T²·KL), source_mass (kept, as given), target_mass (the target's on the kept ids, at T); and winner,
            (B,) int64, or (N,) as source_index is, -1 = none.
    Returns:
        Scalar fp32 (fp64 for fp64 inputs) in nats, or (N,) with reduction="none"; with stats, a pair.
    Raises:
        ValueError: shapes, dtypes, devices or options contradict each other; an id or label is outside the vocabulary;
            temperature <= 0; log-probabilities are positive, or exceed 1 together where the bucket is the rest; a sharded (DTensor) head.
        TypeError: something that is no tensor is given for one, or no number for a number.
    docs/mistakes.md lists likely mistakes, and two checks for those that no error can show.
    Source: arXiv 2408.04998, L_Fuse; value and gradient are derived in kernels/README.md.
    """
    check_scalars(temperature, softcap, logit_scale, chunk_size)
    check_head(hidden, weight, labels, bias)
    check_options(tail, reduction, num_items_in_batch, beta, kd_weight, max_chunk_bytes)
    dtype = compute_dtype(hidden, weight)
    fp64 = "computes in float32, got float64 operands; use impl=None, or cast them" if dtype == torch.float64 else None
    impl = choose_impl(impl, hidden.device, fp64)
    rows = hidden.shape[0]
    inputs = {
        "source_ids": source_ids, "source_logprobs": source_logprobs, "source_tail": source_tail,
        "source_ce": source_ce, "source_index": source_index, "cu_seqlens": cu_seqlens,
        "ce_weight": ce_weight, "kd_weight": kd_weight,
    }  # fmt: skip
    check_tensors(**inputs)
    _check_sources(rows, source_ids, source_logprobs, source_tail, source_ce, source_index, cu_seqlens, tail)
    for name, value in (("ce_weight", ce_weight), ("kd_weight", kd_weight)):
        if value is not None and value.shape != (rows,):
            raise ValueError(f"{name} must be (N,) = ({rows},), got {tuple(value.shape)}; give one weight per row")
    if impl == "triton" and hidden.dtype == torch.float32 and torch.is_autocast_enabled(hidden.device.type):
        # As autocast treats a linear head. Logits and dweight stay fp32; so does the weight, which the op casts.
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    check_device(hidden, **inputs)
    for name, value in inputs.items():
        if value is not None and value.requires_grad:
            raise ValueError(f"{name} must not require grad: only hidden, weight and bias get one; detach it")

    if ce_weight is None:
        ce_weight = torch.ones(rows, dtype=dtype, device=hidden.device)
    ce_weight = ce_weight.to(dtype)
    if kd_weight is None:
        kd_weight = ce_weight * (DEFAULT_BETA if beta is None else beta)
    per_row = reduction == "none"
    # Forward computes no gradient for rows that each have a grad_output of their own: backward does.
    in_forward = torch.is_grad_enabled() and not per_row
    outputs = fused_loss(
        Operands(
            hidden=hidden,
            weight=weight,
            labels=labels,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            bias=bias,
            source_ids=source_ids,
            source_logprobs=source_logprobs,
            source_tail=source_tail,
            source_ce=source_ce,
            source_index=source_index,
            cu_seqlens=cu_seqlens,
        ),
        Options(
            temperature=float(temperature),
            tail=tail,
            softcap=None if softcap is None else float(softcap),
            logit_scale=float(logit_scale),
            per_row=per_row,
            grad_hidden=in_forward and hidden.requires_grad,
            grad_weight=in_forward and weight.requires_grad,
            grad_bias=in_forward and bias is not None and bias.requires_grad,
            chunk_size=chunk_size,
            max_chunk_bytes=max_chunk_bytes,
            impl=impl,
        ),
    )
    loss = outputs.loss
    if reduction == "mean":
        # Outside the op, so that autograd carries the divisor to backward; a step without rows is 0/1.
        if num_items_in_batch is None:
            num_items_in_batch = (labels != IGNORE_INDEX).sum()
        if isinstance(num_items_in_batch, Tensor):
            loss = loss / num_items_in_batch.reshape(()).clamp(min=1)
        else:
            loss = loss / max(num_items_in_batch, 1)
    if not return_stats:
        return loss
    return loss, {name: getattr(outputs, name) for name in STATS}


def check_options(tail, reduction, num_items_in_batch, beta, kd_weight, max_chunk_bytes) -> None:
    """Raises ValueError or TypeError for an option out of range, or two that exclude each other."""
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {TAILS}, got {tail!r}; 'bucket' keeps the mass outside the top-k")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}; the default is 'mean'")
    if num_items_in_batch is not None:
        if reduction != "mean":
            raise ValueError(f"num_items_in_batch is for reduction='mean', got {reduction!r}; divide by it outside")
        if isinstance(num_items_in_batch, Tensor):
            if num_items_in_batch.numel() != 1:
                shape = tuple(num_items_in_batch.shape)
                raise ValueError(f"num_items_in_batch must be one number, got {shape}; sum it over the optimizer step")
        else:
            check_numbers(num_items_in_batch=num_items_in_batch)
            if num_items_in_batch < 0:
                raise ValueError(f"num_items_in_batch must be >= 0, got {num_items_in_batch}; count the valid labels")
    if beta is not None:
        check_numbers(beta=beta)
        if kd_weight is not None:
            raise ValueError(f"give beta or kd_weight, not both, got beta={beta} and a kd_weight; multiply it in")
        if not 0 <= beta < math.inf:
            raise ValueError(f"beta must be >= 0 and finite, got {beta}; 0 turns distillation off")
    if max_chunk_bytes is not None:
        check_numbers(whole=True, max_chunk_bytes=max_chunk_bytes)
        if max_chunk_bytes < 1:
            raise ValueError(f"max_chunk_bytes must be >= 1, got {max_chunk_bytes}; pass None for no cap")


def _check_sources(
    rows, source_ids, source_logprobs, source_tail, source_ce, source_index, cu_seqlens, tail
) -> None:  # fmt: skip
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2):
        raise ValueError(f"cu_seqlens must be (B+1,), from 0 to N, got {tuple(cu_seqlens.shape)}; cumulate the lengths")
    if cu_seqlens is not None and cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int64 or int32, got {cu_seqlens.dtype}; cast it with .int()")
    if source_ids is None:
        for name, value in (
            ("source_logprobs", source_logprobs), ("source_tail", source_tail),
            ("source_ce", source_ce), ("source_index", source_index),
        ):  # fmt: skip
            if value is not None:
                raise ValueError(f"{name} needs source_ids, got None; give both, or neither for cross-entropy alone")
        return
    if source_logprobs is None:
        raise ValueError("source_ids needs source_logprobs, got None; give both, or neither for cross-entropy alone")
    shape = tuple(source_ids.shape)
    if len(shape) != 3 or shape[1] != rows:
        if len(shape) == 2 and shape[0] == rows:
            fix = "unsqueeze(0) a single source"
        elif rows in shape:
            fix = "permute the axes into this order"
        else:
            fix = "flatten and shift the rows as hidden's"
        raise ValueError(f"source_ids must be (S, N, K) with N={rows}, got {shape}; {fix}")
    sources = shape[0]
    if sources == 0 or shape[2] == 0:
        raise ValueError(f"source_ids must hold a source and an entry, got {shape}; pass None for cross-entropy alone")
    if source_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"source_ids must be int32 or int64, got {source_ids.dtype}; cast them with .int()")
    if source_logprobs.shape != source_ids.shape:
        raise ValueError(
            f"source_logprobs must have source_ids' shape {shape}, got {tuple(source_logprobs.shape)}; "
            "take both from one top-k"
        )
    if not source_logprobs.dtype.is_floating_point:
        raise ValueError(f"source_logprobs must be floating point, got {source_logprobs.dtype}; give natural logs")
    if source_logprobs.dtype == torch.bfloat16 and tail == BUCKET and source_tail is None:
        raise ValueError(
            "source_logprobs must be float16 or wider where the bucket is what they lack of 1, got torch.bfloat16, which "
            "moves it by up to 0.0035; take log_softmax of logits.float(), or give source_tail"
        )
    if source_tail is not None:
        if tail != BUCKET:
            raise ValueError(f"source_tail needs tail='bucket', got {tail!r}; drop it: renormalizing divides it out")
        if source_tail.shape != shape[:2]:
            fix = "unsqueeze(0) that of a single source" if source_tail.dim() == 1 else "sum over K"
            raise ValueError(f"source_tail must be (S, N) = {shape[:2]}, got {tuple(source_tail.shape)}; {fix}")
    if source_ce is not None and source_index is not None:
        raise ValueError("give source_ce or source_index, not both, got both; source_index already fixes the choice")
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if source_ce is not None:
        if source_ce.dim() != 2 or source_ce.shape[0] != sources:
            if source_ce.dim() == 1:
                fix = "unsqueeze(1) that of one sequence"
            elif source_ce.dim() == 2 and source_ce.shape[1] == sources:
                fix = "transpose it"
            else:
                fix = "give a row for each source of source_ids"
            raise ValueError(f"source_ce must be (S, B) with S={sources}, got {tuple(source_ce.shape)}; {fix}")
        found, name = source_ce.shape[1], "source_ce"
    elif source_index is not None:
        if source_index.dim() != 1 or source_index.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"source_index must be (B,) or (N,) int64 or int32, got {tuple(source_index.shape)} "
                f"{source_index.dtype}; give one source number per sequence or row"
            )
        if source_index.shape[0] == rows:
            return
        found, name = source_index.shape[0], "source_index"
    else:
        if sources != 1:
            fix = "give source_ce or source_index" + (", or put K last if it stands first" if shape[2] == 1 else "")
            raise ValueError(f"with S={sources} sources a choice is needed, got none; {fix}")
        return
    if sequences is None and found != 1:
        rows_too = f", or a source for each of N={rows} rows" if name == "source_index" else ""
        raise ValueError(
            f"cu_seqlens is required when B > 1, {name} has B={found}; give the (B+1,) sequence bounds{rows_too}"
        )
    if sequences is not None and found != sequences:
        raise ValueError(f"{name} must have B={sequences} sequences as cu_seqlens, got {found}; give one per sequence")


class FusedLinearFusionLoss(nn.Module):
    """`fused_linear_fusion_loss` with its options fixed at construction; the arguments of forward are its tensors."""

    def __init__(
        self,
        *,
        beta: float | None = None,
        temperature: float = 1.0,
        tail: str = BUCKET,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        reduction: str = "mean",
        chunk_size: int | None = None,
        max_chunk_bytes: int | None = None,
        impl: str | None = None,
        return_stats: bool = False,
    ):
        super().__init__()
        check_scalars(temperature, softcap, logit_scale, chunk_size)
        check_options(tail, reduction, None, beta, None, max_chunk_bytes)
        self.options = {
            "beta": beta, "temperature": temperature, "tail": tail, "softcap": softcap, "logit_scale": logit_scale,
            "reduction": reduction, "chunk_size": chunk_size, "max_chunk_bytes": max_chunk_bytes, "impl": impl,
            "return_stats": return_stats,
        }  # fmt: skip

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        source_ids: Tensor | None = None,
        source_logprobs: Tensor | None = None,
        **tensors: Tensor | None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Shapes as in `fused_linear_fusion_loss`; `tensors`: its source_tail, source_ce, bias, num_items_in_batch …"""
        return fused_linear_fusion_loss(hidden, weight, labels, source_ids, source_logprobs, **tensors, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
