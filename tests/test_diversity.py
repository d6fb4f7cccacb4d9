"""What sets of sources are worth, against plain definitions, and every branch of what is recommended."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from profuser.doctor import diversity
from profuser.doctor.diversity import Outcome, combinations, focal_diversity
from profuser.doctor.kinship import Kinship, Pair
from profuser.doctor.recommend import recommend
from profuser.evaluate.scores import accuracies


def outcome_of(right, texts=None, skills=None) -> Outcome:
    """An outcome in which wrong answers all differ, unless texts are given."""
    right = np.array(right, bool)
    texts = texts or [[f"source {s}, prompt {n}" for n in range(right.shape[1])] for s in range(len(right))]
    return Outcome.of(right, texts, skills or ["all"] * right.shape[1])


# --- focal diversity --------------------------------------------------------------------------------------------------


def defined_diversity(right: np.ndarray) -> float:
    """The definition, share by share."""
    size, of_focal = len(right), []
    for focal in range(size):
        wrong = [int((~right[:, n]).sum()) for n in range(right.shape[1]) if not right[focal, n]]
        if not wrong:
            continue
        p = {i: wrong.count(i) / len(wrong) for i in range(1, size + 1)}
        both = sum(i * (i - 1) * p[i] for i in p) / (size * (size - 1))
        of_focal.append(1 - both / (sum(i * p[i] for i in p) / size))
    return sum(of_focal) / len(of_focal) if of_focal else 0.0


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_focal_diversity_is_what_the_paper_defines(size, seed):
    right = np.random.default_rng(seed).random((size, 40)) < 0.2 + 0.2 * seed
    assert focal_diversity(right) == pytest.approx(defined_diversity(right), abs=1e-12)


@pytest.mark.parametrize(
    ("right", "value"),
    [
        ([[1, 0], [0, 1]], 1.0),  # no two fail together
        ([[1, 0], [1, 0]], 0.0),  # both always fail together
        # The first fails alone once and together once: 1 - (1/2) / (3/4) = 1/3; the second only together: 0.
        ([[1, 0, 0], [1, 1, 0]], 1 / 6),
        ([[1, 1], [0, 1]], 1.0),  # the first has no errors and is no focal source
        ([[1, 1], [1, 1]], 0.0),  # nobody errs
        ([[0, 1]], 0.0),  # a set of one
        ([[0, 0], [0, 0], [0, 0]], 0.0),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], 0.5),  # always exactly two of three fail: 1 - (2/6) / (2/3)
    ],
)
def test_focal_diversity_of_cases_worked_by_hand(right, value):
    assert focal_diversity(np.array(right, bool)) == pytest.approx(value, abs=1e-12)


# --- the vote ---------------------------------------------------------------------------------------------------------


def voted(right, texts) -> list[bool]:
    outcome = outcome_of(right, texts)
    return outcome.plurality(range(len(right))).tolist()


def test_right_answers_are_the_same_whatever_their_words():
    assert voted([[0], [1], [1]], [["7"], ["It is 8."], ["2+6=8. Answer: 8."]]) == [True]


def test_wrong_answers_are_the_same_but_for_case_and_whitespace():
    assert voted([[1], [0], [0]], [["8"], ["The  Seven\n"], ["the seven"]]) == [False]
    assert voted([[1], [0], [0]], [["8"], ["seven"], ["7"]]) == [True]  # three answers, of which the first is taken


def test_of_tied_answers_that_of_the_first_source_is_taken():
    assert voted([[1, 0], [0, 1]], [["a", "b"], ["c", "d"]]) == [True, False]
    # Two answers with two votes each: the one whose first voter comes first.
    assert voted([[0], [0], [1], [1]], [["x"], ["x"], ["a"], ["b"]]) == [False]
    assert voted([[0], [1], [0], [1]], [["y"], ["a"], ["z"], ["b"]]) == [True]


def test_a_source_that_says_nothing_does_not_vote():
    assert voted([[0], [0], [1]], [[""], [" \n"], ["a"]]) == [True]
    assert voted([[0], [0]], [[""], [""]]) == [False]
    assert voted([[0], [1]], [["x"], [""]]) == [False]  # an empty answer that is right votes; the tie goes to the first
    assert voted([[1], [0]], [[""], ["x"]]) == [True]


@pytest.mark.parametrize("seed", range(3))
def test_the_plurality_of_random_votes_is_that_of_a_counter(seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 4, (5, 60))
    right, texts = codes == 0, [[f"answer {code}" for code in row] for row in codes]
    outcome = outcome_of(right, texts)
    for members in [(0, 1, 2, 3, 4), (1, 3, 4), (0, 2), (2,)]:
        expected = [Counter(codes[list(members), n].tolist()).most_common(1)[0][0] == 0 for n in range(60)]
        assert outcome.plurality(members).tolist() == expected
        assert outcome.oracle(members).tolist() == [bool((codes[list(members), n] == 0).any()) for n in range(60)]


# --- sets of sources --------------------------------------------------------------------------------------------------


def test_every_set_of_few_sources_is_looked_at_and_the_best_score_comes_first():
    right = np.random.default_rng(1).random((4, 50)) < 0.4
    outcome = outcome_of(right)
    found = combinations(outcome)
    assert sorted(c.members for c in found) == sorted(
        m for size in range(1, 5) for m in itertools.combinations(range(4), size)
    )
    assert [c.score for c in found] == sorted((c.score for c in found), reverse=True)
    for c in found:
        assert c.score == pytest.approx(0.6 * c.diversity + 0.4 * c.plurality)
        single = len(c.members) == 1
        assert c.diversity == pytest.approx(0.0 if single else defined_diversity(right[list(c.members)]))
        assert c.oracle == pytest.approx(right[list(c.members)].any(0).mean())


def test_twelve_sources_are_searched_exhaustively_and_thirteen_from_the_best_pair(monkeypatch):
    rng = np.random.default_rng(2)
    assert len(combinations(outcome_of(rng.random((12, 5)) < 0.5))) == 4095
    outcome = outcome_of(rng.random((13, 30)) < 0.4)
    found = combinations(outcome)
    assert Counter(len(c.members) for c in found) == {1: 13, 2: 78} | dict.fromkeys(range(3, 14), 1)
    grown = {len(c.members): c for c in found if len(c.members) > 2} | {
        2: next(c for c in found if len(c.members) == 2)
    }
    assert all(set(grown[n].members) < set(grown[n + 1].members) for n in range(2, 13))
    # Each step adds the source with the best score, which looking at every set of this size that holds the last one confirms.
    monkeypatch.setattr(diversity, "MOST_EXHAUSTIVE", 13)
    everything = combinations(outcome)
    for n in range(2, 6):
        larger = [c for c in everything if len(c.members) == n + 1 and set(c.members) > set(grown[n].members)]
        assert grown[n + 1].score == pytest.approx(max(c.score for c in larger))


def test_equal_sets_come_in_the_order_of_size_and_of_the_recipe():
    found = combinations(outcome_of([[1, 0], [1, 0], [1, 0]]))
    assert [c.members for c in found] == [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]


def test_sets_are_equal_however_their_scores_were_rounded():
    found = combinations(outcome_of([[0, 0, 1, 0, 1, 0, 0], [1, 1, 0, 1, 1, 1, 0], [0, 1, 0, 1, 0, 0, 0]]))
    (first, second), (a, b) = zip(*[(c.members, c.score) for c in found if c.members in ((0, 1), (1, 2))])
    assert a == pytest.approx(b, abs=1e-12)  # on some machines the second is larger, by rounding alone
    assert (first, second) == ((0, 1), (1, 2))


def test_every_skill_counts_once_as_in_the_scores_of_a_run():
    rng = np.random.default_rng(3)
    skills = ["a"] * 30 + ["b"] * 5 + ["c"] * 10
    right = rng.random((2, 45)) < 0.5
    outcome = outcome_of(right, skills=skills)
    rows = [{"skill": skill} for skill in skills]
    for of_source in right:
        assert outcome.mean(of_source) == pytest.approx(accuracies(rows, of_source)["mean"])
        share = outcome.share(of_source)
        assert 0 <= share.low < share.value < share.high <= 1


def test_a_gain_is_counted_on_the_same_prompts():
    before, after = np.arange(100) < 50, np.arange(100) < 80
    outcome = outcome_of([before, after])
    gain = outcome.gain(after, before)
    assert gain.value == pytest.approx(0.3)
    assert (gain.low, gain.high) == pytest.approx((0.219, 0.396), abs=1e-3)  # Wilson's interval of 30 in 100
    other = outcome.gain(np.roll(after, 10), before)  # loses 10 and gains 40
    assert other.value == pytest.approx(0.3)
    assert other.low < gain.low
    assert other.high > gain.high
    assert outcome.gain(before, after).value == pytest.approx(-0.3)


# --- what is recommended ----------------------------------------------------------------------------------------------

NAMES = ["ada", "bob", "cid", "dot"]


def advice(right, texts=None, kinship=None, names=NAMES):
    outcome = outcome_of(right, texts)
    return recommend(outcome, combinations(outcome), names[: len(right)], kinship)


def prompts(*kinds: tuple[str, int]) -> np.ndarray:
    """`("ada", 3)` stands for three prompts on which only ada is right, `("ada bob", 2)` for two on which both are."""
    return np.array([[name in kind.split() for name in NAMES] for kind, n in kinds for _ in range(n)]).T


SPLIT = prompts(("ada", 40), ("bob", 35), ("cid", 20), ("", 5))[:3]


def test_specialists_are_fused():
    found = advice(SPLIT)
    assert (found.method, found.sources) == ("fuse", ["ada", "bob", "cid"])
    assert found.sentence.startswith(
        "Fuse ada, bob and cid: one of them at least is right on 95.0 % of 100 held-out prompts, 55.0 points"
    )
    assert "ada, the best alone" in found.sentence
    assert found.sentence.count(". ") == 0
    assert found.sentence.endswith(".")


def test_sources_whose_plurality_is_better_than_the_best_decode_together():
    # Any two of three are right nearly everywhere, each with errors of its own.
    right = prompts(("ada bob", 60), ("bob cid", 60), ("ada cid", 60), ("ada bob cid", 20))[:3]
    found = advice(right)
    assert (found.method, found.sources) == ("decode", ["ada", "bob", "cid"])
    assert "plurality alone gains 30.0 points" in found.sentence


def test_a_plurality_that_is_not_surely_better_is_no_reason_to_decode_together():
    right = prompts(("ada", 40), ("bob cid", 14), ("bob", 20), ("cid", 20))[:3]
    # Where bob and cid give the same wrong answer, ten of what ada knows are lost.
    texts = [["no" if s and n < 10 else f"source {s}, prompt {n}" for n in range(94)] for s in range(3)]
    outcome = outcome_of(right, texts)
    gain = outcome.gain(outcome.plurality([0, 1, 2]), outcome.right[0])
    assert gain.low < 0 < gain.value
    found = advice(right, texts)
    assert (found.method, found.sources) == ("fuse", ["ada", "bob", "cid"])


def related(cosines: dict[tuple[str, str], float | None], change=0.1, apart=()) -> Kinship:
    names = [name for name in NAMES if name not in apart]
    pairs = [Pair(a, b, c, c) for (a, b), c in cosines.items()]
    return Kinship("base", dict.fromkeys(names, change), pairs, dict.fromkeys(apart, "other shapes"))


ALIKE: dict[tuple[str, str], float | None] = {("ada", "bob"): 0.4, ("ada", "cid"): 0.3, ("bob", "cid"): 0.5}


def test_relatives_are_merged_even_if_they_could_decode_together():
    found = advice(SPLIT, kinship=related(ALIKE))
    assert (found.method, found.sources) == ("merge", ["ada", "bob", "cid"])
    assert "with the base base" in found.sentence
    assert "at least 0.30" in found.sentence
    right = prompts(("ada bob", 60), ("bob cid", 60), ("ada cid", 60), ("ada bob cid", 20))[:3]
    assert advice(right, kinship=related(ALIKE)).method == "merge"


@pytest.mark.parametrize(
    "kinship",
    [
        related(ALIKE | {("ada", "cid"): 0.0999}),
        related(ALIKE | {("ada", "cid"): -0.5}),
        related(ALIKE | {("ada", "cid"): None}),
        related(ALIKE, change=1.0),
        related({("ada", "bob"): 0.4}, apart=["cid", "dot"]),
        related({}, apart=["ada", "bob", "cid", "dot"]),
    ],
    ids=[
        "a low kinship",
        "a negative one",
        "an unknown one",
        "another base",
        "one of another shape",
        "all of another shape",
    ],
)
def test_what_is_not_related_is_not_merged(kinship):
    assert advice(SPLIT, kinship=kinship).method == "fuse"


def test_only_the_recommended_sources_must_be_related():
    right = prompts(("ada", 50), ("bob", 50))[:3]  # cid knows nothing
    found = advice(right, kinship=related({("ada", "bob"): 0.4}, apart=["cid"]))
    assert (found.method, found.sources) == ("merge", ["ada", "bob"])


@pytest.mark.parametrize(
    ("right", "best"),
    [
        (prompts(("ada bob cid", 60), ("ada", 30), ("", 10))[:3], "ada"),  # the others know nothing else
        (prompts(("bob", 90), ("ada", 6), ("", 4))[:2], "bob"),  # 6 of 100 are not surely 5 or more
        (prompts(("ada bob", 100))[:2], "ada"),  # of equally good ones the first
        (prompts(("cid", 3))[:3], "cid"),
    ],
    ids=["no gain", "an unsure gain", "all alike", "one knows all"],
)
def test_the_best_is_kept_where_nothing_is_surely_gained(right, best):
    found = advice(right, kinship=related(ALIKE))
    assert (found.method, found.sources) == ("keep", [best])
    assert found.sentence.startswith(f"Keep {best}: ")
    assert f"all {len(right)} sources together" in found.sentence


def test_a_gain_counts_from_the_best_source_even_if_it_is_not_in_the_set():
    """bob and cid divide half of what ada knows between them: diverse, but worth nothing beside ada."""
    right = prompts(("ada bob", 40), ("ada cid", 40), ("ada", 20))[:3]
    assert max(combinations(outcome_of(right)), key=lambda c: c.diversity).members != (0,)
    assert advice(right).sources == ["ada"]
    # With prompts that only dot knows, the set is one that gains.
    with_dot = prompts(("ada bob", 40), ("ada cid", 40), ("ada", 20), ("dot", 30))
    assert advice(with_dot).method == "fuse"
    assert "dot" in advice(with_dot).sources


def test_a_single_source_and_sources_that_know_nothing():
    assert advice(prompts(("ada", 5), ("", 5))[:1]).sentence.startswith("Keep ada: ada is right on 50.0 %")
    found = advice(prompts(("", 9))[:2])
    assert (found.method, found.sources) == ("none", [])
    assert "no source is right on any of 9" in found.sentence
