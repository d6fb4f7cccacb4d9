"""How judges' scores become votes and how ties are broken; votes read back from a store agree with its audit table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from profuser.prepare.data import load_examples
from profuser.prepare.vote_rules import NOBODY, borda, mean_z_scores, vote
from profuser.prepare.votes import judged_examples
from profuser.recipe.schedule import Mode
from profuser.store import layout

NAN = float("nan")


def winner(scores, eligible=None, floors=None):
    scores = np.array(scores, dtype=np.float32)[None]
    eligible = np.ones(scores.shape[2], bool) if eligible is None else np.array(eligible)
    found = vote(scores, eligible[None], None if floors is None else np.array(floors, float))
    return int(found.winner[0]), found.votes[0].tolist()


def test_most_votes_win():
    assert winner([[1, 2, 0], [0, 5, 1], [9, 0, 0]]) == (1, [1, 2, 0])


def test_a_tied_best_splits_the_judges_vote():
    assert winner([[1, 1, 0], [0, 1, 0]]) == (1, [0.5, 1.5, 0])


def test_a_judge_with_a_nan_or_with_equal_scores_abstains():
    assert winner([[NAN, 9, 0], [3, 3, 3], [0, 0, 1]]) == (2, [0, 0, 1])


def test_a_tie_in_votes_goes_to_the_higher_mean_z_score():
    # Each response has one vote. In units of its own spread, judge 1 prefers response 1 by far more than judge 0 prefers 0.
    scores = np.array([[[1.0, 0.9], [0.0, 1.0]], [[5.0, 0.0], [0.4, 0.5]]])
    w, votes, _ = vote(scores, np.ones((2, 2), bool))
    assert votes[0].tolist() == [1, 1]
    assert w[0] == 1


def test_a_complete_tie_goes_to_the_lowest_index():
    assert winner([[1, 1, 0]]) == (0, [0.5, 0.5, 0])


def test_sums_that_differ_by_rounding_alone_are_tied():
    """Responses 1 and 5 have 11/12 of a vote each, added up from other parts."""
    scores = [[1, 1, 0, 0, 1, 0], [0, 1, 0, 1, 0, 1], [1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 1]]
    found = vote(np.array([scores], np.float32), np.ones((1, 6), bool))
    assert found.votes[0, 1] != found.votes[0, 5]
    assert found.tied[0]


@pytest.mark.parametrize(
    ("scores", "eligible"),
    [
        ([[0, 0, 0]], [True, True, True]),
        ([[1, 1, 1], [2, 2, 2]], [True, True, True]),
        ([[NAN, NAN, NAN], [5, 5, 5]], [True, True, True]),
        ([[NAN, 9, 0], [5, 5, 5]], [True, True, True]),
        ([[9, 1, 1]], [False, True, True]),
    ],
)
def test_without_a_judge_that_prefers_a_response_nobody_wins(scores, eligible):
    assert winner(scores, eligible) == (NOBODY, [0, 0, 0])


def test_one_judge_with_a_preference_is_a_signal():
    assert winner([[0, 0, 0], [NAN, 1, 2], [0, 0, 0.5]]) == (2, [0, 0, 1])


def test_the_only_eligible_response_needs_no_vote_but_must_reach_the_floors():
    assert winner([[3]]) == (0, [0])
    assert winner([[9, 1, 9], [NAN, NAN, NAN]], [False, True, False]) == (1, [0, 0, 0])
    assert winner([[3]], [False]) == (NOBODY, [0])
    assert winner([[3, 5]], [True, False], floors=[4]) == (NOBODY, [0, 0])


NONE = -np.inf


@pytest.mark.parametrize(
    ("scores", "floors", "expected"),
    [
        # Nothing reaches the floor, whatever this judge or another one prefers.
        ([[0.4, 0.2, 0.1]], [0.5], (NOBODY, [0, 0, 0])),
        ([[0, 0, 0], [1, 2, 3]], [0.5, NONE], (NOBODY, [0, 0, 0])),
        # The response that most judges prefer is below another judge's floor.
        ([[9, 1, 2], [9, 1, 2], [0, 1, 1]], [NONE, NONE, 0.5], (2, [0, 0.5, 2.5])),
        # A judge votes only for what it prefers to some other response: the first judge's favourite cannot win.
        ([[9, 1, 1], [0, 1, 2]], [NONE, 0.5], (2, [0, 0, 1])),
        ([[9, 1, 1], [0, 1, 1]], [NONE, 0.5], (1, [0, 0.5, 0.5])),
        # One response is left, and the judge with the floor prefers it to the others.
        ([[0, 1, 0]], [1], (1, [0, 1, 0])),
        # A floor is no vote.
        ([[1, 1, 1]], [0.5], (NOBODY, [0, 0, 0])),
        # A score that is equal to the floor reaches it, although 0.7 is stored as 0.69999999.
        ([[0.7, 0.1, 0.2]], [0.7], (0, [1, 0, 0])),
        # A judge that abstains by one NaN still keeps out what it scores below its floor.
        ([[NAN, 0.1, 1], [1, 3, 2]], [0.5, NONE], (2, [0, 0, 1])),
        ([[0.1, 0.2, 0.3]], [NONE], (2, [0, 0, 1])),
    ],
)
def test_what_a_judge_scores_below_its_floor_cannot_win(scores, floors, expected):
    assert winner(scores, floors=floors) == expected


def test_ineligible_responses_take_no_part_whatever_their_score():
    assert winner([[9, 1, 2], [NAN, 1, 2]], [False, True, True]) == (2, [0, 0, 2])


def test_nothing_eligible_has_no_winner():
    assert winner([[1, 2]], [False, False])[0] == NOBODY


def test_z_scores_are_standardised_over_the_whole_data_set_not_per_example():
    # The judges' scales differ by a factor of 1000. Without standardisation judge 0 would decide every tie.
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(200, 2, 2)) * np.array([1000.0, 1.0])[:, None]
    w, votes, _ = vote(scores, np.ones((200, 2), bool))
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


# -- other rules -----------------------------------------------------------------------------------------------------------


def points(rule, scores, eligible=None, floors=None):
    scores = np.array(scores, dtype=np.float32)[None]
    eligible = np.ones(scores.shape[2], bool) if eligible is None else np.array(eligible)
    found = vote(scores, eligible[None], None if floors is None else np.array(floors, float), rule)
    return int(found.winner[0]), found.votes[0].round(6).tolist(), bool(found.tied[0])


@pytest.mark.parametrize(
    ("scores", "eligible", "expected"),
    [
        # Two judges love 0, two prefer 1 to 2 to 0 by a hair: the majority is divided, by ranks 1 is in front.
        ([[9, 5, 1], [9, 5, 1], [0, 5, 4], [0, 5, 4]], None, (1, [2, 3, 1], False)),
        ([[1, 1, 0]], None, (0, [0.75, 0.75, 0], True)),
        ([[NAN, 5, 9], [2, 1, 0]], None, (0, [1, 0.5, 0], False)),
        ([[3, 3, 3], [0, 1, 2]], None, (2, [0, 0.5, 1], False)),
        ([[9, 1, 2]], [False, True, True], (2, [0, 0, 1], False)),
        ([[NAN, 1, 2]], [False, True, True], (2, [0, 0, 1], False)),
        ([[1, 1]], None, (NOBODY, [0, 0], False)),
        ([[3]], None, (0, [0], True)),
    ],
)
def test_bordas_count(scores, eligible, expected):
    winner_, votes, tied = points("borda", scores, eligible)
    assert (winner_, votes) == expected[:2]
    if len(votes) > 1:
        assert tied == expected[2]


def test_a_floor_keeps_a_response_from_winning_by_any_rule():
    for rule, worst in (("borda", 0), ("mean_z", NOBODY)):
        assert points(rule, [[9, 5, 1], [0, 5, 1]], floors=[-np.inf, 1])[0] == 1
        assert points(rule, [[9, 5, 1]], floors=[10])[0] == NOBODY
        # The only one that may win is beaten on the whole, but one judge prefers it.
        assert points(rule, [[1, 2], [2, 5], [3, 1]], floors=[-np.inf, -np.inf, 2])[0] == worst
        assert points(rule, [[1, 2], [2, 5]], floors=[-np.inf, 6])[0] == NOBODY


def test_the_mean_of_z_scores_weighs_how_much_a_judge_prefers():
    """Two judges prefer 1 a little, one prefers 0 by far. The majority is for 1, the mean for 0."""
    scores = np.array([[[9.0, 0.0], [4.9, 5.0], [4.9, 5.0]], [[5.0, 4.0], [9.0, 0.0], [9.0, 0.0]]])
    both = np.ones((2, 2), bool)
    assert vote(scores, both).winner[0] == 1
    found = vote(scores, both, rule="mean_z")
    assert found.winner[0] == 0
    z = mean_z_scores(scores, both)
    assert found.votes[0].tolist() == pytest.approx([z[0, 0] - z[0, 1], 0])
    assert vote(np.ones((1, 2, 3)), np.ones((1, 3), bool), rule="mean_z").winner[0] == NOBODY


def test_a_judge_that_abstains_is_left_out_of_the_mean_of_z_scores():
    scores = np.array([[[0.0, 2.0], [NAN, 9.0]], [[0.0, 2.0], [0.0, 2.0]]])
    assert mean_z_scores(scores, np.ones((2, 2), bool)).tolist() == [[-1, 1], [-1, 1]]


def test_the_mean_of_z_scores_is_counted_from_the_lowest_of_the_eligible():
    """Two responses are eligible, and the judge scores them alike. That both are above its mean score is no preference."""
    scores = np.array([[[5.0, 5.0, 9.0]], [[0.0, 1.0, 2.0]]])
    found = vote(scores, np.array([[True, True, False], [True, True, True]]), rule="mean_z")
    assert found.winner[0] == NOBODY
    assert found.votes[0].tolist() == [0, 0, 0]


def test_bordas_points_are_those_of_ranks():
    rng = np.random.default_rng(1)
    scores = rng.random((30, 3, 4))
    ranks = scores.argsort(-1).argsort(-1)  # how many are lower
    expected = (ranks / 3).sum(1)
    np.testing.assert_allclose(borda(scores, np.ones((30, 4), bool)), expected)


def test_an_infinite_score_is_beyond_all_finite_ones():
    """A judge may score what it cannot use with minus infinity. Such a response must not count as an average one."""
    inf = np.inf
    for rule in ("majority", "borda", "mean_z"):
        assert points(rule, [[-inf, -5]])[0] == 1
        assert points(rule, [[-inf, -5], [0, 0]])[0] == 1
        assert points(rule, [[3, inf, 2]])[0] == 1
        assert points(rule, [[-inf, inf]])[0] == 1
        assert points(rule, [[inf, inf]])[0] == points(rule, [[-inf, -inf]])[0] == NOBODY
        # One that is left out takes no part, whatever it has.
        assert points(rule, [[inf, 1, 2]], [False, True, True])[0] == 2
    scores = np.array([[[1.0, 3.0]], [[-inf, inf]], [[NAN, inf]]])
    assert mean_z_scores(scores, np.ones((3, 2), bool)).tolist() == [[-1, 1], [-2, 2], [0, 0]]


@pytest.mark.parametrize("rule", ["majority", "borda", "mean_z"])
@pytest.mark.parametrize("candidates", [1, 3])
def test_no_examples_have_no_winners(rule, candidates):
    found = vote(np.zeros((0, 2, candidates)), np.zeros((0, candidates), bool), rule=rule)
    assert found.winner.shape == found.tied.shape == (0,)
    assert found.votes.shape == (0, candidates)
