"""How far judges agree, whether they reward length, whether one decides: against values computed by hand and by scipy's formulas."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from profuser.prepare.agreement import agreement, correlation_within, kendall_tau, warnings_of
from profuser.prepare.vote_rules import choices_of, vote
from profuser.prepare.votes import Ballots, Candidate

NAN = math.nan


def ballots(scores, texts=None, eligible=None) -> Ballots:
    """Ballots of (E, R, C) scores, without floors."""
    scores = np.array(scores, np.float32)
    E, R, C = scores.shape
    eligible = np.ones((E, C), bool) if eligible is None else np.array(eligible)
    texts = [[f"text {c}" for c in range(C)]] * E if texts is None else texts
    candidates = [[Candidate(text, bool(ok)) for text, ok in zip(*row)] for row in zip(texts, eligible)]
    tally, floors = vote(scores, eligible), np.full(R, -np.inf)
    choices = choices_of(scores, eligible, floors)
    return Ballots(candidates, tally.winner, tally.votes, tally.tied, scores, choices, eligible, eligible, 1)


def slow_tau(one, other):
    """Kendall's tau-b with its pairs counted one by one."""
    agree = ones = others = 0
    for a, b in zip(one, other):
        for i, j in combinations(range(len(a)), 2):
            if any(math.isnan(x) for x in (a[i], a[j], b[i], b[j])):
                continue
            x, y = (a[i] > a[j]) - (a[i] < a[j]), (b[i] > b[j]) - (b[i] < b[j])
            agree, ones, others = agree + x * y, ones + x * x, others + y * y
    return agree / math.sqrt(ones * others) if ones * others else None


def test_tau_counts_pairs_of_one_prompt():
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 4, (2, 50, 5)).astype(float)
    one[rng.random((50, 5)) < 0.1] = NAN
    assert kendall_tau(one, other) == pytest.approx(slow_tau(one.tolist(), other.tolist()))
    assert kendall_tau(one, one) == pytest.approx(1)
    assert kendall_tau(one, -one) == pytest.approx(-1)
    assert kendall_tau(one, np.ones_like(one)) is None
    # Between prompts nothing is compared: here every judge is one with itself within each prompt, and opposed across them.
    assert kendall_tau(np.array([[0.0, 1], [10, 11]]), np.array([[10.0, 11], [0, 1]])) == 1
    assert kendall_tau(np.array([[-np.inf, 1.0, -np.inf]]), np.array([[0.0, 1.0, 0.0]])) == 1


def test_correlation_with_length_is_within_a_prompt():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, (40, 3)).astype(float)
    scores = (
        0.5 * lengths + rng.normal(0, 10, (40, 3)) + rng.normal(0, 1000, (40, 1))
    )  # prompts differ, which does not count
    scores[3, 1] = NAN
    counted = np.isfinite(scores)
    a, b = [], []
    for e in range(40):
        a += (scores[e, counted[e]] - scores[e, counted[e]].mean()).tolist()
        b += (lengths[e, counted[e]] - lengths[e, counted[e]].mean()).tolist()
    expected = np.dot(a, b) / math.sqrt(np.dot(a, a) * np.dot(b, b))
    assert correlation_within(scores, lengths) == pytest.approx(expected)
    assert correlation_within(lengths, lengths) == pytest.approx(1)
    assert correlation_within(lengths, np.full((40, 3), 7.0)) is None
    assert correlation_within(np.full((40, 3), 0.1), lengths) is None
    assert correlation_within(np.full((2, 2), NAN), np.ones((2, 2))) is None


def test_an_infinite_score_is_left_out_of_the_correlation_with_length():
    lengths = np.array([[1.0, 2.0, 9.0], [3.0, 1.0, 2.0]])
    scores = np.array([[1.0, 2.0, -np.inf], [3.0, 1.0, 2.5]])
    expected = correlation_within(np.where(np.isfinite(scores), scores, NAN), lengths)
    assert expected is not None
    assert correlation_within(scores, lengths) == expected


def test_without_prompts_or_with_one_response_there_is_nothing_to_say():
    nothing = {"pairs": [{"judges": ["a", "b"], "tau": None}], "length": {"a": None, "b": None}}
    nothing |= {"alone": {"a": 0.0, "b": 0.0}, "ties": 0.0, "prompts": 0, "preferences": {"a": 0, "b": 0}}
    for scores in (np.zeros((0, 2, 3)), [[[1], [2]]]):
        assert agreement(ballots(scores), ["a", "b"]) == nothing


def test_ties_and_who_decides_alone():
    scores = [
        [[1, 2], [0, 0], [0, 0]],  # the first judge alone
        [[1, 2], [3, 0], [0, 0]],  # one against one: a tie
        [[1, 2], [1, 2], [0, 5]],
        [[1, 1], [1, 1], [1, 1]],  # nobody wins
    ]
    found = agreement(ballots(scores), ["a", "b", "c"])
    assert found["alone"] == {"a": pytest.approx(1 / 3), "b": 0, "c": 0}
    assert found["ties"] == pytest.approx(1 / 3)
    assert found["prompts"] == 3
    assert found["preferences"] == {"a": 3, "b": 2, "c": 1}
    assert [pair["judges"] for pair in found["pairs"]] == [["a", "b"], ["a", "c"], ["b", "c"]]
    # Equal texts that share the most points are no tie.
    same = agreement(ballots(scores, [["x", "y"], ["x", "x"], ["x", "y"], ["x", "y"]]), ["a", "b", "c"])
    assert same["ties"] == 0


def test_a_response_below_a_floor_makes_no_tie_and_the_winners_source_is_its_responses():
    some = ballots([[[0, 0, 1, 1]]], [["w", "y", "x", "x"]])
    some = replace(
        some, votes=np.array([[0.0, 1, 1, 1]]), admitted=np.array([[True, False, True, True]]), responses_per_source=2
    )
    assert (some.winner.tolist(), some.tied.tolist()) == ([2], [True])
    assert not some.is_tie(0)
    assert some.winning_source(0) == 1
    assert [*some.places_of(1)] == [2, 3]


def test_warnings_name_the_judge():
    long = [[[5.0, 1.0], [0, 0]]] * 20
    found = {
        "agreement": agreement(ballots(long, [["a long text", "short"]] * 20), ["a", "b"]),
        "vote_wins": {"all": {"x": 20}},
    }
    one, two = warnings_of(found)
    assert "judge a alone has a preference on 100% of the prompts" in one
    assert "explains 100% of judge a's variance" in two
    assert "longer responses" in two
    few = agreement(ballots([*long[:9], *[[[1.0, 1.0], [0, 0]]] * 11], [["a long text", "short"]] * 20), ["a", "b"])
    assert warnings_of(found | {"agreement": few}) == []
    earlier = {key: found["agreement"][key] for key in ("pairs", "length", "alone", "ties")}
    assert warnings_of(found | {"agreement": earlier}) == [one, two]
    assert warnings_of({"agreement": earlier, "vote_wins": {"all": {"x": 9}}}) == []
    assert warnings_of({"agreement": None}) == warnings_of({}) == []
    shorter = {
        "agreement": agreement(ballots(long, [["short", "a long text"]] * 20), ["a", "b"]),
        "vote_wins": {"all": {"x": 20}},
    }
    assert "shorter responses" in warnings_of(shorter)[1]
