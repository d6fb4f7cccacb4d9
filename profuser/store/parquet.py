"""Writes Parquet files of more rows than memory holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profuser.store.files import move_into_place, temporary_beside, writing

if TYPE_CHECKING:
    import pyarrow as pa

AT_A_TIME = 1024
"""How many rows of a file are held in memory."""


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema, at_a_time: int = AT_A_TIME) -> int:
    """Writes rows to a file, which gets its name when all of them are in it. Where there are no rows, there is no file.

    Returns:
        How many rows there are.
    Raises:
        DiskFull: there is no room.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, unwritten, count = temporary_beside(path), iter(rows), 0
    try:
        with pq.ParquetWriter(temporary, schema) as writer:
            while some := list(islice(unwritten, at_a_time)):
                table = pa.Table.from_pylist(some, schema)
                with writing(path, table.nbytes):  # the rows come from elsewhere, where a disk can be full as well
                    writer.write_table(table)
                count += len(some)
        if count:
            move_into_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count
