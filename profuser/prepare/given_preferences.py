"""Reads preferences, such as those of people, which take the place of a judge: which of two responses to a prompt is the better one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from profuser.disk_table import key_of
from profuser.errors import DataError, in_short
from profuser.prepare.columns import is_empty, is_missing, text_of
from profuser.prepare.data import Row, plain
from profuser.prepare.given import GivenScores, file_rows, prompt_of_row
from profuser.prepare.messages import messages_of, prompt_of


class GivenPreferences:
    """The preferences of one judge, from a file with `prompt` or `messages`, `chosen` and `rejected`, as trainers of preferences have them.

    Both are texts, or messages that end with the assistant's; messages may begin with the prompt, which then needs no column.

    Args:
        judge: the judge's name, for messages. path: the file.
    Raises:
        DataError: the file is missing or broken, or a row lacks a part or prefers a response to itself.
    """

    def __init__(self, judge: str, path: str):
        self._times: dict[bytes, tuple[int, int]] = {}  # how often a response was preferred, and how often compared
        self._prompts: set[bytes] = set()
        for where, row in file_rows(f"judges: {judge}: scores", path):
            try:
                endings = [_ending(column, row.get(column)) for column in ("chosen", "rejected")]
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            (_, chosen), (_, rejected) = endings
            if chosen == rejected:
                raise DataError(
                    f"{where}: `chosen` and `rejected` must differ, got {in_short(chosen)} twice; take the row out"
                )
            prompts = {prompt for prompt, _ in endings if prompt is not None}
            if not prompts or not all(is_empty(row.get(column)) for column in ("prompt", "messages")):
                prompts.add(prompt_of_row(where, row))
            if len(prompts) > 1:
                shown = " and ".join(map(in_short, sorted(prompts)))
                raise DataError(
                    f"{where}: the prompt must be the same wherever the row has it, got {shown}; fix the row"
                )
            (prompt,) = prompts
            self._prompts.add(key_of(prompt))
            for response, won in ((chosen, 1), (rejected, 0)):
                key = key_of(prompt, response)
                before = self._times.get(key, (0, 0))
                self._times[key] = before[0] + won, before[1] + 1

    def score(self, example: Row, response: str) -> float:
        """Returns in which share of its comparisons a response to an example's prompt was preferred. One without any has a half, between
        those that were preferred and those that were not; where no responses to the prompt were compared, all have NaN."""
        prompt = plain(example["prompt"])
        if not self.compares(example, response):
            return 0.5 if key_of(prompt) in self._prompts else math.nan
        won, compared = self._times[key_of(prompt, response)]
        return won / compared

    def compares(self, example: Row, response: str) -> bool:
        """Whether a response to an example's prompt was compared with another."""
        return key_of(plain(example["prompt"]), response) in self._times


def _ending(column: str, cell: Any) -> tuple[str | None, str]:
    """The prompt before a response, in the form in which prompts are compared, as far as the cell has it, and the response."""
    if is_missing(cell):
        raise DataError(f"`{column}` must be a text, or messages that end with the assistant's, it has nothing; fix it")
    if not isinstance(cell, (list, Mapping)):
        return None, text_of(column, cell).strip()
    messages = messages_of(column, [cell] if isinstance(cell, Mapping) else cell)
    if not messages or messages[-1].role != "assistant":
        raise DataError(f"`{column}` must end with the assistant's message, got {in_short(cell)}; fix it")
    before = plain(prompt_of(column, messages[:-1])) if len(messages) > 1 else None
    return before, messages[-1].text.strip()


def given_scores(judge: str, path: str) -> GivenScores | GivenPreferences:
    """Reads a judge's scores, or preferences where the file has those. It raises what reading them raises."""
    _, first = next(file_rows(f"judges: {judge}: scores", path), ("", {}))
    prefers = {"chosen", "rejected"} <= set(first) and "score" not in first
    return (GivenPreferences if prefers else GivenScores)(judge, path)
