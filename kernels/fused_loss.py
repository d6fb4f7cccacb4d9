"""Cross-entropy plus KL to the winning source's kept entries, without [N, V] logits: the op and its plain-torch path.

The op dispatches to `fused_loss_torch` below or to fused_loss_triton.py, which computes the same on a GPU.

Every term's gradient in the logits is row scalars × softmax − a sparse vector (derived in README.md), so one dense
pass per chunk serves them all: the kept ids and the gold id are lifted out of the logits, −inf takes their place, the
rest is exponentiated and scaled by one number per row, and the few lifted entries are written back. The gradients are
computed in forward (three GEMMs) and scaled by grad_output in backward; only per-row output recomputes them.
First order only: there is no double backward. Arguments are checked by profuser/loss.py; here only values are.
Dimension letters: N rows (n valid), C rows of a chunk, D hidden, V vocabulary, S sources, K kept entries, B sequences.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .common import (
    IGNORE_INDEX,
    LOGPROB_SLACK,
    LOWEST,
    MASS_SLACK,
    TAIL_SLACK,
    check_label_values,
    chunk_rows,
    compute_dtype,
    cross_entropy_from_sums,
)
from .head import ChunkedHead, Head

TINY = 1e-38


def choose_winner(
    labels: Tensor,
    source_ids: Tensor | None,
    source_ce: Tensor | None,
    source_index: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Winning source per sequence (per row when source_index is) and per row; -1 = no distillation.

    Min-CE: the lowest finite CE; NaN and infinite lose, ties go to the lowest index, nothing finite = -1.
    """
    if source_index is not None:
        winner = source_index.long()
    elif source_ce is not None:
        ce = torch.where(source_ce.isfinite(), source_ce, torch.inf)
        lowest, winner = ce.min(0).values, ce.argmin(0)  # argmin, unlike min's index, promises the first of equals
        winner = winner.masked_fill(lowest == torch.inf, -1)
    else:
        sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        winner = torch.full((sequences,), -1 if source_ids is None else 0, dtype=torch.int64, device=labels.device)
    if source_ids is None:
        return winner, None
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if winner.shape[0] != sequences:
        return winner, winner
    if sequences == 1:
        return winner, winner.expand(labels.shape)
    row = torch.arange(len(labels), device=winner.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row.to(cu_seqlens.dtype), right=True)
    # Bounds that end before the last row are an error where values may be read; -2 marks it where they may not.
    return winner, torch.nn.functional.pad(winner, (0, 1), value=-2)[sequence]


class Kept(NamedTuple):
    """The winner's distribution of n rows, ready for the chunks: unique ids, and p that sums to 1 - t."""

    ids: Tensor  # (n, K) int64, -1 = no entry
    p: Tensor  # (n, K), 0 where there is no entry
    log_p: Tensor  # (n, K), 0 where p is 0
    t: Tensor  # (n,) mass of the bucket outside the ids
    t_log_t: Tensor  # (n,)
    mass: Tensor  # (n,) kept mass as it was given
    present: Tensor  # (n,) bool: the row has a KD term


def prepare_kept(
    rows: Tensor,
    row_winner: Tensor,
    source_ids: Tensor,
    source_logprobs: Tensor,
    source_tail: Tensor | None,
    bucket: bool,
    vocabulary: int,
    dtype: torch.dtype,
) -> Kept:
    """Reads the winner's entries of `rows`, merges duplicate ids and settles the tail. Needs no logits.

    In fp64, as (n, K) numbers cost nothing: t = 1 - M of a peaked source would have lost its digits in fp32.
    """
    winner = row_winner[rows]
    source = winner.clamp_min(0)
    ids = source_ids[source, rows].long().masked_fill((winner < 0)[:, None], -1)
    log_p = source_logprobs[source, rows].double().masked_fill(ids < 0, -torch.inf)
    top = log_p.amax(1).clamp_min(LOWEST)  # p relative to the largest: renormalised, e^-800 counts as well
    p = (log_p - top[:, None]).exp()

    # Equal ids become neighbours; each run's mass is added into one slot.
    ids, order = ids.sort(1)
    p = p.gather(1, order)
    run = torch.zeros_like(ids)
    torch.cumsum(ids[:, 1:] != ids[:, :-1], 1, out=run[:, 1:])
    p = torch.zeros_like(p).scatter_add_(1, run, p)
    ids = torch.full_like(ids, -1).scatter_(1, run, ids)

    relative = p.sum(1)
    mass = relative * top.exp()
    present = relative != 0  # true for NaN: a poisoned source must show in the loss
    ids = ids.masked_fill(~present[:, None], -1)
    if not bucket:
        t = torch.zeros_like(mass)
    elif source_tail is None:
        over = mass > 1 + MASS_SLACK
        if over.any():
            raise ValueError(
                "source_logprobs must be natural log-probabilities of one distribution, a row's add up to a mass of "
                f"{mass[over][0].item():.4g}; take log_softmax over the whole vocabulary (after / T), and pad with the id -1"
            )
        t = (1 - mass).clamp_min(0)
    else:
        t = source_tail[source, rows].double()
        outside = ~((t >= -TAIL_SLACK) & (t <= 1 + TAIL_SLACK))  # true for NaN
        if (outside & present).any():
            raise ValueError(
                f"source_tail must be linear mass in [0, 1], got {t[outside & present][0].item():.6g}; "
                "take exp() of a log-mass"
            )
        t = t.clamp(0, 1)
    # No column outside the ids could take a tail: it is rounding, and p is renormalised.
    t = t.masked_fill(~present | ((ids >= 0).sum(1) == vocabulary), 0)
    p = p * ((1 - t) / relative.where(present, torch.ones_like(relative)))[:, None]
    log_p = torch.where(p == 0, 0, p.log())
    return Kept(ids, *(x.to(dtype) for x in (p, log_p, t, torch.xlogy(t, t), mass)), present)


def check_values(
    labels: Tensor,
    vocabulary: int,
    source_ids: Tensor | None,
    source_logprobs: Tensor | None,
    source_index: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raises ValueError for values out of range. Ignored rows may hold anything."""
    check_label_values(labels, vocabulary)
    if cu_seqlens is not None:
        rows = labels.shape[0]
        bad = (cu_seqlens[0] != 0) | (cu_seqlens[-1] != rows) | (cu_seqlens.diff() < 0).any()
        if bad:
            raise ValueError(
                f"cu_seqlens must rise from 0 to N={rows}, got {cu_seqlens.tolist()[:8]}; cumulate the sequence lengths"
            )
    if source_ids is None:
        return
    if source_index is not None:
        sources = source_ids.shape[0]
        bad = (source_index < -1) | (source_index >= sources)
        if bad.any():
            raise ValueError(
                f"source_index must be in [0, {sources}) or -1 for no distillation, got {source_index[bad][0].item()}; "
                "number the sources as source_ids does"
            )
    valid = (labels != IGNORE_INDEX)[:, None]
    bad = (source_ids >= vocabulary) | (source_ids < -1)
    # Two steps: the rows' mask is only worth reading when something is out of range.
    if bad.any() and (bad := bad & valid).any():
        raise ValueError(
            f"source_ids must be < {vocabulary} (the target's vocabulary) and >= -1 (padding), "
            f"got {source_ids[bad][0].item()}; map the source's tokens to this target's tokenizer"
        )
    bad = source_logprobs > LOGPROB_SLACK
    if bad.any() and (bad := bad & valid & (source_ids >= 0)).any():
        raise ValueError(
            f"source_logprobs must be natural log-probabilities <= 0, got {source_logprobs[bad][0].item():.6g}; "
            "take log() of probabilities, log_softmax() of logits"
        )


def fused_loss_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    source_ids: Tensor | None,
    source_logprobs: Tensor | None,
    source_tail: Tensor | None,
    source_ce: Tensor | None,
    source_index: Tensor | None,
    cu_seqlens: Tensor | None,
    ce_weight: Tensor,
    kd_weight: Tensor,
    temperature: float,
    bucket: bool,
    softcap: float | None,
    logit_scale: float,
    per_row: bool,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
    chunk_size: int | None,
    max_chunk_bytes: int | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns loss (scalar, or (N,) when per_row), dhidden, dweight, dbias for grad_output = 1 (empty unless asked for;
    in the compute dtype, or fp16 would lose what grad_output scales up), ce, kd, source_mass, target_mass (N,) and winner."""
    if not (impl == "triton" and hidden.is_cuda):  # there a check would wait for the device: the row becomes NaN
        check_values(labels, weight.shape[0], source_ids, source_logprobs, source_index, cu_seqlens)
    winner, row_winner = choose_winner(labels, source_ids, source_ce, source_index, cu_seqlens)
    if impl == "triton":
        from .fused_loss_triton import fused_loss_triton as compute  # not before: without a GPU there may be no triton
    else:
        compute = fused_loss_torch
    results = compute(
        hidden, weight, bias, labels, row_winner, source_ids, source_logprobs, source_tail, ce_weight, kd_weight,
        temperature, bucket, softcap, logit_scale, per_row, grad_hidden, grad_weight, grad_bias,
        chunk_size, max_chunk_bytes,
    )  # fmt: skip
    return *results, winner.clone()  # an op's output may not be its input


fused_loss = torch.library.custom_op("profuser::fused_loss", mutates_args=())(fused_loss_forward)


@torch.no_grad()
def fused_loss_torch(
    hidden, weight, bias, labels, row_winner, source_ids, source_logprobs, source_tail, ce_weight, kd_weight,
    temperature, bucket, softcap, logit_scale, per_row, grad_hidden, grad_weight, grad_bias,
    chunk_size, max_chunk_bytes,
):  # fmt: skip
    """The op in plain torch, chunk by chunk, for any device; row_winner (N,) as from `choose_winner`."""
    N, D = hidden.shape
    V = weight.shape[0]
    dtype = compute_dtype(hidden, weight)
    rows = (labels != IGNORE_INDEX).nonzero()[:, 0]
    n = rows.shape[0]
    gold = labels[rows].long()
    a, b = ce_weight[rows].to(dtype), kd_weight[rows].to(dtype)
    kept = None
    if source_ids is not None:
        kept = prepare_kept(rows, row_winner, source_ids, source_logprobs, source_tail, bucket, V, dtype)
        b = torch.where(kept.present, b, 0)

    C = chunk_rows(n, V, dtype.itemsize, chunk_size, max_chunk_bytes)
    head = ChunkedHead(Head(weight, bias, softcap, logit_scale), dtype, C)
    need_grad = grad_hidden or grad_weight or grad_bias
    scratch = hidden.new_empty(min(C, n), V, dtype=dtype)
    # The softmax at T and tanh's derivative are further [C, V] buffers, only where they are needed.
    scratch_T = torch.empty_like(scratch) if kept is not None and temperature != 1 else None
    slope = torch.empty_like(scratch) if softcap is not None and need_grad else None

    dhidden = hidden.new_zeros(N, D, dtype=dtype) if grad_hidden else hidden.new_empty(0, dtype=dtype)
    dweight = weight.new_zeros(V, D, dtype=dtype) if grad_weight else weight.new_empty(0, dtype=dtype)
    dbias = weight.new_zeros(V, dtype=dtype) if grad_bias else weight.new_empty(0, dtype=dtype)
    ce, kd, source_mass, target_mass = (hidden.new_zeros(N, dtype=dtype) for _ in range(4))
    terms = hidden.new_zeros(N if per_row else n, dtype=dtype)

    for begin in range(0, n, C):
        chunk = slice(begin, min(begin + C, n))
        # Without ignored rows a slice does, and nothing is copied.
        at = chunk if n == N else rows[chunk]
        h = hidden[at].to(dtype)
        slope_c = slope if slope is None else slope[: h.shape[0]]
        z = head.logits_into(scratch[: h.shape[0]], h, slope_c)
        chunk_kept = None if kept is None else Kept(*(x[chunk] for x in kept))
        # The gradient leaves through logit_scale, a factor of every row scalar.
        ce_c, kd_c, mass_c = chunk_losses(
            z,
            scratch_T if scratch_T is None else scratch_T[: h.shape[0]],
            gold[chunk],
            chunk_kept,
            a[chunk] * logit_scale,
            b[chunk] * logit_scale,
            temperature,
            need_grad,
        )
        term = a[chunk] * ce_c
        ce[at] = ce_c
        if kept is not None:
            term = term + b[chunk] * kd_c
            kd[at], target_mass[at], source_mass[at] = kd_c, mass_c, chunk_kept.mass
        terms[at if per_row else chunk] = term
        if need_grad:
            if slope_c is not None:
                z.mul_(slope_c)
            if grad_hidden:
                dhidden[at] = head.pull_back(z)
            if grad_weight:
                dweight.addmm_(z.t(), h)
            if grad_bias:
                dbias.add_(z.sum(0))
    loss = terms if per_row else terms.sum()
    return loss, dhidden, dweight, dbias, ce, kd, source_mass, target_mass


def chunk_losses(
    z: Tensor,
    scratch_T: Tensor | None,
    gold: Tensor,
    kept: Kept | None,
    a: Tensor,
    b: Tensor,
    temperature: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, T²·KL and the target's mass on the kept ids (C,); turns z (C, V) into its gradient in place.

    Sums of exp are held relative to a maximum of their own part (the columns outside the lifted ids, or those outside
    the kept ids), and joined relative to the row's, so that neither q_rest nor 1 - q_gold is ever a difference.
    """
    T = temperature
    gold = gold[:, None]
    if kept is None:
        lifted = gold
    else:
        entry = kept.ids >= 0
        lifted = torch.cat([torch.where(entry, kept.ids, gold), gold], 1)  # absent slots point at the gold id
    z_lifted = z.gather(1, lifted)
    z.scatter_(1, lifted, -torch.inf)
    m_dense = z.amax(1, keepdim=True).clamp_min_(LOWEST)
    z.sub_(m_dense)
    if scratch_T is not None:
        sum_dense_T = torch.mul(z, 1 / T, out=scratch_T).exp_().sum(1, keepdim=True)
    sum_dense = z.exp_().sum(1, keepdim=True)
    if scratch_T is None:
        sum_dense_T = sum_dense

    m = torch.maximum(m_dense, z_lifted.amax(1, keepdim=True))
    below = z_lifted - m
    e = below.exp()
    e_gold = e[:, -1:]
    shrink = (m_dense - m).exp()
    others = sum_dense * shrink
    if kept is not None:
        apart = entry & (kept.ids != gold)  # kept ids other than the gold id
        others = others + (e[:, :-1] * apart).sum(1, keepdim=True)
    total = others + e_gold
    ce = cross_entropy_from_sums(others, e_gold, below[:, -1:])[:, 0]

    a = a[:, None]
    if kept is None:
        if need_grad:
            z.mul_(a * shrink / total).scatter_(1, gold, -a * others / total)
        return ce, torch.zeros_like(ce), torch.zeros_like(ce)

    # The same at temperature T, for the kept ids against everything outside them; the gold id may be on either side.
    gold_kept = (entry & ~apart).any(1, keepdim=True)
    z_gold = z_lifted[:, -1:]
    e_T, shrink_T = (e, shrink) if T == 1 else ((below / T).exp(), ((m_dense - m) / T).exp())
    m_rest = torch.where(gold_kept, m_dense, torch.maximum(m_dense, z_gold))
    dense_in_rest = ((m_dense - m_rest) / T).exp()
    gold_in_rest = torch.where(gold_kept, 0, ((z_gold - m_rest) / T).exp())
    rest = (sum_dense_T * dense_in_rest + gold_in_rest).clamp_min_(TINY)
    mass_kept = (e_T[:, :-1] * entry).sum(1, keepdim=True)
    total_T = mass_kept + rest * ((m_rest - m) / T).exp()
    log_total_T = total_T.log()
    log_q = below[:, :-1] / T - log_total_T
    log_q_rest = (m_rest - m) / T + rest.log() - log_total_T
    t = kept.t[:, None]
    # p = 0 drops the term by name: its log q may be -inf.
    kl = torch.where(kept.p == 0, 0, kept.p * (kept.log_p - log_q)).sum(1) + kept.t_log_t - (t * log_q_rest)[:, 0]
    kd = T * T * kl  # 0 without an entry: p and t are
    if need_grad:
        b = b[:, None] * T
        # Outside the kept ids b·T·(q − t·q/q_rest); dividing by the rest's own sum survives a q_rest that underflows.
        alpha_dense = shrink_T / total_T - t * dense_in_rest / rest
        alpha_gold = e_T[:, -1:] / total_T - t * gold_in_rest / rest
        grad_kept = a * (e[:, :-1] / total) + b * (e_T[:, :-1] / total_T - kept.p)
        p_gold = (kept.p * ~apart).sum(1, keepdim=True)
        kd_gold = torch.where(gold_kept, e_T[:, -1:] / total_T - p_gold, alpha_gold)
        grad_gold = b * kd_gold - a * (others / total)
        if scratch_T is None:
            z.mul_(a * shrink / total + b * alpha_dense)
        else:
            z.mul_(a * shrink / total).add_(scratch_T.mul_(b * alpha_dense))
        # Every slot that points at the gold id writes the same value.
        z.scatter_(1, lifted, torch.cat([torch.where(apart, grad_kept, grad_gold), grad_gold], 1))
    return ce, kd, (mass_kept / total_T)[:, 0]


@fused_loss.register_fake
def _(
    hidden, weight, bias, labels, source_ids, source_logprobs, source_tail, source_ce, source_index, cu_seqlens,
    ce_weight, kd_weight, temperature, bucket, softcap, logit_scale, per_row, grad_hidden, grad_weight, grad_bias,
    chunk_size, max_chunk_bytes, impl,
):  # fmt: skip
    N = hidden.shape[0]
    V, D = weight.shape
    dtype = compute_dtype(hidden, weight)
    if source_index is not None:
        winners = source_index.shape[0]
    elif source_ce is not None:
        winners = source_ce.shape[1]
    else:
        winners = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        hidden.new_empty((N,) if per_row else (), dtype=dtype),
        hidden.new_empty((N, D) if grad_hidden else (0,), dtype=dtype),
        weight.new_empty((V, D) if grad_weight else (0,), dtype=dtype),
        weight.new_empty((V,) if grad_bias else (0,), dtype=dtype),
        *(hidden.new_empty(N, dtype=dtype) for _ in range(4)),
        hidden.new_empty(winners, dtype=torch.int64),
    )


def _setup_context(ctx, inputs, output):
    tensors, options = inputs[:12], inputs[12:]
    _, dhidden, dweight, dbias, *stats = output
    ctx.mark_non_differentiable(dhidden, dweight, dbias, *stats)
    ctx.set_materialize_grads(False)
    hidden, weight, bias = inputs[:3]
    ctx.options = options
    ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
    if options[4]:  # per_row: each row has a grad_output of its own, which no stored sum can be scaled by
        ctx.save_for_backward(*tensors)
    else:
        ctx.save_for_backward(dhidden, dweight, dbias)


def _backward(ctx, grad_loss, *unused):
    none = (None,) * 20
    if torch.is_grad_enabled():  # the gradients are data here, not a graph: a penalty on them would be dropped silently
        raise RuntimeError("the fused loss has no second derivative, got create_graph=True; call backward without it")
    if grad_loss is None:
        return None, None, None, *none
    temperature, bucket, softcap, logit_scale, per_row, _, _, _, chunk_size, max_chunk_bytes, impl = ctx.options
    needs = ctx.needs_input_grad[:3]
    if per_row:
        *tensors, ce_weight, kd_weight = ctx.saved_tensors
        _, *grads = fused_loss(
            *(None if x is None else x.detach() for x in tensors), ce_weight * grad_loss, kd_weight * grad_loss,
            temperature, bucket, softcap, logit_scale, False, *needs, chunk_size, max_chunk_bytes, impl,
        )[:4]  # fmt: skip
    else:
        grads = ctx.saved_tensors
    grads = zip(grads, needs, ctx.dtypes, strict=True)
    if per_row:
        return *(grad.to(dtype) if need else None for grad, need, dtype in grads), *none
    return *(_scaled(grad, grad_loss, dtype) if need else None for grad, need, dtype in grads), *none


def _scaled(grad: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """grad · grad_loss as a new tensor: a second backward may follow.

    Multiplied in fp32: beside a bf16 gradient a grad_output of 1/N may itself be rounded to bf16, scaling all of it.
    Written in its final dtype: an fp32 product as large as the head would be a copy too many.
    """
    return torch.mul(grad.to(grad_loss.dtype), grad_loss.detach(), out=torch.empty_like(grad, dtype=dtype))


fused_loss.register_autograd(_backward, setup_context=_setup_context)
