"""Reads data files, a part at a time where their format allows it. Every value stays as it stands in the file, and all texts are Unicode.

A table with one type per column, as pandas or pyarrow would make it of a text file, would turn "007" into 7.0, "NA" into a
missing value and a date into a timestamp.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from profuser.errors import DataError, first_line
from profuser.prepare.hub_files import ON_HUB, FileOnHub
from profuser.prepare.messages import unspelt
from profuser.prepare.spelt_json import from_json
from profuser.recipe.places import COMPRESSIONS, file_suffix
from profuser.recipe.utf8 import decode, defect, text_of, texts_in

DEEPEST = 200
"""So many lists and mappings may lie in each other. Of many more neither Python's JSON nor its pickle is sure."""

BATCH = 1024
"""How many rows of a binary file are read at a time."""

CONTINUED = b"\xff\xff\xff\xff"
"""What stands before every message of an Arrow stream. With a length of 0 behind it, it is the mark at the end
(https://arrow.apache.org/docs/format/Columnar.html#ipc-streaming-format)."""

Table = Iterator[dict[str, Any]]
"""The rows of a file, which are read as they are asked for."""

Reader = Callable[[Any], Table]
"""Reads an open binary file."""


def read_jsonl(file: Any) -> Table:
    """Reads a file with one JSON object per line. Empty lines are skipped."""
    return _json_lines(text_of(file))


def read_json(file: Any) -> Table:
    """Reads a JSON file that holds a list of objects, or one object per line. It is read as a whole."""
    text = decode(file.read())
    if text.lstrip().startswith("["):
        return iter([_object(row) for row in from_json(text)])
    try:
        return iter([*_json_lines(io.StringIO(text, newline=None))])
    except ValueError:
        with contextlib.suppress(ValueError):
            keys = ", ".join(_object(from_json(text)))
            raise TypeError(
                f"it is one object with the keys {keys}, where a list of rows is needed, or one row per line"
            ) from None
        raise


def read_csv(file: Any, delimiter: str = ",") -> Table:
    """Reads a CSV file whose first row is the header. Every value stays a text, but for the JSON text of messages, which becomes these."""
    csv.field_size_limit(2**31 - 1)  # a response may be longer than the default limit of 128 KiB
    reader = csv.reader(text_of(file, newline=""), delimiter=delimiter, strict=True)
    header = next(reader, [])
    if len(header) == 1 and (other := next((c for c in ",;\t|" if c in header[0]), None)):
        raise ValueError(
            f"its cells must be separated by {delimiter!r}, the header has only {other!r}: write it with {delimiter!r}"
        )
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"the column {twice[0]!r} stands in the header twice")
    number = 1
    try:
        for row in filter(None, reader):
            number += 1
            if len(row) != len(header):
                raise ValueError(f"row {number} has {len(row)} cells, the header {len(header)}")
            yield dict(zip(header, map(unspelt, row)))
    except csv.Error as error:
        raise ValueError(f"row {number + 1}, counted from the header: {error}") from None


def read_parquet(file: Any) -> Table:
    """Reads a Parquet file, whose columns have the types that the file gives them."""
    import pyarrow.parquet

    # Buffering in advance would read all of the file for its first rows.
    return _arrow_rows(pyarrow.parquet.ParquetFile(_seekable(file), pre_buffer=False).iter_batches(BATCH))


def read_arrow(file: Any) -> Table:
    """Reads an Arrow file: a stream, such as `save_to_disk` of the library `datasets` writes, or one with an index at its end."""
    import pyarrow

    file = _seekable(file)
    has_index = file.read(6) == b"ARROW1"
    file.seek(0)
    if not has_index:
        return _arrow_rows(_whole_stream(file))
    reader = pyarrow.ipc.open_file(file)
    return _arrow_rows(map(reader.get_batch, range(reader.num_record_batches)))


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


def is_read_in_parts(name: str) -> bool:
    """Whether a file of this name is read a part at a time. A JSON list is not, nor a compressed file in which one has to go back."""
    suffix, is_compressed = file_suffix(name), Path(name).suffix.lower() in COMPRESSIONS
    return suffix != ".json" and not (is_compressed and suffix in (".parquet", ".arrow"))


def read_file(path: str | Path, name: str, delimiter: str | None = None, what: str = "data") -> Table:
    """Yields the rows of a data file.

    Args:
        path: where it is; hf://… is a file on the Hub, of which no more is read than the rows need that are asked for.
        name: what messages call it. delimiter: what separates the cells of a CSV file. what: what the file is.

    Raises:
        DataError: the file is of no kind that we read, is broken, holds a text that is not Unicode, or does not come from the Hub.
    """
    import pyarrow

    path = str(path)
    reader = READERS.get(file_suffix(path))
    if reader is None:
        raise DataError(f"{what} must be {', '.join(READERS)}, got {name}; convert it")
    if delimiter is not None:
        reader = partial(read_csv, delimiter=delimiter)
    try:
        with (
            FileOnHub(path, name) if path.startswith(ON_HUB) else contextlib.nullcontext(path) as place,
            pyarrow.input_stream(place, compression=COMPRESSIONS.get(Path(path).suffix.lower())) as file,
        ):
            for number, row in enumerate(reader(file)):
                _check_row(f"{what} {name}", number, row)
                yield row
    except DataError:
        raise
    except Exception as error:  # pyarrow, csv and json each raise their own kinds for a broken file
        fix = "name a copy that is mended" if path.startswith(ON_HUB) else "fix the file or its path"
        raise DataError(f"{what} {name} cannot be read ({first_line(error)}); {fix}") from None


def _check_row(name: str, number: int, row: dict[str, Any]) -> None:
    """Raises DataError where a row holds a text that is not Unicode, or is nested too deep. `name` is what messages call the file."""
    for column, value in row.items():
        if _is_deeper(value, DEEPEST):
            raise DataError(
                f"{name} must hold at most {DEEPEST} lists and mappings in each other, row {number} (from 0) has more in the column "
                f"{column!r}; take it out"
            )
        if wrong := next(filter(None, map(defect, texts_in((column, value)))), None):
            raise DataError(f"{name} must hold Unicode, row {number} (from 0) has in the column {column!r} {wrong}")


def _is_deeper(value: object, levels: int) -> bool:
    """Whether more lists and mappings than so many lie in each other."""
    if not isinstance(value, (list, tuple, dict)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(one, levels - 1) for one in inner)


def _json_lines(lines: Iterable[str]) -> Table:
    """Reads one JSON object per line."""
    for number, line in enumerate(lines, start=1):
        line = line.strip(" \t\r\n").lstrip("\ufeff")  # two files that were joined have a second mark
        if line.strip():
            try:
                yield _object(from_json(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error.msg}, at character {error.colno}") from None
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None


def _object(value: object) -> dict:
    """Returns a row that was read from JSON, after checking that it is an object."""
    if not isinstance(value, dict):
        raise ValueError(f"a row must be an object, got a {type(value).__name__}")
    return value


def _whole_stream(file: Any) -> Iterator[Any]:
    """Yields the tables of an Arrow stream. One whose writer was killed may end between two of them, and then lacks the mark at the end.

    Streams from before Arrow 0.15, whose messages do not begin with CONTINUED, are taken as they are.
    """
    import pyarrow

    is_marked = file.read(len(CONTINUED)) == CONTINUED
    file.seek(0)
    yield from pyarrow.ipc.open_stream(file)
    mark = CONTINUED + bytes(4)
    file.seek(max(file.tell() - len(mark), 0))
    if is_marked and file.read(len(mark)) != mark:
        raise ValueError("it was not written to its end, so that rows may be missing: write it again")


def _seekable(file: Any) -> Any:
    """Returns a file in which one can go back. A compressed one is therefore read as a whole."""
    return file if file.seekable() else io.BytesIO(file.read())


def _arrow_rows(batches: Iterable[Any]) -> Table:
    """Yields the rows of Arrow tables. Where a text in them is not UTF-8, the error names the row."""
    before = 0
    for batch in batches:
        names = batch.schema.names
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"the column {twice!r} stands in the file twice")
        for first in range(0, len(batch), BATCH):
            part = batch.slice(first, BATCH)
            try:
                rows = part.to_pylist()
            except UnicodeDecodeError:
                for number in range(len(part)):
                    try:
                        part.slice(number, 1).to_pylist()
                    except UnicodeDecodeError as error:
                        raise ValueError(f"row {before + first + number}: {error}") from None
                raise
            yield from rows
        before += len(batch)
