"""Instructions with ground truth, as rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from profuser.config import DataConfig, is_path, resolve
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
    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    datasets.disable_progress_bars()
    try:
        if path.is_file():
            if path.suffix not in kinds:
                raise DataError(f"data must be {', '.join(kinds)}, got {location}; convert it")
            table = datasets.load_dataset(kinds[path.suffix], data_files=str(path), split="train")
        else:
            table = datasets.load_dataset(str(path) if path.is_dir() else location, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"data {location} cannot be read ({str(error).splitlines()[0]}); fix the file") from None
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
                "prompt": str(row[config.prompt_column] or ""),
                "response": str(row[config.response_column] or "").strip(),
                "skill": str(row[config.skill_column]) if has_skill else "all",
            }
        )
    if not rows:
        raise DataError(f"data {location} must have at least one row, got none; fix the file")
    return rows


def data_hash(rows: Sequence[dict]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for key in ("prompt", "response", "skill"):
            digest.update(row[key].encode() + b"\0")
    return digest.hexdigest()[:16]
