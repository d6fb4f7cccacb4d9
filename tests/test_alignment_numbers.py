"""The truth at numbers agrees with brute force on a source that can be enumerated, and its parts do what they should."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from small_tokenizers import chained, real_tokenizer, wrap

from profuser.errors import DataError
from profuser.experiments import alignment_numbers as numbers
from profuser.experiments.digit_trees import (
    DIGITS,
    GROUP,
    DigitTree,
    composed_row,
    composed_tokenizer,
    grow,
    load_trees,
    save_trees,
)
from profuser.experiments.windows import TEXTS, Target, Window
from profuser.text.token_bytes import TokenBytes


class Toy:
    """A source whose numbers can be enumerated: it writes the first few digits only, and numbers of up to `longest` digits."""

    def __init__(self, text: str, digits: str = "123", longest: int = 4):
        self.tokenizer = wrap(chained())
        self.tokens = TokenBytes(self.tokenizer)
        self.id_of = {piece.decode("latin-1"): i for i, piece in enumerate(self.tokens.pieces) if piece}
        self.digits, self.longest = digits, longest
        ids = self.tokens.encode(text)
        # What `Reading` finds out with a real model.
        self.window = Window("toy", 0, text, ids, self.tokens.spans(ids, text))
        self.sort, self.data = "toy", text.encode()
        self.at = {begin: m for m, (begin, _) in enumerate(self.window.spans)}
        self.rows = np.exp(self.after(0)([tuple(ids[:m]) for m in range(len(ids))]).astype(np.float64))
        self.model = self

    def row(self, before: str) -> np.ndarray:
        """The probabilities behind a text. They depend on its last number, or else on its last character."""
        number = re.search(r"\d*$", before)
        assert number is not None
        follow = "" if len(number[0]) >= self.longest else self.digits
        follow += {"a": " .", " ": "a", ".": "a"}.get(before[-1:], "a.")
        rng = np.random.default_rng([*(number[0] or before[-1:]).encode(), 7])
        row = np.zeros(len(self.tokens.pieces))
        row[[self.id_of[c] for c in follow]] = rng.dirichlet(np.ones(len(follow)))
        return row

    def after(self, cut: int):
        before = self.window.ids[:cut]

        def logprobs(histories):
            rows = [self.row(self.tokens.of([*before, *history]).decode()) for history in histories]
            with np.errstate(divide="ignore"):
                return np.log(np.stack(rows))

        return logprobs

    def written(self, begin: int) -> dict[str, float]:
        """All that may be written from a byte of the text on, up to the first character that ends a number."""
        start = self.data[:begin].decode()
        waiting, found = [("", 1.0)], {}
        while waiting:
            text, mass = waiting.pop()
            if not re.fullmatch(r" ?\d*", text):
                found[text] = mass
                continue
            row = self.row(start + text)
            waiting += [(text + c, mass * row[i]) for c, i in self.id_of.items() if row[i]]
        return found


def truths(toy: Any, target: Target, direction: str, deciding: int | None = None):
    trees = numbers.Trees(toy, {})
    for t, place in numbers.positions(direction, target, toy.window):
        found = numbers.written(toy, trees, toy, target.of(toy.window)[1][t][0], deciding)
        yield t, place, *numbers.truth_at(target, toy.window, t, found)


@pytest.mark.parametrize("merged", [(), (" 1", "12", "123", "31"), ("23", "3122", " 12", " 2", " 213")])
def test_the_truth_is_the_distribution_of_the_targets_token(merged, monkeypatch):
    monkeypatch.setattr(numbers, "FLOOR", 1e-12)
    monkeypatch.setattr(numbers, "LEAST", 1e-12)
    toy, target = Toy("a 12.3122a 3a.213a"), Target("toy", wrap(chained(*merged)))
    ids, spans = target.of(toy.window)
    places = set()
    for t, place, truth, inexact in truths(toy, target, numbers.ONE_TO_SEVERAL):
        places.add(place)
        begin = spans[t][0]
        brute: defaultdict[int, float] = defaultdict(float)
        for text, mass in toy.written(begin).items():
            encoded = target.tokens.encode(toy.data[:begin].decode() + text + " x")
            if encoded[:t] == ids[:t]:
                brute[encoded[t]] += mass
        possible = sum(brute.values())
        assert {i: p for i, p in truth.items() if p > 1e-9} == pytest.approx(
            {i: p / possible for i, p in brute.items()}
        )
        assert sum(truth.values()) == pytest.approx(1.0)
        assert inexact == 0.0
    assert places >= {"first token", "after the number"}
    assert ("first token with a space" in places) == any(word[0] == " " for word in merged)


def test_digits_that_decide_need_not_be_followed(monkeypatch):
    toy, target = Toy("a 12.3122a"), Target("toy", wrap(chained()))
    known = {t: truth for t, _, truth, _ in truths(toy, target, numbers.SEVERAL_TO_ONE)}
    monkeypatch.setattr(numbers.Trees, "at", None)  # one digit decides, so no tree is asked for
    for t, _, truth, inexact in truths(toy, target, numbers.SEVERAL_TO_ONE, deciding=1):
        assert truth == pytest.approx(known[t])
        assert inexact == 0.0


def test_what_is_not_followed_is_reported(monkeypatch):
    monkeypatch.setattr(numbers, "FLOOR", 2.0)
    toy, target = Toy("a 12.3122a"), Target("toy", wrap(chained(" 1", "12")))
    _, _, truth, inexact = next(truths(toy, target, numbers.ONE_TO_SEVERAL))
    long = sum(mass for text, mass in toy.written(1).items() if len(re.sub(r"\D", "", text)) >= GROUP)
    assert long > 0.01
    assert inexact == pytest.approx(long)
    assert sum(truth.values()) == pytest.approx(1.0)


def test_numbers_of_a_tree_have_all_its_mass():
    row, ends = np.full(10, 0.08), np.zeros(10)
    tree = DigitTree({"": row, "4": np.full(10, 0.05), "42": ends})
    found = {digits: (mass, exact) for digits, mass, exact in tree.numbers()}
    assert found["4"] == (pytest.approx(0.08 * 0.5), True)
    assert found["42"] == (pytest.approx(0.08 * 0.05), True)
    assert found["7"] == (pytest.approx(0.08), False)
    assert found["41"] == (pytest.approx(0.08 * 0.05), False)
    assert sum(mass for mass, _ in found.values()) == pytest.approx(0.8)
    assert dict.fromkeys(DIGITS, (pytest.approx(0.08), True)) == {d: (p, e) for d, p, e in tree.numbers(1)}


def test_a_tree_follows_what_is_probable():
    def logprobs(histories):
        # The digit 5 is likely while a number has less than six digits; token 0 ends it.
        rows = np.full((len(histories), 11), np.log(0.001))
        for row, history in zip(rows, histories, strict=True):
            row[6 if len(history) < 6 else 0] = np.log(0.99)
        return rows

    tree = grow(logprobs, range(1, 11), floor=0.5)
    assert {len(digits) for digits in tree.following} == {0, 1, 2, 3, 4, 5, 6}
    assert [digits for digits in tree.following if len(digits) >= GROUP] == ["555", "5555", "55555", "555555"]
    assert len([digits for digits in tree.following if len(digits) < GROUP]) == 111
    found = {digits: mass for digits, mass, _ in tree.numbers()}
    assert found["555555"] == pytest.approx(0.99**6 * 0.99, rel=1e-2)


def test_a_composed_row_is_a_distribution():
    toy: Any = Toy("a 12.3a", longest=5)
    tokenizer, ids = composed_tokenizer(toy.tokenizer)
    tree = numbers.Trees(toy, {}).at(toy, 2)
    row = toy.rows[toy.at[2]]
    composed = composed_row(row, tree, ids)
    assert composed.sum() == pytest.approx(1.0)
    assert len(composed) == len(tokenizer) == len(toy.tokenizer) + 1100
    letter = toy.id_of["a"]
    assert composed[letter] == pytest.approx(row[letter])
    after = {text: toy.row("a " + text) for text in ("1", "12", "2")}
    begins = {"1": row[toy.id_of["1"]], "2": row[toy.id_of["2"]]}
    goes_on = {text: after[text][[toy.id_of[d] for d in DIGITS]].sum() for text in after}
    one_two = begins["1"] * after["1"][toy.id_of["2"]]
    assert composed[ids["2"]] == pytest.approx(begins["2"] * (1 - goes_on["2"]))
    assert composed[ids["12"]] == pytest.approx(one_two * (1 - goes_on["12"]))
    assert composed[ids["123"]] == pytest.approx(one_two * after["12"][toy.id_of["3"]])


def test_behind_a_short_token_the_composed_source_writes_no_digit():
    toy: Any = Toy("a 12.3a")
    composed = numbers.Composed(toy, numbers.Trees(toy, {}))
    side = composed.side(toy)
    assert composed._tokens.pieces[side.ids[2]] == b"12"
    assert side.probabilities.sum(1) == pytest.approx(1.0)
    digits = side.probabilities[:, list(composed.ids.values())].sum(1)
    assert digits[2] > 0.1
    assert digits[3] == 0.0


def test_the_composed_tokenizer_cuts_numbers_as_deepseek_does():
    composed, ids = composed_tokenizer(wrap(chained("ab", " ab")))
    tokens = TokenBytes(composed)
    other = TokenBytes(real_tokenizer("deepseek_v3"))
    rng = np.random.default_rng(0)
    for length in range(1, 12):
        for _ in range(20):
            text = f"ab {''.join(rng.choice(list(DIGITS), length))}."
            pieces = [tokens.pieces[i] for i in tokens.encode(text)]
            assert pieces == [other.pieces[i] for i in other.encode(text)]
    assert tokens.encode("ab ab.") == TokenBytes(wrap(chained("ab", " ab"))).encode("ab ab.")
    assert {digits: tokens.pieces[i] for digits, i in ids.items()} == {digits: digits.encode() for digits in ids}


def test_a_tokenizer_with_longer_numbers_cannot_be_composed_of():
    for word in ("42", " 7", "v2"):
        with pytest.raises(DataError, match="only tokens with digits are the ten digits"):
            composed_tokenizer(wrap(chained(word)))


def test_a_source_of_few_tokens_loses_nothing_at_the_first_digit():
    toy: Any = Toy("a 12.2a 1a", digits="12", longest=2)  # six tokens of digits and two others, all among the top k
    trees = numbers.Trees(toy, {})
    side = numbers.Composed(toy, trees).side(toy)
    target = Target("llama2", wrap(chained()))
    rows = list(numbers.measure_text(toy, trees, toy, side, numbers.SEVERAL_TO_ONE, target))
    assert {row["place"] for row in rows} == {"first digit", "second digit", "after the number"}
    for row in rows:
        assert row["covered"]
        if row["place"] == "first digit":
            assert row["false"] == pytest.approx(0.0, abs=1e-5)
            assert row["missing"] == pytest.approx(0.0, abs=1e-5)
        if row["place"] == "second digit":  # what follows a number that has ended is not said
            assert row["false"] == pytest.approx(0.0, abs=1e-5)
            assert row["missing digits"] == pytest.approx(0.0, abs=1e-5)
            assert row["missing"] > 0.01


@pytest.mark.parametrize(
    ("name", "direction", "expected"),
    [
        ("deepseek_v3", numbers.ONE_TO_SEVERAL, ["123:first token", "45:later token", " at:after the number"]),
        ("gpt2", numbers.ONE_TO_SEVERAL, [" 123:first token with a space", "45:later token", " at:after the number"]),
        (
            "qwen2",
            numbers.SEVERAL_TO_ONE,
            [*(f"{d + 1}:{p} digit" for d, p in enumerate(("first", "second", "third")))],
        ),
    ],
)
def test_positions_are_the_tokens_of_numbers_and_those_behind_them(name, direction, expected):
    target = Target(name, real_tokenizer(name))
    text = "Only 12345 at 9:30"
    window = Window("toy", 0, text, [], [])
    ids, _ = target.of(window)
    found = [
        f"{target.tokens.piece(ids[t]).decode()}:{place}" for t, place in numbers.positions(direction, target, window)
    ]
    assert found[: len(expected)] == expected
    assert len(found) == (10 if direction == numbers.SEVERAL_TO_ONE else 6)


def test_false_and_missing_mass():
    target = Target("toy", wrap(chained("12", "123")))
    token = {piece: i for i, piece in enumerate(target.tokens.pieces)}
    said = {token[b"1"]: 0.6, token[b"12"]: 0.1, token[b"a"]: 0.1}
    truth = {token[b"1"]: 0.2, token[b"12"]: 0.3, token[b"123"]: 0.3, token[b"a"]: 0.1, numbers.OTHER: 0.1}
    found = numbers.figures(target, token[b"12"], said, truth)
    assert found["false"] == pytest.approx(0.4)
    assert found["missing"] == pytest.approx(0.2 + 0.3)
    assert found["missing digits"] == pytest.approx(0.5)
    assert found["gold"] == [0.1, 0.3]
    assert np.array(found["classes"]) == pytest.approx(np.array([[0.1, 0.1], [0.6, 0.2], [0.1, 0.3], [0.0, 0.3]]))
    assert found["total variation"] == pytest.approx((0.4 + 0.2 + 0.2) / 2)


def test_mass_beyond_the_named_tokens_and_the_most_probable_is_not_looked_at():
    target = Target("toy", wrap(chained()))
    truth = {100 + n: 0.05 for n in range(20)}
    found = numbers.figures(target, 100, {119: 0.01}, truth)
    assert found["missing"] == pytest.approx(10 * 0.05 + 0.04)
    assert found["false"] == 0.0


def test_trees_come_back_from_their_file(tmp_path):
    trees = {
        "The 4": DigitTree({"": np.full(10, 0.0625), "7": np.full(10, 0.03125)}),
        "x\n": DigitTree({"": np.zeros(10)}),
    }
    save_trees(tmp_path / "trees.npz", "a model", trees)
    found = load_trees(tmp_path / "trees.npz", "a model")
    assert list(found) == list(trees)
    for text, tree in trees.items():
        assert list(found[text].following) == list(tree.following)
        for digits, row in tree.following.items():
            np.testing.assert_array_equal(found[text].following[digits], row)
    with pytest.raises(DataError, match="must hold the trees of this model"):
        load_trees(tmp_path / "trees.npz", "another model")


def test_the_table_shows_what_it_was_before():
    row = {
        "direction": numbers.ONE_TO_SEVERAL,
        "target": "gpt2",
        "place": "first token",
        "sort": "plain",
        "covered": True,
    }
    figures = {"total variation": 0.5, "false": 0.4, "missing": 0.3, "missing digits": 0.2, "not followed": 0.01}
    classes = [[0.1, 0.1]] * len(numbers.CLASSES)
    rows = [row | figures | {"gold": [0.1, 0.2], "classes": classes}, row | {"covered": False, "not followed": 0.03}]
    results = {"source": "toy", "hardware": "none", "versions": {"torch": "0", "transformers": "0"}, "commit": "abc"}
    before = results | {"figures": numbers.summary(rows), "commit": "old"}
    rows[0] |= {"false": 0.125}
    page = numbers.section(results | {"figures": numbers.summary(rows)}, before, "run it")
    line = next(line for line in page.splitlines() if line.startswith("| one → several | gpt2 | first token |"))
    assert "| 2 | 0.500 | 0.500 | 0.400 → 0.125 | 0.300 | 0.200 | 0.100 | 0.200 | 0.020 |" in line
    assert "what it was at commit old" in page


def test_the_text_has_numbers_of_every_length():
    sorts = defaultdict(list)
    for sort, text in numbers.paragraphs((TEXTS / "numbers.txt").read_text("utf-8")):
        sorts[sort] += re.findall(r"\d+", text)
        assert not text[0].isdigit()
        assert "  1" not in text
    assert list(sorts) == ["plain", "decimals", "times", "code", "sums"]
    assert {len(number) for number in sorts["plain"]} == {1, 2, 3, 4, 5, 6}
    assert 60 <= sum(map(len, sorts.values())) <= 100
