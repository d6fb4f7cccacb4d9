"""The bytes of tokens concatenate to the text and their spans are monotone and cover it, or the text is refused."""

from __future__ import annotations

import functools
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizers import CONTROL, REAL, SMALL, byte_level, real_tokenizer, sentencepiece, wrap
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from profuser.errors import DataError
from profuser.text.token_bytes import TokenBytes, TokenBytesMismatch

SNIPPETS = [
    " ",
    "  ",
    "    ",
    "\n",
    "\t",
    "hello",
    "Things",
    "42",
    "你好",
    "é",
    "e\u0301",
    "👩‍👩‍👧",
    "▁",
    "<0x41>",
    "\x00",
    *CONTROL,
]
texts = st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=4), max_size=10).map("".join)
small = pytest.mark.parametrize("name", list(SMALL))


@functools.cache
def tokens_of(name: str) -> TokenBytes:
    return TokenBytes(wrap(SMALL[name]()))


@functools.cache
def real_tokens(name: str) -> TokenBytes:
    return TokenBytes(real_tokenizer(name))


def check_spans(tokens: TokenBytes, ids: list[int], text: str) -> None:
    """Checks that the spans are in order without gaps or overlaps, and that each holds exactly its token's bytes."""
    data = text.encode()
    reached = 0
    for i, (begin, end) in zip(ids, tokens.spans(ids, text)):
        assert max(begin, 0) == reached <= end
        piece = tokens.pieces[i]
        if piece is not None:
            assert piece.endswith(data[reached:end])
            assert piece[: len(piece) - (end - reached)] in (b"", b" ")
        else:
            assert data[reached:end].decode() in ("", tokens.specials[i])
        reached = end
    assert reached == len(data)


@small
@settings(max_examples=60, deadline=None)
@given(text=texts)
@example(text=" a")
@example(text="<s> a</s>b")
def test_pieces_concatenate_or_the_text_is_refused(name, text):
    tokens = tokens_of(name)
    if "NFC" in name and unicodedata.normalize("NFC", text) != text:
        reason = "normaliser"
    elif ("metaspace" in name or name in ("llama-2 prepend", "gemma")) and "▁" in text:
        reason = "decoder"  # a mark in the text cannot be told from a space
    else:
        check_spans(tokens, tokens.encode(text), text)
        return
    with pytest.raises(TokenBytesMismatch) as error:
        tokens.spans(tokens.encode(text), text)
    assert error.value.reason == reason


@small
@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.tuples(texts, st.booleans()), max_size=4))
def test_encoding_in_parts_equals_encoding_the_whole(name, parts):
    tokens = tokens_of(name)
    whole = "".join(text for text, _ in parts)
    assert tokens.encode_parts([(whole, False)])[0] == tokens.encode(whole)
    if not tokens.has_control(whole):
        assert tokens.encode_parts(parts)[0] == tokens.encode(whole)


@small
@settings(max_examples=40, deadline=None)
@given(text=texts)
def test_a_literal_part_never_becomes_a_control_token(name, text):
    tokens = tokens_of(name)
    ids = tokens.encode_parts([("<s>x ", False), (text, True), ("</s>", False)])[0]
    assert [i for i in ids if i in tokens.specials] == [tokens.encode("<s>")[0], tokens.encode("</s>")[0]]


@pytest.mark.parametrize(
    ("scheme", "text", "begins"),
    [
        ("prepend", "hello", [-1]),
        ("prepend", " hello", [-1, 0]),  # the tokenizer's own space comes first, then that of the text
        ("always", "hello", [-1]),
        ("always", " hello", [0]),
        ("first", "hello", [-1]),
        ("never", "hello", [0]),
    ],
)
def test_a_dummy_space_at_the_beginning_is_before_byte_0(scheme, text, begins):
    tokens = TokenBytes(wrap(sentencepiece(700, scheme)))
    spans = tokens.spans(tokens.encode(text), text)
    assert [b for b, _ in spans][: len(begins)] == begins


@pytest.mark.parametrize(("scheme", "dummy"), [("prepend", True), ("always", True), ("first", False), ("never", False)])
def test_dummy_space_after_a_control_token_is_not_in_the_text(scheme, dummy):
    tokens = TokenBytes(wrap(sentencepiece(700, scheme)))
    text = "<s>hello<s>hello"
    ids = tokens.encode(text)
    spans = tokens.spans(ids, text)
    assert spans[0] == (0, 3)
    second = ids.index(ids[0], 1)
    assert spans[second] == (8, 11)
    assert spans[second + 1][0] == 11
    assert tokens.piece(ids[second + 1]).startswith(b" ") == dummy
    check_spans(tokens, ids, text)


def test_byte_fallback_covers_part_of_a_character():
    tokens = TokenBytes(wrap(sentencepiece(700, "first")))
    ids = tokens.encode("🦜")
    assert [tokens.pieces[i] for i in ids][-4:] == [bytes([b]) for b in "🦜".encode()]
    assert tokens.of(ids) == b" \xf0\x9f\xa6\x9c"
    assert tokens.spans(ids, "🦜")[-4:] == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_byte_tokens_declared_special_are_bytes_all_the_same():
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    special = ["<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokenizer.train_from_iterator(["ab"], trainers.BpeTrainer(special_tokens=special, show_progress=False))
    tokens = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"))
    check_spans(tokens, tokens.encode("aéb"), "aéb")


def test_ids_without_a_token_are_refused_and_have_no_bytes():
    tokens = tokens_of("byte-level")
    beyond = len(tokens.pieces) + 7
    assert tokens.of([beyond, *tokens.encode("a")]) == b"a"
    for i in (beyond, -1):
        with pytest.raises(TokenBytesMismatch):
            tokens.spans([i], "a")


def test_control_token_that_is_not_in_the_text_is_zero_width():
    tokens = tokens_of("byte-level")
    begin = tokens.encode("<s>")
    assert tokens.spans(begin + tokens.encode("a"), "a") == [(0, 0), (0, 1)]


@pytest.mark.parametrize(
    "ids", [lambda ids: ids[:-1], lambda ids: ids[1:], lambda ids: [*ids, ids[-1]], lambda ids: ids[::-1]]
)
def test_tokens_of_another_text_are_refused(ids):
    tokens = tokens_of("byte-level")
    text = "hello world 42"
    with pytest.raises(TokenBytesMismatch):
        tokens.spans(ids(tokens.encode(text)), text)


def with_runs(*, normalized: bool, special: bool = False, dummy: str | None = None) -> TokenBytes:
    """The smallest tokenizer whose runs of two are added tokens. Its BPE makes the same runs of plain spaces and line ends."""
    vocab = {token: i for i, token in enumerate(["<s>", "a", "b", "▁", "▁▁", "\n", "\n\n"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "▁"), ("\n", "\n")]))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    if dummy == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), tokenizer.normalizer])
    elif dummy == "metaspace":
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    spaces, ends = (AddedToken(run, normalized=normalized) for run in ("▁▁", "\n\n"))
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([spaces])
    tokenizer.add_tokens([ends])
    return TokenBytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>"))


RUNS = pytest.mark.parametrize(
    "runs",
    [
        {"normalized": False},
        {"normalized": True},
        {"normalized": False, "special": True},
        {"normalized": False, "dummy": "prepend"},
        {"normalized": False, "dummy": "metaspace"},
    ],
    ids=str,
)


@RUNS
@pytest.mark.parametrize("text", ["a  b", "a   b", "    a\n\n    b", "a  ", "  ", "\n\n  a", " a  b"])
def test_an_added_token_that_plain_spaces_reach_stands_for_the_spaces(runs, text):
    tokens = with_runs(**runs)
    ids = tokens.encode(text)
    check_spans(tokens, ids, text)
    assert "  " not in text or b"  " in [tokens.pieces[i] for i in ids]
    check_spans(tokens, tokens.encode_parts([("<s>", False), (text, True)])[0], "<s>" + text)


@RUNS
@pytest.mark.parametrize("text", ["▁▁", "a▁▁b", "a▁b"])
def test_the_spelling_of_an_added_token_that_spaces_reach_is_refused(runs, text):
    tokens = with_runs(**runs)
    with pytest.raises(TokenBytesMismatch) as error:
        tokens.spans(tokens.encode(text), text)
    assert error.value.reason == "decoder"


def test_an_added_token_that_only_its_spelling_reaches_keeps_it():
    tokenizer = Tokenizer.from_str(sentencepiece(620, "never").to_str())
    tokenizer.add_tokens([AddedToken("<|a▁b|>", normalized=False)])
    tokens = TokenBytes(wrap(tokenizer))
    text = "hello<|a▁b|>world"
    ids = tokens.encode(text)
    check_spans(tokens, ids, text)
    assert "<|a▁b|>".encode() in tokens.added
    spaces = "hello<|a b|>world"
    check_spans(tokens, tokens.encode(spaces), spaces)


def test_an_added_token_in_the_byte_level_alphabet_stands_for_the_bytes_that_reach_it():
    """Someone has added the string of a token of the vocabulary, in which Ġ is a space, as if it were text."""
    tokenizer = Tokenizer.from_str(byte_level(500).to_str())
    assert tokenizer.token_to_id("Ġthe") is not None
    tokenizer.add_tokens([AddedToken("Ġthe", normalized=False), AddedToken("café", normalized=False)])
    tokens = TokenBytes(wrap(tokenizer))
    for text in ("said the cat", "a café"):
        check_spans(tokens, tokens.encode(text), text)
    assert tokens.pieces[tokenizer.get_vocab()["Ġthe"]] == b" the"
    with pytest.raises(TokenBytesMismatch):
        tokens.spans(tokens.encode("saidĠthe cat"), "saidĠthe cat")


def test_an_end_of_turn_that_text_reaches_stays_a_control_token():
    tokenizer = Tokenizer.from_str(byte_level(500).to_str())
    newline = tokenizer.get_vocab()["Ċ"]
    tokens = TokenBytes(wrap(tokenizer), control=[newline])
    assert tokens.pieces[newline] is None
    assert newline in tokens.specials


def test_added_token_that_takes_whitespace_covers_it():
    tokenizer = Tokenizer.from_str(byte_level(500).to_str())
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, rstrip=True)])
    tokenizer.add_special_tokens([AddedToken("<|begin|>", special=True, lstrip=True)])
    tokenizer.add_tokens([AddedToken("<both>", lstrip=True, rstrip=True)])
    tokens = TokenBytes(wrap(tokenizer))
    text = "a<|end|> \nb  <both> c"
    ids = tokens.encode(text)
    spans = dict(zip(ids, tokens.spans(ids, text)))
    assert spans[tokenizer.get_vocab()["<|end|>"]] == (1, 10)
    assert spans[tokenizer.get_vocab()["<both>"]] == (11, 20)
    assert tokens.encode_parts([("a<|end|> \n", False), ("b  <both> c", True)])[0] == ids
    text = "a \n<|begin|> b"
    assert tokens.spans(tokens.encode(text), text)[:2] == [(0, 1), (1, 12)]
    assert tokens.encode_parts([(text, False)])[0] == tokens.encode(text)


def test_of_two_control_strings_the_longer_one_counts():
    tokenizer = Tokenizer.from_str(byte_level(500).to_str())
    tokenizer.add_special_tokens([AddedToken("<|a", special=True), AddedToken("<|a|>", special=True)])
    tokens = TokenBytes(wrap(tokenizer))
    assert tokens.encode_parts([("x<|a|><|a", False)])[0] == tokens.encode("x<|a|><|a")


@pytest.mark.parametrize("scheme", ["first", "never"])
def test_space_that_is_not_in_the_text_is_refused(scheme):
    tokens = TokenBytes(wrap(sentencepiece(700, scheme)))
    with pytest.raises(TokenBytesMismatch):
        tokens.spans(tokens.encode("<s> hello"), "<s>hello")


def test_tokenizer_without_a_backend_is_refused():
    with pytest.raises(DataError, match="backend"):
        TokenBytes(object())  # pyrefly: ignore[bad-argument-type]


@pytest.mark.parametrize("name", REAL)
def test_a_real_tokenizer_gives_back_every_text(name):
    tokens = real_tokens(name)
    for text in (
        "Things like these don't happen 12345 times.\n\n    return  x\t\n",
        "你好，世界 русский café 👩‍👩‍👧 \u3000\u00a0 x",
        " leading and trailing  ",
        "<s>[INST] hi [/INST] answer </s><|endoftext|><|im_end|>",
        "\x00\x7f<0x0A> \\n",
        "",
    ):
        check_spans(tokens, tokens.encode(text), text)
        check_spans(tokens, tokens.encode_parts([(text, True)])[0], text)
        assert not any(i in tokens.specials for i in tokens.encode_parts([(text, True)])[0])
        assert tokens.encode(text) == real_tokenizer(name)(text, add_special_tokens=False)["input_ids"]


CHANGED = [("qwen2", "cafe\u0301", "normaliser"), ("gpt_neox", "e\u0301", "normaliser"), ("llama2", "a▁b", "decoder")]


@pytest.mark.parametrize(("name", "text", "reason"), CHANGED)
def test_real_tokenizer_refuses_what_it_changes(name, text, reason):
    tokens = real_tokens(name)
    with pytest.raises(TokenBytesMismatch) as error:
        tokens.spans(tokens.encode(text), text)
    assert error.value.reason == reason
    assert tokens.encode(tokens.seen(text)) == tokens.encode(text)
