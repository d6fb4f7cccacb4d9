"""Finds out how a data set writes its examples down, and reads a row: what is to be answered, and the ground truth.

Unless the recipe names the columns, they are found by their names. A prompt may have parts in several columns, and a row may hold
a conversation: as OpenAI's API takes it, with `role` and `content`, or as ShareGPT writes it, with `from` and `value`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from profuser.errors import DataError, in_short
from profuser.prepare.tables import from_json
from profuser.recipe.schema import DataConfig
from profuser.text.conversation import Conversation, Prompt, content_text
from profuser.text.template import Message

MESSAGES = ("messages", "conversations", "conversation")
"""What data sets call a column of conversations."""

PAIRS = (
    ("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("instruction", "response"),
    ("question", "answer"),
)  # fmt: skip
"""What data sets call the columns of prompts and responses, the first pair first."""

INPUTS = ("input", "context")
"""What data sets with instructions call a column with what the instruction is about."""

SYSTEM = ("system", "system_prompt")
"""What data sets call a column with a system message."""

LEFT_OUT = (*INPUTS, *SYSTEM, "history")
"""Columns, in small or capital letters, whose text belongs to a prompt and would be missing in it."""

SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "model": "assistant",
    "bard": "assistant", "bing": "assistant", "system": "system",
}  # fmt: skip
"""Who speaks, as ShareGPT calls it."""

WEIGHTS = {"weight": 1, "train": True, "loss": True}
"""Keys of a message that say whether it is learnt, with the value that says so. Another value would be lost."""

UNREAD = (
    "tool_calls",
    "tool_call_id",
    "function_call",
    "tools",
    "images",
    "audio",
    "refusal",
    "reasoning_content",
    "thinking",
)
"""Keys of a message that say something which is not read."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a data set.

    prompt, response: the columns of two texts, or of messages and a message. messages: the column of whole conversations instead.
    inputs: columns whose text is put behind the prompt. system: the column of a system message.
    by_name: whether they were found by their names.
    """

    prompt: str = ""
    response: str = ""
    messages: str = ""
    inputs: tuple[str, ...] = ()
    system: str = ""
    by_name: bool = field(default=False, compare=False)

    @property
    def all(self) -> tuple[str, ...]:
        """All columns that hold a part of an example."""
        columns = (self.prompt, *self.inputs, self.response, self.messages, self.system)
        return tuple(column for column in columns if column)

    def __str__(self) -> str:
        system = f", system messages in {self.system!r}" if self.system else ""
        if self.messages:
            return f"conversations in {self.messages!r}{system}"
        prompt = " and ".join(map(repr, (self.prompt, *self.inputs)))
        return f"prompts in {prompt}, responses in {self.response!r}{system}"


def find_columns(location: str, there: Sequence[str], config: DataConfig) -> Columns:
    """Finds the columns of a data set.

    Args:
        location: what messages call the data set. there: its columns.
        config: the recipe's group `data`, which may name some of them.

    Raises:
        DataError: a column that the recipe names is not there; none are known by their names, or several kinds are.
    """
    usual = DataConfig(train="")
    named = (config.prompt_column, config.response_column) != (usual.prompt_column, usual.response_column)
    system = next((column for column in SYSTEM if column in there), "")
    if config.messages_column is not None:
        _check_there(location, there, "messages", config.messages_column)
        return Columns(messages=config.messages_column, system=system)
    if named:
        for key in ("prompt", "response"):
            _check_there(location, there, key, getattr(config, f"{key}_column"))
        return Columns(prompt=config.prompt_column, response=config.response_column)

    # The recipe names none of them.
    messages = next((column for column in MESSAGES if column in there), "")
    pair = next((pair for pair in PAIRS if set(pair) <= set(there)), None)
    if messages and pair:
        raise DataError(
            f"data {location} must say in one way what its examples are, it has {messages!r} beside {pair[0]!r} and {pair[1]!r}; set "
            f"data.messages_column: {messages}, or take it out of the data"
        )
    if messages:
        return Columns(messages=messages, system=system, by_name=True)
    if pair is None:
        shown = ", ".join(f"{prompt} and {response}" for prompt, response in PAIRS)
        raise DataError(
            f"data {location} must have the columns {shown}, or {' or '.join(MESSAGES)}, found: {', '.join(there)}; set "
            "data.prompt_column and data.response_column to the right ones, or add them to the data"
        )
    prompt, response = pair
    inputs = tuple(c for c in INPUTS if c in there and c != response) if prompt == "instruction" else ()
    by_name = pair != (usual.prompt_column, usual.response_column)
    return Columns(prompt=prompt, response=response, inputs=inputs, system=system, by_name=by_name)


def examples_of(
    columns: Columns, row: Mapping[str, Any], config: DataConfig, notes: dict[str, int]
) -> list[tuple[Prompt, str]]:
    """Reads a row: each prompt or conversation with its ground truth, one for the last turn or for all turns of the assistant.

    Args:
        notes: counts what was done to rows. It is added to.
    Raises:
        DataError: the row does not hold what it should.
    """
    if columns.messages:
        messages = _messages(columns.messages, row[columns.messages], notes)
        if not messages or messages[-1]["role"] != "assistant":
            role = messages[-1]["role"] if messages else None
            raise DataError(
                f"the column {columns.messages!r} must end with the assistant's turn, the ground truth, got {in_short(role)}; add it, or "
                "take the row out"
            )
        messages = _with_system(columns, row, messages)
        turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if len(turns) > 1 and turns[-2] == turns[-1] - 1:
            raise DataError(
                f"the column {columns.messages!r}: the user and the assistant must speak in turn, the last two messages are the "
                "assistant's; join them"
            )
        return [
            (_prompt(columns.messages, messages[:n]), messages[n]["content"])
            for n in (turns if config.turns == "all" else turns[-1:])
        ]

    # The response, as a text or as one message.
    response = row[columns.response]
    if isinstance(response, list) and response and isinstance(response[0], dict):
        found = _messages(columns.response, response, notes)
        if [message["role"] for message in found] != ["assistant"]:
            raise DataError(
                f"the column {columns.response!r} must be a text or one message of the assistant, got {in_short(response)}; fix it"
            )
        response = found[0]["content"]
    else:
        response = text_of(columns.response, response)

    # The prompt, as messages or as a text with its parts. A text alone may also be empty.
    prompt = row[columns.prompt]
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        messages = _with_system(columns, row, _messages(columns.prompt, prompt, notes))
        return [(_prompt(columns.prompt, messages), response)]
    first, *others = (text_of(column, row[column]) for column in (columns.prompt, *columns.inputs))
    text = "\n\n".join([first, *(text for text in others if text.strip())])
    messages = _with_system(columns, row, [{"role": "user", "content": text}])
    return [(text if len(messages) == 1 else _prompt(columns.prompt, messages), response)]


def check_none_left_out(columns: Columns, row: Mapping[str, Any]) -> None:
    """Raises DataError where a column that belongs to the prompts holds text and no key of the recipe names it."""
    for column, value in row.items():
        if column in columns.all or column.lower() not in LEFT_OUT:
            continue
        if value.strip() if isinstance(value, str) else value:
            fix = f"join it with {columns.messages or columns.prompt!r} in one column and drop it"
            if (columns.prompt, columns.response) in PAIRS and column in (*INPUTS, *SYSTEM):
                fix = "take data.prompt_column and data.response_column out of the recipe, so that it is read"
            raise DataError(
                f"the column {column!r} must be a part of the prompts, it would be left out; {fix}, or rename it if it is no part of them"
            )


def text_of(column: str, value: object) -> str:
    """Returns a cell as the text that stands in the file; null becomes an empty text."""
    if isinstance(value, (list, dict, bytes)):
        raise DataError(
            f"the column {column!r} must hold text, got a {type(value).__name__}; take the text out of it, or name it as "
            "data.messages_column if it holds conversations"
        )
    if isinstance(value, bool):
        return json.dumps(value)
    return "" if value is None else str(value)


def _check_there(location: str, there: Sequence[str], key: str, column: str) -> None:
    """Raises DataError unless a column that the recipe names is there."""
    if column not in there:
        raise DataError(
            f"data {location} must have the column {column!r} (data.{key}_column), found: {', '.join(there)}; set "
            f"data.{key}_column to the right one, or add it to the data"
        )


def _messages(column: str, value: object, notes: dict[str, int]) -> list[Message]:
    """Reads messages, as a list or as the JSON text of one, which a CSV file has."""
    if isinstance(value, str):
        try:
            value = from_json(value)
        except (ValueError, RecursionError):
            value = {}
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise DataError(f"the column {column!r} must hold a list of messages, got {in_short(value)}; fix it")
    messages = [_message(column, number, message) for number, message in enumerate(value, start=1)]
    sharegpt = any("from" in message for message in value)
    if sharegpt and messages and messages[0]["role"] == "assistant":  # many of ShareGPT's do
        notes["conversations begin with the assistant's turn, which is left out"] += 1
        messages = messages[1:]
    return messages


def _message(column: str, number: int, message: Mapping[str, Any]) -> Message:
    where = f"message {number} in the column {column!r}"
    for key in (*WEIGHTS, *UNREAD):
        value = message.get(key)
        if value not in (None, "", [], {}) and value != WEIGHTS.get(key):
            raise DataError(
                f"{where} must say nothing in {key!r}, which is not read, got {in_short(value)}; take it out"
            )
    role, content = message.get("role"), message.get("content")
    if role is None and "from" in message:
        role, content = message["from"], message.get("value")
        role = SHAREGPT.get(role.lower(), role) if isinstance(role, str) else role
    # What is wrong with a role is found where the conversation is read. A ground truth may be empty.
    return {"role": role, "content": "" if content is None else content_text(where, content)}


def _with_system(columns: Columns, row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """Puts the text of the system column in front."""
    text = text_of(columns.system, row[columns.system]) if columns.system else ""
    if not text.strip():
        return messages
    if messages and messages[0]["role"] == "system":
        raise DataError(
            f"a row must have one system message, it has one in its messages and another in {columns.system!r}; take one out"
        )
    return [{"role": "system", "content": text}, *messages]


def _prompt(column: str, messages: list[Message]) -> Prompt:
    """What is to be answered: a text where there is nothing but one turn of the user."""
    try:
        conversation = Conversation.of(messages)
    except DataError as error:
        raise DataError(f"the column {column!r}: {error}") from None
    return str(conversation) if conversation.is_prompt else conversation
