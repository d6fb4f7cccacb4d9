"""Files that are whole or not there: atomic writes, JSON with clear errors, and safetensors mapped into memory."""

from __future__ import annotations

import hashlib
import json
import os
from datetime import datetime
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np

from profuser.errors import DataError

# Types of the safetensors format that a store uses.
DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32, "I32": np.int32,
    "U64": np.uint64, "I64": np.int64, "F16": np.float16, "F32": np.float32, "F64": np.float64,
}  # fmt: skip


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is either the old one or the whole new one, also after a power cut."""
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
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, *keys: str, fix: str = "restore it or start over with --fresh") -> Any:
    """A JSON file, an object with these keys if there are any.

    Raises:
        DataError: it is missing, broken or something else; the message ends with `fix`.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {fix}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} must hold JSON, got {error}; {fix}") from None
    if absent := [key for key in keys if not isinstance(value, dict) or value.get(key) is None]:
        raise DataError(f"{path} must hold {', '.join(keys)}, without {', '.join(absent)}; {fix}")
    return value


def set_aside(path: Path) -> Path | None:
    """Rename an old directory out of the way, for --fresh; nothing is deleted."""
    if not path.exists():
        return None
    aside = path.with_name(f"{path.name}.{datetime.now():%Y%m%d-%H%M%S}")
    for n in range(1, 1000):
        if not aside.exists():
            break
        aside = path.with_name(f"{path.name}.{datetime.now():%Y%m%d-%H%M%S}-{n}")
    path.rename(aside)
    return aside


def sha256(data: bytes | mmap) -> str:
    return hashlib.sha256(data).hexdigest()


def mapped(path: Path) -> mmap:
    """A file's bytes, read from the disk where they are looked at.

    Raises:
        OSError, ValueError: it is missing, or empty.
    """
    with open(path, "rb") as file:
        return mmap(file.fileno(), 0, access=ACCESS_READ)


def header_length(data: bytes | mmap) -> int:
    """Length of a safetensors file's header with the 8 bytes in front that say it; at most the file's own length."""
    return min(8 + int.from_bytes(data[:8], "little"), len(data))


def tensors_of(data: bytes | mmap) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file as read-only views of its bytes: nothing is copied.

    The header is JSON, name -> dtype, shape and data_offsets behind it (huggingface.co/docs/safetensors).

    Raises:
        ValueError, KeyError, TypeError: the header is not one of this format.
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
