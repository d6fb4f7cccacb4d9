"""Shows lines of a text in a terminal, with marks under them where the tokens of two tokenizers begin.

    text    The·cats·run⏎
    target  =  =~   <=  ⏎

Every column is one character, or one byte, such as `\\xe4`, where a token begins within a character. Therefore a mark stands
exactly under what it is about. A token that covers no bytes has a column of its own, `∅`. What a terminal would not print is
escaped, so that a text cannot move the cursor or change colours. The colours (Okabe and Ito's, which colour-blind readers can
tell apart) say nothing that the marks do not say.
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
"""The mark and the meaning of every kind of position, in the order of profuser.alignment.types.KINDS."""

COLORS = (36, 74, 214, 175)
"""The colour of every kind, among a terminal's 256: bluish green, sky blue, orange, reddish purple."""

MAX_EXAMPLES = 4  # how many lines are shown, unless it takes more to show every kind
LABEL = 8  # how many columns the name of a row takes
LEAD_TOKENS = 3  # how many tokens are shown before the first token of the kind that a line was chosen for

Spans = tuple[np.ndarray, np.ndarray]


def paint(text: str, kind: int, color: bool) -> str:
    """Returns a text in the colour of a kind, or as it is without colours."""
    return f"\x1b[38;5;{COLORS[kind]}m{text}\x1b[0m" if color else text


def example_rows(
    data: bytes, target: Spans, kind: np.ndarray, source: Spans, *, color: bool, width: int
) -> list[tuple[str, str, str, str]]:
    """Chooses a few lines of a text in which every kind that occurs can be seen, and returns them in the text's order.

    Args:
        data: the text as bytes. target, source: the tokens' byte offsets as ((n,) begin, (n,) end), which never decrease.
        kind: (n,) the kinds of the target's tokens. color: whether colours are used. width: the columns of the terminal.
    Returns:
        For each line four rows of text: a title, the text, the target's marks and the source's marks.
    """
    # How many tokens of every kind each line has.
    newlines = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
    starts = np.concatenate([[0], newlines + 1, [len(data)]])
    line = np.searchsorted(starts, target[0], "right") - 1
    counts = np.zeros((len(starts), len(KINDS)), np.int64)
    np.add.at(counts, (line, kind), 1)
    total = counts.sum(0)

    # A line for every kind that no chosen line shows yet, the rarest kind first and `same_span` last.
    chosen: dict[int, int] = {}  # by line, the first of its tokens that is shown
    for k in sorted(np.flatnonzero(total).tolist(), key=lambda k: (k == SAME_SPAN, total[k])):
        if any(counts[other, k] for other in chosen):
            continue
        # Among the lines with this kind, the one with most kinds; of several, the one with most tokens of this kind.
        best = int(np.lexsort((counts[:, k], (counts > 0).sum(1), counts[:, k] > 0))[-1])
        chosen[best] = _first_token(line, kind, best, k)

    # If there is room, the lines with most tokens of the kinds `shared_prefix` and `inside`, which are the instructive ones.
    for best in np.argsort(-(counts[:, 1] + counts[:, 2]), kind="stable").tolist():
        if len(chosen) >= MAX_EXAMPLES or not counts[best, 1:3].any():
            break
        if best not in chosen:
            chosen[best] = int(np.flatnonzero(line == best)[0])
    return [
        _rows(data, int(starts[n + 1]), target, kind, source, chosen[n], n, color, width - LABEL)
        for n in sorted(chosen)
    ]


def _first_token(line: np.ndarray, kind: np.ndarray, number: int, k: int) -> int:
    """Returns the token from which a line is shown, so that a token of kind k comes soon.

    It is the line's first token, or one that is a few tokens before the first one of kind k. `line` says in which line every
    token lies.
    """
    own = np.flatnonzero(line == number)
    wanted = int(np.flatnonzero(kind[own] == k)[0])
    return int(own[max(wanted - LEAD_TOKENS, 0)]) if wanted > 3 * LEAD_TOKENS else int(own[0])


def _rows(data, stop, target: Spans, kind, source: Spans, first, number, color, width) -> tuple[str, str, str, str]:
    """Returns the four rows of a line: its title, its text from the token `first` on, and the marks of both sides.

    The text ends at the byte `stop` or where the width is used up.
    """
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
        begun = starts.get(position, {}).get(n)  # the target's token that begins in this column, if one does
        holder = int(np.searchsorted(target[0], position, "right")) - 1  # the one that the column belongs to
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


HELD = -1
"""Stands for the token that holds a byte, in place of the number that each zero-width token at a byte has."""


def _tokens_at(spans: Spans, begin: int, stop: int) -> dict[int, dict[int, int]]:
    """Returns the tokens that begin in [begin, stop), by the byte at which they begin.

    At one byte there may be several. The one that holds the byte has the key HELD; zero-width tokens are numbered from 0.
    """
    tokens: dict[int, dict[int, int]] = {}
    low, high = np.searchsorted(spans[0], (begin, stop), "left").tolist()
    for token in range(low, high):
        at = tokens.setdefault(int(spans[0][token]), {})
        at.setdefault(HELD if spans[1][token] > spans[0][token] else len(at), token)
    return tokens


def _columns(data: bytes, begin: int, stop: int, *starts: dict[int, dict[int, int]]) -> Iterator[tuple[int, str, int]]:
    """Yields for every column its byte, what is shown there, and HELD or the number of the zero-width token that it stands for.

    `starts` are the tokens of both sides by byte, as `_tokens_at` returns them.
    """
    position = begin
    while position < stop:
        # The zero-width tokens before the character.
        for n in range(max(len(at.get(position, {}).keys() - {HELD}) for at in starts)):
            yield position, "∅", n

        # The character, or one of its bytes if a token begins within it.
        size = _size(data[position])
        character = data[position : min(position + size, stop)].decode(errors="ignore")
        if not character or any(inner in at for inner in range(position + 1, position + size) for at in starts):
            yield position, f"\\x{data[position]:02x}", HELD
            position += 1
            continue
        shown = "·" if character == " " else printable(character)
        if not column_width(shown) and any(HELD in at.get(position, {}) for at in starts):
            shown = f"◌{shown}"  # a combining mark has no column of its own, under which a token's mark could stand
        yield position, shown, HELD
        position += size


def _size(lead: int) -> int:
    """Returns how many bytes a UTF-8 character has that begins with this byte; 1 for a byte from within a character."""
    return 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
