"""Prepares text to be shown: characters that a terminal or page would hide are written out, and width is counted in columns."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata


def visible(text: str) -> str:
    """`text` with control characters, direction overrides and lone surrogates written out, as `\\x1b` or `\\u202e`."""
    return "".join(ascii(c)[1:-1] if _is_hidden(c) else c for c in text)


def _is_hidden(character: str) -> bool:
    """Whether a terminal or page would hide the character, or let it change how other text is shown."""
    if character in "\n\t" or " " <= character <= "~":
        return False
    directions = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return (
        unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"}
        or unicodedata.bidirectional(character) in directions
        or character == "\ufeff"
    )


def printable(character: str) -> str:
    """The character itself, or a visible text in its place if it cannot be printed."""
    if character == "\n":
        return "⏎"
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def column_width(shown: str) -> int:
    """The number of columns that a text takes on a terminal."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in shown
    )


def clipped(text: str, width: int) -> str:
    """The text, made printable and cut to at most `width` columns."""
    out, used = "", 0
    for character in text:
        shown = printable(character)
        used += column_width(shown)
        if used >= width:
            return f"{out}…"
        out += shown
    return out


def terminal_width() -> int:
    """The number of the terminal's columns, or 80 if there is no terminal."""
    return shutil.get_terminal_size().columns


def use_color() -> bool:
    """Whether to write in colour: on a terminal or if FORCE_COLOR is set, but never if NO_COLOR is set."""
    wanted = sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))
    return wanted and not os.environ.get("NO_COLOR")
