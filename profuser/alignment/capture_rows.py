"""A capture as the oracle of the alignment reads it: every row and range as lists, and without its own token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from profuser.alignment.numbers import is_number, numbers
from profuser.alignment.types import DIGITS, NUMBERS, WHOLE, SourceCapture
from profuser.errors import DataError


@dataclass(slots=True)
class Row:
    """What a row or range says, without the own token.

    candidates, masses: the candidates that rule 3 is for, and their masses.
    tokens: target tokens with masses that were merged before the cut.
    cut: the mass of all candidates that end the target's token.
    exact: the mass of the whole row or range.
    """

    candidates: list[int]
    masses: list[float]
    tokens: list[tuple[int, float]] = field(default_factory=list)
    cut: float = 0.0
    exact: float = 1.0


class Rows:
    """A capture as lists: its rows, the mass of each row's own token, and its ranges."""

    def __init__(
        self, capture: SourceCapture, end_ids: frozenset[int], n: int, targets: int, pieces: Sequence[bytes | None]
    ):
        check_capture(capture)
        m = len(capture.ids)
        self.ids: list[int] = capture.ids.tolist()
        self.begin: list[int] = capture.begin.tolist()
        self.stop: list[int] = capture.stop.tolist()
        self.has_end = m > 0 and self.ids[-1] in end_ids and self.begin[-1] == self.stop[-1] == n
        self.content = m - self.has_end
        self.own: list[float] = np.exp(capture.own_logprobs.astype(np.float64)).tolist()
        self._end_ids, self._pieces = end_ids, pieces
        masses = np.exp(capture.top_logprobs.astype(np.float64)).tolist()
        self._top = [
            Row(*_others(ids, row, own, len(pieces)))
            for own, ids, row in zip(self.ids, capture.top_ids.tolist(), masses, strict=True)
        ]
        ranges = capture.ranges
        exact = np.exp(ranges.logmass.astype(np.float64)).tolist()
        masses = np.exp(ranges.logprobs.astype(np.float64)).tolist()
        cut = targets + len(pieces) + len(numbers())
        self.ranges: dict[tuple[int, int], Row] = {}  # by (row, strip)
        for j, strip, ids, row, mass in zip(
            ranges.rows.tolist(), ranges.strip.tolist(), ranges.ids.tolist(), masses, exact, strict=True
        ):
            found = self.ranges[j, strip] = Row([], [], exact=mass)
            for i, p in zip(ids, row, strict=True):
                if i == cut:
                    found.cut += p
                elif i >= targets and (i - targets != self.ids[j] or strip == DIGITS):
                    found.candidates.append(i - targets)
                    found.masses.append(p)
                elif 0 <= i < targets:
                    found.tokens.append((i, p))

    def top(self, j: int) -> Row:
        """A row's top k."""
        return self._top[j]

    def ends(self, j: int) -> Row:
        """The ends of turn in a row's top k."""
        ends = [(c, p) for c, p in zip(self._top[j].candidates, self._top[j].masses, strict=True) if c in self._end_ids]
        return Row([c for c, _ in ends], [p for _, p in ends])

    def whole(self, j: int) -> Row:
        """The whole row: merged, if the capture has it so. Ends of turn have no bytes, so they are not among the merged."""
        merged, ends = self.ranges.get((j, WHOLE)), self.ends(j)
        if merged is None:
            return self._followed(j, self._top[j])
        row = Row(merged.candidates + ends.candidates, merged.masses + ends.masses, merged.tokens, merged.cut)
        return self._followed(j, row)

    def digits(self, j: int) -> Row | None:
        """What row j says of the tokens that begin with a digit, if the capture holds it."""
        digits = self.ranges.get((j, DIGITS))
        return None if digits is None else self._followed(j, digits)

    def _followed(self, j: int, row: Row) -> Row:
        """Puts the numbers that were followed at row j in the place of the candidates that consist of digits (rule 9)."""
        followed = self.ranges.get((j, NUMBERS))
        if followed is None:
            return row
        pieces = self._pieces
        kept = [
            (c, p)
            for c, p in zip(row.candidates, row.masses, strict=True)
            if not (0 <= c < len(pieces) and is_number(pieces[c]))
        ]
        candidates, masses = [c for c, _ in kept], [p for _, p in kept]
        return Row(candidates + followed.candidates, masses + followed.masses, row.tokens, row.cut, row.exact)

    def goes_on(self, j: int) -> float | None:
        """The probability with which a digit is taken to follow row j's candidates, if its own token ends in a digit."""
        digits = self.ranges.get((j + 1, DIGITS))
        known = digits is not None and j < self.content and (self._pieces[self.ids[j]] or b"")[-1:].isdigit()
        return (1.0 + min(digits.exact, 1.0)) / 2 if known and digits else None


def _others(ids: list[int], masses: list[float], own: int, size: int) -> tuple[list[int], list[float]]:
    """The candidates of a row and their masses, without the own token, padding, and ids beyond the vocabulary."""
    if own not in ids and -1 not in ids and max(ids, default=0) < size:
        return ids, masses
    keep = [slot for slot, i in enumerate(ids) if i != own and 0 <= i < size]
    return [ids[slot] for slot in keep], [masses[slot] for slot in keep]


def check_capture(capture: SourceCapture) -> None:
    """Raises DataError for arrays that do not belong together, or whose values no distribution can have."""
    m, ranges = len(capture.ids), capture.ranges
    lengths = {
        len(x) for x in (capture.begin, capture.stop, capture.top_ids, capture.top_logprobs, capture.own_logprobs)
    }
    if lengths != {m} or capture.top_ids.ndim != 2 or capture.top_ids.shape != capture.top_logprobs.shape:
        raise DataError(
            f"a capture's arrays must have one row per token ({m}), got rows {sorted(lengths)}; capture it again"
        )
    r = len(ranges.rows)
    lengths = {len(x) for x in (ranges.strip, ranges.logmass, ranges.ids, ranges.logprobs)}
    if lengths != {r} or ranges.ids.ndim != 2 or ranges.ids.shape != ranges.logprobs.shape:
        raise DataError(
            f"the arrays of a capture's prefix ranges must have one row per range ({r}), got rows {sorted(lengths)}; "
            "capture it again"
        )
    if r and not (ranges.rows.min() >= 0 and ranges.rows.max() < m and ranges.strip.min() >= NUMBERS):
        raise DataError(
            f"a prefix range must belong to one of {m} rows and have bytes, got rows [{ranges.rows.min()}, "
            f"{ranges.rows.max()}] and {ranges.strip.min()} bytes; capture it again"
        )
    for name, logprobs in (
        ("top_logprobs", capture.top_logprobs),
        ("own_logprobs", capture.own_logprobs),
        ("ranges.logmass", ranges.logmass),
        ("ranges.logprobs", ranges.logprobs),
    ):
        # A sum in float32 may end slightly above 0.
        bad = ~(logprobs <= 1e-3)
        if bad.any():
            raise DataError(
                f"{name} must be natural log-probabilities, got {logprobs[bad].flat[0]}; apply log_softmax, or capture it again"
            )
