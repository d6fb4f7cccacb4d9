"""Alignment with odd tokenizers, with interruptions, and with arrays of a caller that contradict each other."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from alignment_checks import (
    BARE,
    TEXTS,
    TOLERANCE,
    assert_same,
    certain,
    chain_chat,
    check_mass,
    random_capture,
    run,
    token,
)
from small_tokenizers import byte_level, capture_of, chained, distribution, ids_of, labels, order_of, small_chat, wrap
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase

from profuser import align, prefix_ranges
from profuser.alignment.engine import byte_aligner
from profuser.alignment.reference import PythonByteAligner
from profuser.alignment.vocab_map import ByteOrder
from profuser.errors import DataError
from profuser.kernels.source_topk import source_topk_from_logits
from profuser.text.chat import ChatFormat
from profuser.text.token_bytes import TokenBytesMismatch

ENGINES = pytest.mark.parametrize("engine", [byte_aligner, PythonByteAligner], ids=["engine", "oracle"])


def with_added(tokenizer: Tokenizer, *tokens: AddedToken) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def plain_end_chat(*words: str) -> ChatFormat:
    """A chat whose end of turn is an added token that nobody declared special."""
    tokenizer = wrap(with_added(chained(*words), AddedToken("<eot>", special=False)), BARE.replace("</s>", "<eot>"))
    return ChatFormat(tokenizer, end_ids=ids_of(tokenizer, "<eot>"))


def test_an_end_of_turn_that_is_not_declared_special_is_a_control_token():
    chat = plain_end_chat()
    assert chat.token_bytes.pieces[chat.end_id] is None
    encoded = chat.encode("x", "say <eot> now")
    assert labels(encoded).count(chat.end_id) == 1
    assert chat.token_bytes.of(labels(encoded)) == b"say <eot> now"
    assert chat.end_id not in order_of(chat).ids


def test_an_end_of_turn_cannot_have_emitted_the_bytes_before_a_position():
    """The source's token is `<=`, and the target is at its `=`. `<eot>` begins with `<` as a string, but not as bytes."""
    target, source = chain_chat(), plain_end_chat("<=")
    own = labels(source.encode("x", "a<=b"))
    rows = certain(source, "a<=b")
    rows[1] = {own[1]: 0.2, source.end_id: 0.8}
    aligned = run(target, source, "a<=b", rows)
    assert distribution(aligned, 2) == pytest.approx({token(target, "="): 1.0}, abs=TOLERANCE)


@ENGINES
def test_an_interrupted_alignment_leaves_nothing_wrong_behind(engine, monkeypatch):
    target, source = small_chat("byte-level"), small_chat("llama-2 prepend", "llama2")
    text = TEXTS[0]
    encoded, own = target.encode("x", text), source.encode("x", text)
    pool = source.token_bytes.fragment.encode(text + " and so on", add_special_tokens=False).ids
    capture = random_capture(source, own, text.encode(), target, encoded, pool, np.random.default_rng(0))
    expected = engine(target, source).align(text.encode(), encoded, capture)

    class Interrupted:
        def encode_batch_fast(self, *args, **kwargs):
            raise KeyboardInterrupt

    aligner = engine(target, source)
    with monkeypatch.context() as patch:
        patch.setitem(target.token_bytes.__dict__, "fragment", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            aligner.align(text.encode(), encoded, capture)
    assert_same(aligner.align(text.encode(), encoded, capture), expected)


def test_a_strip_normaliser_does_not_strip_what_stands_before_a_candidate():
    stripping = Tokenizer.from_str(byte_level(500).to_str())
    stripping.normalizer = normalizers.Strip()
    source = small_chat("llama-2 prepend", "llama2")
    text = "hello  help, the  cat said"
    rows = certain(source, text)
    found = [run(ChatFormat(wrap(t)), source, text, rows) for t in (stripping, byte_level(500))]
    assert_same(*found)


def test_a_candidate_that_completes_an_added_token_cannot_follow():
    target = ChatFormat(wrap(with_added(chained(), AddedToken("<think>", special=False)), BARE))
    source = chain_chat()
    text = "a <think x"
    own = labels(source.encode("x", text))
    rows = certain(source, text)
    at = len("a <think")
    rows[at] = {own[at]: 0.1, token(source, ">"): 0.9}
    aligned = run(target, source, text, rows, min_reliability=0)
    assert aligned.reliability[at] == pytest.approx(0.1, abs=TOLERANCE)


def test_an_added_token_that_takes_whitespace_makes_a_response_unusable_and_nothing_else():
    chat = ChatFormat(wrap(with_added(chained(), AddedToken("<think>", special=False, rstrip=True)), BARE))
    with pytest.raises(TokenBytesMismatch, match="decoder"):
        chat.encode("x", "a <think> b")
    assert chat.token_bytes.of(labels(chat.encode("x", "a <think>b"))) == b"a <think>b"
    chat.encode("a <think> b", "y")


def test_a_text_without_cuts_keeps_prefixes_short():
    target, source = chain_chat(split=False), chain_chat("ab")
    response = "ab" * 300
    aligned = run(target, source, response, certain(source, response))
    check_mass(aligned)
    assert (aligned.reliability == 1).all()


def test_the_byte_order_leaves_out_what_the_model_has_no_logit_for():
    chat = chain_chat("ab")
    size = len(chat.token_bytes.pieces) - 1
    order = ByteOrder(chat.token_bytes, size)
    assert order.ids.max() < size
    lo, hi = order.range_of(b"a")
    assert [chat.token_bytes.pieces[i] for i in order.ids[lo:hi]] == [b"a"]


@pytest.mark.parametrize("prefix", [b"a", b"\xff", b"\xff\xff", b"zzz", b" "])
def test_a_range_of_the_byte_order_is_all_that_begins_with_its_bytes(prefix):
    chat = chain_chat("ab", "abc", "b")
    pieces = chat.token_bytes.pieces
    order = ByteOrder(chat.token_bytes)
    lo, hi = order.range_of(prefix)
    assert sorted(order.ids[lo:hi].tolist()) == [i for i, p in enumerate(pieces) if p and p.startswith(prefix)]


# The next tests are about what a caller of `align` can get wrong.


def source_rows() -> tuple[str, PreTrainedTokenizerBase, PreTrainedTokenizerBase, list[Any]]:
    """A call that works: text, target, source, and the list of the other arguments."""
    target, source = (small_chat(name).tokenizer for name in ("byte-level", "llama-2 prepend"))
    text = "Things like these don't happen, hello help."
    ids = torch.tensor(source(text, add_special_tokens=False).input_ids)
    logits = torch.randn(len(ids), len(source), generator=torch.Generator().manual_seed(1)) * 3
    logits[torch.arange(len(ids)), ids] += 6
    needed = prefix_ranges(text, target, source)
    top_ids, top_logprobs, _, ce, *inside = source_topk_from_logits(logits, ids, 5, ranges=needed)
    return text, target, source, [top_ids, top_logprobs, -ce, inside]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda i, p, own, r: (i.roll(1, 0), p.roll(1, 0), own, r), DataError, "row m of both speaks of token m"),
        (lambda i, p, own, r: (i, p, own - 9, r), DataError, "same token"),
        (lambda i, p, own, r: (i[:, :1].expand(-1, 5), p, own, r), DataError, "same token"),
        (lambda i, p, own, r: (i, p / np.log(2), own / np.log(2) - 1, r), DataError, "same token"),
        (lambda i, p, own, r: (i, p.exp(), own, r), DataError, "log_softmax"),
        (lambda i, p, own, r: (i, p, -own, r), DataError, "log_softmax"),
        (lambda i, p, own, r: (i, p, own, (r[0], r[1], r[2] - 5)), DataError, "the mass they are part of"),
        (lambda i, p, own, r: (i.long() + 2**32, p, own, r), ValueError, "32 bits"),
        (lambda i, p, own, r: (p, i, own, r), ValueError, "ids must be integers"),
        (lambda i, p, own, r: (i[1:], p[1:], own[1:], r), DataError, r"top_ids must have a row.*split_special_tokens"),
        (
            lambda i, p, own, r: (i[:, :1] + 1000, p[:, :1] * 0 - 0.1, own - 9, r),
            DataError,
            "must be of the source's tokenizer",
        ),
        (lambda i, p, own, r: (i, p, own, (*r, r[0])), ValueError, "last three"),
        (lambda i, p, own, r: (i, p, own, (r[0][1:], r[1][1:], r[2][1:])), DataError, "one row per range"),
    ],
)
def test_rows_that_contradict_each_other_are_refused(change, error, message):
    text, target, source, rows = source_rows()
    align(text, target, source, *rows)
    with pytest.raises(error, match=message):
        align(text, target, source, *change(*rows))


def test_what_is_no_text_or_no_tokenizer_is_refused():
    text, target, source, rows = source_rows()
    with pytest.raises(TypeError, match="text must be a string, got list"):
        align([text], target, source, *rows)  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(TypeError, match="a tokenizer must be one of Hugging Face's, got str"):
        prefix_ranges(text, target, "gpt2")  # pyrefly: ignore[bad-argument-type]


def test_bfloat16_rows_are_taken():
    text, target, source, (ids, logprobs, own, inside) = source_rows()
    half = align(text, target, source, ids, logprobs.bfloat16(), own, inside)
    whole = align(text, target, source, ids, logprobs, own, inside)
    assert torch.allclose(half.source_tail, whole.source_tail, atol=0.05)


@pytest.mark.parametrize(
    "settings", [{"top_k": 1.5}, {"top_k": 2**31}, {"min_reliability": 2}, {"min_reliability": float("nan")}]
)
def test_settings_out_of_range_are_refused(settings):
    text, target, source, rows = source_rows()
    with pytest.raises(ValueError, match="must be"):
        align(text, target, source, *rows, **settings)
    assert align(text, target, source, *rows, top_k=2**31 - 1).source_ids.shape[1] <= len(target)


def test_a_tokenizer_that_learnt_a_token_is_read_anew():
    tokenizer = wrap(Tokenizer.from_str(json.dumps(json.loads(byte_level(500).to_str()))))
    _, _, source, _ = source_rows()
    m = len(source("a bozun", add_special_tokens=False).input_ids)
    nothing = (torch.full((m, 1), -1), torch.full((m, 1), -torch.inf), torch.full((m,), -torch.inf))
    align("a bozun", tokenizer, source, *nothing)
    tokenizer.add_tokens(["bozun"])
    ids = align("a bozun", tokenizer, source, *nothing).target_ids.tolist()
    assert ids == tokenizer("a bozun", add_special_tokens=False).input_ids


def test_a_cut_and_empty_response_has_no_rows_and_no_positions():
    target, source = chain_chat(), chain_chat("ab")
    encoded, own = (chat.encode("x", "", complete=False) for chat in (target, source))
    capture = capture_of(source, own, 0, [], 1, (target, encoded))
    assert len(byte_aligner(target, source).align(b"", encoded, capture).kind) == 0
