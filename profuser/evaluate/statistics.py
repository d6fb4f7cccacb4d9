"""Intervals of scores by the bootstrap, and tests between two models that were asked the same items.

A score is a weighted mean over tasks of the means over their items. The items of each task are drawn anew on their own, so that a
task keeps its weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from profuser.report.intervals import Score

DRAWS = 2000
"""How often items are drawn anew."""
TURNS = 10_000
"""How often signs are turned."""
AT_ONCE = 1 << 22
"""The most indices that are drawn at a time."""


@dataclass(frozen=True)
class Sample:
    """The values of a task's items. Its mean counts every item by its size, where items have one, such as bytes of text."""

    values: np.ndarray
    sizes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shares(self) -> np.ndarray:
        """How much each item counts in the mean; they sum to 1."""
        sizes = np.ones(len(self)) if self.sizes is None else self.sizes
        return sizes / sizes.sum()

    def of(self, kept: np.ndarray) -> Sample:
        """The items that a mask keeps."""
        return Sample(self.values[kept], None if self.sizes is None else self.sizes[kept])

    def mean(self) -> float:
        # Divided last, so that 196 right answers of 200 are 0.98 here as everywhere else.
        weighted = self.values if self.sizes is None else self.values * self.sizes
        return float(weighted.sum() / (len(self) if self.sizes is None else self.sizes.sum()))


def score(parts: Sequence[Sample], weights: Sequence[float], *, seed: int = 0) -> Score:
    """Returns a score with its 95 % percentile interval by the bootstrap, which is the same at every call.

    Args:
        parts: the items of each task. weights: how much each task's mean counts; they sum to 1.
    """
    value = sum(w * part.mean() for w, part in zip(weights, parts, strict=True))
    generator, total = np.random.default_rng(seed), np.zeros(DRAWS)
    for weight, part in zip(weights, parts, strict=True):
        rows = max(1, AT_ONCE // len(part))
        for first in range(0, DRAWS, rows):
            drawn = generator.integers(len(part), size=(min(rows, DRAWS - first), len(part)))
            shares = part.shares[drawn]
            total[first : first + rows] += weight * (shares * part.values[drawn]).sum(1) / shares.sum(1)
    low, high = np.quantile(total, [0.025, 0.975])
    return Score(value, float(low), float(high))


def paired_p(a: Sequence[Sample], b: Sequence[Sample], weights: Sequence[float], *, seed: int = 0) -> float:
    """Returns the two-sided p-value of the difference between two models that were asked the same items.

    For right and wrong answers of one task this is the exact McNemar test. Otherwise the signs of the items' differences are
    turned at random, as if the two models could be exchanged on every item.
    """
    if len(a) == 1 and a[0].sizes is None and all(np.isin(part.values, (0, 1)).all() for part in (*a, *b)):
        one, other = a[0].values, b[0].values
        return mcnemar(int((one > other).sum()), int((one < other).sum()))
    differences = np.concatenate([w * x.shares * (x.values - y.values) for w, x, y in zip(weights, a, b, strict=True)])
    differences = differences[differences != 0]  # where the two agree, no sign changes any sum
    if not len(differences):
        return 1.0
    observed, generator, extreme = abs(differences.sum()), np.random.default_rng(seed), 0
    rows = max(1, AT_ONCE // len(differences))
    for first in range(0, TURNS, rows):
        signs = generator.integers(0, 2, size=(min(rows, TURNS - first), len(differences))) * 2 - 1
        extreme += int((abs(signs @ differences) >= observed * (1 - 1e-9)).sum())
    return (extreme + 1) / (TURNS + 1)


def mcnemar(only_a: int, only_b: int) -> float:
    """Returns the exact two-sided p-value of the McNemar test, from how many items only one of the models has right."""
    count, fewer = only_a + only_b, min(only_a, only_b)
    if not count:
        return 1.0
    # In logarithms, because the binomial coefficients of thousands of items are no floats.
    terms = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, terms)))
