"""Span matching does what its definition says, and the two engines agree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profuser.alignment.spans import ENGINE, _align, match_spans, match_spans_python
from profuser.alignment.types import INSIDE, SAME_SPAN, SHARED_PREFIX, SKIPPED


def spans_from(cuts: list[int], clip: int) -> tuple[np.ndarray, np.ndarray]:
    edges = np.array(sorted(cuts), np.int32)
    begin, end = edges[:-1].copy(), edges[1:].copy()
    if len(begin):
        begin[0] -= clip
    return begin, end


tokenizations = st.tuples(st.lists(st.integers(0, 30), max_size=20), st.integers(0, 2)).map(lambda x: spans_from(*x))


@settings(max_examples=300, deadline=None)
@given(target=tokenizations, source=tokenizations)
def test_match_spans_is_what_the_definition_says(target, source):
    kind, position = match_spans_python(*target, *source)
    a, b = np.maximum(target[0], 0), np.maximum(source[0], 0)
    for t, begin in enumerate(a):
        peers = [j for j in range(len(b)) if b[j] == begin]
        holders = [j for j in range(len(b)) if b[j] < begin < source[1][j]]
        if peers:
            order = sum(a[:t] == begin)
            j = peers[order] if order < len(peers) else peers[0]
            assert (kind[t], position[t]) == (SAME_SPAN if source[1][j] == target[1][t] else SHARED_PREFIX, j)
        elif holders:
            assert (kind[t], position[t]) == (INSIDE, holders[0])
        else:
            assert (kind[t], position[t]) == (SKIPPED, -1)


@pytest.mark.skipif(_align is None, reason=f"engine: {ENGINE}")
@settings(max_examples=500, deadline=None)
@given(target=tokenizations, source=tokenizations)
def test_cpp_match_spans_equals_python(target, source):
    for ours, oracle in zip(match_spans(*target, *source), match_spans_python(*target, *source)):
        assert ours.dtype == oracle.dtype
        assert ours.tolist() == oracle.tolist()


@pytest.mark.parametrize("function", [match_spans, match_spans_python])
@pytest.mark.parametrize(
    ("target", "message"),
    [(([0, 2, 1], [2, 3, 4]), "monotone"), (([0, 3], [3, 2]), "monotone"), (([0], [1, 2]), "1-D")],
)
def test_match_spans_refuses_what_are_no_spans(function, target, message):
    with pytest.raises(ValueError, match=message):
        function(*target, [0], [4])
    with pytest.raises(ValueError, match=message):
        function([0], [4], *target)
