"""The fused loss in plain torch, chunk by chunk, for any device and dtype.

Each term's gradient in a row's logits is a number per row times the softmax, minus a vector of few entries (README.md
derives it). Therefore one dense pass over a chunk of logits serves all terms:
- the kept ids and the gold id, the label, are *lifted*: their logits are read, and −inf takes their place;
- all other logits are exponentiated, summed, and later multiplied by one number per row: that is their gradient;
- the losses, and the gradients at the few lifted ids, are computed from the sums and written back.

Dimension letters: N rows, n rows with a label, C rows of a chunk, D hidden, V vocabulary, S sources, K kept entries.
The formula's letters, as in README.md: z logits, h hidden states, m a maximum of logits, e = exp(z − m), a and b the rows'
weights of CE and KD, p the source's distribution on the kept ids, t its tail, T the temperature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .common import (
    IGNORE_INDEX,
    LOWEST,
    MASS_SLACK,
    TAIL_SLACK,
    chunk_rows,
    compute_dtype,
    cross_entropy_from_sums,
)
from .fused_loss_types import Operands, Options, Outputs, Winner
from .head import ChunkedHead, Head
from .tails import RENORMALIZE

TINY = 1e-38


@torch.no_grad()
def fused_loss_torch(operands: Operands, options: Options, winner: Winner) -> Outputs:
    """What the op returns. Rows without a label are left out of the computation: what they hold is never read."""
    hidden, weight, labels = operands.hidden, operands.weight, operands.labels
    N, D = hidden.shape
    V = weight.shape[0]
    T = options.temperature
    dtype = compute_dtype(hidden, weight)

    # What needs no logits, for all rows with a label at once.
    rows = (labels != IGNORE_INDEX).nonzero()[:, 0]
    n = rows.shape[0]
    gold = labels[rows].long()
    a, b = operands.ce_weight[rows].to(dtype), operands.kd_weight[rows].to(dtype)
    kept = None
    if winner.of_row is not None:  # there are sources
        kept = prepare_kept(operands, options.tail, winner.of_row, rows, dtype)
        b = torch.where(kept.present, b, 0)

    # The buffers of a chunk, used again by every chunk: logits, which become their gradient; their exponentials at T; and
    # the softcap's derivative. The last two exist only where they differ from the first, or are needed.
    C = chunk_rows(n, V, dtype.itemsize, options.chunk_size, options.max_chunk_bytes)
    head = ChunkedHead(Head(weight, operands.bias, options.softcap, options.logit_scale), dtype, C)
    logits = hidden.new_empty(min(C, n), V, dtype=dtype)
    exps_T = torch.empty_like(logits) if kept is not None and T != 1 else None
    slope = torch.empty_like(logits) if options.softcap is not None and options.any_grad else None

    # The results. Rows without a label keep these zeros.
    dhidden = hidden.new_zeros(N, D, dtype=dtype) if options.grad_hidden else hidden.new_empty(0, dtype=dtype)
    dweight = weight.new_zeros(V, D, dtype=dtype) if options.grad_weight else weight.new_empty(0, dtype=dtype)
    dbias = weight.new_zeros(V, dtype=dtype) if options.grad_bias else weight.new_empty(0, dtype=dtype)
    ce, kd, source_mass, target_mass = (hidden.new_zeros(N, dtype=dtype) for _ in range(4))
    terms = hidden.new_zeros(N if options.per_row else n, dtype=dtype)

    for begin in range(0, n, C):
        chunk = slice(begin, min(begin + C, n))  # of the n rows with a label
        at = chunk if n == N else rows[chunk]  # of all N rows; a slice where it can be, because it copies nothing

        # Logits: the first of three matrix products.
        h = hidden[at].to(dtype)
        size = h.shape[0]
        slope_c = None if slope is None else slope[:size]
        z = head.logits_into(logits[:size], h, slope_c)

        # Losses, and the gradient in place of the logits. It leaves through logit_scale, which multiplies it as a whole:
        # a factor of the weights does the same.
        kept_c = None if kept is None else kept.of(chunk)
        ce_c, kd_c, target_mass_c = chunk_losses(
            z,
            None if exps_T is None else exps_T[:size],
            gold[chunk],
            kept_c,
            a[chunk] * options.logit_scale,
            b[chunk] * options.logit_scale,
            T,
            options.any_grad,
        )
        term = a[chunk] * ce_c
        ce[at] = ce_c
        if kept_c is not None:
            term = term + b[chunk] * kd_c
            kd[at], source_mass[at], target_mass[at] = kd_c, kept_c.mass, target_mass_c
        terms[at if options.per_row else chunk] = term

        # Gradients of the operands: the two other matrix products.
        if options.any_grad and slope_c is not None:
            z.mul_(slope_c)
        if options.grad_hidden:
            dhidden[at] = head.pull_back(z)
        if options.grad_weight:
            dweight.addmm_(z.t(), h)
        if options.grad_bias:
            dbias.add_(z.sum(0))

    return Outputs(
        loss=terms if options.per_row else terms.sum(),
        dhidden=dhidden,
        dweight=dweight,
        dbias=dbias,
        ce=ce,
        kd=kd,
        source_mass=source_mass,
        target_mass=target_mass,
        winner=winner.chosen,
    )


class Kept(NamedTuple):
    """The winner's distribution of n rows, ready for the chunks: unique ids, and p that sums to 1 − t."""

    ids: Tensor  # (n, K) int64, -1 = no entry
    p: Tensor  # (n, K), 0 where there is no entry
    log_p: Tensor  # (n, K), 0 where p is 0
    t: Tensor  # (n,) mass of the bucket outside the ids
    t_log_t: Tensor  # (n,)
    mass: Tensor  # (n,) mass of the entries as it was given
    present: Tensor  # (n,) bool: the row has a KD term
    has_entry: Tensor  # (n, K) bool: ids >= 0
    apart: Tensor  # (n, K) bool: an entry of another id than the gold one

    def of(self, chunk: slice) -> Kept:
        """Some of the rows."""
        return Kept(*(x[chunk] for x in self))


def prepare_kept(operands: Operands, tail: str, winner_of_row: Tensor, rows: Tensor, dtype: torch.dtype) -> Kept:
    """Reads the winner's entries of `rows`, merges those of equal ids, and settles what the tail is. Needs no logits.

    Computed in fp64, which costs nothing for (n, K) numbers: in fp32, t = 1 − M of a peaked source would have lost its digits.
    """
    vocabulary = operands.weight.shape[0]
    assert operands.source_ids is not None
    assert operands.source_logprobs is not None

    # The winner's entries. Where there is no winner, the row of source 0 stands in, with all of its ids taken away.
    winner = winner_of_row[rows]
    source = winner.clamp_min(0)
    ids = operands.source_ids[source, rows].long().masked_fill((winner < 0)[:, None], -1)
    log_p = operands.source_logprobs[source, rows].double().masked_fill(ids < 0, -torch.inf)
    # p relative to the largest: where it is renormalised, entries of e^-800 count as well.
    top = log_p.amax(1).clamp_min(LOWEST)
    p = (log_p - top[:, None]).exp()

    # Sorting makes equal ids neighbours, a run. Each run has a number, and its mass is added up in the slot of that number.
    ids, by_id = ids.sort(1)
    p = p.gather(1, by_id)
    run = torch.zeros_like(ids)
    torch.cumsum(ids[:, 1:] != ids[:, :-1], 1, out=run[:, 1:])
    p = torch.zeros_like(p).scatter_add_(1, run, p)
    ids = torch.full_like(ids, -1).scatter_(1, run, ids)

    # A row whose entries have no mass at all has no distribution.
    relative = p.sum(1)
    mass = relative * top.exp()
    present = relative != 0  # also true for NaN: a source that is NaN must show in the loss
    ids = ids.masked_fill(~present[:, None], -1)

    # The tail: nothing, what the entries lack of 1, or what is given.
    if tail == RENORMALIZE:
        t = torch.zeros_like(mass)
    elif operands.source_tail is None:
        over = mass > 1 + MASS_SLACK
        if over.any():
            raise ValueError(
                "source_logprobs must be natural log-probabilities of one distribution, a row's add up to a mass of "
                f"{mass[over][0].item():.4g}; take log_softmax over the whole vocabulary (after / T), and pad with the id -1"
            )
        t = (1 - mass).clamp_min(0)
    else:
        t = operands.source_tail[source, rows].double()
        outside = ~((t >= -TAIL_SLACK) & (t <= 1 + TAIL_SLACK))  # also true for NaN
        if (outside & present).any():
            raise ValueError(
                f"source_tail must be linear mass in [0, 1], got {t[outside & present][0].item():.6g}; "
                "take exp() of a log-mass"
            )
        t = t.clamp(0, 1)
    # Where the ids are the whole vocabulary, no column is left that could hold a tail: it is rounding, and is divided out.
    has_entry = ids >= 0
    t = t.masked_fill(~present | (has_entry.sum(1) == vocabulary), 0)

    # Scaled to what the tail leaves.
    p = p * ((1 - t) / relative.where(present, torch.ones_like(relative)))[:, None]
    log_p = torch.where(p == 0, 0, p.log())
    p, log_p, t, t_log_t, mass = (x.to(dtype) for x in (p, log_p, t, torch.xlogy(t, t), mass))
    apart = has_entry & (ids != operands.labels[rows][:, None])
    return Kept(ids, p, log_p, t, t_log_t, mass, present, has_entry, apart)


def chunk_losses(
    z: Tensor,
    exps_T: Tensor | None,
    gold: Tensor,
    kept: Kept | None,
    a: Tensor,
    b: Tensor,
    T: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, T²·KL and the target's mass on the kept ids, (C,) each, from the logits z (C, V) of a chunk.

    z is overwritten: with its own gradient under `need_grad`, where a and b (C,) are the rows' weights. `exps_T` (C, V) is
    a buffer for exponentials at T, None where T is 1 or without a source. `gold` (C,) holds the labels.

    Every sum of exponentials is kept relative to a maximum of its own part: of the columns that were not lifted, or of all
    that are outside the kept ids. Two parts are added relative to the row's maximum. So neither q_rest, the target's mass
    outside the kept ids, nor 1 − q_gold is ever a difference.
    """
    gold = gold[:, None]

    # Lift: read the logits at the kept ids and at the gold id, and write −inf in their place. Slots without an entry, and
    # the last one, point at the gold id.
    if kept is None:
        lifted = gold
    else:
        lifted = torch.cat([torch.where(kept.has_entry, kept.ids, gold), gold], 1)
    z_lifted = z.gather(1, lifted)
    z.scatter_(1, lifted, -torch.inf)

    # The dense part: from here on z holds exponentials relative to m_dense, at T = 1.
    m_dense = z.amax(1, keepdim=True).clamp_min_(LOWEST)
    z.sub_(m_dense)
    sum_dense_T = None if exps_T is None else torch.mul(z, 1 / T, out=exps_T).exp_().sum(1, keepdim=True)
    sum_dense = z.exp_().sum(1, keepdim=True)
    if sum_dense_T is None:
        sum_dense_T = sum_dense

    # The whole row at T = 1: the dense part and the lifted entries, relative to the row's maximum m. Kept ids that are the
    # gold id are counted once, in the last slot.
    m = torch.maximum(m_dense, z_lifted.amax(1, keepdim=True))
    below = z_lifted - m
    e = below.exp()
    e_gold = e[:, -1:]
    shrink = (m_dense - m).exp()
    others = sum_dense * shrink  # the sum of all that are not the gold id
    if kept is not None:
        others = others + (e[:, :-1] * kept.apart).sum(1, keepdim=True)
    total = others + e_gold
    ce = cross_entropy_from_sums(others, e_gold, below[:, -1:])[:, 0]

    a = a[:, None]
    if kept is None:
        if need_grad:
            z.mul_(a * shrink / total).scatter_(1, gold, -a * others / total)
        return ce, torch.zeros_like(ce), torch.zeros_like(ce)

    # The same at T, in two parts: the kept ids, and all that is outside them, the rest. The gold id is in either.
    gold_kept = (kept.has_entry & ~kept.apart).any(1, keepdim=True)
    z_gold = z_lifted[:, -1:]
    e_T, shrink_T = (e, shrink) if T == 1 else ((below / T).exp(), ((m_dense - m) / T).exp())
    m_rest = torch.where(gold_kept, m_dense, torch.maximum(m_dense, z_gold))
    dense_in_rest = ((m_dense - m_rest) / T).exp()
    gold_in_rest = torch.where(gold_kept, 0, ((z_gold - m_rest) / T).exp())
    rest = (sum_dense_T * dense_in_rest + gold_in_rest).clamp_min_(TINY)
    mass_kept = (e_T[:, :-1] * kept.has_entry).sum(1, keepdim=True)
    total_T = mass_kept + rest * ((m_rest - m) / T).exp()

    # KL = Σ p (log p − log q) + t (log t − log q_rest). An entry with p = 0 is left out by name: its log q may be −inf.
    # Without an entry p and t are 0, and so is the sum.
    log_total_T = total_T.log()
    log_q = below[:, :-1] / T - log_total_T
    log_q_rest = (m_rest - m) / T + rest.log() - log_total_T
    t = kept.t[:, None]
    kl = torch.where(kept.p == 0, 0, kept.p * (kept.log_p - log_q)).sum(1) + kept.t_log_t - (t * log_q_rest)[:, 0]
    kd = T * T * kl

    if need_grad:
        b_T = b[:, None] * T  # T² of the loss times 1/T of z/T
        # Outside the kept ids the gradient is b·T·(q − t·q/q_rest). Both columns there, a dense one and the gold id, are
        # divided by the sum of the rest itself, which survives a q_rest that underflows.
        alpha_dense = shrink_T / total_T - t * dense_in_rest / rest
        alpha_gold = e_T[:, -1:] / total_T - t * gold_in_rest / rest
        # On the kept ids it is b·T·(q − p). For the gold id cross-entropy adds a·(q − 1), for all other ids a·q.
        grad_kept = a * (e[:, :-1] / total) + b_T * (e_T[:, :-1] / total_T - kept.p)
        p_gold = (kept.p * ~kept.apart).sum(1, keepdim=True)
        kd_gold = torch.where(gold_kept, e_T[:, -1:] / total_T - p_gold, alpha_gold)
        grad_gold = b_T * kd_gold - a * (others / total)
        # Scale the exponentials to gradients, and write those of the lifted ids in their places. All slots that point at
        # the gold id write the same value.
        if exps_T is None:
            z.mul_(a * shrink / total + b_T * alpha_dense)
        else:
            z.mul_(a * shrink / total).add_(exps_T.mul_(b_T * alpha_dense))
        z.scatter_(1, lifted, torch.cat([torch.where(kept.apart, grad_kept, grad_gold), grad_gold], 1))
    return ce, kd, (mass_kept / total_T)[:, 0]
