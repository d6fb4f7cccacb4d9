"""Divides sequences into forward passes, and those of an optimizer step among the ranks.

A pass is a list of rows, and a row is a list of sequences that lie end to end. Where rows are packed, first-fit-decreasing fills
them (Johnson, 1973): the sequences are taken from the longest to the shortest, and each goes into the first row that has room.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, Protocol, TypeVar

import numpy as np


class Tokens(Protocol):
    """A sequence of tokens."""

    @property
    def input_ids(self) -> Sequence[int] | np.ndarray: ...


S = TypeVar("S", bound=Tokens)

Row = list[S]
Pass = list[list[S]]

Layout = Literal["padded", "packed", "flat"]
"""padded: a row holds one sequence, and short rows are padded. packed: rows hold several, and are not much longer than the longest
sequence, because attention with a mask costs as much as the square of a row's length. flat: a pass is a single row, for attention
that takes the bounds of the sequences and computes nothing between them (flash-attention's varlen)."""

WELL_FILLED, MOST_LENGTHS = 0.95, 4
"""Packed rows are as long as the longest sequence if less than a twentieth of them is then empty; else up to four times as long."""


def by_count(sequences: Sequence[S], count: int) -> list[Pass[S]]:
    """Divides sequences into `count` passes with a sequence per row. Those of a pass are of similar length, so little is padded.

    A pass may be empty.
    """
    ordered = sorted(sequences, key=_length)
    bounds = [round(len(ordered) * i / count) for i in range(count + 1)]
    return [[[sequence] for sequence in ordered[first:stop]] for first, stop in pairwise(bounds)]


def by_tokens(sequences: Sequence[S], budget: int, layout: Layout, multiple: int = 1) -> list[Pass[S]]:
    """Divides sequences into passes of at most `budget` tokens, padding included; a longer sequence has a pass of its own.

    Args:
        multiple: the number of passes is made a multiple of this, the last of them empty where there are too few sequences.
    """
    descending = sorted(sequences, key=_length, reverse=True)
    too_long = [[[sequence]] for sequence in descending if _length(sequence) > budget]
    fitting = descending[len(too_long) :]
    match layout:
        case "padded":
            rows = [[sequence] for sequence in fitting]
        case "packed":
            rows = filled(fitting, budget)
        case "flat":
            rows = first_fit(fitting, budget)
    passes: list[Pass[S]] = []
    longest = 0  # of the pass that is filled
    for row in sorted(rows, key=tokens_of, reverse=True):
        if not passes or layout == "flat" or (len(passes[-1]) + 1) * longest > budget:
            passes.append([])
            longest = tokens_of(row)
        passes[-1].append(row)
    passes = [*too_long, *passes]
    while len(passes) % multiple:
        # The pass with most sequences is halved, rather than that a rank waits with nothing to do.
        most = max(range(len(passes)), key=lambda n: sum(map(len, passes[n])))
        passes[most : most + 1] = _halves(passes[most])
    return passes


def filled(descending: Sequence[S], budget: int) -> list[Row[S]]:
    """Puts sequences into the shortest rows that are well filled, or else into those that are filled best."""
    best: list[Row[S]] = []
    for length in range(1, MOST_LENGTHS + 1):
        capacity = length * max(map(_length, descending), default=0)
        if best and capacity > budget:
            break
        rows = first_fit(descending, capacity)
        if not best or size_of(rows) < size_of(best):
            best = rows
        if sum(map(tokens_of, best)) >= WELL_FILLED * size_of(best):
            break
    return best


def first_fit(descending: Sequence[S], capacity: int) -> list[Row[S]]:
    """Puts sequences, which come from the longest to the shortest, into rows of at most `capacity` tokens."""
    rows: list[Row[S]] = []
    room: list[int] = []
    for sequence in descending:
        length = _length(sequence)
        at = next((n for n, free in enumerate(room) if free >= length), None)
        if at is None:
            at = len(rows)
            rows.append([])
            room.append(capacity)
        rows[at].append(sequence)
        room[at] -= length
    return rows


def shares(passes: Sequence[Pass[S]], world: int) -> list[list[Pass[S]]]:
    """Deals passes, a multiple of `world`, among the ranks: as many to each, and in every round the largest to who has least."""
    found: list[list[Pass[S]]] = [[] for _ in range(world)]
    load = [0] * world
    for begin in range(0, len(passes), world):
        of_round = sorted(passes[begin : begin + world], key=size_of, reverse=True)
        for rank, one in zip(sorted(range(world), key=lambda r: load[r]), of_round, strict=True):
            found[rank].append(one)
            load[rank] += size_of(one)
    return found


def tokens_of(row: Sequence[Tokens]) -> int:
    """The tokens of a row's sequences."""
    return sum(map(_length, row))


def size_of(one: Sequence[Sequence[Tokens]]) -> int:
    """The tokens that a pass computes, padding included."""
    return len(one) * max(map(tokens_of, one), default=0)


def _halves(one: Pass[S]) -> tuple[Pass[S], Pass[S]]:
    """Divides a pass into two of about as many sequences. One is empty where there is only one sequence, or none."""
    if len(one) > 1:
        return one[::2], one[1::2]
    row = one[0] if one else []
    first, second = row[::2], row[1::2]
    return [first] if first else [], [second] if second else []


def _length(sequence: Tokens) -> int:
    return len(sequence.input_ids)
