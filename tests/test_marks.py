"""The marks of a target's tokens: labels and rows come back as they were written, in the smallest dtype."""

import numpy as np
import pytest

from profuser.prepare.target_writer import TargetWriter
from profuser.store.marks import labels_of, mark_dtype, marks_of, rows_of


@pytest.mark.parametrize("sources", [1, 3, 7, 8, 31, 63])
def test_labels_and_rows_come_back_as_they_were(sources):
    rng = np.random.default_rng(sources)
    labels = rng.random(50) < 0.5
    source, position = (rng.random((sources, 50)) < 0.6).nonzero()
    marks = marks_of(labels, source, position)
    stored = marks.astype(mark_dtype(marks))
    assert stored.itemsize == {1: 1, 3: 1, 7: 1, 8: 2, 31: 4, 63: 8}[sources]
    assert (labels_of(stored) == labels).all()
    assert [found.tolist() for found in rows_of(stored, sources)] == [source.tolist(), position.tolist()]


def test_sources_that_no_bit_of_the_dtype_stands_for_have_no_rows():
    """Where the first sources won, the marks of ten sources fit a byte."""
    marks = marks_of(np.array([False, True, True]), np.array([2, 2]), np.array([1, 2]))
    stored = marks.astype(mark_dtype(marks))
    assert stored.tolist() == [0, 0b1001, 0b1001]
    assert stored.itemsize == 1
    assert [found.tolist() for found in rows_of(stored, 10)] == [[2, 2], [1, 2]]


def test_a_sequence_without_rows_or_tokens_has_marks():
    nothing = np.zeros(0, np.int64)
    assert marks_of(np.array([True, False]), nothing, nothing).tolist() == [1, 0]
    assert marks_of(np.zeros(0, bool), nothing, nothing).size == 0
    assert mark_dtype(np.zeros(0, np.uint64)) is np.uint8


def test_a_shard_without_sequences_has_marks_of_bytes():
    assert TargetWriter(2, 100, 5, "byte", "all").arrays()["marks"].dtype == np.uint8


@pytest.mark.parametrize(("source", "position"), [([0, 0], [2, 1]), ([1, 0], [1, 2]), ([0, 0], [1, 1])])
def test_rows_out_of_order_are_not_attributed_to_other_tokens(source, position):
    with pytest.raises(AssertionError, match="out of order"):
        marks_of(np.ones(3, bool), np.array(source), np.array(position))
