"""Where words end, in scripts with and without spaces: the places at which a segment of Cool-Fusion may end."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator

UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC", "FULLWIDTH", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR")
"""The first words in the names of characters that are written without spaces between words."""


def word_ends(text: str) -> Iterator[int]:
    """The places in a text at which a word ends, ascending. At its end only where that does not depend on what follows.

    A word ends before a space, and before or behind a character of a script without spaces. Spaces belong to the word behind
    them, so that no word consists of spaces alone. Marks that combine with the character before them are not cut off.
    """
    begun = False
    for place, (last, following) in enumerate(zip(text, [*text[1:], ""]), start=1):
        begun = begun or not last.isspace()
        if not begun or (following and (unicodedata.combining(following) or following in JOINERS)):
            continue
        if last in JOINERS and following:
            continue
        ends = (following.isspace() and not last.isspace()) or (
            not last.isspace() and (is_unspaced(last) or (following and is_unspaced(following)))
        )
        if ends:
            yield place


JOINERS = "\u200d\ufe0e\ufe0f"
"""The joiner of emoji and the selectors of their form, which belong to the characters beside them."""


@functools.lru_cache(maxsize=1 << 14)
def is_unspaced(character: str) -> bool:
    """Whether a character belongs to a script in which words are not separated by spaces."""
    return unicodedata.name(character, "").startswith(UNSPACED)
