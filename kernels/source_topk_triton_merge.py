"""Adding the masses of tokens that count for the same id, on the Triton path of `source_topk`: what is added, and the launches.

Tokens are sorted by the id that they count for, on the device. Those of an id are a segment, and each segment's tokens are added
in that order, so that sums are the same in every run. README.md describes the kernels.
Dimension letters: as in source_topk_triton_kernels.py.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .source_topk_triton_kernels import GROUP, _merge_kernel, _merged_reduce_kernel, _select_kernel

MERGED_ROWS = 512  # rows or ranges of a launch: enough for a large GPU, and their merged masses take little memory
LONG = 64  # a segment of more tokens is added by all lanes of a program
BLOCK = 256


@dataclass(frozen=True, slots=True)
class Segments:
    """n tokens, sorted by the id that they count for. There may be n segments; of those without tokens the id is -1."""

    members: Tensor
    """(n,) int32, the tokens, those of an id together; V for a token that does not exist."""
    positions: Tensor | None
    """(n,) int32, where each stood before it was sorted. Without it, all members count for every range."""
    begin: Tensor
    """(n,) int32, of a segment among the members, for the segments from the longest to the shortest."""
    count: Tensor
    """(n,) int32, how many members it has."""
    column: Tensor
    """(n,) int32, the place of its id among the ids."""
    ids: Tensor
    """(n,) int32, ascending, then -1. An id of -1 comes first if there are tokens without an id."""
    occurs: Tensor
    """(V,) int32, how often each token is among the members."""


def plan_segments(tokens: Tensor, mapped: Tensor, vocabulary: int, positions: bool = False) -> Segments:
    """Segments of tokens (n,), n > 0, by the ids (n,) that they count for. Nothing waits for the device."""
    known = (tokens >= 0) & (tokens < vocabulary)
    tokens = torch.where(known, tokens.long(), vocabulary)
    mapped, by_id = mapped.long().clamp_min(-1).sort(stable=True)
    starts = torch.ones_like(mapped, dtype=torch.bool)
    starts[1:] = mapped[1:] != mapped[:-1]
    segment = starts.cumsum(0) - 1
    count = torch.zeros_like(mapped).scatter_add_(0, segment, torch.ones_like(mapped))  # whole numbers, in any order
    ids = torch.full_like(mapped, -1).scatter_(0, segment, mapped)
    begin = count.cumsum(0) - count
    by_size = count.sort(descending=True, stable=True).indices
    occurs = mapped.new_zeros(vocabulary + 1).scatter_add_(0, tokens, torch.ones_like(mapped))
    return Segments(
        members=tokens[by_id].int(),
        positions=by_id.int() if positions else None,
        begin=begin[by_size].int(),
        count=count[by_size].int(),
        column=by_size.int(),
        ids=ids.int(),
        occurs=occurs[:vocabulary].int(),
    )


@dataclass(frozen=True, slots=True)
class Merge:
    """Rows or ranges whose masses are merged by the same segments."""

    segments: Segments
    which: Tensor | None = None
    """(B,) int32, the ranges, or None for all rows."""
    rows: list[int] | None = None
    """(B,) the rows of those ranges, ascending, or None if only the device knows them."""
    own_map: bool = False
    """Whether they are ranges with maps of their own, for which the label is left out and the mass is computed, too."""

    def of_chunk(self, rows: slice, items: int) -> Iterator[slice]:
        """Slices, of `items` at most, of what may be in a chunk of rows: of its rows, or of `which`."""
        first, last = 0, rows.stop - rows.start
        if self.which is not None:
            first, last = 0, len(self.which)
        if self.rows is not None:
            first, last = bisect_left(self.rows, rows.start), bisect_left(self.rows, rows.stop)
        for begin in range(first, last, items):
            yield slice(begin, min(begin + items, last))


def plan_merges(vocab_map: Tensor | None, ranges: tuple[Tensor, ...] | None, N: int, vocabulary: int) -> list[Merge]:
    """All merges of a call. Only for ranges with maps does the host wait for the device, once, to learn which slices occur."""
    merges = []
    if vocab_map is not None:
        every = torch.arange(vocabulary, device=vocab_map.device)
        merges.append(Merge(plan_segments(every, vocab_map, vocabulary)))
    if ranges is None or not len(ranges[0]):
        return merges
    rows, lo, hi, vocab_order, *maps = ranges
    listed = []
    if maps and len(maps[1]):
        listed = numbers_of(rows, lo, hi, maps[0])
        slices: dict[tuple[int, int, int], list[int]] = {}
        for r, (row, first, last, begin) in enumerate(listed):
            # What is out of bounds keeps its NaN.
            if 0 <= row < N and 0 <= first < last <= len(vocab_order) and 0 <= begin <= len(maps[1]) - (last - first):
                slices.setdefault((first, last, begin), []).append(r)
        for (first, last, begin), members in slices.items():
            segments = plan_segments(vocab_order[first:last], maps[1][begin : begin + last - first], vocabulary)
            merges.append(Merge(segments, *_by_row(members, listed, rows), own_map=True))
    if vocab_map is not None and len(vocab_order):
        # Ranges without maps of their own may all differ. They share the segments of the whole order, and each counts only
        # those members whose positions are in it.
        known = vocab_order.long().clamp(0, vocabulary - 1)
        segments = plan_segments(vocab_order, vocab_map[known], vocabulary, positions=True)
        if listed:
            members = [r for r, (_, _, _, begin) in enumerate(listed) if begin == -1]
            merges.append(Merge(segments, *_by_row(members, listed, rows)))
        else:
            merges.append(Merge(segments, torch.arange(len(rows), dtype=torch.int32, device=rows.device)))
    return merges


def without_mapped(
    rows: Tensor, lo: Tensor, hi: Tensor, vocab_order: Tensor, map_begin: Tensor, mapped: Tensor
) -> tuple[Tensor, ...]:
    """The ranges as `_range_kernel` is to see them: without those that are merged, and those that exceed their map as wrong."""
    lo, hi, map_begin = lo.long(), hi.long(), map_begin.long()
    fits = (map_begin == -1) | ((map_begin >= 0) & (map_begin <= len(mapped) - (hi - lo)))
    merged = fits & (map_begin >= 0) & (lo < hi)
    # No chunk has row -1. A range that begins at -1 is out of bounds.
    return torch.where(merged, -1, rows.long()), torch.where(fits, lo, -1), hi, vocab_order


def numbers_of(*columns: Tensor) -> list[tuple[int, ...]]:
    """The rows of a table of whole numbers, read from the device."""
    return [tuple(numbers) for numbers in torch.stack([x.long() for x in columns], 1).tolist()]


def _by_row(members: list[int], listed: list[tuple[int, ...]], like: Tensor) -> tuple[Tensor, list[int]]:
    members = sorted(members, key=lambda r: listed[r][0])
    return torch.tensor(members, dtype=torch.int32, device=like.device), [listed[r][0] for r in members]


class Merger:
    """Runs the merges of a call, chunk by chunk."""

    def __init__(
        self,
        merges: list[Merge],
        ranges: tuple[Tensor, ...] | None,
        found: list[Tensor],
        chunk: int,
        vocabulary: int,
        elementwise: dict[str, Any],
    ):
        """`found` are the results of `source_topk`, which are written; `chunk` is the most rows of a chunk."""
        self.merges, self.ranges, self.found = merges, ranges, found
        self.vocabulary, self.elementwise = vocabulary, elementwise
        largest = max((len(merge.segments.ids) for merge in merges), default=0)
        items = min(chunk, MERGED_ROWS)
        # A merge has a row's columns, and their groups, at these distances. They are multiples of 16, for wide loads.
        self.S = triton.cdiv(largest, GROUP.value) * GROUP.value
        self.merged = found[1].new_empty(items, self.S)
        self.maxima = found[1].new_empty(items, triton.cdiv(largest, GROUP.value**2) * GROUP.value)

    def run(self, rows: slice, raw: tuple[Any, ...], labels: Tensor, row_max: Tensor, log_sum: Tensor) -> None:
        """Merges what is asked for in a chunk, of which `raw` are the logits, their width and the bias."""
        for merge in self.merges:
            for part in merge.of_chunk(rows, len(self.merged)):
                self._launch(merge, part, rows, raw, labels, row_max, log_sum)

    def _launch(
        self,
        merge: Merge,
        part: slice,
        rows: slice,
        raw: tuple[Any, ...],
        labels: Tensor,
        row_max: Tensor,
        log_sum: Tensor,
    ) -> None:
        segments, items, n = merge.segments, part.stop - part.start, len(merge.segments.ids)
        out_ids, out_logprobs = self.found[:2]
        which = of_which = lo = hi = logmass = None
        in_chunk = (rows.start, rows.stop - rows.start)
        if merge.which is None:
            # The rows of this part are all that the kernels see.
            raw = (raw[0][part], *raw[1:])
            labels, row_max, log_sum = labels[part], row_max[part], log_sum[part]
            out_ids, out_logprobs = out_ids[rows][part], out_logprobs[rows][part]
            in_chunk = (0, items)
        else:
            which = merge.which[part]
            assert self.ranges is not None
            of_which, lo, hi, *_ = self.ranges
            out_ids, out_logprobs, logmass = self.found[4:]
        own_labels, own_mass = (labels, logmass) if merge.own_map else (None, None)
        supers = triton.cdiv(n, GROUP.value**2)
        groups = supers * GROUP.value
        k = out_ids.shape[1]
        K = max(2, triton.next_power_of_2(k))
        blocks = triton.cdiv(n, BLOCK)
        _merge_kernel[(items * blocks,)](
            *raw, row_max, own_labels, which, of_which, lo, hi, segments.positions, segments.members, segments.begin,
            segments.count, segments.column, self.merged, *in_chunk, n, blocks, self.S, **self.elementwise,
            V=self.vocabulary, LONG=LONG, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        _merged_reduce_kernel[(items,)](
            self.merged, segments.ids, self.maxima, *raw, row_max, log_sum, own_labels, segments.occurs, which, of_which,
            own_mass, *in_chunk, n, self.S, groups, **self.elementwise, V=self.vocabulary, BLOCK=2048, num_warps=4,
        )  # fmt: skip
        _select_kernel[(items,)](
            self.merged, self.S, None, self.maxima, row_max, log_sum, out_ids, out_logprobs, segments.ids, which, of_which,
            logmass, *in_chunk, n, groups, k, temperature=1.0, softcap=None, logit_scale=None, K=K,
            BLOCK_S=max(K, triton.next_power_of_2(supers)), num_warps=4,
        )  # fmt: skip
