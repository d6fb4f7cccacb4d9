"""95 % intervals of shares, of their means and of differences.

Wilson's for one share; for a mean over skills and for a difference they are combined by MOVER (Zou and Donner 2008: the
distances to the limits add in quadrature, so for a difference they are Newcombe's).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Z = 1.959964  # two-sided 95 %


class Score(NamedTuple):
    """A share of correct answers in [0, 1] with its 95 % interval; low and high are NaN where the count is unknown."""

    value: float
    low: float
    high: float


def wilson(share: float, count: int | None) -> Score:
    """A share of `count` trials with its 95 % Wilson interval; without a count the limits are NaN."""
    if not count or math.isnan(share):
        return Score(share, math.nan, math.nan)
    center = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return Score(share, max(0.0, center - half), min(1.0, center + half))


def mean_score(mean: float, parts: Sequence[Score]) -> Score:
    """`mean` of independent shares with the MOVER interval of their unweighted mean."""
    below = math.sqrt(sum((p.value - p.low) ** 2 for p in parts)) / max(len(parts), 1)
    above = math.sqrt(sum((p.high - p.value) ** 2 for p in parts)) / max(len(parts), 1)
    return Score(mean, mean - below, mean + above)


def difference(after: Score, before: Score) -> Score:
    """after - before with its MOVER interval (both were asked the same prompts, so it is on the wide side)."""
    value = after.value - before.value
    below = math.hypot(after.value - after.low, before.high - before.value)
    above = math.hypot(after.high - after.value, before.value - before.low)
    return Score(value, value - below, value + above)
