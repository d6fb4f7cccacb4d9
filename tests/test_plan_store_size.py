"""The bytes that the plan names are those of a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from profuser.models.load import chat_format
from profuser.plan.lengths import Lengths, measured
from profuser.plan.plan import make_plan
from profuser.plan.store_size import PER_SEQUENCE, Counts, capture_bytes, targets_bytes
from profuser.recipe.schema import SourceConfig
from profuser.store.layout import TARGET_COLUMNS


def size_of(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def test_captures_have_the_bytes_that_their_counts_say(prepared):
    directory, _, _ = prepared
    for name, vocabulary in (("guardian", 1152), ("scholar", 448), ("reckoner", 448)):
        files = [path for part in ("truth", "winners") for path in directory.glob(f"store/{part}/*-{name}-*")]
        shards = [load_file(path) for path in files]
        examples, tokens, ranges = (
            sum(count(shard) for shard in shards)
            for count in (lambda s: len(s["reason"]), lambda s: len(s["ids"]), lambda s: len(s["range_rows"]))
        )
        counts = Counts(examples, tokens, ranges, len(files))
        assert capture_bytes(counts, vocabulary, 10) == pytest.approx(size_of(files), rel=0.03)


def test_targets_have_the_bytes_that_their_counts_say(prepared):
    files = list(prepared[0].glob("store/targets/*"))
    shards = [load_file(path) for path in files]
    sequences, tokens, rows_, entries = (
        sum(len(shard[name]) for shard in shards) for name in ("example", "input_ids", "row_tail", "entry_ids")
    )
    counts = Counts(sequences, tokens, rows_, len(files))
    missing = (10 * rows_ - entries) * 4  # not every row has top_k entries
    assert targets_bytes(counts, 1152, 10, 3) - missing == pytest.approx(size_of(files), rel=0.03)


def test_the_plan_is_near_a_prepared_store(prepared):
    directory, of, _ = prepared
    plan = make_plan(of, processes=(1,), timed=False)
    found = {
        name: size_of([path for part in ("truth", "winners") for path in directory.glob(f"store/{part}/*-{name}-*")])
        for name in ("guardian", "scholar", "reckoner")
    }
    found["targets"] = size_of(list(directory.glob("store/targets/*")))
    assert plan.store["targets"] == pytest.approx(found["targets"], rel=0.05)
    # Who wins the vote cannot be known: the sources get equal shares.
    assert sum(plan.store.values()) == pytest.approx(sum(found.values()), rel=0.05)


def test_more_entries_and_larger_vocabularies_take_more():
    counts = Counts(1000, 50_000, 20_000, 1)
    assert capture_bytes(counts, 1 << 16, 20) - capture_bytes(counts, 1 << 16, 10) == 10 * (50_000 * 4 + 20_000 * 6)
    assert capture_bytes(counts, (1 << 16) + 1, 10) - capture_bytes(counts, 1 << 16, 10) == 50_000 * 2 * 11
    assert capture_bytes(counts, 7, 10) < capture_bytes(counts, 10, 10)


def test_every_source_adds_its_cross_entropy_its_weight_and_a_bit_of_the_marks():
    one, two = (targets_bytes(Counts(1000, 0, 0, 0), 1152, 10, sources) for sources in (1, 2))
    assert one == 1000 * sum(np.dtype(TARGET_COLUMNS[name]).itemsize for name in PER_SEQUENCE)
    assert two - one == 1000 * 2 * 4
    seven, eight = (targets_bytes(Counts(0, 1000, 0, 0), 1152, 10, sources) for sources in (7, 8))
    assert eight - seven == 1000


def test_lengths_are_those_of_a_random_sample_up_to_the_limit():
    target, source = (chat_format(SourceConfig(name=name, model=f"demo:{name}")) for name in ("guardian", "scholar"))
    short, long = ({"prompt": "Hi.", "response": "sea " * n, "skill": "s"} for n in (1, 40))
    one, other = (measured(target, source, [row], 448, 1000) for row in (short, long))
    both = measured(target, source, [short] * 400 + [long] * 400, 448, 1000)
    assert both.longest == other.longest > one.longest
    assert both.mean == pytest.approx((one.mean + other.mean) / 2, rel=0.1)  # the first 256 are all short
    assert (one.ranges > 0, measured(source, source, [long], 448, 1000).ranges) == (True, 0)
    limited = measured(target, source, [short, long], 448, other.longest - 5)
    assert (limited.longest, limited.mean) == (other.longest - 5, (one.mean + other.mean - 5) / 2)
    cut = measured(target, source, [long], 448, other.longest - 5)  # of what does not fit the response loses its end
    assert cut.response == other.response - 5
    assert cut.ranges == round(other.ranges * cut.response / other.response) < other.ranges
    assert measured(target, source, [long], 448, 3).response == 0
    assert measured(target, source, [], 448, 1000) == Lengths(0, 0, 0, 0)
