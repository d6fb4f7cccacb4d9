"""Arrays of unequal lengths that are stored end to end, with the offset at which each begins (CSR)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike


def offsets_of(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """The offset at which each of n parts begins, and at which the last one ends: (n + 1,) int64."""
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def ragged(parts: Sequence[np.ndarray], dtype: DTypeLike) -> tuple[np.ndarray, np.ndarray]:
    """Puts arrays end to end that agree in all axes but the first. Returns their offsets and the joined array."""
    return offsets_of([len(p) for p in parts]), (np.concatenate(parts) if len(parts) else np.zeros(0)).astype(dtype)


def slots_of(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part that every entry belongs to, and its place within this part."""
    counts = np.diff(offsets)
    part = np.repeat(np.arange(len(counts)), counts)
    return part, np.arange(len(part)) - np.repeat(offsets[:-1] - offsets[:1], counts)
