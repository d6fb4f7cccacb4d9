"""Reads tables: a file, or one split of a folder or of a data set on the Hub. Every value stays as it stands in the file.

A table with one type per column, as pandas or pyarrow would make it of a text file, turns "007" into 7.0, "NA" into a missing
value and a date into a timestamp. That is why the library `datasets` only finds the files of a split and fetches them, and our
own readers read them. A folder is then read exactly like the files in it.
"""

from __future__ import annotations

import ast
import csv
import difflib
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from profuser.errors import DataError, first_line
from profuser.recipe.places import file_suffix, is_path, resolve
from profuser.recipe.schema import DataLocation, Split
from profuser.recipe.utf8 import decode, defect, texts_in

Table = list[dict[str, Any]]

Reader = Callable[[Any], Table]
"""Reads an open binary file."""

# -- files -------------------------------------------------------------------------------------------------------------


class SpeltNumber(float):
    """A number from JSON that is no whole number. As a text it is what stands in the file: 2.50, 1e5 or NaN."""

    spelling: str

    def __new__(cls, spelling: str) -> SpeltNumber:
        number = super().__new__(cls, spelling)
        number.spelling = spelling
        return number

    def __str__(self) -> str:
        return self.spelling


def from_json(text: str) -> Any:
    """Parses JSON, so that every number can be written again as it was spelt. A key that stands twice is an error."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands in an object twice")
        return found

    return json.loads(text, parse_float=SpeltNumber, parse_constant=SpeltNumber, object_pairs_hook=once)


def read_jsonl(file: Any) -> Table:
    """Reads a file with one JSON object per line. Empty lines are skipped."""
    return _json_lines(decode(file.read()))


def read_json(file: Any) -> Table:
    """Reads a JSON file that holds a list of objects, or one object per line."""
    text = decode(file.read())
    return [_object(row) for row in from_json(text)] if text.lstrip().startswith("[") else _json_lines(text)


def read_csv(file: Any, delimiter: str = ",") -> Table:
    """Reads a CSV file whose first row is the header. Every value stays a text."""
    csv.field_size_limit(2**31 - 1)  # a response may be longer than the default limit of 128 KiB
    reader = csv.reader(io.StringIO(decode(file.read()), newline=""), delimiter=delimiter, strict=True)
    header = next(reader, [])
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"the column {twice[0]!r} stands in the header twice")
    rows = [row for row in reader if row]
    if wrong := next((n for n, row in enumerate(rows, start=2) if len(row) != len(header)), None):
        raise ValueError(f"row {wrong} has {len(rows[wrong - 2])} cells, the header {len(header)}")
    return [dict(zip(header, row)) for row in rows]


def read_parquet(file: Any) -> Table:
    """Reads a Parquet file, whose columns have the types that the file gives them."""
    import pyarrow.parquet

    return _arrow_rows(pyarrow.parquet.read_table(file))


def read_arrow(file: Any) -> Table:
    """Reads an Arrow file, such as `save_to_disk` of the library `datasets` writes."""
    import pyarrow

    return _arrow_rows(pyarrow.ipc.open_stream(file).read_all())


READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
"""The reader of a data file by the file's ending. A compressed file has another ending behind it."""


def read_file(path: Path, name: str, delimiter: str | None = None) -> Table:
    """Reads a data file. `name` is what messages call it, and `delimiter` what separates the cells of a CSV file.

    Raises:
        DataError: the file is of no kind that we read, is broken, or holds a text that is not Unicode.
    """
    import pyarrow

    reader = READERS.get(file_suffix(path.name))
    if reader is None:
        raise DataError(f"data must be {', '.join(READERS)}, got {name}; convert it")
    if delimiter is not None:
        reader = partial(read_csv, delimiter=delimiter)
    try:
        with pyarrow.input_stream(str(path), compression="detect") as file:
            rows = reader(file)
    except Exception as error:  # pyarrow, csv and json each raise their own kinds for a broken file
        raise DataError(f"data {name} cannot be read ({first_line(error)}); fix the file or its path") from None
    for number, row in enumerate(rows):
        for column, value in row.items():
            if wrong := next(filter(None, map(defect, texts_in((column, value)))), None):
                raise DataError(
                    f"data {name} must hold Unicode, row {number} (from 0) has in the column {column!r} {wrong}"
                )
    return rows


def _json_lines(text: str) -> Table:
    """Reads one JSON object per line."""
    rows = []
    for number, line in enumerate(re.split("\r\n|\r|\n", text), start=1):
        if line.strip():
            try:
                rows.append(_object(from_json(line)))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    return rows


def _object(value: object) -> dict:
    """Returns a row that was read from JSON, after checking that it is an object."""
    if not isinstance(value, dict):
        raise ValueError(f"a row must be an object, got a {type(value).__name__}")
    return value


def _arrow_rows(table: Any) -> Table:
    """Returns the rows of an Arrow table. Where a text in it is not UTF-8, the error names the row."""
    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        for number in range(len(table)):
            try:
                table.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise ValueError(f"row {number}: {error}") from None
        raise


# -- folders and data sets ---------------------------------------------------------------------------------------------

USUAL_NAMES: dict[Split, str] = {"train": "train", "validation": "validation", "heldout": "test"}
"""What data sets call our splits."""

NOT_ABOUT_READING = {
    "name", "version", "data_dir", "data_files", "description", "features", "delimiter", "chunksize", "batch_size",
}  # fmt: skip
"""Settings of a data set's files that change none of its values, with `features`: declared types change no value here."""


def read_table(location: DataLocation, split: Split) -> Table:
    """Reads all rows of a location that the recipe names for a split.

    A folder or data set may have several splits of its own. Where the location names none of them, a recipe's training split is
    the one that is called train; any other has to be named, so that no score is computed on training rows unnoticed.

    Raises:
        DataError: the location is missing or broken, or holds no data that we read; its configuration or split is unknown, or
            one has to be named.
    """
    path = Path(resolve(location.path))
    if not path.exists() and is_path(location.path):
        raise DataError(
            f"data must be an existing file or folder, or a Hub data set, got {location.path} (no such file); fix the path"
        )
    if not location.path or path == Path():
        raise DataError(f"data must be a file, a folder or a Hub data set, got {location.path!r}; name one")
    if not path.is_file():
        return [row for file in _files(location, split, path) for row in read_file(*file)]
    for key in ("config", "split"):
        if (value := getattr(location, key)) is not None:
            raise DataError(f"data.{split}: a file has no {key}, got {value} of {location.path}; take {key} out")
    return read_file(path, location.path)


def _files(location: DataLocation, split: Split, path: Path) -> Iterator[tuple[Path, str, str | None]]:
    """Yields the files of a split, which are then on this machine, each with its name and what separates its cells."""
    import datasets

    # Find out which files the splits have.
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our own errors say in one line what is wrong
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of every README without settings
    place = str(path.resolve()) if path.is_dir() else location.path
    try:
        builder = _builder(place, location.config)
        files: dict[str, list[str]] = {str(name): list(found) for name, found in builder.config.data_files.items()}
    except Exception as error:  # a Hub out of reach, a broken README and unknown names each raise their own kinds
        raise _explained(error, location, split, place) from None

    # Choose the split.
    name = location.split or next((name for name in files if len(files) == 1 or name == split), "")
    if name not in files:
        (nearest,) = difflib.get_close_matches(name or USUAL_NAMES[split], files, n=1, cutoff=0)
        raise DataError(
            f"data.{split} must name one of the splits of {location.path} ({', '.join(files)}), got {name or 'none'}; set "
            f"data.{split}: {_mapping(replace(location, split=nearest))}"
        )

    # A data set's README may say how its files are to be read. What separates the cells is all that we can obey.
    usual = type(builder.config)()
    options = {field.name: getattr(builder.config, field.name) for field in fields(usual)}
    options = {name: value for name, value in options.items() if value != getattr(usual, name)}
    delimiter = options.pop("sep", None)
    if unknown := sorted(set(options) - NOT_ABOUT_READING):
        raise DataError(
            f"data {location.path} must be readable as it is, its README sets {', '.join(unknown)}; download its files, "
            "convert them and name them"
        )

    # Fetch the files of all splits, so that they are found again without a network. Those of a folder are here already.
    fetched: Any = datasets.DownloadManager(record_checksums=False).download(files)
    for file, here in zip(files[name], fetched[name]):
        yield Path(here), f"{location.path}/{file.removeprefix(builder.base_path).lstrip('/')}", delimiter


def _builder(place: str, config: str | None) -> Any:
    """Returns what the library `datasets` knows of a folder or a data set on the Hub: above all, the files of every split.

    Without a network this is read from what was downloaded earlier.
    """
    import datasets
    from huggingface_hub import snapshot_download

    try:
        builder = datasets.load_dataset_builder(place, config)
        # Without a network the library may offer its own tables of an earlier run, whose values have changed their types.
        if builder.config.data_files:
            return builder
        raise ConnectionError(f"Couldn't reach {place!r} on the Hub")
    except Exception as error:
        if Path(place).is_dir() or type(error) is ValueError:  # the library's own ValueErrors are about names
            raise
        try:
            downloaded = snapshot_download(place, repo_type="dataset", local_files_only=True)
        except Exception:  # nothing was downloaded, so that the first error is the one to be told
            raise error from None
        return datasets.load_dataset_builder(downloaded, config)


def _explained(error: Exception, location: DataLocation, split: Split, place: str) -> DataError:
    """Returns the error of one line for a folder or data set that could not be opened."""
    # The library's message lists the configurations where one is unknown or missing.
    listed = re.search(r"available\b[^:]*: (\[.*\])", str(error), re.IGNORECASE)
    configs: list[str] = ast.literal_eval(listed[1]) if listed else []
    if configs == ["default"]:  # what the library calls the whole, where there are none
        inside = Path(place) / str(location.config)
        other = f", or set path: {location.path}/{location.config}" if inside.is_dir() else ""
        return DataError(
            f"data.{split}: {location.path} has no configurations, got {location.config}; take config out{other}"
        )
    if configs:
        (nearest,) = difflib.get_close_matches(location.config or configs[0], configs, n=1, cutoff=0)
        return DataError(
            f"data.{split} must name one of the configurations of {location.path} ({', '.join(configs)}), got "
            f"{location.config or 'none'}; set data.{split}: {_mapping(replace(location, config=nearest))}"
        )
    reason = "its README.md is not UTF-8" if isinstance(error, UnicodeDecodeError) else first_line(error)
    fix = "fix the folder, or name a file in it"
    if not Path(place).is_dir():
        fix = "fix the id, or run once where the Hub can be reached"
    return DataError(f"data {location.path} cannot be read ({reason}); {fix}")


def _mapping(location: DataLocation) -> str:
    """Spells a location as a recipe does."""
    return "{ " + ", ".join(f"{key}: {value}" for key, value in asdict(location).items() if value is not None) + " }"
