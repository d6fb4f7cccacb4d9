"""Finds out how a data set writes its examples down, and reads a row: what is to be answered, and the ground truth.

Unless the recipe names the columns, they are found by their names. A prompt may have parts in several columns, and a row may hold
a conversation (`messages.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from profuser.errors import DataError, in_short
from profuser.prepare.messages import Spoken, messages_of, prompt_of
from profuser.recipe.data import DataConfig
from profuser.text.conversation import Prompt

MESSAGES = ("messages", "conversations", "conversation")
"""What data sets call a column of conversations."""

PAIRS = (
    ("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("instruction", "response"),
    ("question", "answer"), ("question", "response"), ("query", "response"),
)  # fmt: skip
"""What data sets call the columns of prompts and responses, the first pair first."""

INPUTS = ("input", "context")
"""What data sets with instructions call a column with what the instruction is about."""

SYSTEM = ("system", "system_prompt")
"""What data sets call a column with a system message."""

LEFT_OUT = (*INPUTS, *SYSTEM, "history")
"""Columns, in small or capital letters, whose text belongs to a prompt and would be missing in it."""

NO_TEXT = ("tools", "functions", "images", "image", "videos", "video", "audios", "audio", "chat_template_kwargs")
"""Columns, in small or capital letters, that say something of a prompt which is no text, and which is not read."""

EMPTY_JSON = ("[]", "{}", "null")
"""What stands for nothing where a list or mapping is written as text."""

PREFERENCES = {"chosen", "rejected"}
"""What data sets of preferences call a better response and a worse one, or whole conversations that end with them."""


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
    messages, *others = [column for column in MESSAGES if column in there] or [""]
    pair = next((pair for pair in PAIRS if set(pair) <= set(there)), None)
    if messages and (beside := others or pair):
        raise DataError(
            f"data {location} must say in one way what its examples are, it has {messages!r} beside {' and '.join(map(repr, beside))}; "
            f"set data.messages_column: {messages}, or take it out of the data"
        )
    if messages:
        return Columns(messages=messages, system=system, by_name=True)
    if pair is None and set(there) >= PREFERENCES:
        raise DataError(
            f"data {location} must have one ground truth for each prompt, it has preferences, found: {', '.join(there)}; to learn "
            "'chosen', set data.messages_column: chosen where it holds conversations, or data.response_column: chosen (and "
            "data.prompt_column) where it holds responses"
        )
    if pair is None:
        shown = ", ".join(f"{prompt} and {response}" for prompt, response in PAIRS)
        raise DataError(
            f"data {location} must have the columns {shown}, or {' or '.join(MESSAGES)}, found: {', '.join(there)}; set "
            "data.prompt_column and data.response_column to the right ones, or add them to the data"
        )
    prompt, response = pair
    inputs = tuple(c for c in INPUTS if c in there and c != response) if prompt == "instruction" else ()
    several = sum(set(columns) <= set(there) for columns in PAIRS) > 1
    by_name = several or pair != (usual.prompt_column, usual.response_column)
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
        messages = _with_system(columns, row, messages_of(columns.messages, row[columns.messages], notes))
        return _learnt(columns.messages, messages, config)

    # The response, as a text or as one message.
    _check_written_alike(columns, row)
    response = _response_of(columns.response, row[columns.response])

    # The prompt, as messages or as a text with its parts. A text alone may also be empty.
    prompt = row[columns.prompt]
    if _holds_messages(prompt):
        if inputs := next((column for column in columns.inputs if _says_something(row[column])), None):
            raise DataError(
                f"the column {inputs!r} must be empty where {columns.prompt!r} holds messages, it would be left out; join them"
            )
        messages = _with_system(columns, row, messages_of(columns.prompt, prompt, notes))
        return [(prompt_of(columns.prompt, messages), response)]
    first, *others = (text_of(column, row[column]) for column in (columns.prompt, *columns.inputs))
    text = "\n\n".join([first, *(text for text in others if text.strip())])
    messages = _with_system(columns, row, [Spoken("user", text)])
    return [(text if len(messages) == 1 else prompt_of(columns.prompt, messages), response)]


def _response_of(column: str, cell: object) -> str:
    """The response in a cell, a text or one message of the assistant."""
    if not (_holds_messages(cell) or isinstance(cell, Mapping)):
        return text_of(column, cell)
    found = messages_of(column, [cell] if isinstance(cell, Mapping) else cell)
    if [message.role for message in found] != ["assistant"]:
        raise DataError(
            f"the column {column!r} must be a text or one message of the assistant, got {in_short(cell)}; fix it"
        )
    _check_learnt(column, found[0])
    return found[0].text


def _learnt(column: str, messages: list[Spoken], config: DataConfig) -> list[tuple[Prompt, str]]:
    """The turns of the assistant that are learnt from a conversation, each with what stands before it."""
    if not messages or messages[-1].role != "assistant":
        role = messages[-1].role if messages else None
        raise DataError(
            f"the column {column!r} must end with the assistant's turn, the ground truth, got {in_short(role)}; add it, or take the row "
            "out"
        )
    turns = [n for n, message in enumerate(messages) if message.role == "assistant"]
    if len(turns) > 1 and turns[-2] == turns[-1] - 1:
        raise DataError(
            f"the column {column!r}: the user and the assistant must speak in turn, the last two messages are the assistant's; join them"
        )
    learnt = turns[-1:] if config.turns == "last" else [n for n in turns if not messages[n].unlearnt]
    _check_learnt(column, messages[(learnt or turns)[-1]])
    return [(prompt_of(column, messages[:n]), messages[n].text) for n in learnt]


def _check_learnt(column: str, message: Spoken) -> None:
    """Raises DataError where a message that would be learnt says that it is not."""
    if message.unlearnt:
        raise DataError(
            f"the column {column!r} must have a message that is learnt, the assistant's last has a {message.unlearnt!r} that says it is "
            f"not; take {message.unlearnt!r} out, or the row"
        )


def _check_written_alike(columns: Columns, row: Mapping[str, Any]) -> None:
    """Raises DataError where a row has nothing in a column and something in another that is called as such columns are.

    What graders compare with is called `answer`, too, so that an empty text may stand beside it.
    """
    prompts, responses = zip(*PAIRS)
    for column, names in ((columns.prompt, prompts), (columns.response, responses)):
        others = [name for name in (*names, *MESSAGES) if name not in columns.all and _says_something(row.get(name))]
        if not is_missing(row[column]):
            others = [name for name in others if name != "answer"]
        if not _says_something(row[column]) and others:
            raise DataError(
                f"the column {column!r} must be filled in every row, it has nothing and {others[0]!r} has something; write all rows alike"
            )


def check_none_left_out(columns: Columns, row: Mapping[str, Any]) -> None:
    """Raises DataError where a column that belongs to the prompts holds text and no key of the recipe names it."""
    for column, value in row.items():
        if column in columns.all or not _says_something(value):
            continue
        if column.lower() in NO_TEXT and value not in EMPTY_JSON:
            raise DataError(
                f"the column {column!r} must be empty, it would be left out, as nothing but text is read; take the row out, or rename the "
                "column if it is no part of the prompts"
            )
        if column.lower() in LEFT_OUT:
            fix = f"join it with {columns.messages or columns.prompt!r} in one column and drop it"
            if _is_found_without_names(columns, row, column):
                fix = "take data.prompt_column and data.response_column out of the recipe, so that it is read"
            raise DataError(
                f"the column {column!r} must be a part of the prompts, it would be left out; {fix}, or rename it if it is no part of them"
            )


def _says_something(value: object) -> bool:
    """Whether there is anything in a cell but whitespace, or in the lists and mappings in it. A 0 is a text as others are."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, (list, Mapping)):
        return any(map(_says_something, value.values() if isinstance(value, Mapping) else value))
    return not is_missing(value)


def is_missing(value: object) -> bool:
    """Whether a cell has nothing: null, or the NaN that pandas and Python's JSON write in place of it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_empty(value: object) -> bool:
    """Whether a cell has nothing, or the empty text that a CSV file has in place of it."""
    return is_missing(value) or value == ""


def _is_found_without_names(columns: Columns, row: Mapping[str, Any], column: str) -> bool:
    """Whether a column would be read if the recipe did not name any, and the others as well."""
    try:
        found = find_columns("", list(row), DataConfig(train=""))
    except DataError:
        return False
    return column in found.all and set(columns.all) <= set(found.all)


def text_of(column: str, value: object) -> str:
    """Returns a cell as the text that stands in the file; one that has nothing becomes an empty text."""
    if isinstance(value, (list, dict, bytes)):
        raise DataError(
            f"the column {column!r} must hold text, got a {type(value).__name__}; take the text out of it, or name it as "
            "data.messages_column if it holds conversations"
        )
    if isinstance(value, bool):
        return json.dumps(value)
    return "" if is_missing(value) else str(value)


def _check_there(location: str, there: Sequence[str], key: str, column: str) -> None:
    """Raises DataError unless a column that the recipe names is there."""
    if column not in there:
        raise DataError(
            f"data {location} must have the column {column!r} (data.{key}_column), found: {', '.join(there)}; set "
            f"data.{key}_column to the right one, or add it to the data"
        )


def _holds_messages(cell: object) -> bool:
    """Whether a cell holds messages in place of a text."""
    return isinstance(cell, list) and bool(cell) and isinstance(cell[0], Mapping)


def _with_system(columns: Columns, row: Mapping[str, Any], messages: list[Spoken]) -> list[Spoken]:
    """Puts the text of the system column in front, unless the messages begin with the same one."""
    text = text_of(columns.system, row[columns.system]) if columns.system else ""
    if not text.strip():
        return messages
    if messages and messages[0].role == "system":
        if messages[0].text.strip() == text.strip():
            return messages
        raise DataError(
            f"a row must have one system message, it has one in its messages and another in {columns.system!r}; take one out"
        )
    return [Spoken("system", text), *messages]
