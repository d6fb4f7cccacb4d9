"""In the templates of well-known models the learnt tokens are the response and its end, and the rest is what the model is used to."""

from __future__ import annotations

from typing import Any

import pytest
from model_templates import MODELS, tokenizer_of
from small_tokenizers import ids_of

from profuser.text.chat import ChatFormat
from profuser.text.conversation import Conversation, Prompt, Turn
from profuser.text.template import conversation

SYSTEM = Turn("system", "Be brief.")
FIRST = (Turn("user", "What is 8-4?"), Turn("assistant", "Answer: 4."))
PROMPTS: dict[str, Prompt] = {
    "one turn": "Who said hello?",
    "system": Conversation((SYSTEM, Turn("user", "Who said hello?"))),
    "two turns": Conversation((*FIRST, Turn("user", "Who said hello?"))),
    "system and three turns": Conversation((SYSTEM, *FIRST, *FIRST, Turn("user", "Who said hello?"))),
}
RESPONSE = "The cat said hello,\n  hello world. 你好 1234"

names = pytest.mark.parametrize("name", MODELS)
prompts = pytest.mark.parametrize("prompt", PROMPTS.values(), ids=list(PROMPTS))


def hugging_face(name: str, messages: list[dict[str, Any]], **options: Any) -> Any:
    """What the tokenizer's own apply_chat_template gives, where a system message without a place is in the first user message."""
    if messages[0]["role"] == "system" and not MODELS[name].system:
        (system, user, *others) = messages
        messages = [user | {"content": f"{system['content']}\n\n{user['content']}"}, *others]
    return tokenizer_of(name).apply_chat_template(messages, tokenize=True, return_dict=True, **options)


@names
@prompts
def test_ids_are_the_models_own_and_the_response_and_its_end_are_learnt(name, prompt):
    known, chat = MODELS[name], ChatFormat(tokenizer_of(name))
    encoded = chat.encode(prompt, RESPONSE)
    expected = hugging_face(name, conversation(prompt, RESPONSE))["input_ids"]
    assert encoded.input_ids == expected[: len(encoded.input_ids)]
    assert not chat.token_bytes.of(expected[len(encoded.input_ids) :]).strip()

    # What is learnt.
    (end,) = ids_of(chat.tokenizer, known.end)
    assert encoded.input_ids[-1] == chat.end_id == end
    assert encoded.end_of_turn == len(encoded.input_ids) - 1
    learnt = [i for i, label in zip(encoded.input_ids, encoded.label_mask, strict=True) if label]
    assert chat.token_bytes.of(learnt[:-1]).decode().strip() == RESPONSE
    assert learnt[-1] == end

    # How often the text begins.
    if known.begin is not None:
        turns = [turn for turn in prompt.turns if turn.role == "user"] if isinstance(prompt, Conversation) else [prompt]
        (begin,) = ids_of(chat.tokenizer, known.begin)
        assert encoded.input_ids.count(begin) == (len(turns) if known.begins_each_turn else 1)
        assert encoded.input_ids[0] == begin


@names
@prompts
def test_a_model_is_asked_as_apply_chat_template_asks_it(name, prompt):
    chat = ChatFormat(tokenizer_of(name))
    asked = conversation(prompt, "")[:-1]
    assert chat.prompt_ids(prompt) == hugging_face(name, asked, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("name", [name for name, known in MODELS.items() if known.marked])
@prompts
def test_the_mask_is_that_of_hugging_face_where_the_template_has_one(name, prompt):
    """TRL's `assistant_only_loss` learns what this mask marks, which is every turn of the assistant. The last one is the response."""
    chat = ChatFormat(tokenizer_of(name))
    encoded = chat.encode(prompt, RESPONSE)
    marked = hugging_face(name, conversation(prompt, RESPONSE), return_assistant_tokens_mask=True)
    assert marked["input_ids"][: len(encoded.input_ids)] == encoded.input_ids
    mask = marked["assistant_masks"][: len(encoded.input_ids)]
    begin = len(mask) - next((n for n, m in enumerate(reversed(mask)) if not m), len(mask))
    assert [int(label) for label in encoded.label_mask] == [0] * begin + [1] * (len(mask) - begin)

    # With all turns learnt, every turn is the response of an example: together they are the whole mask.
    turns = prompt.turns if isinstance(prompt, Conversation) else (Turn("user", prompt),)
    turns = (*turns, Turn("assistant", RESPONSE))
    learnt = sum(
        sum(chat.encode(Conversation(turns[:n]) if n > 1 else turns[0].text, turn.text).label_mask)
        for n, turn in enumerate(turns)
        if turn.role == "assistant"
    )
    assert learnt == sum(marked["assistant_masks"])
