"""Alignment against brute force: the right rows, the right tokens, and no probability lost."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    SMALL,
    VICUNA,
    byte_level,
    capture_of,
    chained,
    distribution,
    labels,
    random_rows,
    real_chat,
    sentencepiece,
    small_chat,
    wrap,
)
from tokenizers import AddedToken, Regex, pre_tokenizers

from profuser import align
from profuser.align import (
    ALIGNED,
    INSIDE,
    KINDS,
    SAME_SPAN,
    SHARED_PREFIX,
    SKIP_INSIDE,
    SKIP_LOW_RELIABILITY,
    SKIP_NO_SOURCE_POSITION,
    SKIPPED,
    Aligned,
    ByteAligner,
    match_spans,
    match_spans_python,
)
from profuser.chat import ChatFormat
from profuser.errors import DataError
from profuser.token_bytes import TokenBytesMismatch

TOLERANCE = 2e-6  # of float32 log-probabilities

BARE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '</s>' }}{% endfor %}"
"""Nothing stands before a response but a control token."""


def run(
    target: ChatFormat,
    source: ChatFormat,
    response: str,
    rows: list[dict[int, float]],
    k: int | None = None,
    **settings,
) -> Aligned:
    """Aligns full distributions, one per label of the source; k: how many of each are captured (all unless given)."""
    encoded, own = target.encode("x", response), source.encode("x", response)
    capture = capture_of(own, len(response.encode()), rows, k or max(map(len, rows)))
    aligner = ByteAligner(target, source, **{"top_k": 1000, **settings})
    return aligner.align(
        response.encode(),
        labels(encoded),
        encoded.spans,
        encoded.end is not None,
        capture,
        target_lead=encoded.input_ids[: encoded.start],
    )


def check_mass(aligned: Aligned) -> None:
    """Every position's probabilities sum to one with the tail; skipped ones hold nothing."""
    for t in range(len(aligned.kind)):
        entries = distribution(aligned, t)
        assert all(p > 0 for p in entries.values())
        assert list(entries.values()) == sorted(entries.values(), reverse=True)
        assert 0 <= aligned.tail[t] <= 1
        assert sum(entries.values()) + aligned.tail[t] == pytest.approx(1, abs=1e-5)
        assert bool(entries) == (aligned.skip_reason[t] == ALIGNED)
    assert aligned.offsets[-1] == len(aligned.ids) == len(aligned.logprobs)
    assert len(aligned.offsets) == len(aligned.kind) + 1


def token(chat: ChatFormat, text: str) -> int:
    ids = chat.token_bytes.fragment.encode(text, add_special_tokens=False).ids
    assert len(ids) == 1, (text, ids)
    return ids[0]


def chain_chat(*words: str, template: str = BARE, split: bool = True, **settings) -> ChatFormat:
    return ChatFormat(wrap(chained(*words, split=split), template), **settings)


def certain(chat: ChatFormat, response: str) -> list[dict[int, float]]:
    """A source that is sure of its own tokens."""
    return [{i: 1.0} for i in labels(chat.encode("x", response))]


# Span matching


def spans_from(cuts: list[int], clip: int) -> tuple[np.ndarray, np.ndarray]:
    edges = np.array(sorted(cuts), np.int32)
    begin, end = edges[:-1].copy(), edges[1:].copy()
    if len(begin):
        begin[0] -= clip
    return begin, end


tokenizations = st.tuples(st.lists(st.integers(0, 30), max_size=20), st.integers(0, 2)).map(lambda x: spans_from(*x))


@settings(max_examples=300, deadline=None)
@given(target=tokenizations, source=tokenizations)
def test_match_spans_is_what_the_definition_says(target, source):
    kind, position = match_spans_python(*target, *source)
    a, b = np.maximum(target[0], 0), np.maximum(source[0], 0)
    for t, begin in enumerate(a):
        peers = [j for j in range(len(b)) if b[j] == begin]
        holders = [j for j in range(len(b)) if b[j] < begin < source[1][j]]
        if peers:
            order = sum(a[:t] == begin)
            j = peers[order] if order < len(peers) else peers[0]
            assert (kind[t], position[t]) == (SAME_SPAN if source[1][j] == target[1][t] else SHARED_PREFIX, j)
        elif holders:
            assert (kind[t], position[t]) == (INSIDE, holders[0])
        else:
            assert (kind[t], position[t]) == (SKIPPED, -1)


@pytest.mark.skipif(align._align is None, reason=f"engine: {align.ENGINE}")
@settings(max_examples=500, deadline=None)
@given(target=tokenizations, source=tokenizations)
def test_cpp_match_spans_equals_python(target, source):
    for ours, oracle in zip(match_spans(*target, *source), match_spans_python(*target, *source)):
        assert ours.dtype == oracle.dtype
        assert ours.tolist() == oracle.tolist()


@pytest.mark.parametrize("function", [match_spans, match_spans_python])
@pytest.mark.parametrize(
    ("target", "message"),
    [(([0, 2, 1], [2, 3, 4]), "monotone"), (([0, 3], [3, 2]), "monotone"), (([0], [1, 2]), "1-D")],
)
def test_match_spans_refuses_what_are_no_spans(function, target, message):
    with pytest.raises(ValueError, match=message):
        function(*target, [0], [4])
    with pytest.raises(ValueError, match=message):
        function([0], [4], *target)


# Rules, one by one


def test_target_token_of_two_source_tokens_sums_over_the_path():
    """` hel` .5, then `lo` .8 and `p` .15: ` hello` .4, ` help` .075, .025 to the tail."""
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
    """After the target's token `Th`, `ings` is impossible: it would have been `Things`."""
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
        ((), ("    ",), True),  # the source puts every space on its own, x follows: the target would, too
        ((), (" x",), False),  # the target's token takes the x
        ((" x",), ("  ",), False),  # only ` x` keeps the source's space; the target's token takes one of the two
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
    """Four spaces before a word: the target gives the last one to the word, so the source's `    ` is its `   `."""
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
    begin, end, turn = source_tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<|im_end|>"])
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


def test_candidate_that_ends_inside_a_character_needs_a_token_of_exactly_its_bytes():
    """`é` is two bytes: a byte-level source may say the first alone, SentencePiece has it as a byte token."""
    source = chain_chat()
    half = source.token_bytes.pieces.index("é".encode()[:1])
    rows = certain(source, "ab")
    rows[1] = {labels(source.encode("x", "ab"))[1]: 0.6, half: 0.4}
    target = ChatFormat(wrap(sentencepiece(620, "never"), BARE))
    aligned = run(target, source, "ab", rows)
    at = int(np.flatnonzero(aligned.source_position == 1)[0])
    assert distribution(aligned, at)[target.token_bytes.pieces.index("é".encode()[:1])] == pytest.approx(
        0.4, abs=TOLERANCE
    )
    joined = chain_chat("aé")  # here only the character follows `a` in one token; alone its bytes are tokens
    assert sum(distribution(run(joined, source, "ab", rows), 1).values()) == pytest.approx(1, abs=TOLERANCE)


def test_positions_inside_a_source_token_are_skipped_and_counted():
    target, source = chain_chat(), chain_chat("abc")
    aligned = run(target, source, "abc", certain(source, "abc"))
    check_mass(aligned)
    assert [KINDS[kind] for kind in aligned.kind] == ["shared_prefix", "inside", "inside", "same_span"]
    assert aligned.skip_reason.tolist() == [ALIGNED, SKIP_INSIDE, SKIP_INSIDE, ALIGNED]
    assert aligned.source_position.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("target_template", "source_template", "skipped"),
    [(BARE, VICUNA, True), (VICUNA, BARE, False), (VICUNA, VICUNA, False)],
)
def test_template_space_in_the_first_token(target_template, source_template, skipped):
    """A source whose first token holds the template's space has more to say than about the response; skip it, unless the
    target's first token holds it, too. A target's own space stands before every candidate."""
    target = chain_chat(" a", " b", template=target_template)
    source = chain_chat(" a", " b", "zz", template=source_template)
    rows = certain(source, "a")
    space = b" " if source_template == VICUNA else b""
    other = source.token_bytes.pieces.index(space + b"b")
    rows[0] = {labels(source.encode("x", "a"))[0]: 0.6, other: 0.4}
    aligned = run(target, source, "a", rows)
    check_mass(aligned)
    assert aligned.kind[0] == (INSIDE if skipped else SAME_SPAN)
    assert aligned.skip_reason[0] == (SKIP_INSIDE if skipped else ALIGNED)
    if not skipped:
        expected = {token(target, " a"): 0.6, token(target, " b"): 0.4}
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
    capture = capture_of(own, 2, [{i: 1.0} for i in labels(own)], 1)
    aligned = ByteAligner(target, source).align(b"ab", labels(encoded), encoded.spans, False, capture)
    assert len(aligned.kind) == 1
    whole = target.encode("x", "ab")
    aligned = ByteAligner(target, source).align(b"ab", labels(whole), whole.spans, True, capture)
    assert (aligned.kind[-1], aligned.skip_reason[-1]) == (SKIPPED, SKIP_NO_SOURCE_POSITION)
    check_mass(aligned)


def test_ids_beyond_the_tokenizer_and_padding_stay_in_the_tail():
    target, source = chain_chat("ab"), chain_chat()
    rows = certain(source, "a")
    rows[0] = {labels(source.encode("x", "a"))[0]: 0.6, len(source.token_bytes.pieces) + 3: 0.4}
    aligned = run(target, source, "a", rows, k=5)
    assert distribution(aligned, 0) == pytest.approx({token(target, "a"): 0.6}, abs=TOLERANCE)


def test_a_token_that_the_target_never_emits_is_no_candidate():
    """`zqx` is in its vocabulary, but its tokenizer writes `z`, `qx`."""
    target, source = chain_chat("qx", "zqx"), chain_chat("zqx")
    assert b"zqx" in target.token_bytes.pieces
    rows = certain(source, "a")
    rows[0] = {labels(source.encode("x", "a"))[0]: 0.6, token(source, "zqx"): 0.4}
    aligned = run(target, source, "a", rows)
    assert distribution(aligned, 0) == pytest.approx({token(target, "a"): 0.6, token(target, "z"): 0.4}, abs=TOLERANCE)


@pytest.mark.parametrize("which", ["target", "source"])
def test_tokens_of_another_response_are_refused(which):
    target, source = chain_chat("ab"), chain_chat()
    encoded, own = target.encode("x", "abc"), source.encode("x", "abc")
    other = {"target": target, "source": source}[which].encode("x", "abd")
    encoded, own = (other, own) if which == "target" else (encoded, other)
    capture = capture_of(own, 3, [{i: 1.0} for i in labels(own)], 1)
    with pytest.raises(DataError, match=which):
        ByteAligner(target, source).align(b"abc", labels(encoded), encoded.spans, True, capture)


def test_arrays_that_do_not_belong_together_are_refused():
    chat = chain_chat()
    own = chat.encode("x", "abc")
    capture = capture_of(own, 3, [{i: 1.0} for i in labels(own)], 1)
    with pytest.raises(DataError, match="one per token"):
        ByteAligner(chat, chat).align(b"abc", labels(own), own.spans[:-1], True, capture)
    short = dataclasses.replace(capture, top_ids=capture.top_ids[:-1], top_logprobs=capture.top_logprobs[:-1])
    with pytest.raises(DataError, match="one row per token"):
        ByteAligner(chat, chat).align(b"abc", labels(own), own.spans, True, short)
    with pytest.raises(ValueError, match="top_k"):
        ByteAligner(chat, chat, top_k=0)


# Properties

TEXTS = [
    "Things like these don't happen, hello help 12345.",
    "def f(x):\n    if x > 10:\n        return  x + 1\n\n\n    else:\treturn",
    "你好，世界！我们 Straße café 👩‍👩‍👧 🙂🦜",
    "3.14  and <s> or </s>, it's I'LL  'x'",
    "",
    "a",
]


@pytest.mark.parametrize("template", ["vicuna", "llama2", "chatml"])
@pytest.mark.parametrize("name", list(SMALL))
def test_same_tokenizer_gives_back_the_sources_top_k(name, template):
    chat = small_chat(name, template)
    twin = ChatFormat(wrap(SMALL[name](), chat.tokenizer.chat_template))
    rng = np.random.default_rng(0)
    pool = np.array([i for i, piece in enumerate(chat.token_bytes.pieces) if piece])
    for response in TEXTS:
        rows = random_rows(chat.encode("x", response), pool, rng)
        aligned = run(chat, twin, response, rows, k=10, top_k=10)
        check_mass(aligned)
        assert (aligned.kind == SAME_SPAN).all()
        assert (aligned.reliability == 1).all()
        own = labels(chat.encode("x", response))
        for t, row in enumerate(rows):
            best = sorted(row.items(), key=lambda item: (-item[1], item[0]))[:10]
            if own[t] in dict(best):
                expected = {chat.end_id if i in chat.end_ids else i: p for i, p in best}
                assert distribution(aligned, t) == pytest.approx(expected, abs=TOLERANCE)


responses = st.lists(
    st.sampled_from(
        [*TEXTS, " ", "  ", "\n", "\n\n", "    ", "Th", "ings", "1", "23", "'s", "好", "é", "🙂", "</s>", ":", "x"]
    )
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=3),
    max_size=7,
).map(lambda parts: "".join(parts).strip())


class NoCuts:
    """The whole text before a token as its pre-token: slow, and right by definition."""

    def prefixes(self, ids, start):
        return [tuple(ids[:t]) for t in range(start, len(ids) + 1)]


@pytest.mark.parametrize(
    "target_name", ["byte-level", "byte-level prefix space", "metaspace first", "metaspace always", "llama-2 prepend"]
)
@settings(max_examples=25, deadline=None)
@given(response=responses, seed=st.integers(0, 1000))
def test_mass_is_whole_and_contexts_are_long_enough(target_name, response, seed):
    """For any text: probabilities sum to one with the tail, and no earlier context would have changed a result."""
    rng = np.random.default_rng(seed)
    target = small_chat(target_name)
    for source in (ChatFormat(wrap(byte_level(440), VICUNA)), small_chat("llama-2 prepend", "llama2")):
        own = source.encode("x", response)
        pool = np.unique([source.end_id, *source.token_bytes.fragment.encode("  ".join(TEXTS) + response).ids])
        rows = random_rows(own, pool, rng)
        encoded = target.encode("x", response)
        capture = capture_of(own, len(response.encode()), rows, 12)
        arguments = (response.encode(), labels(encoded), encoded.spans, True, capture)
        lead = encoded.input_ids[: encoded.start]
        aligner, slow = (ByteAligner(target, source, min_reliability=0) for _ in range(2))
        slow._boundaries = NoCuts()
        aligned, oracle = (x.align(*arguments, target_lead=lead) for x in (aligner, slow))
        check_mass(aligned)
        for field in Aligned.__slots__:
            assert getattr(aligned, field).tolist() == getattr(oracle, field).tolist(), field
        again = aligner.align(*arguments, target_lead=lead)  # from the cache
        assert again.ids.tolist() == aligned.ids.tolist()
        assert again.logprobs.tolist() == aligned.logprobs.tolist()


def test_digit_groups_that_depend_on_what_follows_are_kept_whole():
    """Groups of three from the right: after `1,234` a fifth digit makes it `12,345`, so `234` was never there."""
    tokenizer = chained("123", "234", "345", "12")
    groups = pre_tokenizers.Split(Regex(r"\d{1,3}(?=(?:\d{3})*(?!\d))"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([groups, tokenizer.pre_tokenizer])
    target, source = ChatFormat(wrap(tokenizer, BARE)), chain_chat()
    response = "1234 a"
    own = labels(source.encode("x", response))
    assert target.token_bytes.of(labels(target.encode("x", response))[1:2]) == b"234"
    rows = certain(source, response)
    rows[4] = {own[4]: 0.6, token(source, "5"): 0.3, token(source, "b"): 0.1}
    aligned = run(target, source, response, rows)
    assert aligned.source_position[2] == 4
    assert aligned.reliability[2] == pytest.approx(0.7, abs=TOLERANCE)


REAL_PAIRS = [
    ("llama2", "qwen2"),
    ("qwen2", "llama2"),
    ("gpt_neox", "llama2"),
    ("llama2", "gpt_neox"),
    ("qwen2", "gpt_neox"),
]
REAL_TEMPLATE = {"llama2": "llama2", "qwen2": "chatml", "gpt_neox": "vicuna"}


@pytest.mark.parametrize(("target_name", "source_name"), REAL_PAIRS)
def test_real_tokenizers_align_as_with_the_whole_context(target_name, source_name):
    target, source = (real_chat(name, REAL_TEMPLATE[name]) for name in (target_name, source_name))
    rng = np.random.default_rng(1)
    aligner, slow = (ByteAligner(target, source, min_reliability=0) for _ in range(2))
    slow._boundaries = NoCuts()
    for response in TEXTS:
        encoded, own = target.encode("x", response), source.encode("x", response)
        pool = np.unique([source.end_id, *source.token_bytes.fragment.encode("  ".join(TEXTS)).ids])
        capture = capture_of(own, len(response.encode()), random_rows(own, pool, rng), 10)
        arguments = (response.encode(), labels(encoded), encoded.spans, True, capture)
        lead = encoded.input_ids[: encoded.start]
        aligned, oracle = (x.align(*arguments, target_lead=lead) for x in (aligner, slow))
        check_mass(aligned)
        for field in Aligned.__slots__:
            assert getattr(aligned, field).tolist() == getattr(oracle, field).tolist(), field


def test_a_text_that_a_tokenizer_changes_never_reaches_alignment():
    with pytest.raises(TokenBytesMismatch):
        small_chat("byte-level NFC").encode("x", "cafe\u0301")


# Brute force: a toy source whose every next-token distribution is known

STEMS = {" hel": ("lo", "p", "met"), " ca": ("t", "re", "rd"), " do": ("g", "ne")}
CLOSED = (" a", " tree", " treat", " sun", " sunny", " dot", " cab", " helium")


def toy_source(template: str) -> ChatFormat:
    """Every word is one token, or a stem and an ending."""
    endings = tuple(itertools.chain.from_iterable(STEMS.values()))
    return chain_chat(*STEMS, *CLOSED, *(e for e in endings if len(e) > 1), template=template)


def toy_rows(source: ChatFormat, response: str, rng: np.random.Generator) -> list[dict[int, float]]:
    """At each position full distributions over what can follow there; a stem only where the text goes on with it, since
    only there the next distribution is known."""
    pieces = source.token_bytes.pieces
    own = labels(source.encode("x", response))
    words = {token(source, w) for w in CLOSED}
    control = source.tokenizer.convert_tokens_to_ids("<s>")
    rows = []
    for j, i in enumerate(own):
        stem = pieces[own[j - 1]].decode() if j and pieces[own[j - 1]] else None
        support = {*words, source.end_id, control, i}
        if stem in STEMS:
            support |= {token(source, e) for e in STEMS[stem]}
        masses = rng.dirichlet(np.full(len(support), 0.4)) + 1e-6
        rows.append(dict(zip(sorted(support), (masses / masses.sum()).tolist())))
    return rows


def brute_force(
    target: ChatFormat, source: ChatFormat, response: str, rows, t: int
) -> tuple[dict[int, float], float] | None:
    """(mass per target token, dropped mass) of target position t: every continuation of the source up to the end of its
    word, spelt out and given to the target's tokenizer in the whole conversation. None where alignment is approximate: the
    target's token ends within a stem, so how the source's word ends decides, and alignment does not look."""
    encoded, own = target.encode("x", response), source.encode("x", response)
    own_ids, starts = labels(own), [b for b, _ in own.spans] + [len(response.encode())]
    begin, end = [*encoded.spans, (starts[-1], starts[-1])][t]
    if begin not in starts:
        return None
    before = encoded.input_ids[: encoded.start + t]
    gold = encoded.input_ids[encoded.start + t]
    found: dict[int, float] = {}
    dropped = 0.0
    exact = True

    def count(continuation: bytes, mass: float, within_stem: bool) -> None:
        nonlocal dropped, exact
        # Tokens of the response begin at -1 with the template's space, so do continuations there.
        text = response.encode()[: max(begin, 0)] + continuation[max(-begin, 0) :]
        ids = target.encode("x", text.decode(), complete=False).input_ids
        token = ids[len(before)] if ids[: len(before)] == before else None
        exact &= not within_stem or token == gold
        if token is None:
            dropped += mass
        else:
            found[token] = found.get(token, 0.0) + mass

    def expand(j: int, so_far: bytes, mass: float, within_stem: bool) -> None:
        for i, p in rows[j].items():
            piece = source.token_bytes.pieces[i]
            if i == source.end_id and not so_far:
                found[target.end_id] = found.get(target.end_id, 0.0) + mass * p
            elif i == source.end_id:
                count(so_far, mass * p, within_stem)
            elif piece and piece.decode() in STEMS:
                assert i == own_ids[j], "a stem only where the text goes on with it"
                expand(j + 1, so_far + piece, mass * p, within_stem or starts[j + 1] >= end)
            elif piece is None:  # another control token: tail, but the own token before it is the gold one's beginning
                found[gold] = found.get(gold, 0.0) + (mass * p if within_stem else 0.0)
            else:
                count(so_far + piece, mass * p, within_stem)

    expand(starts.index(begin), b"", 1.0, False)
    return (found, dropped) if exact else None


def test_alignment_equals_brute_force_over_every_continuation():
    rng = np.random.default_rng(0)
    source = toy_source(VICUNA)
    words = [*CLOSED, *(stem + ending for stem, endings in STEMS.items() for ending in endings)]
    compared = dropping = longer = 0
    for _ in range(25):
        # A target that cuts the words anywhere: merges towards random parts of them, in random order.
        parts = []
        for word in rng.permutation(words).tolist():
            first, last = sorted(rng.choice(len(word) + 1, 2, replace=False).tolist())
            parts.append(word[first:last] if rng.random() < 0.6 else word)
        target = chain_chat(*parts, template=VICUNA)
        response = "".join(rng.choice(words, 6).tolist()).strip()
        rows = toy_rows(source, response, rng)
        aligned = run(target, source, response, rows, min_reliability=0)
        check_mass(aligned)
        spans = target.encode("x", response).spans
        for t in np.flatnonzero(aligned.kind < INSIDE).tolist():
            truth = brute_force(target, source, response, rows, t)
            if truth is None or aligned.skip_reason[t] != ALIGNED:
                continue
            found, dropped = truth
            assert aligned.reliability[t] == pytest.approx(1 - dropped, abs=TOLERANCE)
            expected = {i: p / (1 - dropped) for i, p in found.items() if p}
            assert distribution(aligned, t) == pytest.approx(expected, abs=TOLERANCE)
            assert aligned.tail[t] == pytest.approx(1 - sum(expected.values()), abs=1e-5)
            compared += 1
            dropping += dropped > 0.01
            longer += t < len(spans) and aligned.kind[t] == SHARED_PREFIX
    assert compared > 150
    assert dropping > 10
    assert longer > 30
