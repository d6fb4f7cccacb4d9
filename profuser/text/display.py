"""Text as it is shown: what a terminal or page would hide is written out, and width is counted in columns."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata


def visible(text: str) -> str:
    """`text` with control characters, direction overrides and lone surrogates written out, as `\\x1b` or `\\u202e`."""
    return "".join(ascii(c)[1:-1] if _is_hidden(c) else c for c in text)


def _is_hidden(character: str) -> bool:
    if character in "\n\t" or " " <= character <= "~":
        return False
    directions = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return (
        unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"}
        or unicodedata.bidirectional(character) in directions
        or character == "\ufeff"
    )


def printable(character: str) -> str:
    if character == "\n":
        return "⏎"
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def column_width(shown: str) -> int:
    """Columns on a terminal."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in shown
    )


def clipped(text: str, width: int) -> str:
    """At most `width` columns of a text, made printable."""
    out, used = "", 0
    for character in text:
        shown = printable(character)
        used += column_width(shown)
        if used >= width:
            return f"{out}…"
        out += shown
    return out


def terminal_width() -> int:
    """Columns of the terminal, 80 where there is none."""
    return shutil.get_terminal_size().columns


def use_color() -> bool:
    """On a terminal, or with FORCE_COLOR set; never with NO_COLOR."""
    wanted = sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))
    return wanted and not os.environ.get("NO_COLOR")
