"""What the sources say of the rows: their kept entries, ready to be compared with the target's logits.

Dimension letters: N rows, n of them that are looked at, V vocabulary, S sources, K kept entries. W is the number of sources
that a row learns from: 1, or S where they are mixed. L is the number of ids that they name together, W·K at most.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import row_entries
from .common import LOWEST, MASS_SLACK, TAIL_SLACK
from .divergences import ENTRY_FLOOR, TAIL_FLOOR, infinite_at_zero
from .fused_loss_types import Operands, Options, Winner
from .tails import BUCKET, CONDITIONAL, TailRule


class Kept(NamedTuple):
    """The distributions of n rows on the ids that any of the row's sources names; a source's p sums to 1 with its bucket."""

    ids: Tensor  # (n, L) int64, unique, -1 = no entry
    inside: Tensor  # (n, W, L) bool: the source has an entry of that id
    p: Tensor  # (n, W, L + 1), 0 where there is no entry; the last is t, the mass of the bucket outside the source's ids
    log_p: Tensor  # (n, W, L + 1), -inf where that is 0
    weight: Tensor  # (n, W) of the source, 0 where it has no entry
    mass: Tensor  # (n, W) mass of the entries as it was given
    has_entry: Tensor  # (n, L) bool: ids >= 0
    apart: Tensor  # (n, L) bool: an entry of another id than the gold one

    def of(self, chunk: slice) -> Kept:
        """Some of the rows."""
        return Kept(*(x[chunk] for x in self))

    def mean(self, of_source: Tensor) -> Tensor:
        """The weighted mean (n,) of what each source has, (n, W); 0 where no source has an entry."""
        total = self.weight.sum(1)
        return (self.weight * of_source).sum(1) / total.where(total != 0, torch.ones_like(total))


def absent_tail(tail: str) -> float:
    """The t of a source without an entry: it says what is true of every target, that all the mass is outside.

    CONDITIONAL has no outside.
    """
    return 0.0 if tail == CONDITIONAL else 1.0


def prepare_kept(
    operands: Operands,
    options: Options,
    winner: Winner,
    rows: Tensor,
    dtype: torch.dtype,
    vocabulary: int,
    invalid: Tensor | None = None,
) -> Kept:
    """Reads the sources' entries of `rows`, merges those of equal ids, and settles what the tail is. Needs no logits.

    Computed in fp64, which costs nothing for so few numbers: in fp32, t = 1 − M of a peaked source would have lost its digits.
    `vocabulary` is the number of all ids. Where no value may be read, `invalid` (n, W) says which sources have a value out of
    range. Their weights become NaN, as does that of a source whose mass or tail is out of range, which is an error otherwise.

    Raises:
        ValueError: a mass or a tail is out of range.
    """
    ids, log_p, tail, weight = entries_of_rows(operands, winner, rows)
    labels = operands.labels[rows]
    tail = None if tail is None else tail.double()
    bucket, floors = options.tail == BUCKET, infinite_at_zero(options.divergence)
    rule = TailRule(
        bucket=bucket,
        absent_tail=absent_tail(options.tail),
        tail_floor=TAIL_FLOOR if floors else 0.0,
        entry_floor=ENTRY_FLOOR if floors else 0.0,
        vocabulary=vocabulary,
    )
    settle = row_entries.settle if invalid is None and row_entries.take(ids, dtype) else settled
    ids, inside, p, log_p, apart, mass, present = settle(ids, log_p, tail if bucket else None, labels, rule)
    weight = weight.to(dtype).masked_fill(~present, 0)
    if bucket:
        wrong = out_of_range(mass, tail, present)
        if invalid is None:
            check_range(wrong, mass, tail)
        else:
            invalid = invalid | wrong
    if invalid is not None:
        weight = weight.masked_fill(invalid, torch.nan)
    return Kept(ids, inside, p.to(dtype), log_p.to(dtype), weight.contiguous(), mass.to(dtype), ids >= 0, apart)


def settled(ids: Tensor, log_p: Tensor, tail: Tensor | None, labels: Tensor, rule: TailRule) -> tuple[Tensor, ...]:
    """ids, inside, p, log_p, apart and mass as Kept has them, in fp64, and which sources have any mass (n, W).

    From ids (n, W, K) int64, log_p (n, W, K), tail (n, W) fp64, None where it is what the entries lack of 1, and labels (n,).
    """
    log_p = log_p.double().masked_fill(ids < 0, -torch.inf)
    # p relative to the largest: where it is renormalised, entries of e^-800 count as well.
    top = log_p.amax(-1, keepdim=True).clamp_min(LOWEST)
    ids, p = merge_equal(ids, (log_p - top).exp())

    # A source whose entries have no mass at all has no distribution.
    relative = p.sum(-1)
    mass = relative * top[..., 0].exp()
    present = relative != 0  # also true for NaN: a source that is NaN must show in the loss
    ids = ids.masked_fill(~present[..., None], -1)

    # The tail t and what it leaves to the entries: nothing and all, what the entries lack of 1 and their mass, or what is given.
    if not rule.bucket:
        t, share = torch.zeros_like(mass), torch.ones_like(mass)
    elif tail is None:
        t, share = (1 - mass).clamp_min(0), mass.clamp_max(1)
    else:
        t = tail.clamp(0, 1)
        share = 1 - t
    if rule.tail_floor and rule.bucket:
        t, share = (x.clamp(rule.tail_floor, 1 - rule.tail_floor) for x in (t, share))
    p = p / relative.where(present, torch.ones_like(relative))[..., None]
    if rule.entry_floor:
        ids = ids.masked_fill(p * share[..., None] < rule.entry_floor, -1)
    # Where the ids are the whole vocabulary, no column is left that could hold a tail: it is rounding, and is divided out.
    nothing_outside = (ids >= 0).sum(-1) == rule.vocabulary
    p = p * share.masked_fill(nothing_outside, 1)[..., None]
    t = t.masked_fill(nothing_outside, 0).masked_fill(~present, rule.absent_tail)
    ids, inside, p = on_one_set_of_ids(ids, p)
    p = torch.cat([p, t[..., None]], -1)
    apart = (ids >= 0) & (ids != labels[:, None])
    return ids, inside, p, p.log(), apart, mass, present


def out_of_range(mass: Tensor, tail: Tensor | None, present: Tensor) -> Tensor:
    """Which sources (n, W) have entries of more mass than there is, or a tail that is none."""
    if tail is None:
        return mass > 1 + MASS_SLACK
    return present & ~((tail >= -TAIL_SLACK) & (tail <= 1 + TAIL_SLACK))  # also true for NaN


def check_range(wrong: Tensor, mass: Tensor, tail: Tensor | None) -> None:
    """Raises ValueError for the first source that is out of range."""
    if not wrong.any():
        return
    if tail is None:
        raise ValueError(
            "source_logprobs must be natural log-probabilities of one distribution, a row's add up to a mass of "
            f"{mass[wrong][0].item():.4g}; take log_softmax over the whole vocabulary (after / T), and pad with the id -1"
        )
    raise ValueError(
        f"source_tail must be linear mass in [0, 1], got {tail[wrong][0].item():.6g}; take exp() of a log-mass"
    )


def entries_of_rows(operands: Operands, winner: Winner, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Ids (n, W, K) int64, log-probabilities (n, W, K), tails (n, W) where they are given, and the sources' weights (n, W)."""
    source_ids, source_logprobs, source_tail = operands.source_ids, operands.source_logprobs, operands.source_tail
    assert source_ids is not None
    assert source_logprobs is not None
    if winner.weight_of_row is not None:
        weight = winner.weight_of_row[:, rows].T
        tail = None if source_tail is None else source_tail[:, rows].T
        # What a source of weight 0 says is not looked at.
        ids = source_ids[:, rows].transpose(0, 1).long().masked_fill((weight == 0)[..., None], -1)
        return ids, source_logprobs[:, rows].transpose(0, 1), tail, weight
    assert winner.of_row is not None
    # Where there is no winner, the row of source 0 stands in, with all of its ids taken away.
    of_row = winner.of_row[rows]
    source = of_row.clamp_min(0)
    ids = source_ids[source, rows].long().masked_fill((of_row < 0)[:, None], -1)
    tail = None if source_tail is None else source_tail[source, rows][:, None]
    return ids[:, None], source_logprobs[source, rows][:, None], tail, torch.ones_like(source)[:, None]


def merge_equal(ids: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Unique ids along the last axis, -1 and 0 in the slots that get free, and the mass of each."""
    # Sorting makes equal ids neighbours, a run. Each run has a number, and its mass is added up in the slot of that number.
    ids, by_id = ids.sort(-1)
    run = run_numbers(ids)
    p = torch.zeros_like(p).scatter_add_(-1, run, p.gather(-1, by_id))
    return torch.full_like(ids, -1).scatter_(-1, run, ids), p


def run_numbers(sorted_ids: Tensor) -> Tensor:
    """The number of the run of equal ids that each belongs to."""
    run = torch.zeros_like(sorted_ids)
    torch.cumsum(sorted_ids[..., 1:] != sorted_ids[..., :-1], -1, out=run[..., 1:])
    return run


def on_one_set_of_ids(ids: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ids (n, L) that any source names, whether a source names them (n, W, L), and its p there; from (n, W, K)."""
    n, W, K = ids.shape
    if W == 1:
        return ids[:, 0], ids >= 0, p.masked_fill(ids < 0, 0)
    all_ids, by_id = ids.flatten(1).sort(1)
    run = run_numbers(all_ids)
    slot = torch.empty_like(run).scatter_(1, by_id, run).view(n, W, K)
    named = torch.full_like(all_ids, -1).scatter_(1, run, all_ids)
    # Where there is no entry p is 0, and all of those share the slot of the id -1.
    p = p.new_zeros(n, W, W * K).scatter_add_(2, slot, p.masked_fill(ids < 0, 0))
    inside = torch.zeros(n, W, W * K, dtype=torch.bool, device=ids.device).scatter_(2, slot, ids >= 0)
    return named, inside & (named >= 0)[:, None], p
