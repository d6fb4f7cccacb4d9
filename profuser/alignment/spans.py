"""Matches each target token with the source token whose distribution it can take, because both follow the same bytes.

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
    """The oracle of `match_spans`, in plain Python."""
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
    # The source tokens that begin where the target token begins are [first, past). There can be several, because a token
    # may have no width. Then the n-th target token of an offset takes the n-th source token, or the first one if there are
    # fewer.
    first = np.searchsorted(b, a, side="left")
    past = np.searchsorted(b, a, side="right")
    nth = np.arange(len(a)) - np.searchsorted(a, a, side="left")
    row = np.where(first + nth < past, first + nth, first)
    shared = first < past
    position[shared] = row[shared]
    kind[shared] = np.where(f[row[shared]] == e[shared], SAME_SPAN, SHARED_PREFIX)
    # Where there is none, the source token before may hold the byte at which the target token begins.
    before = np.maximum(first - 1, 0)
    inside = ~shared & (first > 0) & (f[before] > a)
    position[inside] = before[inside]
    kind[inside] = INSIDE
    return kind, position


def match_spans(
    target_begin: ArrayLike, target_end: ArrayLike, source_begin: ArrayLike, source_end: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the source token that each target token's distribution can come from.

    Args:
        target_begin, target_end: (n,) int32, monotone byte spans of the target's tokens. Begins below 0 are set to 0.
        source_begin, source_end: (m,) int32, the same of the source's tokens.
    Returns:
        kind: (n,) uint8, indices into KINDS.
        source_position: (n,) int32, the source token that begins at the same byte. For the kind `inside` it is the one
            that holds this byte, and for `skipped` it is -1.
    Raises:
        ValueError: the spans are not monotone, or begins and ends differ in length.
    """
    if _align is None:
        return match_spans_python(target_begin, target_end, source_begin, source_end)
    spans = (np.ascontiguousarray(x, dtype=np.int32) for x in (target_begin, target_end, source_begin, source_end))
    return _align.match_spans(*spans)
