"""The rules of byte alignment are tested one by one, on both engines."""

from __future__ import annotations

import json

import numpy as np
import pytest
from alignment_checks import BARE, TOLERANCE, certain, chain_chat, check_mass, run, token
from small_tokenizers import VICUNA, capture_of, chained, distribution, ids_of, labels, sentencepiece, wrap
from tokenizers import AddedToken, Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from profuser.alignment.engine import byte_aligner
from profuser.alignment.reference import PythonByteAligner
from profuser.alignment.types import (
    ALIGNED,
    KINDS,
    SAME_SPAN,
    SKIP_LOW_RELIABILITY,
    SKIP_NO_PREFIX_RANGE,
    SKIP_NO_SOURCE_POSITION,
    SKIPPED,
)
from profuser.text.chat import ChatFormat


def test_target_token_of_two_source_tokens_sums_over_the_path():
    """The source gives ` hel` 0.5, and behind it `lo` 0.8 and `p` 0.15.

    So ` hello` gets 0.4 and ` help` 0.075, and 0.025 goes to the tail.
    """
    target = chain_chat(" hello", " help", " cat")
    source = chain_chat(" hel", "lo", " cat")
    response = "a hello"
    own = labels(source.encode("x", response))
    assert [source.token_bytes.pieces[i] for i in own[:-1]] == [b"a", b" hel", b"lo"]
    rows = certain(source, response)
    rows[1] = {own[1]: 0.5, token(source, " cat"): 0.5}
    rows[2] = {own[2]: 0.8, token(source, "p"): 0.15}
    aligned = run(target, source, response, rows)
    check_mass(aligned)
    assert distribution(aligned, 1) == pytest.approx(
        {token(target, " hello"): 0.4, token(target, " help"): 0.075, token(target, " cat"): 0.5}, abs=TOLERANCE
    )
    assert aligned.tail[1] == pytest.approx(0.025, abs=TOLERANCE)
    assert aligned.reliability[1] == 1
    assert [KINDS[kind] for kind in aligned.kind] == ["same_span", "shared_prefix", "same_span"]


def test_candidate_that_would_merge_with_the_prefix_is_dropped():
    """After the target's token `Th` the text `ings` is impossible, because the tokenizer would have made it `Things`."""
    target = chain_chat("Things", "ab")
    target_pieces = [target.token_bytes.pieces[i] for i in labels(target.encode("x", "Thx"))[:-1]]
    assert target_pieces == [b"Th", b"x"]
    source = chain_chat("Th", "ings")
    rows = certain(source, "Thx")
    own = labels(source.encode("x", "Thx"))
    rows[1] = {own[1]: 0.3, token(source, "ings"): 0.6, token(source, "a"): 0.1}
    aligned = run(target, source, "Thx", rows)
    check_mass(aligned)
    assert aligned.reliability[1] == pytest.approx(0.4, abs=TOLERANCE)
    assert distribution(aligned, 1) == pytest.approx(
        {token(target, "x"): 0.75, token(target, "a"): 0.25}, abs=TOLERANCE
    )
    skipped = run(target, source, "Thx", rows, min_reliability=0.5)
    check_mass(skipped)
    assert skipped.skip_reason[1] == SKIP_LOW_RELIABILITY


def test_candidate_that_would_merge_with_the_template_is_dropped():
    template = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + 'Th' + '</s>' }}{% endfor %}"
    template = template.replace("m['content'] + 'Th'", "('Th' if m['role'] == 'assistant' else '') + m['content']")
    target = chain_chat("Things", template=template)
    source = chain_chat("ings")
    rows = certain(source, "x")
    own = labels(source.encode("x", "x"))
    rows[0] = {own[0]: 0.4, token(source, "ings"): 0.6}
    aligned = run(target, source, "x", rows)
    assert aligned.reliability[0] == pytest.approx(0.4, abs=TOLERANCE)
    assert distribution(aligned, 0) == pytest.approx({token(target, "x"): 1.0}, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("source_words", "target_words", "kept"),
    [
        ((), ("    ",), True),  # every space is a source token of its own, x follows, and the target would do the same
        ((), (" x",), False),  # a token of the target takes the x, too
        ((" x",), ("  ",), False),  # only ` x` keeps the source's space, and the target's token takes one of the two
        ((" x",), (" x",), True),
    ],
)
def test_candidate_that_ends_in_spaces_is_looked_at_with_what_follows(source_words, target_words, kept):
    target, source = chain_chat(*target_words, split=False), chain_chat(*source_words, split=False)
    rows = certain(source, "a.")
    own = labels(source.encode("x", "a."))
    rows[1] = {own[1]: 0.6, token(source, " "): 0.4}
    aligned = run(target, source, "a.", rows)
    assert distribution(aligned, 1) == pytest.approx(
        {token(target, "."): 0.6, **({token(target, " "): 0.4} if kept else {})}, abs=TOLERANCE
    )
    assert aligned.tail[1] == pytest.approx(0 if kept else 0.4, abs=TOLERANCE)


def test_indentation_does_not_grow_by_the_space_of_the_word():
    """Of four spaces before a word, the target gives the last to the word. So the source's `    ` becomes its `   `."""
    tokenizer = chained("a")
    tokenizer.add_tokens([AddedToken("    ")])
    source = ChatFormat(wrap(tokenizer, BARE))
    target = chain_chat("    ", " x")
    rows = certain(source, "a\n.")
    own = labels(source.encode("x", "a\n."))
    rows[2] = {own[2]: 0.6, token(source, "    "): 0.4}
    aligned = run(target, source, "a\n.", rows)
    expected = {token(target, "."): 0.6, token(target, "   "): 0.4}
    assert distribution(aligned, 2) == pytest.approx(expected, abs=TOLERANCE)


def test_end_of_turn_counts_by_role_and_other_control_tokens_stay_in_the_tail():
    target = chain_chat("ab", template=BARE)
    source_tokenizer = wrap(chained("ab"), BARE.replace("</s>", "<|im_end|>"))
    begin, end, turn = ids_of(source_tokenizer, "<s>", "</s>", "<|im_end|>")
    source = ChatFormat(source_tokenizer, end_ids=[end, turn])
    own = labels(source.encode("x", "a"))
    assert own[-1] == turn
    rows = [{own[0]: 0.4, end: 0.1, turn: 0.2, begin: 0.3}, {turn: 0.5, end: 0.3, begin: 0.2}]
    aligned = run(target, source, "a", rows)
    check_mass(aligned)
    assert distribution(aligned, 0) == pytest.approx({token(target, "a"): 0.4, target.end_id: 0.3}, abs=TOLERANCE)
    assert distribution(aligned, 1) == pytest.approx({target.end_id: 0.8}, abs=TOLERANCE)
    assert aligned.tail.tolist() == pytest.approx([0.3, 0.2], abs=TOLERANCE)


def test_end_of_turn_within_a_target_token_counts_for_the_bytes_so_far():
    target, source = chain_chat("hello"), chain_chat("hel", "lo")
    own = labels(source.encode("x", "hello"))
    rows = [{own[0]: 1.0}, {own[1]: 0.7, source.end_id: 0.3}, {own[2]: 1.0}]
    aligned = run(target, source, "hello", rows)
    assert distribution(aligned, 0) == pytest.approx(
        {token(target, "hello"): 0.7, token(target, "hel"): 0.3}, abs=TOLERANCE
    )


@pytest.mark.parametrize(
    "spelt", [b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80"], ids=["surrogate", "beyond", "overlong"]
)
def test_candidate_whose_bytes_no_text_has_stays_in_the_tail(spelt):
    target, tokenizer = chain_chat(split=False), json.loads(chained(split=False).to_str())
    vocab, letter_of = tokenizer["model"]["vocab"], bytes_to_unicode()
    vocab["".join(letter_of[byte] for byte in spelt)] = len(vocab)
    source = ChatFormat(wrap(Tokenizer.from_str(json.dumps(tokenizer)), BARE))
    own = labels(source.encode("x", "ab"))
    rows = certain(source, "ab")
    rows[1] = {own[1]: 0.6, source.token_bytes.pieces.index(spelt): 0.4}
    aligned = run(target, source, "ab", rows)
    assert distribution(aligned, 1) == pytest.approx({token(target, "b"): 0.6}, abs=TOLERANCE)
    assert aligned.tail[1] == pytest.approx(0.4, abs=TOLERANCE)


def test_own_token_outside_the_top_k_is_a_candidate():
    chat = chain_chat()
    own = labels(chat.encode("x", "a"))
    rows = [{own[0]: 0.1, token(chat, "b"): 0.5, token(chat, "c"): 0.4}, {own[1]: 1.0}]
    aligned = run(chat, chain_chat("ab"), "a", rows, k=2)
    assert distribution(aligned, 0)[token(chat, "a")] == pytest.approx(0.1, abs=TOLERANCE)
    assert aligned.tail[0] == pytest.approx(0, abs=TOLERANCE)


def test_what_top_k_leaves_out_is_tail():
    target, source = chain_chat("ab"), chain_chat()
    own = labels(source.encode("x", "a"))
    rows = [{own[0]: 0.4, token(source, "b"): 0.3, token(source, "c"): 0.2, token(source, "d"): 0.1}, {own[1]: 1.0}]
    aligned = run(target, source, "a", rows, top_k=2)
    assert distribution(aligned, 0) == pytest.approx({token(target, "a"): 0.4, token(target, "b"): 0.3}, abs=TOLERANCE)
    assert aligned.tail[0] == pytest.approx(0.3, abs=TOLERANCE)


def test_colliding_mass_is_added():
    target, source = chain_chat(), chain_chat("bc", "bd")
    own = labels(source.encode("x", "a"))
    rows = [{own[0]: 0.5, token(source, "bc"): 0.3, token(source, "bd"): 0.2}, {own[1]: 1.0}]
    aligned = run(target, source, "a", rows)
    assert distribution(aligned, 0) == pytest.approx({token(target, "a"): 0.5, token(target, "b"): 0.5}, abs=TOLERANCE)


@pytest.mark.parametrize(("byte", "kept"), [(0xEE, True), (0xC3, False)])
def test_candidate_that_ends_inside_a_character_counts_where_its_bytes_leave_no_choice(byte, kept):
    """The source's token is one byte of a character, for which SentencePiece has a byte token.

    The byte token is what comes if no character of the vocabulary begins with this byte. `é` begins with 0xC3.
    """
    target = ChatFormat(wrap(sentencepiece(620, "never"), BARE))
    assert any(piece and piece[0] == byte and len(piece) > 1 for piece in target.token_bytes.pieces) != kept
    source = chain_chat()
    rows = certain(source, "ab")
    rows[1] = {labels(source.encode("x", "ab"))[1]: 0.6, source.token_bytes.pieces.index(bytes([byte])): 0.4}
    aligned = run(target, source, "ab", rows)
    at = int(np.flatnonzero(aligned.source_position == 1)[0])
    found = distribution(aligned, at).get(target.token_bytes.pieces.index(bytes([byte])), 0.0)
    assert found == pytest.approx(0.4 if kept else 0.0, abs=TOLERANCE)
    assert aligned.tail[at] == pytest.approx(0.0 if kept else 0.4, abs=TOLERANCE)


def test_inside_a_source_token_only_tokens_with_its_first_bytes_count():
    """The source gives ` cafe` 0.5, ` cab` 0.2, ` ca` 0.1 and ` dog` 0.2; the target is at `b` of ` ca|b`.

    How the token ` ca` would go on is unknown, so its mass goes to the tail.
    """
    target, source = chain_chat(" ca", "fe"), chain_chat(" cafe", " cab", " dog")
    response = "a cab"
    own = labels(source.encode("x", response))
    rows = certain(source, response)
    rows[1] = {own[1]: 0.2, token(source, " cafe"): 0.5, token(source, " ca"): 0.1, token(source, " dog"): 0.2}
    aligned = run(target, source, response, rows)
    check_mass(aligned)
    assert [KINDS[kind] for kind in aligned.kind] == ["same_span", "shared_prefix", "inside", "same_span"]
    assert not aligned.skip_reason.any()
    assert aligned.source_position.tolist() == [0, 1, 1, 2]
    expected = {token(target, "fe"): 5 / 8, token(target, "b"): 2 / 8}
    assert distribution(aligned, 2) == pytest.approx(expected, abs=TOLERANCE)
    assert aligned.tail[2] == pytest.approx(1 / 8, abs=TOLERANCE)


def test_mass_of_the_prefix_is_exact_though_its_top_k_is_not_all_of_it():
    target, source = chain_chat(), chain_chat("xa", "xb", "xc")
    own = labels(source.encode("x", "xa"))
    rows = [{own[0]: 0.1, token(source, "xb"): 0.2, token(source, "xc"): 0.1, token(source, "y"): 0.6}, {own[1]: 1.0}]
    aligned = run(target, source, "xa", rows, k=1)
    check_mass(aligned)
    assert distribution(aligned, 1) == pytest.approx({token(target, "b"): 0.5, token(target, "a"): 0.25}, abs=TOLERANCE)
    assert aligned.tail[1] == pytest.approx(0.25, abs=TOLERANCE)


def test_the_gold_path_goes_on_from_inside_a_source_token():
    """The target's `llo` begins inside the source's ` hel` and ends with its `lo`."""
    target, source = chain_chat(" he", "llo"), chain_chat(" hel", "lo", " heap")
    response = "a hello"
    own = labels(source.encode("x", response))
    rows = certain(source, response)
    rows[1] = {own[1]: 0.3, token(source, " heap"): 0.1, token(source, " "): 0.6}
    rows[2] = {own[2]: 0.8, token(source, "p"): 0.2}
    aligned = run(target, source, response, rows)
    check_mass(aligned)
    at = 2
    assert KINDS[aligned.kind[at]] == "inside"
    expected = {token(target, "llo"): 0.75 * 0.8, token(target, "l"): 0.75 * 0.2, token(target, "a"): 0.25}
    assert distribution(aligned, at) == pytest.approx(expected, abs=TOLERANCE)


def test_a_capture_without_the_prefixs_mass_is_skipped_and_counted():
    target, source = chain_chat(), chain_chat("abc")
    own, encoded = source.encode("x", "abc"), target.encode("x", "abc")
    capture = capture_of(source, own, 3, certain(source, "abc"), 1)
    for engine in (byte_aligner, PythonByteAligner):
        aligned = engine(target, source).align(b"abc", encoded, capture)
        check_mass(aligned)
        assert [KINDS[kind] for kind in aligned.kind] == ["shared_prefix", "inside", "inside", "same_span"]
        assert aligned.skip_reason.tolist() == [ALIGNED, SKIP_NO_PREFIX_RANGE, SKIP_NO_PREFIX_RANGE, ALIGNED]


@pytest.mark.parametrize(("target_template", "source_template"), [(BARE, VICUNA), (VICUNA, BARE), (VICUNA, VICUNA)])
def test_a_template_space_in_the_first_token_is_no_part_of_the_response(target_template, source_template):
    """A template's space may be part of the first token, in the source, in the target or in both.

    If it is in the source's, only the tokens that begin with the space say something about the response. The target's own
    space stands before every candidate.
    """
    target = chain_chat(" a", " b", template=target_template)
    source = chain_chat(" a", " b", "zz", template=source_template)
    rows = certain(source, "a")
    space = b" " if source_template == VICUNA else b""
    other = source.token_bytes.pieces.index(space + b"b")
    rows[0] = {labels(source.encode("x", "a"))[0]: 0.3, other: 0.2, token(source, "zz"): 0.5}
    aligned = run(target, source, "a", rows)
    check_mass(aligned)
    assert aligned.kind[0] == SAME_SPAN
    assert aligned.skip_reason[0] == ALIGNED
    ours = " " if target_template == VICUNA else ""
    expected = {token(target, ours + "a"): 0.3, token(target, ours + "b"): 0.2, token(target, ours or "z"): 0.5}
    if source_template == VICUNA and target_template == BARE:
        # `zz` does not begin with the space, so it does not count.
        expected = {token(target, "a"): 0.6, token(target, "b"): 0.4}
    elif source_template == VICUNA:
        # `zz` stands for a text without the space, so the target's token is `z`.
        expected = {token(target, " a"): 0.3, token(target, " b"): 0.2, token(target, "z"): 0.5}
    assert distribution(aligned, 0) == pytest.approx(expected, abs=TOLERANCE)


def test_target_that_closes_with_template_bytes_gets_the_end_of_turn():
    target = chain_chat(template=BARE.replace("'</s>'", "' </s>'"))
    source = chain_chat("ab")
    end = labels(source.encode("x", "a"))[-1]
    rows = [*certain(source, "a")[:-1], {end: 0.7, token(source, "b"): 0.3}]
    aligned = run(target, source, "a", rows)
    assert distribution(aligned, 1) == pytest.approx({target.end_id: 0.7}, abs=TOLERANCE)
    assert aligned.tail[1] == pytest.approx(0.3, abs=TOLERANCE)


def test_empty_response_aligns_its_end_of_turn():
    target, source = chain_chat("ab"), chain_chat()
    rows = [{source.end_id: 0.9, token(source, "a"): 0.1}]
    aligned = run(target, source, "", rows)
    check_mass(aligned)
    assert distribution(aligned, 0) == pytest.approx({target.end_id: 0.9, token(target, "a"): 0.1}, abs=TOLERANCE)


def test_cut_response_has_no_end_of_turn():
    target, source = chain_chat("ab"), chain_chat()
    own, encoded = source.encode("x", "ab", complete=False), target.encode("x", "ab", complete=False)
    capture = capture_of(source, own, 2, [{i: 1.0} for i in labels(own)], 1)
    aligned = byte_aligner(target, source).align(b"ab", encoded, capture)
    assert len(aligned.kind) == 1
    whole = target.encode("x", "ab")
    aligned = byte_aligner(target, source).align(b"ab", whole, capture)
    assert (aligned.kind[-1], aligned.skip_reason[-1]) == (SKIPPED, SKIP_NO_SOURCE_POSITION)
    check_mass(aligned)


def test_ids_beyond_the_tokenizer_and_padding_stay_in_the_tail():
    target, source = chain_chat("ab"), chain_chat()
    rows = certain(source, "a")
    rows[0] = {labels(source.encode("x", "a"))[0]: 0.6, len(source.token_bytes.pieces) + 3: 0.4}
    aligned = run(target, source, "a", rows, k=5)
    assert distribution(aligned, 0) == pytest.approx({token(target, "a"): 0.6}, abs=TOLERANCE)


@pytest.mark.parametrize("template", [BARE, BARE.replace("'</s>'", "' </s>'")])
def test_ids_beyond_the_tokenizer_do_not_end_a_turn(template):
    target, source = chain_chat("ab", template=template), chain_chat()
    rows = certain(source, "a")
    rows[1] = {source.end_id: 0.6, 2**30: 0.4}
    aligned = run(target, source, "a", rows, k=5)
    assert distribution(aligned, 1) == pytest.approx({target.end_id: 0.6}, abs=TOLERANCE)


def test_a_token_that_the_target_never_emits_is_no_candidate():
    """`zqx` is in the target's vocabulary, but its tokenizer writes this text as `z` and `qx`."""
    target, source = chain_chat("qx", "zqx"), chain_chat("zqx")
    assert b"zqx" in target.token_bytes.pieces
    rows = certain(source, "a")
    rows[0] = {labels(source.encode("x", "a"))[0]: 0.6, token(source, "zqx"): 0.4}
    aligned = run(target, source, "a", rows)
    assert distribution(aligned, 0) == pytest.approx({token(target, "a"): 0.6, token(target, "z"): 0.4}, abs=TOLERANCE)
