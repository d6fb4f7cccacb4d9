"""Reads a data file or data set: prompts with their ground truth, one row per example."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from profuser.errors import DataError
from profuser.recipe.places import is_path, resolve
from profuser.recipe.schema import DataConfig

Row = dict[str, Any]
"""One example: its `prompt`, its `response` (the ground truth, stripped), its `skill`, and all other columns of the data."""


def load_examples(config: DataConfig, location: str, limit: int | None = None) -> list[Row]:
    """Reads the rows of a data file or data set.

    Args:
        config: the recipe's group `data`, which names the columns. location: the file or data set.
        limit: how many rows are read, counted from the first; None reads all.

    Raises:
        DataError: the data is missing, broken or empty, or a column is missing or holds something other than text.
    """
    import datasets

    # Read the table. A file is read by our own readers, a folder or a data set on the Hub by `datasets`.
    path = Path(resolve(location))
    if not path.exists() and is_path(location):
        raise DataError(f"data must be an existing file or a Hub data set, got {location} (no such file); fix the path")
    if not location or path == Path():
        raise DataError(f"data must be a file or a Hub data set, got {location!r}; name one")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error below says in one line what is wrong
    table: list[dict[str, Any]]
    try:
        if not path.is_file():
            data_set: Any = datasets.load_dataset(str(path) if path.is_dir() else location, split="train")
            table = list(data_set)
        elif path.suffix.lower() not in DATA_FILES:
            raise DataError(f"data must be {', '.join(DATA_FILES)}, got {location}; convert it")
        else:
            table = DATA_FILES[path.suffix.lower()](path)
    except DataError:
        raise
    except Exception as error:  # pyarrow, csv, json and datasets each raise their own kinds for a broken file
        cause = error.__cause__ or error
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise DataError(f"data {location} cannot be read ({reason}); fix the file or its path") from None

    # Check that the columns which the recipe names are there.
    columns = list(dict.fromkeys(column for row in table for column in row))
    if not table:
        raise DataError(f"data {location} must have at least one row, got none; fix the file")
    wanted = {"prompt": config.prompt_column, "response": config.response_column}
    # A skill column that the recipe names must be there; the default one may be missing.
    if config.skill_column is not None and config.skill_column != DataConfig.skill_column:
        wanted["skill"] = config.skill_column
    for key, column in wanted.items():
        if column not in columns:
            raise DataError(
                f"data {location} must have the column {column!r} (data.{key}_column), found: {', '.join(columns)}; "
                "name the right one"
            )

    # Name the three columns as everything else expects them, and keep the others beside them.
    has_skill = config.skill_column is not None and config.skill_column in columns
    rows = []
    for row in table[:limit]:
        row = dict.fromkeys(columns) | row
        rows.append(
            {
                **row,
                "prompt": _text(row[config.prompt_column], config.prompt_column, len(rows), location),
                "response": _text(row[config.response_column], config.response_column, len(rows), location).strip(),
                "skill": str(row[config.skill_column]) if has_skill and row[config.skill_column] is not None else "all",
            }
        )
    if any(row["skill"] == "mean" for row in rows):
        raise DataError(
            f'data {location}: a skill must not be called "mean", which stands for the mean over skills; rename it'
        )
    return rows


# These readers leave every value as it stands in the file. A table with one type per column, as pandas or pyarrow would make
# it, would turn "007" into 7.0 and dates into timestamps.


def read_jsonl(path: Path) -> list[dict]:
    """Reads a file with one JSON object per line. Empty lines are skipped."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                rows.append(_object(json.loads(line)))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    return rows


def read_json_list(path: Path) -> list[dict]:
    """Reads a JSON file that holds a list of objects, or one object per line."""
    text = path.read_text(encoding="utf-8-sig")
    return [_object(row) for row in json.loads(text)] if text.lstrip().startswith("[") else read_jsonl(path)


def read_csv(path: Path) -> list[dict]:
    """Reads a CSV file whose first row is the header. Every value stays a text."""
    csv.field_size_limit(2**31 - 1)  # a response may be longer than the default limit of 128 KiB
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        if twice := [name for name in header if header.count(name) > 1]:
            raise ValueError(f"the column {twice[0]!r} stands in the header twice")
        rows = [row for row in reader if row]
    if wrong := next((n for n, row in enumerate(rows, start=2) if len(row) != len(header)), None):
        raise ValueError(f"row {wrong} has {len(rows[wrong - 2])} cells, the header {len(header)}")
    return [dict(zip(header, row)) for row in rows]


def read_parquet(path: Path) -> list[dict]:
    """Reads a Parquet file, whose columns have the types that the file gives them."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def _object(value: object) -> dict:
    """Returns a row that was read from JSON, after checking that it is an object."""
    if not isinstance(value, dict):
        raise ValueError(f"a row must be an object, got a {type(value).__name__}")
    return value


DATA_FILES = {".jsonl": read_jsonl, ".json": read_json_list, ".csv": read_csv, ".parquet": read_parquet}
"""The reader of a data file by the file's suffix, which may also be in capitals."""


def _text(value: object, column: str, row: int, location: str) -> str:
    """Returns a cell as text; null becomes an empty text."""
    if isinstance(value, (list, dict, bytes)):
        raise DataError(
            f"data {location}: the column {column!r} must hold text, row {row} holds a {type(value).__name__}; take the text "
            "out of it"
        )
    return "" if value is None else str(value)


def data_hash(rows: Sequence[Row]) -> str:
    """Returns a short hash of all rows. It covers every column, because judges may read all of them."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
