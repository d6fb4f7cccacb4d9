"""The oracle: the fused loss and the source top-k written densely, one formula after the other, with autograd.

It forms [N, V] tensors and loops in Python as it pleases. It runs in the dtype of its operands: fp64 for the truth, fp32 or
bf16 to measure what that dtype costs. It shares nothing with the chunked path but names, and checks no arguments.
Dimension letters: N rows, D hidden, V vocabulary, S sources, K kept entries, B sequences.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .common import IGNORE_INDEX
from .tails import BUCKET, RENORMALIZE


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
    num_items_in_batch: int | None = None,
    return_stats: bool = False,
) -> Any:
    """`profuser.loss.fused_linear_fusion_loss`, dense: the same arguments and returns, with gradients by autograd."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    ce_weight = torch.ones(rows, dtype=dtype) if ce_weight is None else ce_weight.to(dtype)
    kd_weight = (0.1 / 0.9 if beta is None else beta) * ce_weight if kd_weight is None else kd_weight.to(dtype)
    sources = 0 if source_ids is None else source_ids.shape[0]
    winner, row_winner = choose_winners(sources, rows, source_ce, source_index, cu_seqlens)

    # Only valid rows are looked at: what an ignored one holds cannot matter.
    valid = (labels != IGNORE_INDEX).nonzero()[:, 0]
    logits = head_logits(hidden[valid], weight, bias, softcap, logit_scale)
    gold = labels[valid].long()[:, None]
    ce = -logits.log_softmax(1).gather(1, gold)[:, 0]

    kd = torch.zeros_like(ce)
    source_mass, target_mass = torch.zeros_like(ce), torch.zeros_like(ce)
    if sources:
        assert source_ids is not None
        assert source_logprobs is not None
        # p as a dense distribution, where adding merges duplicate ids. `inside` marks the kept ids.
        p = torch.zeros(len(valid), vocabulary, dtype=dtype)
        inside = torch.zeros(len(valid), vocabulary, dtype=torch.bool)
        given_tail = torch.zeros(len(valid), dtype=dtype)
        for i, row in enumerate(valid.tolist()):
            source = row_winner[row]
            if source < 0:
                continue
            entries = source_ids[source, row] >= 0
            ids = source_ids[source, row][entries].long()
            p[i].index_put_((ids,), source_logprobs[source, row][entries].to(dtype).exp(), accumulate=True)
            inside[i, ids] = True
            if source_tail is not None:
                given_tail[i] = source_tail[source, row]
        mass = p.sum(1)
        has_source = mass != 0
        inside = inside & has_source[:, None]
        nothing_outside = inside.all(1)  # no column is left that could hold a tail: it is rounding, and is divided out
        if tail == RENORMALIZE:
            t = torch.zeros_like(mass)
        elif source_tail is None:
            t = (1 - mass).clamp_min(0)
        else:
            t = given_tail
        t = t.masked_fill(nothing_outside | ~has_source, 0)
        # Scaled to what the tail leaves. This is M > 1, renormalisation and source_tail at once: where p and t sum to 1
        # already, the factor is 1.
        p = p * ((1 - t) / torch.where(has_source, mass, 1))[:, None]

        log_q = (logits / temperature).log_softmax(1)
        no_column = torch.where(inside & ~nothing_outside[:, None], -math.inf, log_q)
        log_q_rest = no_column.logsumexp(1)
        cross = torch.where(p == 0, 0, p * log_q).sum(1)  # log q may be -inf where p is 0
        kl = torch.xlogy(p, p).sum(1) - cross + torch.xlogy(t, t) - t * log_q_rest
        kd = torch.where(has_source, temperature**2 * kl, 0)
        source_mass = mass
        target_mass = torch.where(inside, log_q.detach().exp(), 0).sum(1)

    per_row = torch.zeros(rows, dtype=dtype)
    terms = per_row.index_put((valid,), ce_weight[valid] * ce + kd_weight[valid] * kd)
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
        for name, value in (("ce", ce), ("kd", kd), ("source_mass", source_mass), ("target_mass", target_mass))
    }
    stats["winner"] = torch.tensor(winner)
    return loss, stats


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
