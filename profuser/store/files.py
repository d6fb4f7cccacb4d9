"""Reads and writes files: atomic writes, what is left of a killed one, and safetensors files that are mapped into memory."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Generator, Iterable
from datetime import datetime
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np

from profuser.errors import ProfuserError
from profuser.store.processes import is_running, place

TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
"""The names of what is being written: a dot, the final name, the place of the process, its id and `.tmp`."""
ABANDONED_SECONDS = 24 * 3600
"""What a process elsewhere, of which nothing can be known here, has not changed for so long is left over."""

# The dtypes of the safetensors format, by the names that its headers use.
DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32, "I32": np.int32,
    "U64": np.uint64, "I64": np.int64, "F16": np.float16, "F32": np.float32, "F64": np.float64,
}  # fmt: skip


class DiskFull(ProfuserError, OSError):
    """There is no room for a file."""


@contextlib.contextmanager
def writing(path: Path, size: int) -> Generator[None]:
    """Says clearly why a file, or a directory of files, cannot be written. `size` is how many bytes it needs.

    Raises:
        DiskFull: there is no room. The message names the path and what is missing.
    """
    try:
        yield
    except Exception as error:
        # safetensors has no error of its own for a full disk.
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if isinstance(error, DiskFull) or not is_full:
            raise
        free = shutil.disk_usage(path.parent).free
        raise DiskFull(
            f"{path} needs {size:,} bytes, {free:,} are free on its disk ({getattr(error, 'strerror', None) or 'it is full'}); "
            "make room, and the same command goes on"
        ) from error


def temporary_beside(path: Path) -> Path:
    """Returns the path under which a file or directory is written before it gets its name. `remove_temporary` knows it."""
    return path.with_name(f".{path.name}.{place()}.{os.getpid()}.tmp")


def remove_temporary(folders: Iterable[Path]) -> None:
    """Removes what killed processes have left in folders while they were writing. Only who holds the folders may do this."""
    for folder in folders:
        for path in folder.iterdir() if folder.is_dir() else ():
            if TEMPORARY.fullmatch(path.name):
                _remove(path)


def remove_left_over(path: Path) -> None:
    """Removes what processes that have ended since, by all that is known here, have left beside a path while they were writing it.

    This is for a path that nobody holds a lease on. What a running process writes stays, and so does for a day what was written on
    another machine or in another container.
    """
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        name = re.fullmatch(r"([0-9a-f]{8})\.([0-9]+)\.tmp", temporary.name.removeprefix(f".{path.name}."))
        if name is not None and _is_left_over(temporary, name[1], int(name[2])):
            _remove(temporary)


def _is_left_over(temporary: Path, where: str, process: int) -> bool:
    """Whether the process that wrote a file or a directory has ended."""
    if where == place():  # this process has not begun to write
        return process == os.getpid() or not is_running(process)
    try:
        changed = max(path.lstat().st_mtime for path in (temporary, *temporary.rglob("*")))
    except FileNotFoundError:  # it is changed just now
        return False
    return time.time() - changed > ABANDONED_SECONDS


def _remove(path: Path) -> None:
    """Removes a file, a link, or a directory with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Writes a file so that afterwards, even after a power cut, either the old or the whole new content is there.

    Without `sync` this is not waited for, and does not hold after a power cut. It raises what `writing` raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    with writing(path, len(data)):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            give_name(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    if sync:
        sync_directory(path.parent)


def give_name(path: Path, final: Path) -> None:
    """Gives a file its final name, at once. A directory that has this name is renamed, and this is printed."""
    if final.is_dir() and not final.is_symlink():
        print(f"{final} was a directory: renamed to {set_aside(final)}", flush=True)
    os.replace(path, final)


def move_into_place(path: Path, final: Path) -> None:
    """Gives a file that was written elsewhere on the same disk its name, when all of it is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    final.parent.mkdir(parents=True, exist_ok=True)
    give_name(path, final)
    sync_directory(final.parent)


def sync_directory(path: Path) -> None:
    """Makes sure that the names in a directory are on the disk, which they are only when the directory has been synced as well."""
    directory = os.open(path, os.O_RDONLY)
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


def as_json(value: Any) -> bytes:
    """Returns a value as JSON for a person to read, in UTF-8."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, atomically."""
    write_atomic(path, as_json(value))


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


def in_the_way(directory: Path) -> Path | None:
    """Returns what keeps a directory from being made: of its path and those above it the nearest that exists, if that is none."""
    nearest = next(path for path in (directory, *directory.parents) if path.exists())
    return None if nearest.is_dir() else nearest
