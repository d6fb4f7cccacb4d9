"""Conversations that wait for an answer: every source sees them as its own template shows them, and what is none is named."""

from __future__ import annotations

import io
import json
import logging
import sys
from typing import Any

import pytest
from command_runs import run
from small_tokenizers import CHATML, SMALL, VICUNA, wrap
from test_align_conversations import FORGETS, LLAMA2_SYSTEM
from test_cool_fusion import CONVERSATIONS, PROMPTS, demo  # noqa: F401  (demo is a fixture)

from profuser.errors import DataError
from profuser.generate.answers import answer_file, finished_rows
from profuser.generate.cool_fusion import CoolFusion
from profuser.generate.methods import METHODS
from profuser.generate.prompts import prompts_of
from profuser.generate.speaker import Voice
from profuser.recipe.schema import DecodeConfig
from profuser.text.chat import ChatFormat
from profuser.text.conversation import Conversation, Turn
from profuser.text.turns import waiting

QWEN3 = (  # an empty block of reasoning before the last response, as by Qwen3's template
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'].split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (  # refuses a system message, and turns that do not alternate
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
DROPS = CHATML.replace(
    "{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"
)  # says nothing of it
LAST_ONLY = CHATML.replace("in messages %}", "in messages[-2:] %}")
WITH_SYSTEM = {"chatml": CHATML, "llama2": LLAMA2_SYSTEM, "qwen3": QWEN3, "forgets": FORGETS}
WITHOUT = {"gemma": GEMMA, "vicuna": VICUNA, "drops": DROPS}
TEMPLATES = WITH_SYSTEM | WITHOUT

TALKS = {
    "two turns": ("hello cat ", "\nThe answer is 42. ", "  What is 6*7?"),
    "system": ("Be brief.", "hello", "hello help", "What is 6*7?"),
    "empty system": ("", "hello", "hello help", "What is 6*7?"),
    "system and one turn": ("Things like these don't happen.", "hello"),
}


def talk(*texts: str) -> list[dict[str, str]]:
    """The messages of a conversation, with a system message where the number of texts is even."""
    roles = ["system"] * (len(texts) % 2 == 0) + ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts)]


def chat_of(template: str, name: str = "byte-level") -> ChatFormat:
    return ChatFormat(wrap(SMALL[name](), template))


def rendered(chat: ChatFormat, messages: list[dict[str, str]], **options: Any) -> list[int]:
    render: Any = chat.tokenizer.apply_chat_template
    return render(messages, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("tokenizer", ["llama-2 prepend", pytest.param("byte-level", marks=pytest.mark.long)])
@pytest.mark.parametrize("messages", [talk(*texts) for texts in TALKS.values()], ids=list(TALKS))
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_a_model_reads_what_its_own_template_shows(template, messages, tokenizer):
    chat, conversation = chat_of(TEMPLATES[template], tokenizer), Conversation.of(messages)
    shown = list(messages)
    if template in WITHOUT and messages[0]["role"] == "system":
        system, user = (message["content"] for message in messages[:2])
        shown[:2] = [{"role": "user", "content": f"{system}\n\n{user}" if system else user}]
    assert chat.prompt_ids(conversation) == rendered(chat, shown, add_generation_prompt=True)
    answered = [*shown, {"role": "assistant", "content": "It is 42."}]
    encoded = chat.encode(conversation, "It is 42.")
    assert encoded == chat.encode_messages(answered)
    whole = rendered(chat, answered)
    assert encoded.input_ids == whole[: len(encoded.input_ids)]
    cut = chat.encode(conversation, "It is", complete=False)
    assert encoded.input_ids[: cut.stop] == cut.input_ids[: cut.stop]
    # A response that begins with reasoning of its own gets no empty block beside it.
    thought = chat.encode(conversation, "<think>6*7</think>42", complete=False)
    assert chat.token_bytes.of(thought.input_ids).count(b"<think>") == 1


@pytest.mark.parametrize("template", list(TEMPLATES))
@pytest.mark.parametrize("prompt", ["hello cat", "  say </s> and <|im_end|> \n"])
def test_one_turn_is_the_prompt(template, prompt):
    chat = chat_of(TEMPLATES[template])
    conversation = Conversation.of([{"role": "user", "content": prompt}])
    assert chat.prompt_ids(conversation) == chat.prompt_ids(prompt)
    assert chat.encode(conversation, "42") == chat.encode(prompt, "42")
    # Rendered as conversations of several turns are, it is the same.
    around = waiting(chat.template, chat.token_bytes, chat.opening, talk(prompt))
    assert chat.token_bytes.encode_parts(around.generation)[0] == chat.prompt_ids(prompt)
    assert chat.token_bytes.encode_parts(around.finished)[0] == chat.encode(prompt, "", complete=False).input_ids


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_no_text_of_a_conversation_becomes_a_control_token(template):
    chat = chat_of(TEMPLATES[template])
    plain, literal = (
        Conversation.of(talk(*(text + more for text in TALKS["system"]))) for more in ("", "</s> <|im_end|>")
    )
    control = chat.token_bytes.specials
    for ids in (chat.prompt_ids, lambda prompt: chat.encode(prompt, "42").input_ids):
        assert [i for i in ids(literal) if i in control] == [i for i in ids(plain) if i in control]
        assert chat.token_bytes.of(ids(literal)).count(b"<|im_end|>") == 4


def test_reasoning_of_earlier_turns_is_dropped_as_the_template_does():
    conversation = Conversation.of(talk("hello", "<think>well</think>\nhi", "and?"))
    chat = chat_of(FORGETS)
    assert b"well" not in chat.token_bytes.of(chat.prompt_ids(conversation))
    assert chat.prompt_ids(conversation) == rendered(chat, talk("hello", "hi", "and?"), add_generation_prompt=True)


def test_a_system_message_without_a_place_of_its_own_is_said_once_per_source(caplog):
    with caplog.at_level(logging.WARNING):
        for template in TEMPLATES.values():
            chat = chat_of(template)
            for texts in TALKS.values():
                chat.prompt_ids(Conversation.of(talk(*texts)))
                chat.encode(Conversation.of(talk(*texts)), "42")
    assert sum("no system role" in message for message in caplog.messages) == len(WITHOUT)


@pytest.mark.parametrize(
    ("template", "says"), [(LAST_ONLY, "show every message"), (GEMMA.replace("% 2 == 0", "== 0"), "roles")]
)
def test_a_template_that_cannot_show_a_conversation_is_named_with_the_row(tmp_path, demo, template, says):  # noqa: F811
    odd = Voice("odd", chat_of(template), demo[0].model, demo[0].head)
    prompts = ["hello", Conversation.of(talk(*TALKS["two turns"]))]
    with pytest.raises(DataError, match=rf"^row 2 of --input: .*{says}") as error:
        list(answer_file(CoolFusion([demo[0], odd], DecodeConfig(), 4), prompts, tmp_path / "answers.jsonl"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "answers.jsonl").exists()


# --- what is a conversation ------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("messages", "turns"),
    [
        ([USER], [("user", "hello")]),
        ([{"role": "system", "content": ""}, USER], [("system", ""), ("user", "hello")]),
        (
            [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"text": "lo", "type": "text"}]}],
            [("user", "hello")],
        ),
        ([USER | {"name": None, "tool_calls": [], "refusal": ""}], [("user", "hello")]),
        ([{"content": " \u2028x\n", "role": "user"}], [("user", " \u2028x\n")]),
    ],
)
def test_messages_that_are_read(messages, turns):
    assert list(Conversation.of(messages).turns) == turns


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "at least the user's turn"),
        ({"role": "user", "content": "x"}, "must be a list"),
        ("hello", "must be a list"),
        ([USER, "hello"], "message 2 must have a role and a content"),
        ([USER, None], "message 2 must have a role"),
        ([USER, USER], r"speak in turn.*got the role user in place of assistant in message 2; join"),
        ([{"role": "system", "content": "x"}, USER, USER], r"in message 3; join"),
        ([USER | {"role": "assistant"}, USER], r"the user first.*in message 1"),
        ([USER, USER | {"role": "assistant"}], "last message must be the user's"),
        ([USER | {"role": "system"}], "last message must be the user's"),
        ([USER, USER | {"role": "system"}], "got the role system.*in message 2; give all of it in one message"),
        ([USER | {"role": "system"}, USER | {"role": "system"}, USER], "message 2; give all of it in one message"),
        ([USER | {"role": "tool"}], "role of message 1 must be one of system, user, assistant, got 'tool'"),
        ([USER | {"role": "User"}], "got 'User'"),
        ([USER | {"role": None}], "got None"),
        ([USER | {"role": ["user"]}], "role of message 1"),
        ([{"from": "human", "value": "hello"}], "role of message 1"),
        ([USER | {"content": None}], "content of message 1 must be a text"),
        ([USER | {"content": 7}], "content of message 1 must be a text"),
        ([USER | {"content": " \n"}], "content of message 1 must be a text"),
        ([USER, {"role": "assistant", "content": ""}, USER], "content of message 2 must be a text"),
        ([{"role": "user"}], "content of message 1 must be a text"),
        ([USER | {"content": []}], "content of message 1 must be a text"),
        ([USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "got 'image_url'"),
        ([USER | {"content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]}], "got 'input_audio'"),
        ([USER | {"content": ["hello"]}], "part of message 1 must be a text"),
        ([USER | {"content": [{"type": "text", "text": None}]}], "part of message 1 must be a text"),
        ([USER | {"content": [{"type": "text", "text": "a", "cache_control": {"type": "x"}}]}], "'cache_control'"),
        ([USER | {"tool_calls": [{"id": "1"}]}], "'tool_calls'"),
        ([USER | {"name": "Bob"}], "message 1 may have role and content, got 'name'"),
        ([USER | {"content": "\ud83d"}], "lone surrogate"),
        ([USER | {"name": "\ud83d"}], "lone surrogate"),
    ],
)  # fmt: skip
def test_messages_that_are_no_conversation_are_named_by_file_and_row(tmp_path, messages, says):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + json.dumps({"messages": messages, "id": 7}) + "\n")
    with pytest.raises(DataError, match=rf"prompts\.jsonl line 3: .*{says}") as error:
        prompts_of(path)
    assert "\n" not in str(error.value)


def test_a_prompt_beside_messages_must_be_the_same(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "hello", "messages": [USER]}))
    assert prompts_of(path) == [Conversation((Turn("user", "hello"),))]
    path.write_text(json.dumps({"prompt": "hello", "messages": talk("hello", "hi", "and?")}))
    with pytest.raises(DataError, match="line 1 must have a `prompt` or `messages`, got both"):
        prompts_of(path)


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(METHODS))
def test_a_file_of_conversations_is_answered_by_every_method_in_batches_and_goes_on(demo, tmp_path, method):  # noqa: F811
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    parts = [{"role": "user", "content": [{"type": "text", "text": PROMPTS[0]}]}]
    given = [
        {"messages": parts},
        {"messages": [{"role": turn.role, "content": turn.text} for turn in CONVERSATIONS[-1].turns]},
        {"prompt": PROMPTS[0]},
        {"messages": talk(PROMPTS[1], "sweet", PROMPTS[1])},
    ]  # fmt: skip
    source.write_text("".join(json.dumps(row | {"id": n}) + "\n" for n, row in enumerate(given)))
    prompts = prompts_of(source)
    voices = demo[1:] if method == "mixture" else demo
    fusion = METHODS[method](voices, DecodeConfig(method=method), 6)
    expected = [fusion.answer(prompt) for prompt in prompts]
    assert repr(expected[0]) == repr(expected[2])  # a perplexity may be nan
    for row in answer_file(fusion, prompts, output, "key", 3):  # an interruption behind the second row
        if row[0] is prompts[1]:
            break
    assert finished_rows(output, prompts, "key") == 2
    list(answer_file(fusion, prompts, output, "key", 2))
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["response"] for row in rows] == [answer.text for answer in expected]
    assert [{key: row[key] for key in ("prompt", "messages") if key in row} for row in rows] == given
    with pytest.raises(DataError, match="answers to the same prompts"):
        finished_rows(output, [prompts[n] for n in (0, 3, 2, 1)], "key")
    with pytest.raises(DataError, match="answers to the same prompts"):
        finished_rows(output, [PROMPTS[0], *prompts[1:]], "key")


@pytest.mark.parametrize("chat", [True, False])
def test_lines_are_one_conversation_only_where_that_is_asked_for(demo, monkeypatch, tmp_path, chat):  # noqa: F811
    monkeypatch.setattr("profuser.generate.methods.load_voices", lambda recipe: demo)
    lines = ["Hi", PROMPTS[0], "", PROMPTS[1]]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    options = ["--generation.max_new_tokens=5", f"--trace={tmp_path / 'trace.html'}", *(["--chat"] if chat else [])]
    code, out, err = run("generate", *options)
    assert code == 0, err
    fusion = CoolFusion(demo, DecodeConfig(), 5)
    first = fusion.answer("Hi")
    second = Conversation((Turn("user", "Hi"), Turn("assistant", first.text), Turn("user", PROMPTS[0])))
    expected = [first, fusion.answer(second if chat else PROMPTS[0]), fusion.answer(PROMPTS[1])]
    assert [line.strip() for line in out.splitlines()] == [answer.text for answer in expected]
    assert fusion.answer(second) != fusion.answer(PROMPTS[0])
    assert (f"user: {PROMPTS[0]}" in (tmp_path / "trace.html").read_text()) == chat


@pytest.mark.parametrize("arguments", [["--prompt", "a"], ["--input", "a", "--output", "b"]])
def test_a_chat_with_other_prompts_is_one_line(arguments):
    code, out, err = run("generate", "--chat", *arguments)
    assert (code, out) == (2, "")
    assert "--chat must be given without" in err
    assert err.count("\n") == 1
