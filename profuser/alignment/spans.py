"""Which source token may speak for which target token: the one that conditions on the same bytes.

Target token t covers the bytes [a_t, e_t) of the response, source token j covers [b_j, f_j).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from profuser.alignment.types import INSIDE, SAME_SPAN, SHARED_PREFIX, SKIPPED

try:
    from profuser import _align
except ImportError:
    _align = None

ENGINE = (
    "C++" if _align is not None else "Python (the C++ extension is not built: pip install -e . with a C++ compiler)"
)


def match_spans_python(
    target_begin: ArrayLike, target_end: ArrayLike, source_begin: ArrayLike, source_end: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """The oracle of `match_spans`."""
    a, e, b, f = (np.asarray(x, dtype=np.int32) for x in (target_begin, target_end, source_begin, source_end))
    for name, begin, end in (("target", a, e), ("source", b, f)):
        if begin.ndim != 1 or begin.shape != end.shape:
            raise ValueError(
                f"{name}_begin and {name}_end must be 1-D of one length, got {begin.shape} and {end.shape}"
            )
    a, b = np.maximum(a, 0), np.maximum(b, 0)
    for name, begin, end in (("target", a, e), ("source", b, f)):
        if (begin[1:] < begin[:-1]).any() or (end < begin).any():
            raise ValueError(f"{name} spans must be monotone with begin <= end; re-encode the response")
    kind = np.full(len(a), SKIPPED, dtype=np.uint8)
    position = np.full(len(a), -1, dtype=np.int32)
    if len(b) == 0 or len(a) == 0:
        return kind, position
    first = np.searchsorted(b, a, side="left")
    past = np.searchsorted(b, a, side="right")
    # Several tokens at one offset (zero-width ones) match by order; one too many takes the first.
    order = np.arange(len(a)) - np.searchsorted(a, a, side="left")
    row = np.where(first + order < past, first + order, first)
    shared = first < past
    position[shared] = row[shared]
    kind[shared] = np.where(f[row[shared]] == e[shared], SAME_SPAN, SHARED_PREFIX)
    before = np.maximum(first - 1, 0)
    inside = ~shared & (first > 0) & (f[before] > a)
    position[inside] = before[inside]
    kind[inside] = INSIDE
    return kind, position


def match_spans(
    target_begin: ArrayLike, target_end: ArrayLike, source_begin: ArrayLike, source_end: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """Which source token each target token's distribution can come from.

    Args: (n,) and (m,) int32 byte spans, monotone; begins below 0 are clipped there.
    Returns:
        kind (n,) uint8 into KINDS; source_position (n,) int32: the token that begins at the same byte, for `inside` the
        one that holds it, -1 where skipped.
    Raises:
        ValueError: spans that are not monotone, or not of one length.
    """
    if _align is None:
        return match_spans_python(target_begin, target_end, source_begin, source_end)
    spans = (np.ascontiguousarray(x, dtype=np.int32) for x in (target_begin, target_end, source_begin, source_end))
    return _align.match_spans(*spans)
