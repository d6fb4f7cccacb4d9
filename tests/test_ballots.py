"""The votes of single prompts, read back from a store, agree with its audit table."""

from __future__ import annotations

from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from profuser.prepare.data import load_examples
from profuser.prepare.votes import judged_examples
from profuser.recipe.schedule import Mode
from profuser.store import layout


def test_votes_responses_and_winners_are_those_of_the_audit_table(prepared):
    _, run, store = prepared
    table = pq.read_table(store.directory / "samples.parquet").to_pylist()
    rows = load_examples(run.recipe.data, run.recipe.data.train)
    examples = [*range(0, len(rows), 2), 1]  # they are from several shards, in any order
    for i, found in zip(examples, judged_examples(store, run.recipe, rows, examples), strict=True):
        expected = table[i]
        assert [found[key] for key in ("skill", "prompt", "ground_truth")] == [
            expected[key] for key in ("skill", "prompt", "ground_truth")
        ]
        for source in found["sources"]:
            (response,) = source["responses"]
            assert response["text"] == expected[f"response_{source['name']}"]
            assert response["votes"] == expected[f"votes_{source['name']}"]
            assert response["wins_vote"] == (source["name"] == expected["vote_winner"])
            assert source["wins_min_ce"] == (source["name"] == expected["min_ce_winner"])


def test_the_cross_entropy_is_that_of_the_targets(prepared):
    _, run, store = prepared
    rows = load_examples(run.recipe.data, run.recipe.data.train)
    found = judged_examples(store, run.recipe, rows, range(len(rows)))
    kind = layout.targets("train")
    for number in store.numbers(kind):
        shard = store.get(kind, number)
        for example, mode, ce in zip(shard["example"], shard["mode"], shard["source_ce"]):
            if mode == Mode.TRAINING:
                assert [source["ce"] for source in found[example]["sources"]] == pytest.approx(ce.tolist())


def test_without_judges_there_is_the_cross_entropy_alone(prepared):
    _, run, store = prepared
    rows = load_examples(run.recipe.data, run.recipe.data.train)
    (found,) = judged_examples(store, replace(run.recipe, judges=[], schedule="fusellm"), rows, [2])
    assert all(source["responses"] == [] and source["ce"] > 0 for source in found["sources"])
    assert sum(source["wins_min_ce"] for source in found["sources"]) == 1
