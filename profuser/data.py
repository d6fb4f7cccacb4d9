"""Instructions with ground truth, as rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from profuser.config import DATA_FILES, DataConfig, is_path, resolve
from profuser.errors import DataError


def load_examples(config: DataConfig, location: str, limit: int | None = None) -> list[dict]:
    """Rows with `prompt`, `response` (stripped) and `skill`, and whatever other columns the data has.

    Raises:
        DataError: the file is missing or a column is, with the columns that were found.
    """
    import datasets

    path = Path(resolve(location))
    if not path.exists() and is_path(location):
        raise DataError(f"data must be an existing file or a Hub data set, got {location} (no such file); fix the path")
    datasets.disable_progress_bars()
    try:
        if path.is_file() and not path.stat().st_size:
            raise DataError(f"data {location} must have at least one row, got an empty file; fix the file")
        if path.is_file():
            if path.suffix not in DATA_FILES:
                raise DataError(f"data must be {', '.join(DATA_FILES)}, got {location}; convert it")
            # A CSV cell that says "NA" or "None" is a text.
            options = {"keep_default_na": False} if path.suffix == ".csv" else {}
            table = datasets.load_dataset(DATA_FILES[path.suffix], data_files=str(path), split="train", **options)
        else:
            table = datasets.load_dataset(str(path) if path.is_dir() else location, split="train")
    except DataError:
        raise
    except Exception as error:  # pyarrow, pandas, json and datasets each raise their own kinds for a broken file
        cause = error.__cause__ or error
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise DataError(f"data {location} cannot be read ({reason}); fix the file or its path") from None
    wanted = {"prompt": config.prompt_column, "response": config.response_column}
    for key, column in wanted.items():
        if column not in table.column_names:
            raise DataError(
                f"data {location} must have the column {column!r} (data.{key}_column), found: {', '.join(table.column_names)}; "
                "name the right one"
            )
    has_skill = config.skill_column is not None and config.skill_column in table.column_names
    rows = []
    for row in table.select(range(min(limit or len(table), len(table)))):
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
    if not rows:
        raise DataError(f"data {location} must have at least one row, got none; fix the file")
    return rows


def _text(value: object, column: str, row: int, location: str) -> str:
    """A cell as text; null is empty."""
    if isinstance(value, (list, dict)):
        raise DataError(
            f"data {location}: the column {column!r} must hold text, row {row} holds a {type(value).__name__}; take the text out of it"
        )
    return "" if value is None else str(value)


def data_hash(rows: Sequence[dict]) -> str:
    """Changes with any column of any row: judges may read them all."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
