"""Reads the messages of a data set, as OpenAI's API takes them, with `role` and `content`, or as ShareGPT writes them, with `from` and
`value`. What a message says beside its text is refused, because it would be lost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from profuser.errors import DataError, in_short
from profuser.prepare.spelt_json import from_json
from profuser.text.conversation import Conversation, Prompt, content_text

SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "model": "assistant",
    "bard": "assistant", "bing": "assistant", "system": "system",
}  # fmt: skip
"""Who speaks, as ShareGPT calls it, in small or capital letters."""

ROLES = ("system", "user", "assistant", "tool")
"""Who speaks, as OpenAI calls it."""

TEXTS = ("content", "value", "text")
"""Keys of a message under which data sets write what is said."""

WEIGHTS = ("weight", "train", "loss")
"""Keys of a message that say whether it is learnt: 1 or true, and 0 or false. Another weight would be lost."""

UNREAD = (
    "tool_calls", "tool_call_id", "function_call", "tools", "images", "image", "videos", "video", "audio", "refusal",
    "reasoning_content", "reasoning", "thinking",
)  # fmt: skip
"""Keys of a message that say something which is not read."""


class Spoken(NamedTuple):
    """A message as it was read: who speaks, which may be nobody that we know, and what is said.

    unlearnt: the key that says that the message is not learnt; empty where it is.
    """

    role: Any
    text: str
    unlearnt: str = ""


def messages_of(column: str, value: object, notes: dict[str, int] | None = None) -> list[Spoken]:
    """Reads messages, as a list or as the JSON text of one, which a CSV file has.

    Args:
        notes: counts the conversations that begin with the assistant's turn, which is then left out. Without it, it is kept.
    Raises:
        DataError: they are none, or say something that would be lost.
    """
    given = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = from_json(value)
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        is_spelt = isinstance(given, str) and given.lstrip().startswith("[")
        fix = "write it as JSON" if is_spelt else "write a list in which each has a role and a content"
        raise DataError(f"the column {column!r} must hold a list of messages, got {in_short(given)}; {fix}")
    messages = [_message(column, number, message) for number, message in enumerate(value, start=1)]
    sharegpt = any(message.get("from") is not None for message in value)
    first = int(bool(messages) and messages[0].role == "system")
    begins = [message.role for message in messages[first : first + 1]] == ["assistant"]
    if notes is not None and sharegpt and begins:  # many of ShareGPT's do
        what = "conversations begin with the assistant's turn, which is left out"
        notes[what] = notes.get(what, 0) + 1
        del messages[first]
    return messages


def unspelt(cell: str) -> Any:
    """Returns the messages, or the one message of an assistant, whose JSON text a cell of a CSV file is; any other cell as it is."""
    if cell.lstrip()[:1] not in ("[", "{") or not ('"role"' in cell or '"from"' in cell):
        return cell
    try:
        value = from_json(cell)
    except (ValueError, RecursionError):
        return cell
    if isinstance(value, list):
        return value if value and all(map(_speaker, value)) else cell
    return value if _speaker(value) == "assistant" else cell


def _speaker(message: Any) -> str:
    """Who speaks in a message, whatever is said; nobody in what is none."""
    if isinstance(message, Mapping) and "content" in message:
        return message["role"] if message.get("role") in ROLES else ""
    if isinstance(message, Mapping) and "value" in message and isinstance(message.get("from"), str):
        return SHAREGPT.get(message["from"].lower(), "")
    return ""


def _message(column: str, number: int, message: Mapping[str, Any]) -> Spoken:
    where = f"message {number} in the column {column!r}"
    unlearnt = ""
    for key in (*WEIGHTS, *UNREAD):
        value = message.get(key)
        if value in (None, "", [], {}) or (key in WEIGHTS and value == 1):
            continue
        if key not in WEIGHTS or value != 0:
            raise DataError(
                f"{where} must say nothing in {key!r}, which is not read, got {in_short(value)}; take it out"
            )
        unlearnt = key
    role_key, text_key = ("role", "content") if message.get("role") is not None else ("from", "value")
    role, content = message.get(role_key), message.get(text_key)
    if role is None:
        raise DataError(
            f"the role of {where} must be given in 'role', beside 'content', or in 'from', beside 'value', got {in_short(message)}; rename "
            "its keys"
        )
    if content is None and (other := next((key for key in TEXTS if message.get(key) not in (None, "", [])), None)):
        raise DataError(
            f"{where} must have its text in {text_key!r}, beside {role_key!r}, it has one in {other!r}; rename the key"
        )
    role = SHAREGPT.get(role.lower(), role) if isinstance(role, str) else role
    # What is wrong with a role is found where the conversation is read. A ground truth may be empty.
    return Spoken(role, "" if content is None else content_text(where, content), unlearnt)


def prompt_of(column: str, messages: list[Spoken]) -> Prompt:
    """What is to be answered: a text where there is nothing but one turn of the user. It raises DataError where it is none."""
    try:
        conversation = Conversation.of([{"role": message.role, "content": message.text} for message in messages])
    except DataError as error:
        raise DataError(f"the column {column!r}: {error}") from None
    return str(conversation) if conversation.is_prompt else conversation
