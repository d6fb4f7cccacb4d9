"""Arrays of unequal length end to end, with the offsets where each begins (CSR)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike


def offsets_of(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """(n + 1,) int64: where each of n parts begins, and where the last one ends."""
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def ragged(parts: Sequence[np.ndarray], dtype: DTypeLike) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, the parts end to end) of arrays that agree in all but the first axis."""
    return offsets_of([len(p) for p in parts]), (np.concatenate(parts) if len(parts) else np.zeros(0)).astype(dtype)


def slots_of(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every entry the part that it belongs to and its place within it."""
    counts = np.diff(offsets)
    part = np.repeat(np.arange(len(counts)), counts)
    return part, np.arange(len(part)) - np.repeat(offsets[:-1] - offsets[:1], counts)
