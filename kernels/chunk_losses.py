"""What a chunk of logits says, in plain torch: the losses of its rows, and what their gradient is made of.

Each term's gradient in a row's logits is a number per row times the softmax, minus a vector of few entries (README.md
derives it). Therefore one dense pass over the logits serves all terms:
- the kept ids and the gold id, the label, are *lifted*: their logits are read, and −inf takes their place;
- all other logits are exponentiated, summed, and later multiplied by one number per row: that is their gradient;
- the losses, and the gradients at the few lifted ids, are computed from the sums and written back.

`row_losses.py` has the same done row by row in C++, where a CPU can.

Dimension letters: C rows of a chunk, V vocabulary; W sources that a row learns from and L ids that they name, as in kept.py.
The formula's letters, as in README.md: z logits, m a maximum of logits, e = exp(z − m), a and b the rows' weights of CE and KD,
p a source's distribution on its ids and its bucket, q the target's, T the temperature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .chunk_gradient import ChunkGradient
from .common import LOWEST, NO_TAIL, cross_entropy_from_sums
from .divergences_torch import divergence_parts
from .fused_loss_types import Options
from .kept import Kept
from .rows import exponentials_, exponentials_and_spread_, spread_of
from .tails import CONDITIONAL
from .vocabulary_slice import VocabularySlice

TINY = 1e-38
"""The least sum of exponentials that is divided by."""


class ChunkLosses(NamedTuple):
    """What a chunk's logits say, (C,) each."""

    ce: Tensor  # cross-entropy
    learnt: Tensor  # the same with label smoothing and z-loss: what the row's CE weight multiplies
    kd: Tensor  # T²·D
    target_mass: Tensor  # the target's mass on the kept ids, at T
    entropy: Tensor  # the target's, at T = 1; 0 unless it is asked for


def chunk_losses(
    z: Tensor,
    wide: Tensor,
    exps_T: Tensor | None,
    gold: Tensor,
    kept: Kept | None,
    a: Tensor,
    b: Tensor,
    T: float | Tensor,
    options: Options,
    vocabulary: VocabularySlice,
) -> tuple[ChunkLosses, ChunkGradient | None]:
    """The losses of a chunk from its logits z (C, V), and their gradient where one is asked for.

    z is overwritten with exponentials, 0 in the lifted columns. a and b (C,) are the rows' weights in the gradient.
    `wide` is z, with one more column behind it where the head is sliced. `exps_T` (C, V) is a buffer for exponentials at T, None
    where T is 1 or without a source. T is one number or (C, 1). `gold` (C,) holds the labels.

    Every sum of exponentials is kept relative to a maximum of its own part: of the columns that were not lifted, or of all
    that are outside a source's ids. Two parts are added relative to the row's maximum. So neither q_rest, the target's mass
    outside the kept ids, nor 1 − q_gold is ever a difference.
    """
    smoothing, spread = options.label_smoothing, None
    gold, a, b = gold[:, None], a[:, None], b[:, None]
    sum_z = z.sum(1, keepdim=True) if smoothing else None

    # Lift: read the logits at the kept ids and at the gold id, and write −inf in their place. Slots without an entry, and
    # the last one, point at the gold id.
    lifted = gold if kept is None else torch.cat([torch.where(kept.has_entry, kept.ids, gold), gold], 1)
    columns = vocabulary.columns_of(lifted)
    if vocabulary.group is not None:
        wide[:, -1] = -torch.inf
    z_lifted = wide.gather(1, columns)
    wide.scatter_(1, columns, -torch.inf)

    # The dense part: from here on z holds exponentials relative to m_here, at T = 1.
    if exps_T is None:
        if options.entropies:
            m_here, sum_dense, spread = exponentials_and_spread_(z)
        else:
            m_here, sum_dense = exponentials_(z)
        sum_dense_T = sum_dense
    else:
        m_here = z.amax(1, keepdim=True).clamp_min_(LOWEST)
        z.sub_(m_here)
        sum_dense_T = torch.mul(z, 1 / T, out=exps_T).exp_().sum(1, keepdim=True)
        sum_dense = z.exp_().sum(1, keepdim=True)
        spread = spread_of(z) if options.entropies else None
    m_dense = m_here
    if vocabulary.group is not None:
        z_lifted, m_dense = vocabulary.maximum(torch.cat([z_lifted, m_here], 1)).split([lifted.shape[1], 1], 1)
        below_m = m_here - m_dense
        sums = [sum_dense * below_m.exp(), sum_dense_T * (below_m / T).exp(), sum_dense if sum_z is None else sum_z]
        if spread is not None:
            sums.append((spread - sum_dense * below_m) * below_m.exp())
        sum_dense, sum_dense_T, sum_z, *spreads = vocabulary.total(torch.cat(sums, 1)).split(1, 1)
        spread = spreads[0] if spreads else None

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
    once = None if kept is None else torch.nn.functional.pad(kept.apart, (0, 1), value=True)
    total = others + e_gold
    ce = cross_entropy_from_sums(others, e_gold, below[:, -1:])
    entropy = zero = torch.zeros_like(ce[:, 0])
    if spread is not None:
        # log(total) + Σ e·(m − z) / total: no term is negative.
        spread = (spread + sum_dense * (m - m_dense)) * shrink
        of_lifted = torch.special.entr(e) if once is None else torch.special.entr(e) * once
        entropy = (total.log() + (spread + of_lifted.sum(1, keepdim=True)) / total)[:, 0]
    learnt, scalar = ce, a  # what of the gradient is a number per row times the softmax
    if smoothing or options.z_loss:
        lse = m + total.log()
        if sum_z is not None and smoothing:
            learnt = (1 - smoothing) * ce + smoothing * (lse - sum_z / vocabulary.whole)
        if options.z_loss:
            learnt = learnt + options.z_loss * lse * lse
            scalar = a * (1 + 2 * options.z_loss * lse)
    distilled = None if kept is None else kept_losses(z_lifted, e, m, m_dense, sum_dense_T, T, kept, options)

    gradient = None
    if options.any_grad:
        # Cross-entropy: scalar·q on all columns, of which a is taken from the gold one without a difference. Label smoothing
        # takes its share of that a from all columns alike.
        grad = scalar * (e / total)
        grad[:, -1:] = (scalar - a) * (e_gold / total) - a * (others / total)
        here = (m_here - m).exp()  # z times this is relative to the row's maximum
        dense = scalar * here / total
        even = a * (smoothing / vocabulary.whole)
        if smoothing:
            grad -= even
            grad[:, -1:] += a * smoothing
        b_T = b * T  # T² of the loss times 1/T of z/T
        dense_T = None
        if distilled is not None:
            grad = grad + b_T * distilled.grad_lifted
            dense_T = b_T * distilled.grad_dense * ((m_here - m_dense) / T).exp()
            if exps_T is None:
                dense, dense_T = dense + dense_T, None
        if kept is not None:
            # All slots that point at the gold id have the same value.
            grad[:, :-1] = torch.where(kept.apart, grad[:, :-1], grad[:, -1:])
        gradient = ChunkGradient(dense, dense_T, even if smoothing else None, columns, grad, once)
    if distilled is None:
        return ChunkLosses(ce[:, 0], learnt[:, 0], zero, zero, entropy), gradient
    return ChunkLosses(ce[:, 0], learnt[:, 0], distilled.kd, distilled.target_mass, entropy), gradient


class KeptLosses(NamedTuple):
    """The distillation of a chunk, and its gradients in u = z/T without the row's weight and T²."""

    kd: Tensor  # (C,) T²·D
    target_mass: Tensor  # (C,)
    grad_lifted: Tensor  # (C, L + 1), the last for the gold id
    grad_dense: (
        Tensor  # (C, 1): times the exponential relative to m_dense, the gradient of a column that was not lifted
    )


def kept_losses(
    z_lifted: Tensor,
    e: Tensor,
    m: Tensor,
    m_dense: Tensor,
    sum_dense_T: Tensor,
    T: float | Tensor,
    kept: Kept,
    options: Options,
) -> KeptLosses:
    """Compares the target with each source of a row, on that source's ids and one bucket, and adds up what they say.

    The arguments are those of `chunk_losses`: logits (C, L + 1) at the ids and at the gold id, their exponentials relative to
    the row's maximum m, and the sum at T of all columns that were not lifted.
    """
    gold_kept = (kept.has_entry & ~kept.apart).any(1, keepdim=True)
    once = torch.cat([kept.has_entry, ~gold_kept], 1)[:, None]  # (C, 1, L + 1): every lifted id in one slot
    inside = torch.cat([kept.inside, torch.zeros_like(kept.inside[..., :1])], 2)  # (C, W, L + 1)
    outside = once & ~inside
    z_lifted, m, m_dense, sum_dense_T = z_lifted[:, None], m[:, None], m_dense[:, None], sum_dense_T[:, None]

    # The target at T: the whole row, and what of it is outside a source's ids, the rest.
    at_one = isinstance(T, float) and T == 1
    T_of_row = T[:, 0] if isinstance(T, Tensor) else T
    T = T[:, None] if isinstance(T, Tensor) else T
    below = (z_lifted - m) / T
    e_T = e[:, None] if at_one else below.exp()
    shrink_T = ((m_dense - m) / T).exp()
    total_T = (e_T * once).sum(2, keepdim=True) + sum_dense_T * shrink_T
    q_lifted = e_T / total_T
    mass_kept = (q_lifted * inside).sum(2)
    p, log_p, conditional = kept.p, kept.log_p, options.tail == CONDITIONAL
    if conditional:
        log_q_inside = log_softmax_of(z_lifted / T, inside)
        q_inside = log_q_inside.exp()
        log_q_rest, q_rest = (torch.full_like(total_T, x).expand(*p.shape[:2], 1) for x in (-torch.inf, 0.0))
        in_rest = dense_in_rest = torch.zeros_like(total_T)
        is_nowhere = torch.zeros_like(total_T, dtype=torch.bool)
    else:
        log_total_T = total_T.log()
        q_inside, log_q_inside = q_lifted * inside, (below - log_total_T).masked_fill(~inside, -torch.inf)
        m_rest = torch.maximum(m_dense, z_lifted.masked_fill(~outside, LOWEST).amax(2, keepdim=True))
        # A tail that is rounding has nowhere to be if no column outside the entries can have a probability.
        is_nowhere = (m_rest <= LOWEST) & (p[..., -1:] <= NO_TAIL)
        in_rest = ((z_lifted - m_rest) / T).masked_fill(~outside, -torch.inf).exp()
        dense_in_rest = ((m_dense - m_rest) / T).exp()
        rest = (sum_dense_T * dense_in_rest + in_rest.sum(2, keepdim=True)).clamp_min_(TINY)
        # Shares of the rest are formed from the rest's own sum, which survives a q_rest that underflows.
        in_rest, dense_in_rest = in_rest / rest, dense_in_rest / rest
        log_q_rest = (m_rest - m) / T + rest.log() - log_total_T
        q_rest = log_q_rest.exp()

    # D and its gradient: slope_j − q_j·Σ slope at a part, of which the columns of the rest take their shares.
    q = torch.cat([q_inside[..., :-1], q_rest], 2)
    log_q = torch.cat([log_q_inside[..., :-1], log_q_rest], 2)
    value, slope = divergence_parts(options.divergence, options.divergence_beta, p, log_p, q, log_q)
    # Not in place, because it may be the slope as well.
    value = torch.cat([value[..., :-1], value[..., -1:].masked_fill(is_nowhere, 0)], 2)
    slope_sum, slope_rest = slope.sum(2, keepdim=True), slope[..., -1:]
    if conditional:
        grad = torch.where(inside, slope - q_inside * slope_sum, 0)
        grad_dense = torch.zeros_like(slope_sum)
    else:
        grad = torch.where(inside, slope, slope_rest * in_rest) - q_lifted * slope_sum
        grad_dense = slope_rest * dense_in_rest - slope_sum * (shrink_T / total_T)
    weight = kept.weight[..., None]
    grad, grad_dense = (weight * grad).sum(1), (weight * grad_dense).sum(1)
    of_gold = (grad[:, :-1] * (kept.has_entry & ~kept.apart)).sum(1, keepdim=True)
    grad[:, -1:] = torch.where(gold_kept, of_gold, grad[:, -1:])
    kd = T_of_row * T_of_row * (kept.weight * value.sum(2)).sum(1)
    return KeptLosses(kd, kept.mean(mass_kept), grad, grad_dense)


def log_softmax_of(z: Tensor, among: Tensor) -> Tensor:
    """log_softmax over the last axis of those elements that are `among`, −inf for the others."""
    z = z.masked_fill(~among, -torch.inf)
    z = z - z.amax(-1, keepdim=True).clamp_min(LOWEST)
    return z - z.exp().sum(-1, keepdim=True).clamp_min(TINY).log()
