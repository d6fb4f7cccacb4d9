"""Reads what a user has already: the responses of a source, and the scores of a judge, which are then not asked for.

The files are tables as the data are, in any of their kinds. A row names its prompt as the data do: by `prompt`, or by the `messages`
before the response. Whitespace in a prompt does not count. In a CSV file everything is a text, and an empty cell is null. What a file
says lies on the disk again, under a digest of prompt and response, so that memory hardly grows with its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from profuser.disk_table import DiskTable, key_of
from profuser.errors import DataError, in_short
from profuser.prepare.columns import is_empty, is_missing, text_of
from profuser.prepare.data import Row, plain
from profuser.prepare.messages import messages_of, prompt_of
from profuser.prepare.responses import Response
from profuser.prepare.tables import read_file
from profuser.recipe.data import Split
from profuser.recipe.places import files_of
from profuser.store.files import sha256
from profuser.store.sealed import digest_of_file
from profuser.text.fit import Verdict
from profuser.text.said import Said

LARGEST_SCORE = float(np.finfo(np.float32).max)
"""The largest finite score: all are kept in fp32, in which a larger one would be infinite, and equal to others that are."""

LEFT_OUT = {verdict.label: verdict for verdict in Verdict if verdict not in (Verdict.OK, Verdict.NOT_WINNER)}
"""What an exported store says of the responses that cannot be used."""


class GivenResponses:
    """The responses of one source, from a file with `prompt` or `messages`, `response`, and `finished` (true where it is missing).

    A row may say in `left_out`, in the words of an exported store, why its response cannot be used.

    Args:
        source: the source's name, for messages. path: the file.
        answer: what makes an answer of a response that can be used, by taking the reasoning out of it; None leaves it as it is.
    Raises:
        DataError: the file is missing or broken, or a row lacks a part.
    """

    def __init__(self, source: str, path: str, answer: Callable[[str], Said] | None = None):
        key = f"sources: {source}: responses"
        self.place = f"{key} {path}"
        self._of_prompt: DiskTable[Response] = DiskTable()
        for where, row in file_rows(key, path):
            response, finished = row.get("response"), _from_text(row.get("finished"))
            if not isinstance(response, str):
                raise DataError(f"{where}: `response` must be a text, got {in_short(response)}; fix the row")
            if finished is None:
                finished = True
            if not isinstance(finished, bool):
                raise DataError(f"{where}: `finished` must be true or false, got {in_short(finished)}; fix the row")
            text, verdict = response.strip(), _verdict(where, row)
            if answer is not None and verdict == Verdict.OK:
                text, verdict = answer(text)
            self._of_prompt.add(key_of(prompt_of_row(where, row)), Response(text, finished, verdict))

    def check(self, split: Split, rows: Sequence[Row], count: int, asked: np.ndarray | None = None) -> bool:
        """Whether the file has the responses to a split's prompts. It is false where it has none of them.

        Args:
            count: how many responses each prompt must have.
            asked: (E,) bool, for each row, whether there must be any; None means all.
        Raises:
            DataError: it has some, or another number.
        """
        asked = np.ones(len(rows), bool) if asked is None else asked
        found = [len(self._answers(row, count)) if needed else count for row, needed in zip(rows, asked, strict=True)]
        if not any(found) and split == "heldout":
            return False
        wrong = next((n for n, of_prompt in enumerate(found) if of_prompt != count), None)
        if wrong is not None:
            raise DataError(
                f"{self.place} must have {count} response{'s' * (count != 1)} to each {split} prompt, it has {found[wrong]} to example "
                f"{wrong} (from 0), {in_short(str(rows[wrong]['prompt']))}; add or take out rows, or set "
                "generation.responses_per_source"
            )
        return True

    def of(self, rows: Sequence[Row], count: int) -> list[list[Response]]:
        """Returns the responses to the prompts of some rows, which `check` has found."""
        return [self._answers(row, count) for row in rows]

    def _answers(self, row: Row, count: int) -> list[Response]:
        """The responses to a row's prompt. Where each prompt has one, equal ones are one: a file may have as many rows as the data."""
        answers = self._of_prompt[key_of(plain(row["prompt"]))]
        return list(dict.fromkeys(answers)) if count == 1 else answers


def _verdict(where: str, row: dict[str, Any]) -> Verdict:
    """What a row says of whether its response can be used. It raises DataError for other words than ours."""
    said = row.get("left_out")
    if is_empty(said):
        return Verdict.OK
    if not isinstance(said, str) or said not in LEFT_OUT:
        raise DataError(
            f"{where}: `left_out` must be empty, or one of {', '.join(map(repr, LEFT_OUT))}, got {in_short(said)}; take it out, or the row"
        )
    return LEFT_OUT[said]


class GivenScores:
    """The scores of one judge, from a file with `prompt` or `messages`, `response` and `score`; null or NaN abstains.

    Args:
        judge: the judge's name, for messages. path: the file.
    Raises:
        DataError: the file is missing or broken, a row lacks a part, or two rows score a response differently.
    """

    def __init__(self, judge: str, path: str):
        key = f"judges: {judge}: scores"
        self.place = f"{key} {path}"
        self._of: dict[bytes, float] = {}  # a number is not worth a place on the disk
        for where, row in file_rows(key, path):
            response, score = row.get("response"), _from_text(row.get("score"))
            if not isinstance(response, str):
                raise DataError(f"{where}: `response` must be a text, got {in_short(response)}; fix the row")
            try:
                if isinstance(score, bool) or "score" not in row:
                    raise TypeError
                value = float("nan") if score is None else float(score)
            except (TypeError, ValueError, OverflowError):
                raise DataError(
                    f"{where}: `score` must be a number or null, got {in_short(score)}; fix the row"
                ) from None
            if LARGEST_SCORE < abs(value) < math.inf:
                raise DataError(
                    f"{where}: `score` must be {LARGEST_SCORE:.1e} at most, got {in_short(score)}; scale the scores"
                )
            known = self._of.setdefault(key_of(prompt_of_row(where, row), response.strip()), value)
            if known != value and not (known != known and value != value):
                raise DataError(
                    f"{where}: a response must have one score, got {value:g} after {known:g}; take one of them out"
                )

    def score(self, example: Row, response: str) -> float:
        """Returns the score of a response to an example's prompt.

        Raises:
            DataError: there is none.
        """
        key = key_of(plain(example["prompt"]), response)
        if key not in self._of:
            raise DataError(
                f"{self.place} must have a score for every finished response, it has none for {in_short(response)} to "
                f"{in_short(str(example['prompt']))}; add the row"
            )
        return self._of[key]


def given_files(what: str, path: str) -> list[str]:
    """Returns the files that a recipe names, by a path or a pattern. `what` is the recipe's key, for messages.

    Raises:
        DataError: there are none, or one is a folder.
    """
    files = files_of(path)
    if not files:
        raise DataError(
            f"{what} must be an existing file or a pattern of files, got {path} (no such file); fix the path"
        )
    if folder := next((file for file in files if not Path(file).is_file()), None):
        raise DataError(
            f"{what} must be a file or a pattern of files, got {folder}, which is none; name the files in it"
        )
    return files


def file_digest(what: str, path: str) -> str:
    """Returns a short hash of a file that a user has given, or of all that fit a pattern. It raises what `given_files` raises, and
    DataError where a file cannot be read."""
    try:
        digests = [digest_of_file(Path(file))["sha256"] for file in given_files(what, path)]
    except OSError as error:
        raise DataError(f"{what} {path} cannot be read ({error.strerror}); fix the file or its path") from None
    return (digests[0] if len(digests) == 1 else sha256("".join(digests).encode()))[:16]


def file_rows(what: str, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of a file, or of all files of a pattern, each with what messages call it. They are read as they are asked for.

    It raises what `given_files` and `read_file` raise.
    """
    for file in given_files(what, path):
        yield from ((f"{file}, row {n} (from 0)", row) for n, row in enumerate(read_file(file, file, what=what)))


def _from_text(cell: Any) -> Any:
    """What a cell says: nothing if it is missing, or an empty one of a CSV file, true or false; anything else is left as it is."""
    if not isinstance(cell, str):
        return None if is_missing(cell) else cell
    return {"": None, "true": True, "false": False}.get(cell.strip().lower(), cell)


def prompt_of_row(where: str, row: dict[str, Any]) -> str:
    """The row's prompt, in the form in which prompts are compared."""
    column = "prompt" if is_empty(row.get("messages")) else "messages"
    cell = row.get(column)
    if is_missing(cell):
        raise DataError(f"{where} must have a text as `prompt`, or `messages`, got {in_short(row)}; fix the row")
    try:
        is_text = column == "prompt" and not isinstance(cell, list)
        return plain(text_of(column, cell) if is_text else prompt_of(column, messages_of(column, cell, {})))
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
