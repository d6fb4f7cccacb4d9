"""The marks of a target's tokens: which are labels, and which sources have a row there, as one number for each token.

Bit 0 of a token's mark says that it is a label, and bit 1 + s that source s has a row there. The rows of a sequence follow one
another by source, and those of a source by token, so that neither the source nor the token of a row has to be stored with it.
"""

from __future__ import annotations

import numpy as np

from profuser.recipe.schema import MOST_SOURCES


def marks_of(labels: np.ndarray, source: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Returns the marks of a sequence, (T,) uint64.

    Args:
        labels: (T,) bool, which of its T tokens are labels.
        source, position: (R,) int, the source and the token of each of its R rows, which must be in ascending order of both.
    """
    place = source.astype(np.int64) * len(labels) + position
    assert (place[1:] > place[:-1]).all(), "rows out of order would be those of other tokens"
    assert len(source) == 0 or 0 <= source[0] <= source[-1] < MOST_SOURCES
    marks = labels.astype(np.uint64)
    np.bitwise_or.at(marks, position, np.uint64(1) << (source.astype(np.uint64) + np.uint64(1)))
    return marks


def labels_of(marks: np.ndarray) -> np.ndarray:
    """Returns which tokens are labels, bool, from their marks."""
    return (marks & 1).astype(bool)


def rows_of(marks: np.ndarray, sources: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the source and the token of every row of a sequence, each (R,) int64, from its marks (T,) and the number of sources."""
    bit = np.arange(1, 1 + sources, dtype=marks.dtype)[:, None]
    source, position = (marks >> bit & 1).nonzero()
    return source, position


def mark_dtype(marks: np.ndarray) -> type[np.unsignedinteger]:
    """Returns the smallest dtype that these marks can be stored in."""
    return np.min_scalar_type(int(marks.max(initial=0))).type
