"""Text files are UTF-8, and texts hold nothing but Unicode. What breaks this is found here, and named for an error of one line.

A string of Python's can hold half of a surrogate pair, such as JSON's `"\\ud83d"`. That is no character: no tokenizer takes it,
and no file can hold it.
"""

from __future__ import annotations

import codecs
import errno
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Other encodings by the bytes that a file begins with. UTF-32 comes first, because a mark of UTF-16 is the beginning of one."""

SURROGATE = re.compile("[\ud800-\udfff]")


def decode(data: bytes) -> str:
    """Decodes the content of a file, with or without a byte order mark.

    A byte that is not UTF-8 becomes a lone surrogate, so that the file can still be read up to the place which `defect` finds.

    Raises:
        ValueError: the file is UTF-16 or UTF-32.
    """
    _check_encoding(data)
    return data.decode("utf-8-sig", errors="surrogateescape")


def text_of(file: Any, newline: str | None = None) -> io.TextIOWrapper:
    """Reads an open binary file as `decode` does, a piece at a time. `newline` is that of `open`.

    Raises:
        ValueError: the file is UTF-16 or UTF-32.
    """
    buffered = io.BufferedReader(file)
    _check_encoding(buffered.peek(4))
    return io.TextIOWrapper(buffered, "utf-8-sig", errors="surrogateescape", newline=newline)


def _check_encoding(data: bytes) -> None:
    """Raises ValueError where a file that begins with these bytes is UTF-16 or UTF-32."""
    if other := next((name for mark, name in OTHER_ENCODINGS.items() if data.startswith(mark)), None):
        raise ValueError(f"it is {other} and not UTF-8; convert it with `iconv -f {other} -t utf-8`")


def defect(text: str) -> str | None:
    """Says what in a text is not Unicode, and how to mend it; None where all of it is."""
    if text.isascii() or (found := SURROGATE.search(text)) is None:
        return None
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # where `decode` puts a byte that is not UTF-8
        byte = f"0x{code - 0xDC00:02x}"
        return f"the byte {byte}, which is not UTF-8; convert the file, for instance with `iconv -f cp1252 -t utf-8`"
    return f"\\u{code:04x}, which is half of a character and not Unicode; write the whole character, or leave it out"


def texts_in(value: object) -> Iterator[str]:
    """Yields every text in nested lists and mappings, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from texts_in(pair)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from texts_in(inner)


def read_utf8(path: Path, most: int | None = None) -> str:
    """Reads a text file, with or without a byte order mark. All ends of lines become newlines.

    Args:
        most: the most characters that it may have. One that must have more is not read at all.

    Raises:
        OSError: the file cannot be read, or is none, such as a pipe that nobody writes to or a device without an end.
        ValueError: the file is not UTF-8, or too large. The message names the line and a fix.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    # No character has more than four bytes, nor has the mark.
    if most is not None and (size := path.stat().st_size) > 4 * most + 4:
        raise ValueError(f"and have at most {most:,} characters, it has {size:,} bytes; name another file")
    text = io.StringIO(decode(path.read_bytes()), newline=None).getvalue()
    for number, line in enumerate(text.split("\n"), start=1):
        if wrong := defect(line):
            raise ValueError(f"line {number} has {wrong}")
    return text
