"""How judges' scores become votes and how ties are broken; votes read back from a store agree with its audit table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from profuser.prepare.data import load_examples
from profuser.prepare.votes import judged_examples, vote
from profuser.recipe.schedule import Mode
from profuser.store import layout

NAN = float("nan")


def winner(scores, eligible=None):
    scores = np.array(scores, dtype=float)[None]
    eligible = np.ones(scores.shape[2], bool) if eligible is None else np.array(eligible)
    w, votes = vote(scores, eligible[None])
    return int(w[0]), votes[0].tolist()


def test_most_votes_win():
    assert winner([[1, 2, 0], [0, 5, 1], [9, 0, 0]]) == (1, [1, 2, 0])


def test_a_tied_best_splits_the_judges_vote():
    assert winner([[1, 1, 0], [0, 1, 0]]) == (1, [0.5, 1.5, 0])


def test_a_judge_with_a_nan_or_with_equal_scores_abstains():
    assert winner([[NAN, 9, 0], [3, 3, 3], [0, 0, 1]]) == (2, [0, 0, 1])


def test_a_tie_in_votes_goes_to_the_higher_mean_z_score():
    # Each response has one vote. In units of its own spread, judge 1 prefers response 1 by far more than judge 0 prefers 0.
    scores = np.array([[[1.0, 0.9], [0.0, 1.0]], [[5.0, 0.0], [0.4, 0.5]]])
    w, votes = vote(scores, np.ones((2, 2), bool))
    assert votes[0].tolist() == [1, 1]
    assert w[0] == 1


def test_a_complete_tie_goes_to_the_lowest_index():
    assert winner([[1, 1, 1]]) == (0, [0, 0, 0])


def test_ineligible_responses_take_no_part_whatever_their_score():
    assert winner([[9, 1, 2], [NAN, 1, 2]], [False, True, True]) == (2, [0, 0, 2])


def test_nothing_eligible_has_no_winner():
    assert winner([[1, 2]], [False, False])[0] == -1


def test_z_scores_are_standardised_over_the_whole_data_set_not_per_example():
    # The judges' scales differ by a factor of 1000. Without standardisation judge 0 would decide every tie.
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(200, 2, 2)) * np.array([1000.0, 1.0])[:, None]
    w, votes = vote(scores, np.ones((200, 2), bool))
    tied = votes[:, 0] == votes[:, 1]
    z = scores / scores.std(axis=(0, 2), keepdims=True)
    agree = (z.mean(1).argmax(1) == w)[tied].mean()
    assert tied.sum() > 50
    assert agree > 0.97


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
