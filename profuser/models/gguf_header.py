"""Reads the header of a GGUF file, which says what tensors are in it (github.com/ggml-org/ggml/blob/master/docs/gguf.md).

The `gguf` package keeps every string of the vocabulary as an object of its own, and goes on for as long as a file's counts say.
Here nothing is kept but the tensors' sizes, and a count above its limit is an error.
"""

from __future__ import annotations

import math
import struct
from mmap import ACCESS_READ, mmap
from pathlib import Path

from profuser.errors import DataError

ENTRIES, TENSORS, ELEMENTS, STRING_BYTES, DIMENSIONS = 1 << 16, 1 << 20, 1 << 25, 1 << 26, 8
"""The most metadata entries, tensors, elements of an array, bytes of a string and dimensions of a tensor that a file may have."""

SIZES = {0: 1, 1: 1, 7: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 10: 8, 11: 8, 12: 8}
"""The bytes of a value by the number of its type, for all types but strings (8) and arrays (9)."""


class _Header:
    """A place in the header of a file, which moves on with everything that is read."""

    def __init__(self, data: mmap, place: int = 0):
        self.data, self.place = data, place

    def number(self, form: str, what: str, limit: int | None = None) -> int:
        """Reads a number. It raises ValueError above a limit, and struct.error at the end of the file."""
        (value,) = struct.unpack_from(f"<{form}", self.data, self.place)
        self.place += struct.calcsize(form)
        if limit is not None and value > limit:
            raise ValueError(f"it has {value:,} {what}, and the limit is {limit:,}")
        return value

    def string(self) -> bytes:
        """Reads a string."""
        length = self.number("Q", "bytes in a string", STRING_BYTES)
        self.place += length
        return self.data[self.place - length : self.place]

    def skip(self, kind: int) -> None:
        """Goes past a value of a type, which may be an array."""
        if kind == 8:
            self.string()
        elif kind == 9:
            inner, count = self.number("I", "type"), self.number("Q", "elements in an array", ELEMENTS)
            if inner == 8:
                for _ in range(count):
                    self.string()
            else:
                self.place += count * SIZES[inner]
        else:
            self.place += SIZES[kind]


def gguf_tensors(name: str, file: Path) -> dict[str, int]:
    """Returns the number of elements of every tensor in a GGUF file, by the tensor's name. No weights are read.

    Args:
        name: the model's name in the recipe, for the error message.
    Raises:
        DataError: the file is no GGUF file of version 2 or 3, it is cut off, or a count in it is above its limit.
    """
    try:
        with open(file, "rb") as opened:
            header = _Header(mmap(opened.fileno(), 0, access=ACCESS_READ))
        if header.data[:4] != b"GGUF" or header.data[4:8] not in (b"\x02\0\0\0", b"\x03\0\0\0"):
            raise ValueError("it does not begin as version 2 or 3 of the format does")
        header.place = 8
        tensors = header.number("Q", "tensors", TENSORS)
        for _ in range(header.number("Q", "entries of metadata", ENTRIES)):
            header.string()
            header.skip(header.number("I", "type"))
        sizes = {}
        for _ in range(tensors):
            key = header.string().decode()
            shape = [header.number("Q", "") for _ in range(header.number("I", "dimensions", DIMENSIONS))]
            header.place += 12  # its type, and where it lies
            sizes[key] = math.prod(shape)
    except (ValueError, KeyError, struct.error, OSError) as error:
        known: dict[type, str] = {struct.error: "it is cut off", KeyError: "a value in it has an unknown type"}
        reason = known.get(type(error), str(error))
        raise DataError(f"{name}: the GGUF file {file} cannot be read ({reason}); copy or download it again") from None
    return sizes
