"""Computes 95 % intervals of shares, of means of shares, and of differences.

A single share has Wilson's interval. For a mean over skills and for a difference the intervals are combined by MOVER (Zou and
Donner 2008): the distances from the value to the limits are added in quadrature. For a difference this is Newcombe's interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Z = 1.959964  # the quantile of the normal distribution for a two-sided interval of 95 %


class Score(NamedTuple):
    """A share of correct answers in [0, 1] with its 95 % interval. The limits are NaN where the number of answers is unknown."""

    value: float
    low: float
    high: float


def wilson(share: float, count: int | None) -> Score:
    """Returns a share of `count` trials with its 95 % Wilson interval. Without a count the limits are NaN."""
    if not count or math.isnan(share):
        return Score(share, math.nan, math.nan)
    center = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return Score(share, max(0.0, center - half), min(1.0, center + half))


def mean_score(mean: float, parts: Sequence[Score]) -> Score:
    """Returns `mean`, the unweighted mean of independent shares, with its MOVER interval."""
    below = math.sqrt(sum((part.value - part.low) ** 2 for part in parts)) / max(len(parts), 1)
    above = math.sqrt(sum((part.high - part.value) ** 2 for part in parts)) / max(len(parts), 1)
    return Score(mean, mean - below, mean + above)


def difference(after: Score, before: Score) -> Score:
    """Returns after − before with its MOVER interval.

    The interval is rather wide: it treats the two as independent, although both were asked the same prompts.
    """
    value = after.value - before.value
    below = math.hypot(after.value - after.low, before.high - before.value)
    above = math.hypot(after.high - after.value, before.value - before.low)
    return Score(value, value - below, value + above)
