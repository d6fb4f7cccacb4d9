"""JSON files that prove themselves and the files beside them.

A store, a checkpoint and a run each have one record: manifest.json, state.json and run.json. It lists the sha256 and the size of
the files beside it, and is written after them. Its own content is proven by its seal, which is its entry `sha256`: the sha256 of
all its other entries. A line of metrics.jsonl has a seal as well. A digest says that a file is what was written. It does not say
who wrote it: whoever may write to the directory can make another record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from profuser.errors import DataError
from profuser.store.files import as_json, write_json
from profuser.typed import COUNT, DIGEST, FILE_NAME, checked, read_json

SEAL = "sha256"
"""The entry that holds a seal."""
CHUNK = 1 << 22
"""How many bytes of a file are in memory while it is hashed."""

FileDigest = dict[str, Any]
"""The sha256 of a file and its size in bytes."""
FILE = {"sha256": DIGEST, "bytes": COUNT}
FILES = {FILE_NAME: FILE}
"""The shape of a record's entry with the digests of the files beside it."""


def digest_of(data: bytes) -> FileDigest:
    """Returns the digest of a file with this content."""
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def digest_of_file(path: Path) -> FileDigest:
    """Returns the digest of a file. It raises OSError where the file is missing or cannot be read."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"sha256": digest.hexdigest(), "bytes": size}


def is_intact(path: Path, recorded: FileDigest | None) -> bool:
    """Whether a file is what was recorded. A file of another size is not read, and one without a record is not intact."""
    try:
        return recorded is not None and path.stat().st_size == recorded["bytes"] and digest_of_file(path) == recorded
    except OSError:
        return False


def damaged_files(directory: Path, recorded: Mapping[str, FileDigest]) -> list[str]:
    """Returns the names of the files that are missing or not what was recorded."""
    return [name for name, digest in recorded.items() if not is_intact(directory / name, digest)]


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a mapping with its seal, in place of the one that it may have had."""
    content = {key: of_key for key, of_key in value.items() if key != SEAL}
    return content | {SEAL: _seal(content)}


def unsealed(value: Any, shape: Any) -> dict[str, Any]:
    """Returns the content of a sealed mapping without the seal.

    Raises:
        ValueError: it is no mapping, has no seal or is not what was sealed, or does not have the shape. The message says so,
            after "must hold".
    """
    content = dict(checked(value, {SEAL: DIGEST}))
    if content.pop(SEAL) != _seal(content):
        raise ValueError("what was written, its sha256 differs")
    return checked(content, shape)


def read_record(path: Path, shape: Any, schema: int, *, what: str, fix: str, again: str) -> dict[str, Any]:
    """Reads the record of a store or a run, and returns its content without the seal.

    Args:
        schema: the schema that this version reads. Records of earlier ones had no seal.
        what: what the record is of, for messages. fix: what to do about a damaged record. again: what to do about an earlier one.
    Raises:
        DataError: the file is missing, is not what was written, is of another schema, or does not have the shape.
    """
    value = read_json(path, fix=fix)
    earlier = isinstance(value, dict) and SEAL not in value and value.get("schema", 1)
    if type(earlier) is int and 0 < earlier < schema:
        raise DataError(f"{what} {path.parent} has schema {earlier}, this version reads {schema}; {again}")
    try:
        content = unsealed(value, {"schema": COUNT})
        if content["schema"] != schema:
            raise DataError(
                f"{what} {path.parent} has schema {content['schema']}, this version reads {schema}; {again}"
            )
        as_json(content)  # an escape may stand for half a character, which could not be written again
        return checked(content, shape)
    except ValueError as error:
        raise DataError(f"{path} must hold {error}; {fix}") from None


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a mapping as JSON with its seal, atomically."""
    write_json(path, sealed(value))


def _seal(content: Mapping[str, Any]) -> str:
    """Returns the seal of a mapping, which is the same however its JSON is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
