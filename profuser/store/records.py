"""What has been made of a store in which the work is not done: for every shard a record, until the manifest lists it.

Several processes make a store together, and none may rewrite the manifest under another's hands. Therefore who has written a shard
writes its record, a sealed file of its own in the folder `records`, and one process enters all records in the manifest: before
anyone works, and when all shards are there. Who reads both reads the records first: one that has gone meanwhile is in the manifest.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from profuser.errors import DataError
from profuser.store.layout import kind_of
from profuser.store.manifest import SHARD
from profuser.store.sealed import unsealed, write_sealed
from profuser.typed import read_json

FOLDER = "records"

Entry = dict[str, Any]
"""What the manifest says about a shard."""


def write_record(directory: Path, shard: str, entry: Entry) -> None:
    """Records a shard whose file has been written."""
    write_sealed(_path(directory, shard), {"shard": shard, "entry": entry})


def read_record(directory: Path, shard: str) -> Entry | None:
    """Returns what is recorded of a shard; None where there is no record."""
    return _read(_path(directory, shard)).get(shard)


def read_records(directory: Path) -> dict[str, Entry]:
    """Returns what is recorded of all shards, by their names."""
    entries: dict[str, Entry] = {}
    for path in sorted((directory / FOLDER).glob("*.json")):
        entries |= _read(path)
    return entries


def remove_records(directory: Path) -> None:
    """Removes all records, which the manifest must hold by now."""
    shutil.rmtree(directory / FOLDER, ignore_errors=True)


def _read(path: Path) -> dict[str, Entry]:
    """Returns the shard of a record and its entry. A file that is not what was written, or is not there, records nothing."""
    with contextlib.suppress(DataError, ValueError):
        record = unsealed(read_json(path), {"shard": str, "entry": SHARD})
        kind_of(record["shard"])
        return {record["shard"]: record["entry"]}
    return {}


def _path(directory: Path, shard: str) -> Path:
    return directory / FOLDER / f"{shard.replace('/', '-')}.json"
