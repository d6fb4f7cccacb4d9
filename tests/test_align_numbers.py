"""Numbers: masses are added before the cut at k (rule 7), and a number may go on (rule 8). Both engines give the same."""

from __future__ import annotations

import pytest
from alignment_checks import TOLERANCE, certain, chain_chat, check_mass, run, token
from small_tokenizers import distribution, labels, real_chat

THREE_DIGITS = [f"{n:03}" for n in range(1000)]
TWO_DIGITS = [f"{n:02}" for n in range(100)]


def digits(chat, *texts: str) -> list[int]:
    ids = {piece: i for i, piece in enumerate(chat.token_bytes.pieces)}
    return [ids[text.encode()] for text in texts]


def test_a_thousand_numbers_that_begin_with_one_digit_are_added_before_the_cut():
    """Ten of a thousand equally probable numbers hold a hundredth of their mass; the ten digits hold all of it."""
    target, source = chain_chat("ab"), chain_chat(*THREE_DIGITS)
    response = "x=123."
    rows = certain(source, response)
    own = labels(source.encode("x", response))
    assert [source.token_bytes.pieces[i] for i in own[:-1]] == [b"x", b"=", b"123", b"."]
    rows[2] = dict.fromkeys(digits(source, *THREE_DIGITS), 0.97 / 1000) | {token(source, "."): 0.03}
    aligned = run(target, source, response, rows)
    check_mass(aligned)
    # The first digit, and then the second and third, which lie inside the source's token.
    ten = digits(target, *map(str, range(10)))
    assert distribution(aligned, 2) == pytest.approx(dict.fromkeys(ten, 0.097) | {token(target, "."): 0.03}, abs=1e-4)
    for t in (3, 4):
        assert distribution(aligned, t) == pytest.approx(dict.fromkeys(ten, 0.1), abs=1e-4)


def test_words_that_begin_with_one_token_of_the_target_are_added_before_the_cut():
    """The same holds for words: the target has no token for any of twenty words that begin with ` re`."""
    words = [f" re{a}{b}" for a in "xyzq" for b in "vwjkh"]
    target, source = chain_chat(" re"), chain_chat(*words)
    response = f"a{words[0]}"
    rows = certain(source, response)
    rows[1] = dict.fromkeys(digits(source, *words), 0.045) | {token(source, "."): 0.1}
    aligned = run(target, source, response, rows)
    assert distribution(aligned, 1) == pytest.approx(
        {token(target, " re"): 0.9, token(target, "."): 0.1}, abs=TOLERANCE
    )


def test_a_number_that_may_go_on_counts_for_its_token_only_in_part():
    """The source writes single digits. Behind its own `1` it goes on with a digit half of the time.

    `12` gets 0.5 · 0.3, `13` gets 0.5 · 0.2, and `1` the 0.5 · 0.5 with which the number ends. Of the 0.4 of the candidate `4`,
    a quarter counts: it is taken to go on with the probability 0.75, halfway between 0.5 and 1.
    """
    target, source = chain_chat(*TWO_DIGITS), chain_chat("ab")
    rows = certain(source, "x=12.")
    one, two = digits(source, "1", "2")
    rows[2] = {one: 0.5, token(source, "4"): 0.4, token(source, "."): 0.1}
    rows[3] = {two: 0.3, token(source, "3"): 0.2, token(source, "."): 0.5}
    aligned = run(target, source, "x=12.", rows)
    check_mass(aligned)
    expected = {"12": 0.15, "13": 0.1, "1": 0.25, "4": 0.1, ".": 0.1}
    assert distribution(aligned, 2) == pytest.approx(
        {token(target, text): p for text, p in expected.items()}, abs=TOLERANCE
    )
    assert aligned.tail[2] == pytest.approx(0.3, abs=TOLERANCE)


def test_the_gold_token_gets_exactly_the_mass_with_which_the_number_ends():
    """Behind `1` comes a digit with 0.4. The target would merge it, so `12` gets that mass and `1` the rest."""
    target, source = chain_chat(*TWO_DIGITS), chain_chat("ab")
    rows = certain(source, "x=1.")
    rows[2] = {token(source, "1"): 0.5, token(source, "."): 0.5}
    rows[3] = {token(source, "."): 0.6, token(source, "2"): 0.4}
    aligned = run(target, source, "x=1.", rows)
    expected = {"1": 0.3, "12": 0.2, ".": 0.5}
    assert distribution(aligned, 2) == pytest.approx(
        {token(target, text): p for text, p in expected.items()}, abs=TOLERANCE
    )


def test_a_target_that_merges_no_digits_keeps_its_golds_mass():
    target, source = chain_chat("cd"), chain_chat("ab")
    rows = certain(source, "x=1.")
    rows[2] = {token(source, "1"): 0.5, token(source, "2"): 0.5}
    rows[3] = {token(source, "."): 0.6, token(source, "2"): 0.4}
    aligned = run(target, source, "x=1.", rows)
    assert distribution(aligned, 2) == pytest.approx({token(target, "1"): 0.5, token(target, "2"): 0.5}, abs=TOLERANCE)


def test_where_nothing_is_known_of_what_follows_a_number_stays_in_the_tail():
    """The text has a word where the source might have written a number, so no row tells whether that would go on."""
    target, source = chain_chat(*TWO_DIGITS), chain_chat("ab")
    rows = certain(source, "x=y.")
    rows[2] = {token(source, "y"): 0.5, token(source, "7"): 0.5}
    aligned = run(target, source, "x=y.", rows)
    assert distribution(aligned, 2) == pytest.approx({token(target, "y"): 0.5}, abs=TOLERANCE)
    assert aligned.tail[2] == pytest.approx(0.5, abs=TOLERANCE)


@pytest.mark.long
@pytest.mark.parametrize(("target_name", "source_name"), [("llama2", "deepseek_v3"), ("qwen2", "gpt_neox")])
def test_real_single_digits_get_all_of_the_mass_of_a_sources_long_numbers(target_name, source_name):
    target, source = real_chat(target_name, "vicuna"), real_chat(source_name, "vicuna")
    response = "It costs $734 today."
    own = labels(source.encode("x", response))
    pieces = source.token_bytes.pieces
    j = next(n for n, i in enumerate(own) if pieces[i] in (b"734", b"73", b"7"))
    numbers = [i for i, piece in enumerate(pieces) if piece and piece.isdigit() and len(piece) == 3]
    rows = certain(source, response)
    rows[j] = dict.fromkeys({own[j], *numbers}, 1 / len({own[j], *numbers}))
    aligned = run(target, source, response, rows)
    t = next(t for t, i in enumerate(labels(target.encode("x", response))) if target.token_bytes.pieces[i] == b"7")
    found = distribution(aligned, t)
    assert sum(found.values()) == pytest.approx(1, abs=1e-3)
    assert {target.token_bytes.pieces[i] for i in found} == {b"%d" % d for d in range(10)}
