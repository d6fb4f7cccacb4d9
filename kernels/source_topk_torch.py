"""The source top-k in plain torch, chunk by chunk, for any device and dtype.

Where tokens are mapped to ids of another vocabulary, the masses of all tokens of an id are added before the best ids are
chosen. README.md says why, and how the sums are made.
Dimension letters: N rows, C rows of a chunk, V vocabulary, V' entries of an ordered vocabulary, R ranges, G distinct ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import IGNORE_INDEX, cross_entropy_from_sums

GROUP = 16  # masses whose maximum is looked at first
ADDED_AT_ONCE = 64  # longer sums in fp32 are made of sums of so many: added one by one, equal terms lose digits
# Rows that are merged at a time. More do not fit the cache when they are transposed; so few logits cost only Python's time.
MERGED_ROWS, MERGED_LOGITS = 64, 1 << 17
COLUMNS_AT_ONCE = 4096
LEAST_FP32_MASS = 1e-25  # relative to the row's most probable token; below, fp32 would soon underflow


@dataclass(frozen=True, slots=True)
class ListedRanges:
    """The argument `ranges` of `source_topk`, read and checked."""

    ranges: list[tuple[int, int, int, int]]
    """(row, lo, hi, map_begin), ascending by row; map_begin is -1 for a range without a map of its own."""
    vocab_order: Tensor
    """(V',) int64"""
    mapped: Tensor
    """(L,) int64"""


def topk_rows(
    logits: Callable[[slice], Tensor],
    labels: Tensor,
    k: int,
    vocabulary: int,
    temperature: float,
    chunk: int,
    vocab_map: Tensor | None,
    asked_for: ListedRanges | None,
) -> tuple[Tensor, ...]:
    """What `source_topk` returns. `logits(rows)` gives the logits of a chunk, which may be overwritten."""
    N = labels.shape[0]
    ids = labels.new_empty(N, k, dtype=torch.int32)
    logprobs = labels.new_empty(N, k, dtype=torch.float32)
    lse = labels.new_empty(N, dtype=torch.float32)
    ce = labels.new_empty(N, dtype=torch.float32)
    listed = asked_for.ranges if asked_for else []
    range_ids = labels.new_full((len(listed), k), -1, dtype=torch.int32)
    range_logprobs = labels.new_full((len(listed), k), -torch.inf, dtype=torch.float32)
    range_logmass = labels.new_full((len(listed),), -torch.inf, dtype=torch.float32)
    whole = (
        None if vocab_map is None else plan_merge(torch.arange(vocabulary, device=labels.device), vocab_map, vocabulary)
    )

    @lru_cache(maxsize=64)  # a batch has a handful of large slices; the plans of many would fill the memory
    def plan(lo: int, hi: int, begin: int) -> Merge:
        assert asked_for is not None
        tokens = asked_for.vocab_order[lo:hi]
        if begin >= 0:
            return plan_merge(tokens, asked_for.mapped[begin : begin + hi - lo], vocabulary)
        assert vocab_map is not None
        return plan_merge(tokens, vocab_map[tokens], vocabulary)

    ranges_done = 0
    for begin in range(0, N, chunk):
        rows = slice(begin, min(begin + chunk, N))
        z = logits(rows)
        values, kept = stable_topk(z, k) if whole is None else (z.amax(1, keepdim=True), None)
        gold = labels[rows].long()
        valid = gold != IGNORE_INDEX
        at_gold = gold.clamp_min(0)[:, None]

        # All that follows is relative to the row's maximum. It is finite also in a row of -inf, where -inf - -inf is NaN.
        row_max = values[:, :1].clamp_min(torch.finfo(z.dtype).min)
        gold_below = z.gather(1, at_gold) - row_max
        z.sub_(row_max)
        if whole is not None:
            ids[rows], logprobs[rows], _ = merge_rows(z, range(len(z)), whole, k, temperature, None)

        # The ranges of this chunk, for now without the row's log-sum-exp. They come in the order of their rows.
        first_range = ranges_done
        slices: dict[tuple[int, int, int], list[int]] = {}
        while ranges_done < len(listed) and listed[ranges_done][0] < rows.stop:
            row, lo, hi, map_begin = listed[ranges_done]
            if lo < hi and (map_begin >= 0 or whole is not None):
                slices.setdefault((lo, hi, map_begin), []).append(ranges_done)
            elif lo < hi:
                assert asked_for is not None
                among = asked_for.vocab_order[lo:hi]
                within = z[row - begin, among] / temperature
                range_logmass[ranges_done] = within.logsumexp(0)
                best, at = stable_topk(within[None], min(k, hi - lo))
                range_logprobs[ranges_done, : len(at[0])] = best[0]
                range_ids[ranges_done, : len(at[0])] = among[at[0]].int()
            ranges_done += 1
        for (lo, hi, map_begin), members in slices.items():
            at = torch.tensor(members, device=z.device)
            of_range = [listed[r][0] - begin for r in members]
            left_out = gold if map_begin >= 0 else None
            found = merge_rows(z, of_range, plan(lo, hi, map_begin), k, temperature, left_out)
            range_ids[at], range_logprobs[at], range_logmass[at] = found

        # Sums over the row: at T for the log-probabilities, and at 1 without the gold id for the cross-entropy. Thus a
        # small cross-entropy is no difference of nearly equal sums, and no log-probability depends on a label.
        sum_T = None if temperature == 1 else (z / temperature).exp_().sum(1, keepdim=True)
        z.exp_()
        if sum_T is None:
            sum_T = z.sum(1, keepdim=True)
        others = z.scatter_(1, at_gold, 0).sum(1, keepdim=True)
        ce[rows] = torch.where(valid, cross_entropy_from_sums(others, gold_below.exp(), gold_below)[:, 0], 0)
        log_sum = sum_T.log()
        if kept is not None:
            ids[rows] = kept
            logprobs[rows] = (values - row_max) / temperature - log_sum
        else:
            logprobs[rows] -= log_sum
        lse[rows] = (row_max / temperature + log_sum)[:, 0]

        if ranges_done > first_range:
            row_of_range = [row - begin for row, *_ in listed[first_range:ranges_done]]
            of_ranges = log_sum[torch.tensor(row_of_range, device=lse.device), 0]
            range_logmass[first_range:ranges_done] -= of_ranges
            range_logprobs[first_range:ranges_done] -= of_ranges[:, None]
    if whole is not None:
        ids.masked_fill_(~logprobs.isfinite(), -1)
    if asked_for is None:
        return ids, logprobs, lse, ce
    range_ids.masked_fill_(~range_logprobs.isfinite(), -1)
    return ids, logprobs, lse, ce, range_ids, range_logprobs, range_logmass


def stable_topk(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, largest first, equal ones by ascending index: torch.topk promises no order of those."""
    wide = min(k + 1, z.shape[1])
    values, ids = z.topk(wide, dim=1)
    # Which of several equal values torch.topk keeps is arbitrary. That matters only where the first value that is left out
    # equals the last one that is kept: those rows are sorted.
    if wide > k and (tied := values[:, k - 1] == values[:, k]).any():
        best, by_value = z[tied].sort(dim=1, descending=True, stable=True)
        values[tied, :k], ids[tied, :k] = best[:, :k], by_value[:, :k]
    values, ids = values[:, :k], ids[:, :k]
    # Sorted by id first, a stable sort by value leaves equal values in the order of their ids.
    ids, by_id = ids.sort(1)
    values, by_value = values.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, by_value)


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums of given rows of a table, each in a fixed order and in blocks of ADDED_AT_ONCE."""

    members: Tensor
    """Rows of the table: first the first block of every sum, then the further blocks of long sums."""
    offsets: Tensor
    """Where each block begins among the members, and where the last one ends."""
    count: int
    """How many sums there are."""
    long: Tensor | None
    """The sums that have further blocks, in ascending order."""
    rest: Sums | None
    """How the blocks of the long ones are added."""

    def of(self, table: Tensor) -> Tensor:
        """(count, C) from a table of any number of rows and C columns."""
        blocks = F.embedding_bag(self.members, table, self.offsets, mode="sum", include_last_offset=True)
        if self.long is not None and self.rest is not None:
            blocks[self.long] = self.rest.of(blocks)
        return blocks[: self.count]


def plan_sums(members: Tensor, counts: Tensor) -> Sums:
    """The plan of len(counts) sums: of the first counts[0] members, of the next counts[1], and so on. No count is 0."""
    count = len(counts)
    of_sum = torch.repeat_interleave(counts)  # the sum that each member is for
    within = torch.arange(len(members), device=members.device) - (counts.cumsum(0) - counts)[of_sum]
    first = within < ADDED_AT_ONCE
    owner = of_sum[~first & (within % ADDED_AT_ONCE == 0)]  # the sum of each further block
    sizes = torch.cat([counts.clamp_max(ADDED_AT_ONCE), _further_sizes(counts, owner)])
    long = rest = None
    if len(owner):
        long, further = owner.unique_consecutive(return_counts=True)
        # The first block of a sum stands before its further ones, which are in order already.
        blocks = torch.cat([long, count + torch.arange(len(owner), device=members.device)])
        by_sum = torch.cat([long, owner]).sort(stable=True).indices
        rest = plan_sums(blocks[by_sum], further + 1)
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return Sums(torch.cat([members[first], members[~first]]), offsets, count, long, rest)


def _further_sizes(counts: Tensor, owner: Tensor) -> Tensor:
    """How many members each block behind the first one has."""
    if not len(owner):
        return counts[:0]
    last = torch.cat([owner[1:] != owner[:-1], owner.new_ones(1, dtype=torch.bool)])
    return torch.where(last, (counts[owner] - 1) % ADDED_AT_ONCE + 1, ADDED_AT_ONCE)


@dataclass(frozen=True, slots=True)
class Merge:
    """Which tokens count for which ids."""

    ids: Tensor
    """(G,) the distinct ids, ascending."""
    named: int
    """How many sums belong to no id: 1 if there are tokens without one, else 0. It is the first of the sums."""
    sums: Sums
    """The sums of a table with a row for each of the tokens."""
    tokens: Tensor | None
    """The tokens of the table, or None for all of the vocabulary."""
    occurs: Tensor | None
    """(V,) how often each token is counted, where the table holds all of them."""


def plan_merge(tokens: Tensor, mapped: Tensor, vocabulary: int) -> Merge:
    """The plan of a slice: tokens (n,) and the id that each counts for, -1 for none."""
    mapped, by_id = mapped.long().sort(stable=True)
    ids, counts = mapped.unique_consecutive(return_counts=True)
    without_id = int(len(ids) > 0 and ids[0] < 0)
    # To copy rows is faster than to gather their columns, unless these are few.
    if 2 * len(tokens) < vocabulary:
        return Merge(ids[without_id:], without_id, plan_sums(by_id, counts), tokens, None)
    occurs = torch.bincount(tokens, minlength=vocabulary)
    return Merge(ids[without_id:], without_id, plan_sums(tokens[by_id], counts), None, occurs)


def merge_rows(
    z: Tensor, rows: Sequence[int], merge: Merge, k: int, temperature: float, left_out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best ids of some rows, the logarithms of their masses, and those of the mass of all tokens of the slice.

    Args:
        z: (C, V), logits relative to the row's maximum, as all these masses are.
        rows: r rows that are asked for. They may repeat.
        left_out: (C,) a token for each row of z, or IGNORE_INDEX: it counts for no id, but in the mass of the slice.
    Returns:
        ids (r, k) int32, -1 for padding; logarithms (r, k) fp32, -inf for padding; and (r,) fp32.
    """
    ids = z.new_full((len(rows), k), -1, dtype=torch.int32)
    log_masses = z.new_full((len(rows), k), -torch.inf, dtype=torch.float32)
    log_totals = z.new_empty(len(rows), dtype=torch.float32)
    width = z.shape[1] if merge.tokens is None else len(merge.tokens)
    kept = min(k, len(merge.ids))
    step = min(len(z), max(MERGED_ROWS, MERGED_LOGITS // width))
    for begin in range(0, len(rows), step):
        some = rows[begin : begin + step]
        done = slice(begin, begin + len(some))
        part = torch.tensor(some, device=z.device)
        token = part.new_full(part.shape, IGNORE_INDEX) if left_out is None else left_out[part]
        best, at, total = _merged(z, part, merge, kept, temperature, token, z.dtype)
        if z.dtype == torch.float32:
            deep = (total < LEAST_FP32_MASS) | (best[:, -1:] < LEAST_FP32_MASS).any(1)
            if deep.any():  # rows whose masses fp32 cannot tell from 0, which are very rare
                again = _merged(z, part[deep], merge, kept, temperature, token[deep], torch.float64)
                best, total = best.double(), total.double()
                best[deep], at[deep], total[deep] = again
        ids[done, :kept] = merge.ids[at].int()
        log_masses[done, :kept] = best.log()
        log_totals[done] = total.log()
    return ids, log_masses, log_totals


def _merged(
    z: Tensor, rows: Tensor, merge: Merge, kept: int, temperature: float, token: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The `kept` largest masses of ids (r, kept), which ids those are, and the mass of all (r,), of `rows` (r,) of z.

    token: (r,) what is left out, or IGNORE_INDEX.
    """
    # Transposed, so that all rows add a token at a time, and in blocks that stay in the cache.
    width = z.shape[1] if merge.tokens is None else len(merge.tokens)
    masses = z.new_empty(width, len(rows), dtype=dtype)
    first = int(rows[0])
    # Rows that follow one another need not be gathered.
    neighbours = torch.equal(rows, torch.arange(first, first + len(rows), device=rows.device))
    for begin in range(0, width, COLUMNS_AT_ONCE):
        block = masses[begin : begin + COLUMNS_AT_ONCE]
        if merge.tokens is None:
            columns = z[:, begin : begin + len(block)]
            below = columns[first : first + len(rows)] if neighbours else columns.index_select(0, rows)
        else:
            below = z[rows[:, None], merge.tokens[begin : begin + len(block)]]
        block.copy_(below.t())
        if temperature != 1:
            block.div_(temperature)
        block.exp_()
    # The token that is left out counts in the sum of all, once for each time it is in the slice.
    if merge.tokens is None:
        assert merge.occurs is not None
        valid = token != IGNORE_INDEX
        masses[token[valid], valid.nonzero()[:, 0]] = 0
        times = merge.occurs[token.clamp_min(0)] * valid
    else:
        same = merge.tokens[:, None] == token
        masses.masked_fill_(same, 0)
        times = same.sum(0)
    of_token = z[rows, token.clamp_min(0)].to(dtype).div_(temperature).exp_()
    sums = merge.sums.of(masses)
    return *_best_of_columns(sums[merge.named :], kept), sums.sum(0) + torch.where(times > 0, of_token * times, 0)


def _best_of_columns(masses: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`stable_topk` of each column of masses (G, r), as (r, k). G is large: k groups of GROUP hold the k best (README.md)."""
    count = len(masses)
    if count <= 2 * GROUP * k:
        return stable_topk(masses.t().contiguous(), k)
    whole = count // GROUP * GROUP
    maxima = masses[:whole].view(-1, GROUP, masses.shape[1]).amax(1)
    if whole < count:
        maxima = torch.cat([maxima, masses[whole:].amax(0, keepdim=True)])
    _, groups = stable_topk(maxima.t().contiguous(), k)
    candidates = groups.sort(1).values[:, :, None] * GROUP + torch.arange(GROUP, device=masses.device)
    candidates = candidates.flatten(1)  # ascending, so that equal masses stay in the order of their ids
    of_groups = masses.t().gather(1, candidates.clamp_max(count - 1)).masked_fill_(candidates >= count, -1)
    best, at = stable_topk(of_groups, k)
    return best, candidates.gather(1, at)
