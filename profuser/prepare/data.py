"""Reads the examples of a split: prompts with their ground truth, one row per example."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from profuser.errors import DataError
from profuser.prepare.data_sets import read_table
from profuser.prepare.tables import Table
from profuser.recipe.schema import DataConfig, DataLocation, Split

Row = dict[str, Any]
"""One example: its `prompt`, its `response` (the ground truth, stripped), its `skill`, and all other columns of the data."""

CONVERSATIONS = ("messages", "conversations", "conversation")
"""What data sets call a column of conversations, which we do not read."""

TWO_TEXTS = "give the prompt and the response of a row as texts, in a column each"
"""What is understood today."""

PARTS_OF_PROMPTS = ("instruction", "input", "context", "system", "system_prompt", "history")
"""What data sets call a column with a part of the prompt, in small or capital letters, beside that of the rest of it."""


def load_examples(
    config: DataConfig, location: str | DataLocation, limit: int | None = None, split: Split = "train"
) -> list[Row]:
    """Reads the rows of a split.

    Args:
        config: the recipe's group `data`, which names the columns.
        location: the file, folder or data set, or a place in one.
        limit: how many rows are read, counted from the first; None reads all.
        split: the recipe's split that the rows are for.

    Raises:
        DataError: the data is missing, broken or empty; a column is missing or holds something other than text; a part of the
            prompts would be left out.
    """
    location = DataLocation(path=location) if isinstance(location, str) else location
    table = read_table(location, split)
    columns = list(dict.fromkeys(column for row in table for column in row))
    if not table:
        raise DataError(f"data {location} must have at least one row, got none; fix the file")

    # Check that the columns which the recipe names are there, and that no other holds a part of the prompts.
    wanted = {"prompt": config.prompt_column, "response": config.response_column}
    # A skill column that the recipe names must be there; the default one may be missing.
    if config.skill_column is not None and config.skill_column != DataConfig.skill_column:
        wanted["skill"] = config.skill_column
    for key, column in wanted.items():
        if column not in columns:
            raise DataError(
                f"data {location} must have the column {column!r} (data.{key}_column), found: {', '.join(columns)}; "
                f"{_advice(key, columns)}"
            )
    _check_parts_of_prompts(location, table, columns, config)

    # Name the three columns as everything else expects them, and keep the others beside them.
    has_skill = config.skill_column is not None and config.skill_column in columns
    rows = []
    for row in table[:limit]:
        row = dict.fromkeys(columns) | row
        rows.append(
            {
                **row,
                "prompt": _text(row, config.prompt_column, len(rows), location),
                "response": _text(row, config.response_column, len(rows), location).strip(),
                "skill": (_text(row, str(config.skill_column), len(rows), location) if has_skill else "") or "all",
            }
        )
    if any(row["skill"] == "mean" for row in rows):
        raise DataError(
            f'data {location}: a skill must not be called "mean", which stands for the mean over skills; rename it, or set '
            "data.skill_column: null"
        )
    return rows


def shared_prompts(rows: Sequence[Row], training: Sequence[Row]) -> int:
    """Counts the rows whose prompt is a training prompt as well. Differences in whitespace alone do not count."""
    known = {" ".join(row["prompt"].split()) for row in training}
    return sum(" ".join(row["prompt"].split()) in known for row in rows)


def data_hash(rows: Sequence[Row]) -> str:
    """Returns a short hash of all rows. It covers every column, because judges may read all of them."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _advice(key: str, columns: Sequence[str]) -> str:
    """Says what to do about a column that is missing. `key` says what it holds: the prompt, the response or the skill."""
    if conversations := next((column for column in CONVERSATIONS if column in columns), None):
        return f"conversations (here in {conversations!r}) are not read yet: {TWO_TEXTS}"
    if key != "skill" and {"instruction", "output"} <= set(columns):
        join = ", once every input is joined with its instruction and dropped" if "input" in columns else ""
        return f"set data.prompt_column: instruction and data.response_column: output{join}"
    return f"set data.{key}_column to the right one" + (", or to null" if key == "skill" else ", or add it to the data")


def _check_parts_of_prompts(location: DataLocation, table: Table, columns: Sequence[str], config: DataConfig) -> None:
    """Raises DataError where a column that belongs to the prompts holds text and no key of the recipe names it."""
    unused = set(columns) - {config.prompt_column, config.response_column, config.skill_column}
    for column in columns:
        if column not in unused or column.lower() not in PARTS_OF_PROMPTS:
            continue
        number = next((n for n, row in enumerate(table) if _is_filled(row.get(column))), None)
        if number is not None:
            raise DataError(
                f"data {location}: the column {column!r} must be a part of the prompts, row {number} (from 0) has one that would be left "
                f"out; join it with {config.prompt_column!r} in one column and drop it, or rename it if it is no part of them"
            )


def _is_filled(value: object) -> bool:
    """Whether a cell holds anything but whitespace."""
    return bool(value.strip() if isinstance(value, str) else value)


def _text(row: Row, column: str, number: int, location: DataLocation) -> str:
    """Returns a cell as the text that stands in the file; null becomes an empty text. `number` is the row's, for the message."""
    value = row[column]
    if isinstance(value, (list, dict, bytes)):
        is_conversation = isinstance(value, list) and value and isinstance(value[0], dict)
        fix = f"conversations are not read yet: {TWO_TEXTS}" if is_conversation else "take the text out of it"
        raise DataError(
            f"data {location}: the column {column!r} must hold text, row {number} (from 0) holds a {type(value).__name__}; {fix}"
        )
    if isinstance(value, bool):
        return json.dumps(value)
    return "" if value is None else str(value)
