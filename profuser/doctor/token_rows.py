"""Lines of text with the beginnings of two tokenizers' tokens marked under them, for a terminal.

    text    The·cats·run⏎
    target  =  =~   <=  ⏎

Every column is one character, or one byte (`\\xe4`) where a token begins within a character, so marks stand exactly
under what they mean. A zero-width token has a column of its own, `∅`. What a terminal would not print is escaped: a
text cannot move the cursor or change colours. Colours (Okabe and Ito's, told apart by the colour-blind) only add to the marks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from profuser.alignment.types import KINDS, SAME_SPAN
from profuser.text.display import column_width, printable

LEGEND = (
    ("=", "begins and ends with a source token"),
    ("~", "begins with a source token that ends elsewhere"),
    ("<", "begins inside a source token"),
    ("x", "the source says nothing about it"),
)
"""Mark and meaning of every kind."""

COLORS = (36, 74, 214, 175)
"""Of every kind, of the 256 that terminals have: bluish green, sky blue, orange, reddish purple."""

MAX_EXAMPLES = 4
LABEL = 8  # columns of the rows' names
LEAD_TOKENS = 3  # shown before the first token of the kind that a line was chosen for

Spans = tuple[np.ndarray, np.ndarray]


def paint(text: str, kind: int, color: bool) -> str:
    return f"\x1b[38;5;{COLORS[kind]}m{text}\x1b[0m" if color else text


def example_rows(
    data: bytes, target: Spans, kind: np.ndarray, source: Spans, *, color: bool, width: int
) -> list[tuple[str, str, str, str]]:
    """A few lines in which every kind that occurs is seen, the rarest first, in the text's order.

    Args:
        data: the text; target, source: ((n,) begin, (n,) end), monotone byte offsets; kind: of the target's tokens.
    Returns:
        (title, text, target, source) per line.
    """
    newlines = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
    starts = np.concatenate([[0], newlines + 1, [len(data)]])
    line = np.searchsorted(starts, target[0], "right") - 1
    counts = np.zeros((len(starts), len(KINDS)), np.int64)
    np.add.at(counts, (line, kind), 1)
    total = counts.sum(0)

    chosen: dict[int, int] = {}  # line -> its first token that is shown
    for k in sorted(np.flatnonzero(total).tolist(), key=lambda k: (k == SAME_SPAN, total[k])):
        if any(counts[other, k] for other in chosen):
            continue
        # Many kinds, then many of this one: a line that a person learns from.
        best = int(np.lexsort((counts[:, k], (counts > 0).sum(1), counts[:, k] > 0))[-1])
        chosen[best] = _first_token(line, kind, best, k)
    for best in np.argsort(-(counts[:, 1] + counts[:, 2]), kind="stable").tolist():
        if len(chosen) >= MAX_EXAMPLES or not counts[best, 1:3].any():
            break
        if best not in chosen:
            chosen[best] = int(np.flatnonzero(line == best)[0])
    return [
        _rows(data, int(starts[n + 1]), target, kind, source, chosen[n], n, color, width - LABEL)
        for n in sorted(chosen)
    ]


def _first_token(line: np.ndarray, kind: np.ndarray, n: int, k: int) -> int:
    """Where to begin so that a token of kind k comes soon: a few tokens before it, or with the line."""
    own = np.flatnonzero(line == n)
    wanted = int(np.flatnonzero(kind[own] == k)[0])
    return int(own[max(wanted - LEAD_TOKENS, 0)]) if wanted > 3 * LEAD_TOKENS else int(own[0])


def _rows(data, stop, target: Spans, kind, source: Spans, first, number, color, width) -> tuple[str, str, str, str]:
    begin = int(target[0][first])
    stop = min(stop, begin + 8 * width)
    starts, source_starts = _tokens_at(target, begin, stop), _tokens_at(source, begin, stop)
    text, marks, ticks, used = "", "", "", 0
    for position, shown, n in _columns(data, begin, stop, starts, source_starts):
        columns = column_width(shown)
        if used + columns >= width:
            text += "…"
            break
        used += columns
        begun = starts.get(position, {}).get(n)
        holder = int(np.searchsorted(target[0], position, "right")) - 1
        text += paint(shown, int(kind[holder if begun is None else begun]), color)
        if columns:
            mark = " " if begun is None else paint(LEGEND[kind[begun]][0], int(kind[begun]), color)
            marks += mark + " " * (columns - 1)
            ticks += ("|" if n in source_starts.get(position, {}) else " ") + " " * (columns - 1)
    return (
        f"line {number + 1}",
        f"{'text':<{LABEL}}{text}",
        f"{'target':<{LABEL}}{marks}",
        f"{'source':<{LABEL}}{ticks}",
    )


HELD = -1  # in place of the number of a zero-width token: the one that holds the byte


def _tokens_at(spans: Spans, begin: int, stop: int) -> dict[int, dict[int, int]]:
    """Byte -> {number among the zero-width tokens there, or HELD: token}."""
    tokens: dict[int, dict[int, int]] = {}
    low, high = np.searchsorted(spans[0], (begin, stop), "left").tolist()
    for token in range(low, high):
        at = tokens.setdefault(int(spans[0][token]), {})
        at.setdefault(HELD if spans[1][token] > spans[0][token] else len(at), token)
    return tokens


def _columns(data: bytes, begin: int, stop: int, *starts: dict[int, dict[int, int]]) -> Iterator[tuple[int, str, int]]:
    """(byte, what is shown, HELD or the number of a zero-width token) of every column."""
    position = begin
    while position < stop:
        for n in range(max(len(at.get(position, {}).keys() - {HELD}) for at in starts)):
            yield position, "∅", n
        size = _size(data[position])
        character = data[position : min(position + size, stop)].decode(errors="ignore")
        if not character or any(inner in at for inner in range(position + 1, position + size) for at in starts):
            yield position, f"\\x{data[position]:02x}", HELD
            position += 1
            continue
        shown = "·" if character == " " else printable(character)
        if not column_width(shown) and any(HELD in at.get(position, {}) for at in starts):
            shown = f"◌{shown}"  # a combining mark has no column to put a token's mark under
        yield position, shown, HELD
        position += size


def _size(lead: int) -> int:
    """Bytes of the UTF-8 character that begins so; 1 for a byte from within one."""
    return 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
