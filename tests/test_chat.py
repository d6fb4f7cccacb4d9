"""Conversations have the model's own ids; the response is located in bytes; no text becomes a control token."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    CHATML,
    LLAMA2,
    SMALL,
    TEMPLATES,
    VICUNA,
    byte_level,
    ids_of,
    real_chat,
    sentencepiece,
    small_chat,
    wrap,
)
from tokenizers import AddedToken, Tokenizer

from profuser.errors import DataError
from profuser.text.chat import ChatFormat
from profuser.text.encoded import Encoded
from profuser.text.token_bytes import TokenBytesMismatch

formats = pytest.mark.parametrize("template", list(TEMPLATES))
small = pytest.mark.parametrize("name", [name for name in SMALL if "NFC" not in name])
characters = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
SNIPPETS = [" ", "\n", "hello", "42", "é", "你好", "🙂", "<s>", "</s>", "<|im_end|>"]
texts = st.lists(st.sampled_from(SNIPPETS) | st.text(characters, max_size=4), max_size=8).map("".join)


def hugging_face_ids(chat: ChatFormat, prompt: str, response: str | None) -> list[int]:
    turns = [{"role": "user", "content": prompt}]
    turns += [] if response is None else [{"role": "assistant", "content": response}]
    render: Any = chat.tokenizer.apply_chat_template
    return render(turns, tokenize=True, return_dict=False, add_generation_prompt=response is None)


def check(chat: ChatFormat, encoded: Encoded, response: str) -> None:
    """Checks that the labels are exactly the response's bytes, none of them in a control token, and one end of turn."""
    data = response.encode()
    spans = encoded.spans
    assert len(spans) == encoded.stop - encoded.start
    content = encoded.input_ids[encoded.start : encoded.stop]
    assert not set(content) & set(chat.token_bytes.specials)
    assert data in chat.token_bytes.of(content)
    if data:
        assert spans[0][0] <= 0 < spans[0][1]
        assert spans[-1][0] < len(data) <= spans[-1][1]
        assert all(left[1] == right[0] for left, right in pairwise(spans))
    if encoded.end_of_turn is not None:
        assert encoded.end_of_turn == len(encoded.input_ids) - 1 >= encoded.stop
        assert encoded.input_ids[encoded.end_of_turn] in chat.end_ids
    assert sum(encoded.label_mask) == len(spans) + (encoded.end_of_turn is not None)


@small
@formats
def test_ids_are_those_of_apply_chat_template(name, template):
    chat = small_chat(name, template)
    for prompt, response in [
        ("hello", "world"),
        ("  What is 6*7?\n", "42"),
        ("你好", "Things\n\n  like"),
        ("", "x"),
        ("a", "1"),
    ]:
        expected = hugging_face_ids(chat, prompt, response)
        encoded = chat.encode(prompt, response)
        check(chat, encoded, response)
        assert encoded.input_ids == expected[: len(encoded.input_ids)]
        assert not set(expected[len(encoded.input_ids) :]) & set(chat.end_ids)
        assert chat.prompt_ids(prompt) == hugging_face_ids(chat, prompt, None)


@small
@formats
@settings(max_examples=25, deadline=None)
@given(prompt=texts, response=texts.map(str.strip))
def test_any_text_is_located_exactly_and_never_becomes_a_control_token(name, template, prompt, response):
    chat = small_chat(name, template)
    check(chat, chat.encode(prompt, response), response)
    cut = chat.encode(prompt, response, complete=False)
    check(chat, cut, response)
    assert cut.end_of_turn is None
    control = set(chat.token_bytes.specials)
    assert [i for i in chat.prompt_ids(prompt) if i in control] == [i for i in chat.prompt_ids("x") if i in control]


@small
@formats
def test_literal_control_strings_keep_their_bytes(name, template):
    chat = small_chat(name, template)
    prompt, response = "what does </s> and <|im_end|> do?", "<s> begins, </s> ends and <|im_start|> too"
    encoded = chat.encode(prompt, response)
    check(chat, encoded, response)
    plain = chat.encode("x", "y")
    control = set(chat.token_bytes.specials)
    assert [i for i in encoded.input_ids if i in control] == [i for i in plain.input_ids if i in control]
    begin = chat.encode("x", response).start
    assert chat.encode("x", response).input_ids[: begin - 1] == plain.input_ids[: begin - 1]


def test_template_space_belongs_to_the_first_token():
    for chat in (small_chat("llama-2 prepend", "llama2"), small_chat("byte-level", "vicuna")):
        encoded = chat.encode("x", "hello")
        assert encoded.spans[0][0] == -1
        assert chat.token_bytes.piece(encoded.input_ids[encoded.start]).startswith(b" h")


def test_template_bytes_before_the_end_of_turn_are_no_label():
    chat = small_chat("llama-2 prepend", "llama2")
    assert chat.closing == b" "
    encoded = chat.encode("x", "hello")
    assert encoded.end_of_turn == encoded.stop + 1
    assert encoded.label_mask[encoded.stop] is False
    assert encoded.label_mask[encoded.end_of_turn] is True
    assert small_chat("byte-level", "chatml").closing == b""


def test_text_after_the_end_of_turn_is_dropped():
    chat = small_chat("byte-level", "chatml")
    encoded = chat.encode("x", "hello")
    assert encoded.input_ids[-1] == chat.end_id == chat.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_begin_of_text_is_not_doubled():
    tokenizer = wrap(Tokenizer.from_str(byte_level(500).to_str()), LLAMA2)
    from tokenizers.processors import TemplateProcessing

    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    chat = ChatFormat(tokenizer)
    assert chat.prompt_ids("x").count(begin) == 1
    assert chat.encode("x", "y").input_ids.count(begin) == 1


def test_empty_response_has_only_its_end_of_turn():
    for template in TEMPLATES:
        chat = small_chat("metaspace first", template)
        encoded = chat.encode("x", "")
        assert encoded.spans == []
        assert encoded.end_of_turn is not None
        assert encoded.start == encoded.stop <= encoded.end_of_turn
        assert sum(encoded.label_mask) == 1


def test_end_of_turn_is_found_by_role():
    tokenizer = wrap(byte_level(500), CHATML)
    end, turn = ids_of(tokenizer, "</s>", "<|im_end|>")
    # The template closes with <|im_end|>, so that this token ends a turn, too.
    assert ChatFormat(tokenizer).end_ids == (end, turn)
    chat = ChatFormat(tokenizer, end_ids=[turn, end])
    assert chat.end_ids == (turn, end)
    assert chat.encode("x", "y").input_ids[-1] == chat.end_id == turn


def test_the_digest_tells_what_ends_a_turn():
    """Responses that end at other tokens are other responses."""
    tokenizer = wrap(byte_level(500), CHATML)
    one, other = ChatFormat(tokenizer), ChatFormat(tokenizer, end_ids=[*ids_of(tokenizer, "</s>", "<|im_end|>"), 7])
    assert one.digest == ChatFormat(tokenizer).digest != other.digest


def test_first_control_token_after_the_response_ends_the_turn():
    tokenizer = wrap(byte_level(500), CHATML.replace("'<|im_end|>\n'", "' <|im_end|></s>'"))
    end, turn = ids_of(tokenizer, "</s>", "<|im_end|>")
    chat = ChatFormat(tokenizer, end_ids=[end])
    assert (chat.end_id, chat.end_ids, chat.closing) == (turn, (end, turn), b" ")
    assert chat.encode("x", "y").input_ids[-1] == turn


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "chat_template"),
        ("{{ messages[0]['content'] }}", "once each"),
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", "end token"),
        ("{{ raise_exception('no') }}", "must render"),
    ],
)
def test_unusable_templates_are_refused_with_a_fix(template, message):
    with pytest.raises(DataError, match=message):
        ChatFormat(wrap(byte_level(500), template))


def test_template_that_needs_a_system_message_gets_an_empty_one():
    template = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}" + CHATML
    chat = ChatFormat(wrap(byte_level(500), template))
    check(chat, chat.encode("x", "hello"), "hello")
    assert chat.token_bytes.of(chat.prompt_ids("x")).startswith(b"system\n\n")


def test_template_without_a_system_role_works():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + VICUNA
    chat = ChatFormat(wrap(byte_level(500), template))
    check(chat, chat.encode("x", "hello"), "hello")


def test_template_that_rewrites_a_response_does_not_change_it():
    """Templates of reasoning models cut what stands before </think>, but the response's bytes must stay as they are."""
    template = CHATML.replace("m['content'] +", "m['content'].split('</think>')[-1] +")
    chat = ChatFormat(wrap(byte_level(500), template))
    response = "<think>hm</think>42"
    check(chat, chat.encode("x", response), response)


def test_template_that_ignores_the_generation_prompt_still_opens_the_turn():
    template = CHATML.split("{% if add_generation_prompt %}")[0]
    chat = ChatFormat(wrap(byte_level(500), template))
    assert chat.token_bytes.of(chat.prompt_ids("x")) == b"user\nx\nassistant\n"
    chat = ChatFormat(wrap(byte_level(500), VICUNA.split("{% if add_generation_prompt %}")[0]))
    # The space behind the colon belongs to the response's first token.
    assert chat.token_bytes.of(chat.prompt_ids("x")) == b"USER: x ASSISTANT:"


def test_a_generation_prompt_unlike_the_finished_turn_is_announced(caplog):
    with caplog.at_level(logging.WARNING):
        ChatFormat(wrap(byte_level(500), CHATML.replace("assistant\n'", "robot\n'")))
    assert "scored after" in caplog.text


@pytest.mark.parametrize("scheme", ["prepend", "always", "first"])
def test_a_response_straight_after_a_control_token_begins_at_its_first_byte(scheme):
    """Some tokenizers put a space in front of it, which is no byte of the response."""
    template = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '</s>' }}{% endfor %}"
    chat = ChatFormat(wrap(sentencepiece(700, scheme), template))
    for response in ("hello", "1", "你好", "<s>"):
        encoded = chat.encode("x", response)
        check(chat, encoded, response)
        assert encoded.spans[0][0] == 0


def test_whitespace_taken_by_a_control_token_is_not_a_literal_control_string():
    tokenizer = Tokenizer.from_str(byte_level(500).to_str())
    tokenizer.add_special_tokens(
        [AddedToken("<|user|>", special=True, rstrip=True), AddedToken("<|bot|>", special=True, rstrip=True)]
    )
    template = (
        "{% for m in messages %}{{ ('<|user|>' if m['role'] == 'user' else '<|bot|>') + '\n' + m['content'] + '</s>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|bot|>\n' }}{% endif %}"
    )
    chat = ChatFormat(wrap(tokenizer, template))
    encoded = chat.encode("  x", "hello")
    check(chat, encoded, "hello")
    assert encoded.input_ids == hugging_face_ids(chat, "  x", "hello")[: len(encoded.input_ids)]


def test_a_prompt_that_the_tokenizer_changes_is_no_reason_to_refuse_the_response():
    chat = small_chat("byte-level NFC", "vicuna")
    check(chat, chat.encode("cafe\u0301", "hello"), "hello")
    with pytest.raises(TokenBytesMismatch) as error:
        chat.encode("x", "cafe\u0301")
    assert error.value.reason == "normaliser"
    marked = small_chat("llama-2 prepend", "llama2")
    check(marked, marked.encode("a▁b", "hello"), "hello")
    with pytest.raises(TokenBytesMismatch) as error:
        marked.encode("x", "a▁b")
    assert error.value.reason == "decoder"


@pytest.mark.parametrize(("name", "template"), [("llama2", "llama2"), ("qwen2", "chatml"), ("gpt_neox", "vicuna")])
def test_real_tokenizers_give_the_ids_of_apply_chat_template(name, template):
    chat = real_chat(name, template)
    for prompt, response in [
        ("Hi there", "Answer is 42."),
        ("x", "你好👩‍👩‍👧 é\n\n    return"),
        ("</s>", "<s> and <|im_end|>"),
        ("", ""),
    ]:
        encoded = chat.encode(prompt, response)
        check(chat, encoded, response)
        if "<" not in prompt:
            assert encoded.input_ids == hugging_face_ids(chat, prompt, response)[: len(encoded.input_ids)]
