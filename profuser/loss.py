"""The fused linear fusion loss, L = CE + β·KL(P_source ‖ P_target) on the winner's kept entries (arXiv 2408.04998), and its family.

The loss is computed from hidden states and the head, and logits exist for a chunk of rows at a time only. With one source it
is top-k distillation, with none it is fused linear cross-entropy. This module checks the arguments and reduces the rows'
losses. kernels/fused_loss.py computes values and gradients, and kernels/README.md derives them. The sources must speak of
the target's tokens already: aligning tokenizers comes before.
Dimension letters: N rows, D hidden, V vocabulary, S sources, K kept entries, B sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from .kernels.common import (
    IGNORE_INDEX,
    check_device,
    check_head,
    check_scalars,
    check_tensors,
    choose_impl,
    compute_dtype,
)
from .kernels.divergences import FORWARD_KL, canonical
from .kernels.fused_loss import fused_loss
from .kernels.fused_loss_types import MIN_CE, Operands, Options
from .kernels.left_out import STATISTICS as LEFT_OUT
from .kernels.tails import BUCKET
from .kernels.vocabulary_slice import local_slice
from .loss_arguments import check_family, check_options, check_sources, check_valid_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DEFAULT_BETA = 0.1 / 0.9  # FuseLLM's cross-entropy weight of 0.9, as the ratio of KD to CE

STATS = ("ce", "kd", "source_mass", "target_mass", "winner")
ENTROPIES = ("source_entropy", "target_entropy")


class LossOptions(TypedDict, total=False):
    """The keywords of `fused_linear_fusion_loss` but return_stats, which decides what it returns.

    Only `closed=True`, of Python 3.15, would say that there are no others: hence the ignored errors below.
    """

    source_tail: Tensor | None
    source_ce: Tensor | None
    source_index: Tensor | None
    source_weight: Tensor | None
    cu_seqlens: Tensor | None
    ce_weight: Tensor | None
    kd_weight: Tensor | None
    beta: float | None
    temperature: float | Tensor
    tail: str
    divergence: str
    divergence_beta: float
    combine: str
    combine_temperature: float
    z_loss: float
    label_smoothing: float
    left_out: float
    left_out_capacity: int | None
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    reduction: str
    num_items_in_batch: int | Tensor | None
    chunk_size: int | None
    max_chunk_bytes: int | None
    valid_rows: int | None
    process_group: ProcessGroup | None
    partial_hidden_grad: bool
    impl: str | None
    entropies: bool


@overload
def fused_linear_fusion_loss(  # pyrefly: ignore[inconsistent-overload]
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    source_ids: Tensor | None = None,
    source_logprobs: Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[LossOptions],
) -> Tensor: ...


@overload
def fused_linear_fusion_loss(  # pyrefly: ignore[inconsistent-overload]
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    source_ids: Tensor | None = None,
    source_logprobs: Tensor | None = None,
    *,
    return_stats: Literal[True],
    **options: Unpack[LossOptions],
) -> tuple[Tensor, dict[str, Tensor]]: ...


@overload
def fused_linear_fusion_loss(  # pyrefly: ignore[inconsistent-overload]
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    source_ids: Tensor | None = None,
    source_logprobs: Tensor | None = None,
    *,
    return_stats: bool,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...


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
    source_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ce_weight: Tensor | None = None,
    kd_weight: Tensor | None = None,
    beta: float | None = None,
    temperature: float | Tensor = 1.0,
    tail: str = BUCKET,
    divergence: str = FORWARD_KL,
    divergence_beta: float = 0.5,
    combine: str = MIN_CE,
    combine_temperature: float = 1.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    left_out: float = 0.0,
    left_out_capacity: int | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    chunk_size: int | None = None,
    max_chunk_bytes: int | None = None,
    valid_rows: int | None = None,
    process_group: ProcessGroup | None = None,
    partial_hidden_grad: bool = False,
    impl: str | None = None,
    return_stats: bool = False,
    entropies: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy plus a divergence from sparse sources, without ever forming [N, V] logits.

    Row n adds ce_weight[n]·CE + kd_weight[n]·T²·D, with CE at temperature 1. D is the KL to the winning source, or another
    divergence, or the weighted sum of the divergences from several sources. The logits are
    softcap·tanh(logit_scale·(h Wᵀ + bias)/softcap), of which each part is there only when it is given. The loss has a gradient
    in hidden, weight and bias, by backward. A second derivative and forward-mode differentiation (torch.func.jvp) are errors; the
    rest of torch.func is not supported.

    Args:
        hidden: (N, D) bf16/fp16/fp32/fp64, last hidden states. Row n predicts labels[n]: they are already shifted.
        weight: (V, D) language-model head. Logits, sums and the weight's gradient are computed in fp32, or in fp64 if either
            is fp64. With impl "triton" the matrix products take their operands in hidden's dtype, or in autocast's.
        labels: (N,) int64 or int32. IGNORE_INDEX rows add nothing, whatever else they hold.
        source_ids: (S, N, K) int32 or int64 in [0, V), or -1 for padding. Where an id occurs twice in a row, its masses are
            added. None means cross-entropy alone.
        source_logprobs: (S, N, K) natural logarithms, at `temperature`. bf16 is too coarse for the bucket: give fp16 or fp32.
        source_tail: (S, N) linear mass in [0, 1] outside the entries, which are scaled to sum to 1 - tail. Without it the
            tail is what the entries lack of 1. Only with tail="bucket".
        source_ce: (S, B) nats. Each sequence learns from its source of lowest CE. A NaN or infinite one does not take part, of
            equal ones the first wins, and a sequence where none takes part has no KD.
        source_index: (B,) or (N,) int, the source to learn from instead, -1 for no KD; read as (B,) where B = N.
        source_weight: (S, B) or (S, N), finite and >= 0: the sources are mixed, Σ_s weight·D(source s, target), each on its own
            kept entries. The weights are taken as they are; 0 leaves a source out, whose ids and log-probabilities must be
            valid all the same. Read as (S, B) where B = N. Give one of source_ce, source_index and
            source_weight; one of them is needed if S > 1.
        cu_seqlens: (B+1,) int, from 0 to N: where sequences begin. Required when B > 1.
        ce_weight: (N,) weight of each row's CE, ones by default.
        kd_weight: (N,) weight of each row's divergence, beta·ce_weight by default. Give this or beta, not both.
        beta: KD weight relative to ce_weight, 0.1/0.9 by default.
        temperature: T > 0 of the divergence, one number, or (N,) with one for each row, which gets no gradient.
        tail: what becomes of the source's mass outside the entries. "bucket" matches it as one more entry, "renormalize"
            divides it out, "conditional" divides it out of source and target.
        divergence: D, from a source's P to the target's Q. "forward_kl" is KL(P ‖ Q), "reverse_kl" KL(Q ‖ P), "jsd" GKD's
            generalised Jensen-Shannon divergence, "skew_kl" and "skew_reverse_kl" are DistiLLM's, "tvd" is ½ Σ |P − Q|. Those
            that are infinite where a source has no mass (reverse_kl, jsd at 1, skew_reverse_kl at 0) give the bucket and the
            kept entries a mass of 1e-6 each at least, count entries below 1e-30 as outside, and are an error with
            tail="renormalize".
        divergence_beta: the β of "jsd", in [0, 1] (0 is forward_kl, 1 is reverse_kl), or the α of the skewed two, in [0, 1).
            The others do not read it.
        combine: what source_ce decides: "min_ce" chooses the source of lowest CE, "softmax" mixes them, with the weights
            softmax(−CE / combine_temperature) over the sources of each sequence.
        combine_temperature: > 0, in the units of source_ce.
        z_loss: >= 0, adds ce_weight·z_loss·lse² of the logits at temperature 1.
        left_out: the share of a chunk's gradient, by absolute value, that need not be exact, in [0, 1). 0 is the exact gradient. The
            columns of least mass that hold this share are left out of backward's products, with a rank-one matrix in their place;
            0.003 gives an error of about 1e-3 in hidden's gradient on a language model's states, as bf16 does, in less
            time. The loss stays exact. For a whole head, and with label_smoothing or a softcap, not both; by "triton" only with
            left_out_capacity.
        left_out_capacity: how many columns each chunk of rows keeps, whatever share that leaves out: the shapes do not depend on
            data, and a GPU is not waited for. At least the rows of a chunk times the kept ids and the label; a multiple of 128
            is fastest. columns_needed in the statistics is what would have been enough. None keeps what left_out needs.
        label_smoothing: ε in [0, 1): CE becomes (1 − ε)·CE + ε·(the mean of −log q over all V columns), as in torch.
        bias: (V,) head bias.
        softcap, logit_scale: the model's final logit softcap and scale.
        reduction: "sum" over the rows, "mean" (the sum over num_items_in_batch or the valid rows, 0 where there are none), or
            "none" for (N,) losses.
        num_items_in_batch: divisor of "mean", for an optimizer step of several batches.
        chunk_size: number of rows whose logits exist at a time. None chooses it by V.
        max_chunk_bytes: an upper bound on the bytes of those logits.
        valid_rows: an upper bound of the number of rows with a label, which the caller knows on the host. With it "triton" leaves
            the other rows out of its products, as "torch" always does. Where there are more labels the loss is NaN, with
            "torch" it is an error.
        process_group: the processes among which the head is divided, as in tensor parallelism: each gives its own slice of weight
            and bias, in the order of their ranks, and the same hidden states, labels and sources, whose ids are those of the
            whole vocabulary. Each gets the whole loss, and the gradient of its slice. A DTensor head that is sharded on V brings
            its group along. Computed by "torch".
        partial_hidden_grad: whether hidden's gradient stays this slice's part, for a layer that adds the parts up itself.
        impl: "triton" (CUDA from sm_80, or any device under TRITON_INTERPRET=1), "torch" (any device), or None: triton on
            CUDA unless an operand is fp64 or the head is divided, else torch. Triton never reads a value back to the host: a
            value out of range is no error there, the loss of its row is NaN. Without valid_rows it spends time on ignored
            rows, torch does not.
        return_stats: also return a dict of detached tensors. They are (N,), unweighted, and 0 for rows that have none: ce
            (without smoothing and z-loss), kd (T²·D), source_mass (of the kept entries, as given) and target_mass (the
            target's mass on the kept ids, at T); of mixed sources the weighted sum of D and the weighted mean of the masses.
            The fifth is winner, int64, (B,) or (N,) as source_index is, -1 for none; of mixed sources the heaviest. With
            left_out there are four scalars more: left_out_share of the gradient's mass, kept_share of the columns,
            hidden_error_bound, which the Frobenius norm of the error in hidden's gradient, for a grad_output of 1, exceeds with
            a probability of at most 8e-8, and columns_needed, the largest number of columns that a chunk must keep if no more
            than left_out shall be left out. They are NaN with reduction="none", where backward computes the gradient, and say
            that nothing was left out where there is no gradient.
        entropies: with return_stats also source_entropy and target_entropy, (N,) in nats: of P on the kept entries and the bucket
            (of mixed sources the weighted mean), and of the target's softmax over the whole vocabulary at temperature 1. On a
            GPU they cost some time.
    Returns:
        Scalar fp32 (fp64 for fp64 inputs) in nats, or (N,) with reduction="none". With return_stats a pair of it and the dict.
    Raises:
        ValueError: shapes, dtypes, devices or options contradict each other; an id or label is outside the vocabulary;
            temperature <= 0; log-probabilities are positive; a row's add up to more than 1 where the bucket is the rest; the
            head is a DTensor that is not sharded on V alone.
        TypeError: something that is no tensor is given for one, or no number for a number.
    docs/mistakes.md lists likely mistakes, and two checks for those that no error can show.
    Source: arXiv 2408.04998, L_Fuse; value and gradient are derived in kernels/README.md.

    Example:
        >>> import torch
        >>> from profuser import fused_linear_fusion_loss
        >>> hidden = torch.randn(6, 16, requires_grad=True)  # 6 tokens
        >>> head = torch.randn(50, 16, requires_grad=True)  # a vocabulary of 50
        >>> labels = torch.randint(50, (6,))
        >>> logprobs, ids = torch.randn(2, 6, 50).log_softmax(-1).topk(3)  # what two sources say of the same tokens
        >>> source_ce = torch.tensor([[19.0], [20.2]])  # one sequence; the first source has the lower cross-entropy
        >>> loss, stats = fused_linear_fusion_loss(
        ...     hidden, head, labels, ids, logprobs, source_ce=source_ce, beta=0.3, return_stats=True
        ... )
        >>> loss.backward()
        >>> hidden.grad.shape, stats["winner"]
        (torch.Size([6, 16]), tensor([0]))
    """
    of_row = isinstance(temperature, Tensor)
    check_scalars(1.0 if of_row else temperature, softcap, logit_scale, chunk_size)
    weight, bias, process_group = local_slice(weight, bias, process_group)
    check_head(hidden, weight, labels, bias)
    check_valid_rows(valid_rows)
    if partial_hidden_grad and process_group is None:
        raise ValueError("partial_hidden_grad needs a head that is divided, got no process_group; leave it out")
    check_options(tail, reduction, num_items_in_batch, beta, kd_weight, max_chunk_bytes)
    check_family(
        tail, divergence=divergence, divergence_beta=divergence_beta, combine=combine, combine_temperature=combine_temperature,
        z_loss=z_loss, label_smoothing=label_smoothing, left_out=left_out,
        left_out_capacity=left_out_capacity, softcap=softcap,
    )  # fmt: skip
    if combine != MIN_CE and source_ce is None:
        raise ValueError(
            f"combine={combine!r} needs source_ce, got none; give (S, B) cross-entropies, or leave combine out"
        )
    dtype = compute_dtype(hidden, weight)
    unable = None
    if dtype == torch.float64:
        unable = "computes in float32, got float64 operands; use impl=None, or cast them"
    elif process_group is not None:
        unable = "computes a whole head, got a process_group; use impl=None"
    impl = choose_impl(impl, hidden.device, unable)
    if left_out and torch.is_grad_enabled():
        if process_group is not None:
            raise ValueError(
                f"left_out must be 0 with a process_group, got {left_out}; leave it out: it is for whole heads"
            )
        if impl == "triton" and left_out_capacity is None:
            raise ValueError(
                f"left_out must be 0 with impl='triton', got {left_out}; leave it out, or give left_out_capacity, the number of "
                "columns that each chunk of rows keeps"
            )
    rows = hidden.shape[0]
    sources = {
        "source_ids": source_ids, "source_logprobs": source_logprobs, "source_tail": source_tail,
        "source_ce": source_ce, "source_index": source_index, "source_weight": source_weight, "cu_seqlens": cu_seqlens,
    }  # fmt: skip
    of_rows = {"ce_weight": ce_weight, "kd_weight": kd_weight, "temperature": temperature if of_row else None}
    check_tensors(**sources, **of_rows)
    check_sources(rows, tail, **sources)
    for name, value in of_rows.items():
        if value is not None and value.shape != (rows,):
            raise ValueError(f"{name} must be (N,) = ({rows},), got {tuple(value.shape)}; give one for each row")
        if value is not None and not value.dtype.is_floating_point and name == "temperature":
            raise ValueError(f"{name} must be floating point, got {value.dtype}; call .float()")
    if impl == "triton" and hidden.dtype == torch.float32 and torch.is_autocast_enabled(hidden.device.type):
        # As autocast does for a linear layer. Logits and the weight's gradient stay fp32. So does the weight itself, which the
        # op casts.
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    check_device(hidden, **sources, **of_rows)
    for name, value in (sources | of_rows).items():
        if value is not None and value.requires_grad:
            raise ValueError(f"{name} must not require grad: only hidden, weight and bias get one; detach it")
    for name, value in {"hidden": hidden, "weight": weight, "bias": bias, **sources, **of_rows}.items():
        # The op would drop the tangent: the derivative would be 0.
        if value is not None and value.is_floating_point() and unpack_dual(value).tangent is not None:
            raise RuntimeError(f"the fused loss has no forward-mode derivative, got a tangent of {name}; call backward")

    if ce_weight is None:
        ce_weight = torch.ones(rows, dtype=dtype, device=hidden.device)
    ce_weight = ce_weight.to(dtype)
    if kd_weight is None:
        kd_weight = ce_weight * (DEFAULT_BETA if beta is None else beta)
    per_row = reduction == "none"
    # Where each row has a grad_output of its own, it is backward that computes the gradients.
    in_forward = torch.is_grad_enabled() and not per_row
    outputs = fused_loss(
        Operands(
            hidden, weight, labels, ce_weight, kd_weight, bias, **sources, temperature_of_row=of_rows["temperature"]
        ),
        Options(
            temperature=1.0 if of_row else float(temperature),
            tail=tail,
            divergence=canonical(divergence, divergence_beta),
            divergence_beta=float(divergence_beta),
            combine=combine,
            combine_temperature=float(combine_temperature),
            z_loss=float(z_loss),
            label_smoothing=float(label_smoothing),
            left_out=float(left_out),
            left_out_capacity=left_out_capacity,
            left_out_bound=left_out != 0 and return_stats,
            softcap=None if softcap is None else float(softcap),
            logit_scale=float(logit_scale),
            entropies=entropies and return_stats,
            per_row=per_row,
            grad_hidden=in_forward and hidden.requires_grad,
            grad_weight=in_forward and weight.requires_grad,
            grad_bias=in_forward and bias is not None and bias.requires_grad,
            chunk_size=chunk_size,
            max_chunk_bytes=max_chunk_bytes,
            valid_rows=valid_rows,
            process_group=None if process_group is None else process_group.group_name,
            partial_hidden_grad=partial_hidden_grad,
            impl=impl,
        ),
    )
    loss, divisor = outputs.loss, 1
    if reduction == "mean":
        # Outside the op, so that autograd carries the divisor to backward. Without a row to count the loss is 0/1.
        if num_items_in_batch is None:
            num_items_in_batch = (labels != IGNORE_INDEX).sum()
        if isinstance(num_items_in_batch, Tensor):
            divisor = num_items_in_batch.reshape(()).to(loss.dtype)
            divisor = torch.where(divisor == 0, 1, torch.where(divisor < 0, torch.nan, divisor))
        else:
            divisor = num_items_in_batch if num_items_in_batch > 0 else 1
        loss = loss / divisor
    if not return_stats:
        return loss
    stats = {name: getattr(outputs, name) for name in STATS + (ENTROPIES if entropies else ())}
    if left_out:
        # Where each row has a loss of its own, nothing is known yet.
        said = outputs.left_out.new_full((4,), torch.nan) if per_row else outputs.left_out
        stats |= dict(zip(LEFT_OUT, said.unbind(), strict=True))
        stats["hidden_error_bound"] = stats["hidden_error_bound"] / divisor
    return loss, stats


def at_temperature(
    source_logprobs: Tensor,
    source_tail: Tensor | None,
    *,
    source_temperature: float,
    temperature: float,
    tail: str,
) -> tuple[Tensor, Tensor | None]:
    """Kept log-probabilities and tail at `source_temperature`, as the loss takes them at `temperature` with this tail.

    A softmax at T is, up to a factor of the whole row, the softmax at 1 to the power 1/T. Therefore log-probabilities change
    their temperature by a division, and RENORMALIZE and CONDITIONAL divide out the factor, with the tail: it is left out.
    BUCKET would need the factor, which the kept entries do not tell. `check_source_temperature` has refused that.
    """
    if tail != BUCKET:
        source_tail = None
    if source_temperature != temperature:
        source_logprobs = source_logprobs / (temperature / source_temperature)
    return source_logprobs, source_tail


class FusedLinearFusionLoss(nn.Module):
    """`fused_linear_fusion_loss` with its options fixed at construction. forward takes its tensors."""

    def __init__(
        self,
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
        check_family(
            tail, divergence=divergence, divergence_beta=divergence_beta, combine=combine, combine_temperature=combine_temperature,
            z_loss=z_loss, label_smoothing=label_smoothing, left_out=left_out,
            left_out_capacity=left_out_capacity, softcap=softcap,
        )  # fmt: skip
        self.options: dict[str, Any] = {
            "beta": beta, "temperature": temperature, "tail": tail, "divergence": divergence,
            "divergence_beta": divergence_beta, "combine": combine, "combine_temperature": combine_temperature,
            "z_loss": z_loss, "label_smoothing": label_smoothing, "left_out": left_out,
            "left_out_capacity": left_out_capacity, "softcap": softcap, "logit_scale": logit_scale, "reduction": reduction,
            "chunk_size": chunk_size, "max_chunk_bytes": max_chunk_bytes, "impl": impl, "return_stats": return_stats,
        }  # fmt: skip

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        source_ids: Tensor | None = None,
        source_logprobs: Tensor | None = None,
        *,
        temperature: Tensor | None = None,
        **tensors: Any,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Shapes are as in `fused_linear_fusion_loss`. `tensors` are its source_tail, source_ce, bias, num_items_in_batch …

        A `temperature` is one for each row, in place of the one that was given at construction.
        """
        options = self.options if temperature is None else self.options | {"temperature": temperature}
        return fused_linear_fusion_loss(hidden, weight, labels, source_ids, source_logprobs, **tensors, **options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
