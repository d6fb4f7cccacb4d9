"""The file of prompts that a command answers: one JSON object a line. It is read without torch, so that a mistake in it is said at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from profuser.errors import DataError, in_short
from profuser.recipe.utf8 import defect, read_utf8, texts_in
from profuser.text.conversation import Conversation, Prompt
from profuser.typed import parsed


def prompts_of(path: Path) -> list[Prompt]:
    """The prompts in a JSONL file, one row each: a text as `prompt`, or a conversation as `messages`.

    Raises:
        DataError: the file is missing or not UTF-8, or a row is not of that kind.
    """
    try:
        lines = read_utf8(path).split("\n")  # a text may hold other characters that end a line, such as U+2028
    except OSError:
        raise DataError(f"--input must be an existing JSONL file, got {path}; fix the path") from None
    except ValueError as error:
        raise DataError(f"{path} must be UTF-8, {error}") from None
    prompts = [_prompt(f"{path} line {n}", line) for n, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise DataError(f"--input must have a row for every prompt, {path} has none; fill it in")
    return prompts


def _prompt(where: str, line: str) -> Prompt:
    try:
        row = parsed(line)
    except ValueError as error:
        raise DataError(f"{where} must be a JSON object, got {in_short(line)} ({error}); fix the row") from None
    given = given_in(row)
    if any(map(defect, texts_in(given))):
        raise DataError(f"{where}: a prompt must be Unicode, got a lone surrogate; fix the row")
    prompt = given.get("prompt")
    if "messages" in given:
        try:
            conversation = Conversation.of(given["messages"])
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if prompt is None or (conversation.is_prompt and prompt == str(conversation)):
            return conversation
        raise DataError(f"{where} must have a `prompt` or `messages`, got both, which differ; take one out")
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where} must have a text as `prompt`, got {in_short(row)}; fix the row")
    return prompt


def given_in(row: Any) -> dict[str, Any]:
    """What a row of prompts or of answers has of its prompt."""
    row = row if isinstance(row, dict) else {}
    return {key: row[key] for key in ("prompt", "messages") if row.get(key) is not None}


def given_as(prompt: Prompt) -> dict[str, Any]:
    """What a row has of its prompt, by which it is known again: the text, or the messages as they stood in the input."""
    return {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt.given}
