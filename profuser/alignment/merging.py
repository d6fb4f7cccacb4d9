"""Adds the masses of source tokens that count for one target token before a capture cuts a distribution off at its top k.

Where a target's tokens are shorter than the source's, many source tokens count for one of them: all of `1`, `12` and `123`
are the digit `1` to a target that writes single digits. If the capture kept the ten most probable of a thousand such numbers,
most of their mass would be lost before it is added up. A row is therefore merged over the whole vocabulary, by a map that
says what each source token counts for (rule 7 of reference.py). In such a map stand

    0 .. T - 1        a target token: the source token counts for it wherever it stands behind a boundary of this kind,
    T + s             source token s itself: what it counts for depends on the prefix, and is found out by rule 3,
    T + S + N         CUT: the source token begins a new pre-token, and so ends the target's token that began before it,
    -1                nothing, so that the mass goes to the tail,

where T and S are the sizes of the two vocabularies, and N is the number of `numbers`, which stand between. What a source token
counts for is known without the prefix where the target's text is always cut between the last character before the token and the
token's first one. A boundary is the kind of that last character: whether a space, a digit, or something else than a digit behind
it begins a new pre-token.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from profuser.alignment.boundaries import Boundaries
from profuser.alignment.numbers import DIGITS, numbers
from profuser.alignment.vocab_map import LOOKAHEADS, ByteOrder, CandidateTable, first_tokens, same_tokens
from profuser.text.token_bytes import TokenBytes


class Boundary(NamedTuple):
    """What begins a new pre-token behind a character.

    space: a space with something behind it that is not a space.
    digit: a digit.
    number: after a digit, everything that is no digit and is cut from one.
    everything: nothing stands before, so that every token begins a pre-token.
    """

    space: bool
    digit: bool
    number: bool
    everything: bool = False


START = Boundary(True, True, True, everything=True)
"""The boundary where nothing stands before a token."""
OPEN = Boundary(False, False, False)
"""A boundary behind which it depends on the prefix what a token counts for."""


UNMERGED, UNKNOWN = -1, -2
"""In place of a map: what the tokens count for is not known without the prefix."""


@dataclass(eq=False)
class Merging:
    """The maps of one source's tokens to one target's.

    target, source: the tokens of both sides.
    order: the source's vocabulary in byte order; maps are in this order.
    boundaries, table: of the target, and of the pair.
    maps: the maps that were asked for so far, each (number of tokens of its range,) int32.
    """

    target: TokenBytes
    source: TokenBytes
    order: ByteOrder
    boundaries: Boundaries
    table: CandidateTable
    maps: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self):
        self.same_tokens = same_tokens(self.target, self.source)
        self.cut = len(self.target.pieces) + len(self.source.pieces) + len(numbers())
        self.merges_digits = self.table.merges_digits
        self.ends_in_digit = np.array([bool(piece) and piece[-1:].isdigit() for piece in self.source.pieces])
        self.target_lengths, self.source_lengths = (
            np.array([len(piece or b"") for piece in side.pieces], dtype=np.int32)
            for side in (self.target, self.source)
        )
        self.target_control = np.array([piece is None for piece in self.target.pieces])
        self.digit_range = (self.order.range_of(b"0")[0], self.order.range_of(b"9")[1])
        self._made: dict[tuple, int] = {}  # the maps by what they are for, as indices into `maps` or UNMERGED
        self._behind: dict[int, Boundary] = {}
        # The maps behind each token, UNKNOWN until one is asked for. The last entry is for the beginning of a text.
        self._start_maps = np.full(len(self.target.pieces) + 1, UNKNOWN, dtype=np.int32)
        self._path_maps = np.full(len(self.source.pieces), UNKNOWN, dtype=np.int32)

    def start_maps(self, before: np.ndarray) -> np.ndarray:
        """The maps of rows where a target token begins.

        Args:
            before: (n,) the target's tokens before, or -1 where no text stands before.
        Returns:
            (n,) int32, indices into `maps` or UNMERGED
        """
        for token in np.unique(before[self._start_maps[before] == UNKNOWN]).tolist():
            boundary = START if token < 0 else self._boundary(int(self.boundaries.last[token]))
            self._start_maps[token] = self._start_map(boundary)
        return self._start_maps[before]

    def path_maps(self, before: np.ndarray) -> np.ndarray:
        """The maps of rows within a target token: what begins a new pre-token there ends that token.

        Args:
            before: (n,) the source's tokens before.
        Returns:
            (n,) int32, indices into `maps` or UNMERGED
        """
        for token in np.unique(before[self._path_maps[before] == UNKNOWN]).tolist():
            self._path_maps[token] = self._path_map(self.behind(self.source.pieces[token] or b""))
        return self._path_maps[before]

    def behind(self, data: bytes) -> Boundary:
        """The boundary behind some bytes."""
        for size in range(1, 5):  # the last character has 1 to 4 bytes
            try:
                return self._boundary(ord(data[-size:].decode()))
            except (UnicodeDecodeError, TypeError):
                continue
        return OPEN

    def _boundary(self, code: int) -> Boundary:
        known = self._behind.get(code)
        if known is None:
            known = OPEN
            if code >= 0:
                last = chr(code)
                space = not last.isspace() and bool(self.boundaries.closes_before_space(np.array([code]))[0])
                digit = all(self.boundaries.cut_between(last, d) for d in DIGITS)
                known = Boundary(space, digit, space and last in DIGITS)
            self._behind[code] = known
        return known

    def _add(self, key: tuple, found: np.ndarray | None) -> int:
        """Keeps a map, and returns its index."""
        self._made[key] = UNMERGED if found is None else len(self.maps)
        if found is not None:
            self.maps.append(found.astype(np.int32))
        return self._made[key]

    def _known(self, boundary: Boundary) -> np.ndarray:
        """(source vocabulary,) bool: the source tokens that certainly begin a new pre-token behind a boundary."""
        table = self.table
        if boundary.everything:
            return np.ones(len(table.counts_for), dtype=bool)
        return (
            (table.opens & boundary.space) | (table.digit_led & boundary.digit) | (table.ends_number & boundary.number)
        )

    def _start_map(self, boundary: Boundary) -> int:
        key = ("start", boundary)
        if key in self._made:
            return self._made[key]
        known = self._known(boundary)
        ids = np.arange(len(known)) + len(self.target.pieces)
        # A number that the target would merge with a further digit stays itself (rule 8).
        found = np.where(known & (self.table.onward == 0), self.table.counts_for, ids)
        return self._add(key, found[self.order.ids] if known.any() else None)

    def _path_map(self, boundary: Boundary) -> int:
        key = ("path", boundary)
        if key in self._made:
            return self._made[key]
        known = self._known(boundary)
        found = np.where(known, self.cut, np.arange(len(known)) + len(self.target.pieces))
        return self._add(key, found[self.order.ids] if boundary.space else None)

    def prefix_map(self, entered: bytes, *, starts_text: bool) -> int:
        """The map of the tokens that begin with `entered`, for what comes behind these bytes.

        Args:
            starts_text: whether no text stands before the place behind `entered`, which is then no part of the text.
        Returns:
            an index into `maps`, or UNMERGED
        """
        key = ("prefix", entered, starts_text)
        if key in self._made:
            return self._made[key]
        if self.same_tokens:
            return self._add(key, None)
        boundary = START if starts_text else self.behind(entered)
        lo, hi = self.order.range_of(entered)
        ids = self.order.ids[lo:hi]
        found = ids + len(self.target.pieces)
        places, texts, sizes = [], [], []
        for place, i in enumerate(ids.tolist()):
            rest = (self.source.pieces[i] or b"")[len(entered) :]
            if not rest or not self._begins(rest, boundary):
                continue
            try:
                text = rest.decode()
            except UnicodeDecodeError:
                continue
            places.append(place)
            texts.append(text + LOOKAHEADS[self.table.lookahead[i]])
            sizes.append(len(rest))
        found[places] = first_tokens(self.target, texts, sizes)
        # A number that the target would merge with a further digit stays itself.
        if self.merges_digits:
            onward = [place for place in places if self.ends_in_digit[ids[place]]]
            found[onward] = ids[onward] + len(self.target.pieces)
        return self._add(key, found if places else None)

    def _begins(self, rest: bytes, boundary: Boundary) -> bool:
        """Whether the rest of a token certainly begins a new pre-token behind a boundary."""
        if boundary.everything:
            return True
        if rest[:1].isdigit():
            return boundary.digit
        if boundary.number:
            return self.table.cut_behind_digit(rest.decode(errors="replace"))
        return boundary.space and rest[:1] == b" " and len(rest) > 1 and not rest[1:2].isspace()


@functools.lru_cache(maxsize=16)
def merging_of(target: TokenBytes, source: TokenBytes, order: ByteOrder) -> Merging:
    """The maps of a pair of tokenizers; they are made once."""
    boundaries = boundaries_of(target)
    return Merging(target, source, order, boundaries, candidate_table(target, source))


@functools.lru_cache(maxsize=16)
def boundaries_of(target: TokenBytes) -> Boundaries:
    """The cuts in texts of a target's tokenizer; they are found out once."""
    return Boundaries(target)


@functools.lru_cache(maxsize=16)
def candidate_table(target: TokenBytes, source: TokenBytes) -> CandidateTable:
    """What a source's tokens count for at the beginning of a pre-token; it is found out once per pair."""
    return CandidateTable(target, source, boundaries_of(target))
