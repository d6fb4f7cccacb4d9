"""Reads the text that tokenizers are compared on. This needs no heavy import, so that a wrong path is refused before any."""

from __future__ import annotations

from pathlib import Path

from profuser.errors import DataError


def read_text(path: Path) -> str:
    """Reads a text file and changes nothing in it, not even the ends of lines.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise DataError(f"--text must be a readable file, got {path} ({error.strerror}); fix the path") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"--text must be UTF-8, {path} has the byte 0x{error.object[error.start]:02x} at {error.start}; convert "
            "it, for instance with `iconv -f cp1252 -t utf-8`"
        ) from None
