"""The C++ engine agrees with an oracle that sees the whole text; the public `align` works; bad input is refused."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from alignment_checks import (
    BARE,
    TEXTS,
    TOLERANCE,
    assert_same,
    chain_chat,
    check_mass,
    random_capture,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    SMALL,
    TEMPLATES,
    capture_of,
    chained,
    distribution,
    labels,
    random_rows,
    real_chat,
    real_tokenizer,
    small_chat,
    wrap,
)
from tokenizers import Regex, pre_tokenizers

import profuser
from profuser import align, fused_linear_fusion_loss, prefix_ranges
from profuser.alignment.boundaries import Boundaries
from profuser.alignment.engine import CppByteAligner, byte_aligner
from profuser.alignment.reference import PythonByteAligner
from profuser.alignment.spans import ENGINE, _align
from profuser.alignment.types import ALIGNED, INSIDE, SAME_SPAN, SKIP_NO_PREFIX_RANGE, PrefixRanges
from profuser.errors import DataError
from profuser.experiments.alignment_pairs import PAIRS
from profuser.kernels.source_topk import source_topk_from_logits
from profuser.text.chat import ChatFormat
from profuser.text.token_bytes import TokenBytesMismatch

needs_cpp = pytest.mark.skipif(_align is None, reason=f"engine: {ENGINE}")


@pytest.mark.parametrize(
    ("name", "template"),
    [
        pytest.param(name, template, marks=[] if (n + m) % 3 == 0 else pytest.mark.long)
        for n, name in enumerate(SMALL)
        for m, template in enumerate(TEMPLATES)
    ],
)
def test_same_tokenizer_gives_back_the_sources_top_k(name, template):
    chat = small_chat(name, template)
    twin = ChatFormat(wrap(SMALL[name](), TEMPLATES[template]))
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


# The next tests compare the engine with the oracle on random texts.


FRAGMENTS = ["Th", "ings", "23", "'s", "</s>", "<|im_end|>", "don't", "1,234.5", "//", "==", "東京", "한국", "и", "ß"]
ODD = ["e\u0301", "\u200d", "\x00", "\x7f"]
SPACES = ["  ", "\n\n", "    ", "\r\n", "\t", "\u3000", " \u00a0"]
responses = st.lists(
    st.sampled_from([*TEXTS, *" \n:x1'(.é好я🙂", *FRAGMENTS, *ODD, *SPACES])
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=3),
    max_size=7,
).map(lambda parts: "".join(parts).strip())


class NoCuts(Boundaries):
    """Takes all text before a token, back to the last control token, as its prefix. This is slow, and right by definition."""

    def __init__(self, chat: ChatFormat):
        self._pieces = chat.token_bytes.pieces

    def prefix_starts(self, ids: Sequence[int] | np.ndarray, words: Sequence[int], start: int) -> np.ndarray:
        control = [i for i in range(start) if self._pieces[ids[i]] is None]
        return np.full(len(ids) - start + 1, control[-1] + 1 if control else 0, np.int32)


@functools.cache
def engines(target: ChatFormat, source: ChatFormat):
    """The engine, the oracle without cuts, and the candidates that are worth trying."""
    oracle = PythonByteAligner(target, source, min_reliability=0, top_k=10)
    oracle._boundaries = NoCuts(target)
    found = source.token_bytes.fragment.encode(
        "  ".join([*TEXTS, "\n    x = ' don't' (1,234.5) // == 東京 한국 и ß"])
    ).ids
    pieces = source.token_bytes.pieces
    short = [i for i, piece in enumerate(pieces) if piece and len(piece) == 1]
    return byte_aligner(target, source, min_reliability=0, top_k=10), oracle, np.unique([source.end_id, *found, *short])


def check_engine_equals_oracle(
    target: ChatFormat, source: ChatFormat, response: str, seed: int, complete: bool
) -> None:
    engine, oracle, pool = engines(target, source)
    try:
        encoded, own = (chat.encode("x", response, complete=complete) for chat in (target, source))
    except TokenBytesMismatch:
        return
    capture = random_capture(source, own, response.encode(), target, encoded, pool, np.random.default_rng(seed))
    aligned, expected = (x.align(response.encode(), encoded, capture) for x in (engine, oracle))
    check_mass(aligned)
    assert_same(aligned, expected)
    assert not (aligned.skip_reason == SKIP_NO_PREFIX_RANGE).any() or target.token_bytes is source.token_bytes


SMALL_PAIRS = [
    ("byte-level", "byte-level NFC"),
    ("byte-level prefix space", "llama-2 prepend"),
    ("metaspace first", "byte-level"),
    ("metaspace always", "llama-2 prepend"),
    ("llama-2 prepend", "byte-level"),
    ("gemma", "byte-level"),
    ("byte-level", "gemma"),
]
REAL_PAIRS = [*PAIRS, ("deepseek_v3", "qwen2"), ("mistral_v1", "gpt2")]
REAL_TEMPLATE = {"llama2": "llama2", "qwen2": "chatml"}


def pair_of(target: str, source: str) -> tuple[ChatFormat, ChatFormat]:
    if target in SMALL:
        return small_chat(target), small_chat(source, "llama2" if "llama" in source else "vicuna")
    ours, theirs = (real_chat(name, REAL_TEMPLATE.get(name, "vicuna")) for name in (target, source))
    return ours, theirs


def fuzz(examples: int):
    def of(check):
        return settings(max_examples=examples, deadline=None, database=None)(
            given(response=responses, seed=st.integers(0, 1000), complete=st.booleans())(check)
        )

    return of


@needs_cpp
@pytest.mark.parametrize(("target", "source"), SMALL_PAIRS + REAL_PAIRS[:5:4])
@fuzz(12)
def test_engine_equals_the_oracle_that_sees_the_whole_text(target, source, response, seed, complete):
    check_engine_equals_oracle(*pair_of(target, source), response, seed, complete)


@pytest.mark.long
@needs_cpp
@pytest.mark.parametrize(("target", "source"), SMALL_PAIRS + REAL_PAIRS)
@fuzz(8000)
def test_engine_equals_the_oracle_on_many_texts(target, source, response, seed, complete):
    check_engine_equals_oracle(*pair_of(target, source), response, seed, complete)


def test_digit_groups_that_depend_on_what_follows_are_kept_whole():
    """The target groups digits by three from the right.

    A fifth digit turns `1`, `234` into `12`, `345`. Then `234` has never been a token, so the digit cannot follow it.
    """
    tokenizer = chained("123", "234", "345", "12")
    groups = pre_tokenizers.Split(Regex(r"\d{1,3}(?=(?:\d{3})*(?!\d))"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([groups, tokenizer.pre_tokenizer])
    target, source = ChatFormat(wrap(tokenizer, BARE)), chain_chat()
    response = "1234 a"
    own = labels(source.encode("x", response))
    assert target.token_bytes.of(labels(target.encode("x", response))[1:2]) == b"234"
    rows = [{i: 1.0} for i in own]
    five, b = (source.token_bytes.pieces.index(piece) for piece in (b"5", b"b"))
    rows[4] = {own[4]: 0.6, five: 0.3, b: 0.1}
    aligned = run(target, source, response, rows)
    assert aligned.source_position[2] == 4
    assert aligned.reliability[2] == pytest.approx(0.7, abs=TOLERANCE)


def test_a_text_that_a_tokenizer_changes_never_reaches_alignment():
    with pytest.raises(TokenBytesMismatch):
        small_chat("byte-level NFC").encode("x", "cafe\u0301")


@needs_cpp
def test_a_batch_in_threads_is_its_sequences_one_by_one():
    target, source = small_chat("byte-level"), small_chat("llama-2 prepend", "llama2")
    _, _, pool = engines(target, source)
    rng = np.random.default_rng(3)
    texts = [text for text in TEXTS * 4]
    encoded = [target.encode("x", text) for text in texts]
    captures = [
        random_capture(source, source.encode("x", text), text.encode(), target, e, pool, rng)
        for text, e in zip(texts, encoded)
    ]
    responses = [text.encode() for text in texts]
    batched = byte_aligner(target, source, threads=3).align_batch(responses, encoded, captures)
    single = byte_aligner(target, source)
    for sequence, aligned in zip(zip(responses, encoded, captures), batched, strict=True):
        expected = single.align(*sequence)
        for field in ("kind", "source_position", "offsets", "ids", "logprobs", "tail", "reliability", "skip_reason"):
            assert getattr(aligned, field).tolist() == getattr(expected, field).tolist(), field
    assert single.align_batch([], [], []) == []


@needs_cpp
def test_the_cache_forgets_when_it_is_full(monkeypatch):
    monkeypatch.setattr("profuser.alignment.engine.MAX_CACHED_CANDIDATES", 20)
    target, source = small_chat("byte-level"), small_chat("llama-2 prepend", "llama2")
    _, _, pool = engines(target, source)
    aligner = CppByteAligner(target, source)
    for text in TEXTS:
        encoded, own = target.encode("x", text), source.encode("x", text)
        capture = random_capture(source, own, text.encode(), target, encoded, pool, np.random.default_rng(0))
        aligned = aligner.align(text.encode(), encoded, capture)
        assert_same(aligned, PythonByteAligner(target, source).align(text.encode(), encoded, capture))
        assert aligner._engine.cached <= 20


@needs_cpp
def test_the_stub_of_the_extension_has_its_functions_with_their_arguments():
    assert _align is not None
    stub: dict[str, list[str]] = {}
    for node in ast.walk(ast.parse(Path(profuser.__file__).with_name("_align.pyi").read_text())):
        if isinstance(node, ast.FunctionDef):
            stub[node.name] = [argument.arg for argument in node.args.args]
    built: dict[str, list[str]] = {}
    for name, value in [*vars(_align).items(), *vars(_align.ByteAligner).items()]:
        if isinstance(value, property):
            built[name] = ["self"]
        # pybind11 writes the signature into the first line of the docstring.
        elif found := re.match(rf"{name}\((.*)\) ->", value.__doc__ or ""):
            built[name] = re.findall(r"(\w+): ", found[1])
    assert stub == built


# The next tests are about the public function, `from profuser import align`.


def toy_logits(tokenizer, ids: list[int], spread: float = 4.0) -> torch.Tensor:
    """Logits of an arbitrary source, (M, V). Row m is what it says of token m."""
    logits = torch.randn(len(ids), len(tokenizer) + 5, generator=torch.Generator().manual_seed(0)) * spread
    logits[torch.arange(len(ids)), ids] += 8
    return logits


@pytest.mark.parametrize("pair", [("byte-level", "llama-2 prepend"), ("qwen2", "llama2"), ("llama2", "gpt_neox")])
def test_align_gives_what_the_loss_takes(pair):
    target, source = (small_chat(n).tokenizer if n in SMALL else real_tokenizer(n) for n in pair)
    text = "Things like these don't happen, said the cat; 3.14 and 12345.\n\n    return x"
    ids = source(text, add_special_tokens=False).input_ids
    logits, k = toy_logits(source, ids), 10
    top_ids, top_logprobs, _, ce, *inside = source_topk_from_logits(
        logits, torch.tensor(ids), k, ranges=prefix_ranges(text, target, source)
    )
    aligned = align(text, target, source, top_ids, top_logprobs, -ce, inside)
    n = len(aligned.target_ids)
    assert aligned.target_ids.tolist() == target(text, add_special_tokens=False).input_ids
    assert aligned.source_ids.shape == aligned.source_logprobs.shape == (n, 10)
    assert not (aligned.skip_reason == SKIP_NO_PREFIX_RANGE).any()
    mass = (aligned.source_logprobs.exp() * (aligned.source_ids >= 0)).sum(1) + aligned.source_tail
    np.testing.assert_allclose(mass[aligned.skip_reason == ALIGNED], 1, atol=1e-5)
    without = align(text, target, source, top_ids, top_logprobs, -ce)
    assert (without.skip_reason[aligned.kind == INSIDE] == SKIP_NO_PREFIX_RANGE).all()

    loss = fused_linear_fusion_loss(
        torch.randn(n, 8, requires_grad=True),
        torch.randn(len(target), 8),
        aligned.target_ids,
        aligned.source_ids[None],
        aligned.source_logprobs[None],
        source_tail=aligned.source_tail[None],
    )
    loss.backward()
    assert loss.isfinite()


def test_a_row_without_candidates_says_nothing():
    """The first token of a text has no distribution if nothing stands before it."""
    target, source = (small_chat(name).tokenizer for name in ("byte-level", "byte-level NFC"))
    m = len(source("cat", add_special_tokens=False).input_ids)
    nothing = (torch.full((m, 2), -1), torch.full((m, 2), -torch.inf), torch.full((m,), -torch.inf))
    aligned = align("cat", target, source, *nothing)
    assert (aligned.source_ids == -1).all()
    assert (aligned.skip_reason != ALIGNED).all()


# The next tests are about bad input.


@functools.cache
def case():
    target, source = chain_chat("ab"), chain_chat("bc")
    own, encoded = source.encode("x", "abc"), target.encode("x", "abc")
    rows = [{i: 0.5, 7: 0.5} for i in labels(own)]
    return target, source, encoded, capture_of(source, own, 3, rows, 2, (target, encoded))


TARGET_SIZE = len(chain_chat("ab").token_bytes.pieces)
BAD = {
    "target id of no token": (
        lambda e, c: (replaced(e, input_ids=[*e.input_ids[:-2], 99999, e.input_ids[-1]]), c),
        "token|id",
    ),
    "negative target id": (
        lambda e, c: (replaced(e, input_ids=[*e.input_ids[:-2], -4, e.input_ids[-1]]), c),
        "token|id",
    ),
    "source id of no token": (
        lambda e, c: (e, replaced(c, ids=np.array([5, 99999, 6, 1], np.int32)[: len(c.ids)])),
        "source",
    ),
    "unsorted target spans": (lambda e, c: (replaced(e, spans=e.spans[::-1]), c), "monotone|bytes"),
    "unsorted source spans": (lambda e, c: (e, replaced(c, begin=c.begin[::-1].copy())), "monotone|bytes"),
    "a span too few": (lambda e, c: (replaced(e, spans=e.spans[:-1]), c), "span"),
    "a row too few": (lambda e, c: (e, replaced(c, top_ids=c.top_ids[:-1])), "row"),
    "NaN": (lambda e, c: (e, replaced(c, top_logprobs=np.full_like(c.top_logprobs, np.nan))), "log-probabilities.*nan"),
    "probabilities": (lambda e, c: (e, replaced(c, own_logprobs=np.exp(c.own_logprobs))), "log-probabilities"),
    "range of no row": (lambda e, c: (e, replaced(c, ranges=replaced(c.ranges, rows=c.ranges.rows + 50))), "range"),
    "range without bytes": (
        lambda e, c: (e, replaced(c, ranges=replaced(c.ranges, strip=c.ranges.strip * 0 - 3))),
        "range",
    ),
    "range of other bytes": (
        lambda e, c: (e, replaced(c, ranges=replaced(c.ranges, ids=np.full_like(c.ranges.ids, 7 + TARGET_SIZE)))),
        "range",
    ),
}


def replaced(value, **changes):
    return dataclasses.replace(value, **changes)


@pytest.mark.parametrize("name", list(BAD))
@pytest.mark.parametrize("engine", [byte_aligner, PythonByteAligner], ids=["engine", "oracle"])
def test_bad_input_is_refused_with_the_rule(engine, name):
    target, source, encoded, capture = case()
    assert len(capture.ranges.rows)
    change, message = BAD[name]
    with pytest.raises(DataError, match=message):
        engine(target, source).align(b"abc", *change(encoded, capture))


@needs_cpp
@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_sequence_of_a_batch_that_is_refused_is_named(threads):
    target, source, encoded, capture = case()
    _, wrong = BAD["range of other bytes"][0](encoded, capture)
    with pytest.raises(DataError, match=r"\(sequence 1 of the batch\)"):
        byte_aligner(target, source, threads=threads).align_batch(
            [b"abc"] * 4, [encoded] * 4, [capture, wrong, capture, wrong]
        )


@pytest.mark.parametrize("which", ["target", "source"])
def test_tokens_of_another_response_are_refused(which):
    target, source, encoded, capture = case()
    sides = {"target": (b"abd", source.encode("x", "abd")), "source": (b"abc", source.encode("x", "abd"))}
    response, own = sides[which]
    capture = capture_of(source, own, 3, [{i: 1.0} for i in labels(own)], 1)
    for engine in (byte_aligner, PythonByteAligner):
        with pytest.raises(DataError, match=f"{which} token must hold the response's bytes"):
            engine(target, source).align(response, encoded, capture)


@pytest.mark.parametrize("shorter", ["target", "source"])
def test_tokens_that_end_before_the_response_are_refused(shorter):
    target, source, *_ = case()
    own = {"target": "abcd", "source": "abc"}[shorter]
    rows = [{i: 1.0} for i in labels(source.encode("x", own))]
    capture = capture_of(source, source.encode("x", own), 4, rows, 1)
    encoded = target.encode("x", "abc" if shorter == "target" else "abcd")
    for engine in (byte_aligner, PythonByteAligner):
        with pytest.raises(DataError, match=f"the {shorter}'s tokens must reach the response's end, byte 4, got 3"):
            engine(target, source).align(b"abcd", encoded, capture)


@needs_cpp
@pytest.mark.parametrize("field", ["top_logprobs", "own_logprobs", "ids", "begin"])
def test_another_dtype_is_refused(field):
    target, source, encoded, capture = case()
    other = getattr(capture, field).astype(np.float64)
    with pytest.raises(DataError, match="float64"):
        CppByteAligner(target, source).align(b"abc", encoded, replaced(capture, **{field: other}))


@needs_cpp
@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("response_offsets", lambda x: x + 1, "ascend from 0"),
        ("target_offsets", lambda x: x * 0, "ascend from 0"),
        ("span_offsets", lambda x: x[:-1], "rows"),
        ("prefix_start", lambda x: x + 1000, "prefix_start"),
        ("prefix_start", lambda x: x - 1000, "prefix_start"),
        ("prefix_start", lambda x: x[0] + np.array([0, 1, 0], np.int32), "prefix_start must not descend"),
        ("start", lambda x: x + 1, "spans must be one per token"),
        ("start", lambda x: x - 1000, "start must be"),
        ("target_end", lambda x: x * 0 - 9, "target_end"),
        ("top_ids", lambda x: x[:, :1], "contiguous"),
        ("top_ids", lambda x: x[:, :1].copy(), "one width"),
        ("source_ids", lambda x: x.astype(np.int64), "int32"),
        ("source_begin", lambda x: x[:, None], "1 dimension"),
        ("range_offsets", lambda x: x[::-1].copy(), "ascend from 0"),
    ],
)
def test_the_engine_never_reads_out_of_bounds(field, change, message):
    target, source, encoded, capture = case()
    aligner = CppByteAligner(target, source)
    batch = aligner.batch_of([b"abc"], [encoded], [capture])
    with pytest.raises(DataError, match=message):
        aligner.align_arrays(batch | {field: change(batch[field])})
    with pytest.raises(DataError, match=f"needs {field}"):
        aligner.align_arrays({k: v for k, v in batch.items() if k != field})


@needs_cpp
def test_the_engine_takes_a_range_once():
    target, source, encoded, capture = case()
    twice = (getattr(capture.ranges, field.name).repeat(2, 0) for field in dataclasses.fields(PrefixRanges))
    with pytest.raises(DataError, match="come in order"):
        CppByteAligner(target, source).align(b"abc", encoded, replaced(capture, ranges=PrefixRanges(*twice)))


def test_top_k_must_be_positive():
    chat = chain_chat()
    for engine in (byte_aligner, PythonByteAligner):
        with pytest.raises(ValueError, match="top_k"):
            engine(chat, chat, top_k=0)
