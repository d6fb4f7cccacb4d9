"""The oracle: the fused loss and the source top-k written densely, one formula after the other, with autograd.

It forms [N, V] tensors and loops in Python as it pleases. It runs in the dtype of its operands: fp64 for the truth, fp32 or
bf16 to measure what that dtype costs. It shares nothing with the chunked path but names, and checks no arguments.
Dimension letters: N rows, D hidden, V vocabulary, S sources, K kept entries, B sequences.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .common import IGNORE_INDEX, LOWEST, NO_TAIL
from .divergences import FORWARD_KL, JSD, REVERSE_KL, SKEW_KL, SKEW_REVERSE_KL, TVD
from .fused_loss_types import MIN_CE, SOFTMAX
from .tails import BUCKET, CONDITIONAL


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> Tensor:
    """(N, V) logits softcap·tanh(logit_scale·(h Wᵀ + bias)/softcap); fp32 after the matmul unless that is fp64."""
    logits = hidden @ weight.T
    if logits.dtype != torch.float64:
        logits = logits.float()
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def choose_winners(
    sources: int, rows: int, source_ce: Tensor | None, source_index: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[list[int], list[int]]:
    """The winner of each sequence (or row, when source_index is per row) and of each row; -1 = no distillation."""
    bounds = [0, rows] if cu_seqlens is None else cu_seqlens.tolist()
    sequences = len(bounds) - 1
    if source_index is not None:
        winner = source_index.tolist()
    elif source_ce is not None:
        winner = []
        for b in range(sequences):
            finite = [(ce, source) for source, ce in enumerate(source_ce[:, b].tolist()) if math.isfinite(ce)]
            winner.append(min(finite)[1] if finite else -1)
    else:
        winner = [0 if sources else -1] * sequences
    if len(winner) == sequences:
        return winner, [winner[b] for b in range(sequences) for _ in range(bounds[b], bounds[b + 1])]
    return winner, winner


def fusion_loss_reference(
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
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    num_items_in_batch: int | None = None,
    return_stats: bool = False,
    entropies: bool = False,
) -> Any:
    """`profuser.loss.fused_linear_fusion_loss`, dense: the same arguments and returns, with gradients by autograd."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    ce_weight = torch.ones(rows, dtype=dtype) if ce_weight is None else ce_weight.to(dtype)
    kd_weight = (0.1 / 0.9 if beta is None else beta) * ce_weight if kd_weight is None else kd_weight.to(dtype)
    sources = 0 if source_ids is None else source_ids.shape[0]
    mixed = combine == SOFTMAX or source_weight is not None
    if mixed:
        weights, row_weights = weigh_sources(source_ce, source_weight, combine_temperature, rows, cu_seqlens, dtype)
        heaviest = weights.argmax(0).masked_fill(weights.amax(0) == 0, -1).tolist()
        winner = heaviest
    else:
        winner, row_winner = choose_winners(sources, rows, source_ce, source_index, cu_seqlens)
        row_weights = torch.zeros(sources, rows, dtype=dtype)
        for row, source in enumerate(row_winner):
            if source >= 0:
                row_weights[source, row] = 1

    # Only valid rows are looked at: what an ignored one holds cannot matter.
    valid = (labels != IGNORE_INDEX).nonzero()[:, 0]
    logits = head_logits(hidden[valid], weight, bias, softcap, logit_scale)
    gold = labels[valid].long()[:, None]
    log_q = logits.log_softmax(1)
    ce = -log_q.gather(1, gold)[:, 0]
    learnt = ce
    if label_smoothing:
        learnt = (1 - label_smoothing) * ce - label_smoothing * log_q.mean(1)
    if z_loss:
        learnt = learnt + z_loss * logits.logsumexp(1) ** 2

    kd, source_mass, target_mass, source_entropy, total_weight = (torch.zeros_like(ce) for _ in range(5))
    target_entropy = torch.special.entr(log_q.exp()).sum(1)
    if isinstance(temperature, Tensor):
        temperature = temperature[valid].to(dtype)[:, None]
    if sources:
        assert source_ids is not None
        assert source_logprobs is not None
        log_q = (logits / temperature).log_softmax(1)
        for source in range(sources):
            share = row_weights[source, valid]
            P = dense_source(
                source_ids[source, valid],
                source_logprobs[source, valid].to(dtype),
                None if source_tail is None else source_tail[source, valid].to(dtype),
                share,
                vocabulary,
                tail,
                endless=bool(divergence_of(divergence, divergence_beta, torch.zeros(1), -torch.ones(1)).isinf()),
            )
            log_q_of = log_q.unbind(0)  # whose gradient is that of all rows at once
            D = torch.stack([
                divergence_of(divergence, divergence_beta, *parts_of_row(P.p[i], P.inside[i], P.t[i], log_q_of[i], tail))
                if P.present[i] else log_q.new_zeros(())
                for i in range(len(valid))
            ]) if len(valid) else kd  # fmt: skip
            share = share.masked_fill(~P.present, 0)
            T = temperature[:, 0] if isinstance(temperature, Tensor) else temperature
            kd = kd + torch.where(share == 0, 0, share * T**2 * D)
            entropy = torch.special.entr(P.p).sum(1) + torch.special.entr(P.t)
            source_entropy = source_entropy + torch.where(share == 0, 0, share * entropy)
            source_mass = source_mass + torch.where(share == 0, 0, share * P.mass)
            target_mass = target_mass + share * torch.where(P.inside, log_q.detach().exp(), 0).sum(1)
            total_weight = total_weight + share
        total_weight = torch.where(total_weight == 0, 1, total_weight)
        source_mass, target_mass = source_mass / total_weight, target_mass / total_weight
        source_entropy = source_entropy / total_weight

    per_row = torch.zeros(rows, dtype=dtype)
    terms = per_row.index_put((valid,), ce_weight[valid] * learnt + kd_weight[valid] * kd)
    if reduction == "none":
        loss = terms
    else:
        loss = terms.sum()
        if reduction == "mean":
            loss = loss / max(len(valid) if num_items_in_batch is None else num_items_in_batch, 1)
    if not return_stats:
        return loss
    stats = {
        name: per_row.index_put((valid,), value.detach())
        for name, value in (
            ("ce", ce), ("kd", kd), ("source_mass", source_mass), ("target_mass", target_mass),
            *((("source_entropy", source_entropy), ("target_entropy", target_entropy)) if entropies else ()),
        )
    }  # fmt: skip
    stats["winner"] = torch.tensor(winner)
    return loss, stats


class DenseSource(NamedTuple):
    """What one source says of n rows, as distributions over the whole vocabulary."""

    p: Tensor  # (n, V)
    inside: Tensor  # (n, V) bool: the kept ids
    t: Tensor  # (n,) mass outside
    mass: Tensor  # (n,) of the entries, as given
    present: Tensor  # (n,) bool


def dense_source(
    source_ids: Tensor,
    source_logprobs: Tensor,
    source_tail: Tensor | None,
    share: Tensor,
    vocabulary: int,
    tail: str,
    endless: bool,
) -> DenseSource:
    """One source's rows, (n, K). `endless` says that the divergence is infinite where the source has no mass."""
    rows = len(source_ids)
    # p as a dense distribution, where adding merges duplicate ids. `inside` marks the kept ids.
    p = torch.zeros(rows, vocabulary, dtype=source_logprobs.dtype)
    inside = torch.zeros(rows, vocabulary, dtype=torch.bool)
    for i in range(rows):
        if share[i] == 0:
            continue
        entries = source_ids[i] >= 0
        ids = source_ids[i][entries].long()
        p[i].index_put_((ids,), source_logprobs[i][entries].exp(), accumulate=True)
        inside[i, ids] = True
    mass = p.sum(1)
    present = mass != 0
    inside = inside & present[:, None]
    if tail != BUCKET:
        t = torch.zeros_like(mass)
    elif source_tail is None:
        t = (1 - mass).clamp_min(0)
    else:
        t = source_tail.where(share != 0, 0)
    relative = p / torch.where(present, mass, 1)[:, None]
    if endless:
        if tail == BUCKET:
            t = t.clamp(1e-6, 1 - 1e-6)
        inside = inside & (relative * (1 - t)[:, None] >= 1e-30)
    nothing_outside = inside.all(1)  # no column is left that could hold a tail: it is rounding, and is divided out
    t = t.masked_fill(nothing_outside | ~present, 0)
    # Scaled to what the tail leaves. This is M > 1, renormalisation and source_tail at once: where p and t sum to 1
    # already, the factor is 1.
    p = relative * (1 - t)[:, None]
    return DenseSource(p, inside, t, mass, present)


def parts_of_row(p: Tensor, inside: Tensor, t: Tensor, log_q: Tensor, tail: str) -> tuple[Tensor, Tensor]:
    """P and log Q of one row on its kept ids and the bucket of all others, if there is one; from p (V,) and log q (V,)."""
    kept = log_q[inside]
    if tail == CONDITIONAL:
        return p[inside], kept.log_softmax(0)
    rest = log_q[~inside].logsumexp(0)
    if inside.all() or (rest <= LOWEST and t <= NO_TAIL):  # as of a vocabulary that is padded, whose tail is rounding
        return p[inside], kept
    return torch.cat([p[inside], t[None]]), torch.cat([kept, rest[None]])


def divergence_of(divergence: str, beta: float, P: Tensor, log_q: Tensor) -> Tensor:
    """D(P, Q) as the papers have it, each KL term by term: a part without mass adds nothing on the side that weighs it."""
    Q = log_q.exp()

    def kl(left: Tensor, log_left: Tensor, log_right: Tensor) -> Tensor:
        return torch.where(left == 0, 0, left * (log_left - log_right)).sum()

    log_p = P.log()
    if divergence == JSD and beta not in (0, 1):
        log_m = torch.log(beta * P + (1 - beta) * Q)
        return beta * kl(P, log_p, log_m) + (1 - beta) * kl(Q, log_q, log_m)
    if divergence == REVERSE_KL or (divergence == JSD and beta == 1):
        return kl(Q, log_q, log_p)
    if divergence == SKEW_KL:
        return kl(P, log_p, torch.log(beta * P + (1 - beta) * Q))
    if divergence == SKEW_REVERSE_KL:
        return kl(Q, log_q, torch.log((1 - beta) * P + beta * Q))
    if divergence == TVD:
        return (P - Q).abs().sum() / 2
    return kl(P, log_p, log_q)


def weigh_sources(
    source_ce: Tensor | None,
    source_weight: Tensor | None,
    combine_temperature: float,
    rows: int,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Weights of mixed sources as they are given, (S, B) or (S, N), and those of each row, (S, N)."""
    bounds = [0, rows] if cu_seqlens is None else cu_seqlens.tolist()
    if source_weight is None:
        assert source_ce is not None
        weights = torch.zeros_like(source_ce, dtype=dtype)
        for b in range(source_ce.shape[1]):
            finite = source_ce[:, b].isfinite()
            weights[finite, b] = (-source_ce[finite, b].to(dtype) / combine_temperature).softmax(0)
    else:
        weights = source_weight.to(dtype)
    if weights.shape[1] != len(bounds) - 1:
        return weights, weights
    lengths = torch.tensor(bounds).diff()
    return weights, weights.repeat_interleave(lengths, 1)


def source_topk_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    **options: Any,
) -> tuple[Tensor, ...]:
    """`source_topk`, dense: ids (N, k), logprobs (N, k), lse (N,) at `temperature`, ce (N,) at 1, and those of the ranges."""
    return logits_topk_reference(head_logits(hidden, weight, bias, softcap, logit_scale), labels, k, **options)


def logits_topk_reference(
    logits: Tensor,
    labels: Tensor,
    k: int,
    *,
    vocab_map: Tensor | None = None,
    ranges: tuple[Tensor, ...] | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, ...]:
    """`source_topk_from_logits`, dense."""
    # A stable descending sort keeps equal logits in index order.
    values, ids = logits.sort(dim=1, descending=True, stable=True)
    lse = (logits / temperature).logsumexp(1)
    ce = logits.logsumexp(1) - logits.gather(1, labels.long().clamp_min(0)[:, None])[:, 0]
    ce = torch.where(labels == IGNORE_INDEX, 0, ce)
    all_logprobs = logits / temperature - lse[:, None]
    ids, logprobs = ids[:, :k], values[:, :k] / temperature - lse[:, None]
    if vocab_map is not None:
        for row in range(len(ids)):
            ids[row], logprobs[row] = merged_topk(all_logprobs[row], vocab_map, k)
    if ranges is None:
        return ids, logprobs, lse, ce
    rows, lo, hi, vocab_order, *maps = ranges
    map_begin, mapped = maps or (torch.full_like(rows, -1), rows[:0])
    range_ids = torch.full((len(rows), k), -1)
    range_logprobs = torch.full((len(rows), k), -torch.inf, dtype=logits.dtype)
    range_logmass = torch.full((len(rows),), -torch.inf, dtype=logits.dtype)
    for r in range(len(rows)):
        among = vocab_order[lo[r] : hi[r]].long()
        within = all_logprobs[rows[r], among]
        range_logmass[r] = within.logsumexp(0)
        if map_begin[r] >= 0:
            others = among != labels[rows[r]]
            counts_for = mapped[map_begin[r] : map_begin[r] + len(among)]
            range_ids[r], range_logprobs[r] = merged_topk(within[others], counts_for[others], k)
        elif vocab_map is not None:
            range_ids[r], range_logprobs[r] = merged_topk(within, vocab_map[among], k)
        else:
            best, at = within.sort(descending=True, stable=True)
            best = best[:k][best[:k] > -torch.inf]
            range_ids[r, : len(best)], range_logprobs[r, : len(best)] = among[at[: len(best)]], best
    return ids, logprobs, lse, ce, range_ids, range_logprobs, range_logmass


def merged_topk(logprobs: Tensor, mapped: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k ids of greatest mass, that of all tokens that count for the id, most probable first, then -1 and -inf."""
    mass: dict[int, list[Tensor]] = {}
    for logprob, i in zip(logprobs, mapped.tolist()):
        if i >= 0 and logprob > -torch.inf:
            mass.setdefault(i, []).append(logprob)
    best = sorted((-torch.stack(parts).logsumexp(0).item(), i) for i, parts in mass.items())[:k]
    padding = k - len(best)
    ids = torch.tensor([i for _, i in best] + [-1] * padding, dtype=torch.int64)
    return ids, torch.tensor([-negative for negative, _ in best] + [-torch.inf] * padding, dtype=logprobs.dtype)
