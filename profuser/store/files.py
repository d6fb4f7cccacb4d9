"""Reads and writes files: atomic writes, JSON with clear errors, and safetensors files that are mapped into memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from datetime import datetime
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np

from profuser.errors import DataError

# The dtypes of the safetensors format, by the names that its headers use.
DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32, "I32": np.int32,
    "U64": np.uint64, "I64": np.int64, "F16": np.float16, "F32": np.float32, "F64": np.float64,
}  # fmt: skip


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file so that afterwards, even after a power cut, either the old or the whole new content is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    # The new name is on the disk for certain only when the directory has been synced as well.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def open_to_umask(paths: Iterable[Path]) -> None:
    """Gives files the mode that the process's umask asks for. safetensors writes files that only their owner can read (0600)."""
    mask = os.umask(0)
    os.umask(mask)
    for path in paths:
        path.chmod(0o666 & ~mask)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, *keys: str, fix: str = "restore it") -> Any:
    """Reads a JSON file. If `keys` are given, the file must hold an object in which each of them has a value.

    Raises:
        DataError: the file is missing, is not JSON, or lacks a key. The message ends with `fix`.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {fix}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} must hold JSON, got {error}; {fix}") from None
    if absent := [key for key in keys if not isinstance(value, dict) or value.get(key) is None]:
        raise DataError(f"{path} must hold {', '.join(keys)}, it lacks {', '.join(absent)}; {fix}")
    return value


def set_aside(path: Path) -> Path | None:
    """Renames an old directory out of the way, for --fresh, and returns its new path. Nothing is deleted."""
    if not path.exists():
        return None
    # The new name carries the time. Where that name is taken, a number is added.
    aside = path.with_name(f"{path.name}.{datetime.now():%Y%m%d-%H%M%S}")
    for n in range(1, 1000):
        if not aside.exists():
            break
        aside = path.with_name(f"{path.name}.{datetime.now():%Y%m%d-%H%M%S}-{n}")
    path.rename(aside)
    return aside


def sha256(data: bytes | mmap) -> str:
    """Returns the sha256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def mapped(path: Path) -> mmap:
    """Maps a file into memory, so that only the parts that are looked at are read from the disk.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: the file is empty.
    """
    with open(path, "rb") as file:
        return mmap(file.fileno(), 0, access=ACCESS_READ)


def header_length(data: bytes | mmap) -> int:
    """Returns the length in bytes of a safetensors file's header, with the 8 bytes in front that hold the header's length.

    The result is never larger than the file, so that a damaged length does no harm.
    """
    return min(8 + int.from_bytes(data[:8], "little"), len(data))


def tensors_of(data: bytes | mmap) -> dict[str, np.ndarray]:
    """Returns the arrays of a safetensors file as read-only views of its bytes, so that nothing is copied.

    The header is JSON and gives for every name a dtype, a shape and data_offsets, which count from the end of the header
    (huggingface.co/docs/safetensors).

    Raises:
        ValueError, KeyError, TypeError: the header does not have this format.
    """
    start = header_length(data)
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(
            data,
            dtype=DTYPES[entry["dtype"]],
            count=int(np.prod(entry["shape"])),
            offset=start + entry["data_offsets"][0],
        ).reshape(entry["shape"])
        for name, entry in header.items()
    }
