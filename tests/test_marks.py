"""The marks of a target's tokens: labels and rows come back as they were written, in the smallest dtype. Their writer counts rightly."""

from typing import Any, cast

import numpy as np
import pytest

from profuser.alignment.types import Aligned
from profuser.prepare.capture import ScoredResponse
from profuser.prepare.target_writer import TargetText, TargetWriter
from profuser.recipe.schedule import Mode
from profuser.store.marks import labels_of, mark_dtype, marks_of, rows_of
from profuser.text.encoded import Encoded


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


def test_what_is_counted_of_an_alignment_is_of_the_positions_that_have_entries():
    """These counts are what summary.json and the report say of the alignment."""
    encoded = Encoded([5, 6, 7, 8], [(0, 1), (1, 2), (2, 3)], 1, 4, None, [0, 1, 2, 3])
    scored = ScoredResponse(cast("Any", None), np.zeros(3, np.float32), 3.0, 3, 3)
    aligned = Aligned(
        kind=np.array([0, 0, 3], np.uint8), source_position=np.array([0, 1, -1], np.int32), offsets=np.array([0, 1, 3, 3]),
        ids=np.array([1, 2, 3], np.int32), logprobs=np.full(3, -2, np.float32), tail=np.array([0.25, 0.5, 1], np.float32),
        reliability=np.array([0.45, 0.65, 0.05], np.float32), skip_reason=np.array([0, 0, 1], np.uint8),
    )  # fmt: skip
    writer = TargetWriter(1, 100, 5, "byte", "all")
    writer.add(TargetText(0, Mode.INFERENCE, "abc", encoded, [scored], [1.0]), [aligned])
    found = writer.arrays()
    assert found["covered"].tolist() == [[0], [2]]
    assert found["mapped_mass"].tolist() == [[0], [1.25]]
    assert found["kinds"][Mode.INFERENCE, 0].tolist() == [2, 0, 0, 1]
    assert found["reliability"][Mode.INFERENCE, 0].tolist() == [0, 0, 0, 0, 1, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(("source", "position"), [([0, 0], [2, 1]), ([1, 0], [1, 2]), ([0, 0], [1, 1])])
def test_rows_out_of_order_are_not_attributed_to_other_tokens(source, position):
    with pytest.raises(AssertionError, match="out of order"):
        marks_of(np.ones(3, bool), np.array(source), np.array(position))
