"""The numbers that a source was asked for, as candidates beside its own tokens (rule 9 of reference.py).

A number is a string of up to MOST_DIGITS digits, with or without a space in front. It takes the place of several source
tokens, so numbers have ids behind those of the source's vocabulary: number n of `numbers()` has the id S + n, where S is
the number of the source's tokens.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence

DIGITS = "0123456789"
MOST_DIGITS = 4
NUMBER = re.compile(rb" ?[0-9]+")


@functools.cache
def numbers() -> tuple[bytes, ...]:
    """All numbers, in the order of their ids."""
    return tuple(
        (lead + "".join(digits)).encode()
        for lead in ("", " ")
        for length in range(1, MOST_DIGITS + 1)
        for digits in itertools.product(DIGITS, repeat=length)
    )


@functools.cache
def number_ids() -> dict[bytes, int]:
    """By its bytes, which number it is."""
    return {number: n for n, number in enumerate(numbers())}


def is_number(piece: bytes | None) -> bool:
    """Whether a token consists of digits, with or without a space in front."""
    return piece is not None and NUMBER.fullmatch(piece) is not None


def most_merged_digits(pieces: Sequence[bytes | None]) -> int:
    """The number of digits in the longest run of them that a vocabulary has in one token, but at most MOST_DIGITS."""
    runs = (len(run) for piece in pieces if piece for run in re.findall(rb"[0-9]+", piece))
    return min(max(runs, default=0), MOST_DIGITS)
