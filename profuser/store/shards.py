"""The shards of a store: their files, and what is recorded of each.

Every file is written beside its place, synced and renamed, and only then recorded with its sha256: by a record of its own
(records.py), which the manifest takes over when it is next written. Both are sealed. A shard also records its origin, which is a digest of
what it was made from. So a damaged shard is never used, and one that was made from something else is known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as save_tensors

from profuser.errors import DataError
from profuser.store.files import header_length, mapped, remove_temporary, sha256, tensors_of, write_atomic
from profuser.store.layout import FOLDERS, Kind, kind_of
from profuser.store.manifest import read_manifest, write_manifest
from profuser.store.records import FOLDER as RECORDS
from profuser.store.records import read_record, read_records, remove_records, write_record
from profuser.typed import checked, parsed


@dataclass(slots=True)
class Total:
    """The shards of one folder and split, added up.

    examples: how many one source or judge has, so that an example is counted once. bytes: the size of all files.
    """

    folder: str
    split: str
    shards: int = 0
    examples: int = 0
    bytes: int = 0


class Shards:
    """The shards of one directory. A shard counts as present when the manifest lists it or there is a record of it."""

    def __init__(self, directory: Path, manifest: dict[str, Any] | None = None):
        self.directory = directory
        self._verified: set[str] = set()
        self._version: object = None
        self._manifest: dict[str, Any] = {"shards": {}} if manifest is None else manifest
        if manifest is None:
            self._read()

    def __len__(self) -> int:
        """The number of shards."""
        return len(self._manifest["shards"])

    def has(self, kind: Kind, number: int, origin: str | None = None) -> bool:
        """Whether this shard is present, be it that another process has made it meanwhile. Its file is not looked at.

        Args:
            origin: what it must have been made from; None takes any.
        """
        name = kind.shard(number)

        def is_present() -> bool:
            entry = self._manifest["shards"].get(name)
            return entry is not None and origin in (None, entry["origin"])

        if is_present():
            return True
        if (entry := read_record(self.directory, name)) is not None:
            self._manifest["shards"][name] = entry
        elif self._version != _version(self.directory):  # the manifest may have taken the record over
            self._read()
        return is_present()

    def numbers(self, kind: Kind) -> list[int]:
        """Returns the numbers of the present shards of a kind, in ascending order."""
        found = (kind_of(name) for name in self._manifest["shards"])
        return sorted(number for other, number in found if other == kind)

    def digest(self, kind: Kind) -> str:
        """Returns a short hash of all shards of a kind. It changes when any of them changes."""
        shards = self._manifest["shards"]
        return sha256("".join(shards[kind.shard(n)]["sha256"] for n in self.numbers(kind)).encode())[:16]

    @property
    def digests(self) -> dict[str, str]:
        """The sha256 of every shard, by its name."""
        return {name: entry["sha256"] for name, entry in self._manifest["shards"].items()}

    @property
    def divided(self) -> dict[str, int]:
        """Among how many shards the examples of every split are divided."""
        return self._manifest["divided"]

    def totals(self) -> list[Total]:
        """Adds up the shards, examples and bytes by folder and split."""
        totals: dict[tuple[str, str], Total] = {}
        counted: set[tuple[str, str, int]] = set()
        for name, entry in sorted(self._manifest["shards"].items()):
            kind, number = kind_of(name)
            total = totals.setdefault((kind.folder, kind.split), Total(kind.folder, kind.split))
            total.shards += 1
            total.bytes += entry["bytes"]
            # The shards of several sources hold the same examples, which are counted for the first source only.
            if (kind.folder, kind.split, number) not in counted:
                counted.add((kind.folder, kind.split, number))
                total.examples += entry["examples"]
        return list(totals.values())

    def damaged(self) -> list[str]:
        """Returns the names of the shards whose files are missing or no longer what was written."""
        return [name for name in sorted(self._manifest["shards"]) if not self._intact(name)]

    def missing(self) -> list[str]:
        """Returns the names of the shards whose files are not there. No file is read."""
        return [name for name in sorted(self._manifest["shards"]) if not self._path(name).is_file()]

    def drop_damaged(self) -> None:
        """Drops the shards whose files are missing or no longer what was written, so that they are made again, and prints them."""
        damaged = self.damaged()
        for name in damaged:
            print(f"store: {self._path(name)} is damaged or missing: building it again", flush=True)
        if damaged:
            self._drop(damaged)

    def sha256(self, kind: Kind, number: int) -> str:
        """The sha256 of a shard's file, which must be present."""
        return self._manifest["shards"][kind.shard(number)]["sha256"]

    def origin(self, kind: Kind, number: int) -> str:
        """What a shard that is present was made from."""
        return self._manifest["shards"][kind.shard(number)]["origin"]

    def put(
        self, kind: Kind, number: int, arrays: Mapping[str, np.ndarray], *, examples: int, origin: str = ""
    ) -> None:
        """Writes a shard of arrays. `examples` is the number of examples that it covers, `origin` a digest of what it is made from."""
        data = save_tensors({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        columns = {name: arrays[name] for name in kind.index}
        facts = {"index": index_digest(data, columns), "examples": examples, "origin": origin}
        self._put(kind.shard(number), data, facts)

    def put_json(self, kind: Kind, number: int, value: Any, *, examples: int, origin: str = "") -> None:
        """Writes a shard of texts as JSON. `examples` and `origin` are those of `put`."""
        data = json.dumps(value, ensure_ascii=False).encode()
        self._put(kind.shard(number), data, {"examples": examples, "origin": origin})

    def get(self, kind: Kind, number: int) -> dict[str, np.ndarray]:
        """Returns a shard's arrays, which are mapped into memory and read-only. The file's hash is checked at the first read.

        Raises:
            DataError: the file is missing, or no longer what was written.
        """
        name = kind.shard(number)
        try:
            return tensors_of(self._bytes(name))
        except (ValueError, KeyError, TypeError):
            raise differs(self._path(name)) from None

    def get_json(self, kind: Kind, number: int, shape: Any = Any) -> Any:
        """Returns a shard's texts, which must have a shape (profuser.typed). It raises what `get` raises."""
        name = kind.shard(number)
        try:
            return checked(parsed(self._bytes(name)[:]), shape)
        except ValueError:
            raise differs(self._path(name)) from None

    def index(self, kind: Kind, number: int) -> dict[str, np.ndarray]:
        """Returns the index columns of a shard, mapped into memory. Only these columns and the header are read and checked.

        Raises:
            DataError: the file is missing, or has another length, header or index than was written.
        """
        name = kind.shard(number)
        entry, path = self._manifest["shards"].get(name, {}), self._path(name)
        try:
            data = mapped(path)
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from None
        try:
            columns = {column: tensors_of(data)[column] for column in kind.index}
        except (ValueError, KeyError, TypeError):
            raise differs(path) from None
        if len(data) != entry.get("bytes") or index_digest(data, columns) != entry.get("index"):
            raise differs(path)
        return columns

    def _put(self, name: str, data: bytes, facts: dict[str, Any]) -> None:
        """Writes a shard's file, then records the shard with its hash, its size and these facts."""
        write_atomic(self._path(name), data)
        self._verified.discard(name)
        entry = {"sha256": sha256(data), "bytes": len(data), **facts}
        write_record(self.directory, name, entry)
        self._manifest["shards"][name] = entry

    def _bytes(self, name: str) -> mmap:
        """Maps a shard's file into memory. Before the first use its hash is checked against the manifest's."""
        entry, path = self._manifest["shards"].get(name), self._path(name)
        try:
            data = mapped(path)
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from None
        if name not in self._verified:
            if entry is None or sha256(data) != entry["sha256"]:
                raise differs(path)
            self._verified.add(name)
        return data

    def _intact(self, name: str) -> bool:
        """Whether a shard's file can be read and has the hash of the manifest."""
        try:
            intact = sha256(mapped(self._path(name))) == self._manifest["shards"][name]["sha256"]
        except (OSError, ValueError):
            return False
        if intact:
            self._verified.add(name)
        return intact

    def _drop(self, names: list[str]) -> None:
        """Takes shards out of the manifest, so that the store is no longer complete and they are made again."""
        self._enter_records()  # a record that is left would bring its shard back
        for name in names:
            del self._manifest["shards"][name]
        self._manifest["complete"] = False
        self._save()

    def _path(self, name: str) -> Path:
        """Returns the path of a shard's file. A name from a manifest that was tampered with must not lead out of the store."""
        path = self.directory / f"{name}{kind_of(name)[0].suffix}"
        if not path.resolve().is_relative_to(self.directory.resolve()):
            raise DataError(
                f"store: a shard must lie inside {self.directory}, got {name!r}; the manifest is not to be trusted"
            )
        return path

    def _read(self) -> None:
        """Reads the manifest, and before it the records of the shards that it may not list yet."""
        records, version = read_records(self.directory), _version(self.directory)
        self._manifest = read_manifest(self.directory)
        self._manifest["shards"] |= records
        self._version = version

    def _save(self) -> None:
        """Writes the manifest, in which the shards have the same order whoever has made them."""
        self._manifest["shards"] = dict(sorted(self._manifest["shards"].items()))
        write_manifest(self.directory, self._manifest)
        self._version = _version(self.directory)

    def _enter_records(self) -> None:
        """Enters all records in the manifest, and removes them."""
        if (self.directory / RECORDS).exists():
            self._save()
            remove_records(self.directory)

    def _tidy(self) -> None:
        """Removes the records, and what killed processes have left while they were writing."""
        self._enter_records()
        remove_temporary([self.directory, *(self.directory / folder for folder in FOLDERS)])


def _version(directory: Path) -> object:
    """Returns what is another thing whenever the manifest has been written again; None where there is none."""
    try:
        found = (directory / "manifest.json").stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def index_digest(data: bytes | mmap, columns: Mapping[str, np.ndarray]) -> str:
    """Returns the sha256 of a safetensors file's header and its index columns together."""
    return sha256(b"".join([data[: header_length(data)], *(columns[name].tobytes() for name in sorted(columns))]))


def differs(path: Path) -> DataError:
    """The error for a shard whose content is not what was written."""
    return DataError(
        f"store shard {path} must have the sha256 of the manifest, its content differs; run "
        "`python -m profuser.prepare` with the recipe to build it again"
    )


def unreadable(path: Path, error: Exception) -> DataError:
    """The error for a shard whose file cannot be opened."""
    reason = getattr(error, "strerror", None) or error
    return DataError(
        f"store shard {path} cannot be read ({reason}); run `python -m profuser.prepare` with the recipe again"
    )
