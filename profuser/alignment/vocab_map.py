"""The part of the alignment that depends on the two vocabularies alone, and not on the text.

`CandidateTable` holds the target token that each source token counts for at the beginning of a pre-token, as one int32 per
source token. With a pre-tokenizer that splits text, nearly all candidates begin a pre-token. `ByteOrder` is the source's
vocabulary sorted by bytes, in which the tokens that begin with given bytes are one range (rule 2 in reference.py).
"""

from __future__ import annotations

import bisect
import json
import unicodedata
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from profuser.alignment.boundaries import Boundaries
from profuser.alignment.numbers import DIGITS, most_merged_digits
from profuser.text.token_bytes import TokenBytes

# These stand in place of the target id that a candidate counts for: its mass goes to the tail, is dropped, or goes to the
# target's end of turn.
TAIL, DROPPED, END = -1, -2, -3

LOOKAHEADS = ("", "x", " x")
"""The texts that may be put behind a candidate that ends in spaces, so that the spaces are not the end of the text."""


class TextFormat(Protocol):
    """One side of an alignment, such as `profuser.text.chat.ChatFormat` or `profuser.alignment.align.PlainText`."""

    @property
    def token_bytes(self) -> TokenBytes: ...
    @property
    def end_ids(self) -> tuple[int, ...]: ...  # all tokens with the role end of turn
    @property
    def end_id(self) -> int | None: ...  # the one of them that closes a response
    @property
    def closing(self) -> bytes: ...  # the template's text between a response and its end of turn


class ByteOrder:
    """The tokens of a vocabulary sorted by their bytes. Control tokens and tokens without bytes are left out.

    Args:
        size: the number of rows of the model's head, because a tokenizer may have more tokens than that.
    Attributes:
        ids: (V',) int32, the tokens in this order.
    """

    def __init__(self, tokens: TokenBytes, size: int | None = None):
        ordered = sorted((piece, i) for i, piece in enumerate(tokens.pieces[:size]) if piece)
        self.ids = np.array([i for _, i in ordered], dtype=np.int32)
        self._sorted = [piece for piece, _ in ordered]
        self._ranges: dict[bytes, tuple[int, int]] = {}

    def range_of(self, prefix: bytes) -> tuple[int, int]:
        """The range [lo, hi) of `ids` that holds the tokens which begin with `prefix`, including `prefix` itself."""
        known = self._ranges.get(prefix)
        if known is None:
            lo = bisect.bisect_left(self._sorted, prefix)
            # The range ends before the first byte string that is greater than all strings with this prefix. It is the
            # prefix with its last byte raised by one; a last byte of 0xff cannot be raised and is taken off first.
            beyond = prefix.rstrip(b"\xff")
            hi = len(self._sorted)
            if beyond:
                hi = bisect.bisect_left(self._sorted, beyond[:-1] + bytes([beyond[-1] + 1]), lo=lo)
            known = self._ranges[prefix] = (lo, hi)
        return known


def lookaheads(tokens: TokenBytes, ids: Sequence[int]) -> np.ndarray:
    """Finds what to put behind each candidate when its text is tokenised.

    A candidate that ends in spaces must not be taken for the end of the text. Tokenizers of the GPT family give the last
    of several spaces to the word behind them, so an `x` takes a space away from the candidate, and ` x` does not. The
    first of the two that leaves the candidate a token in its own tokenizer is taken. If neither does, it is `x`.

    Returns:
        (len(ids),) uint8, indices into LOOKAHEADS.
    """
    result = np.zeros(len(ids), dtype=np.uint8)
    spaced, texts = [], []
    for place, i in enumerate(ids):
        text = (tokens.pieces[i] or b"").decode(errors="replace")
        if text[-1:].isspace():
            spaced.append(place)
            texts += [text + follow for follow in LOOKAHEADS[1:]]
    encodings = tokens.fragment.encode_batch_fast(texts, add_special_tokens=False)
    for n, place in enumerate(spaced):
        kept = [encoding.ids[:1] == [ids[place]] for encoding in encodings[2 * n : 2 * n + 2]]
        result[place] = 2 if kept == [False, True] else 1
    return result


def first_tokens(target: TokenBytes, texts: list[str], sizes: list[int]) -> list[int]:
    """For each text the target token that it begins with, or TAIL if this token is longer than the candidate's size.

    Args:
        texts: the candidates' texts, each with its look-ahead.
        sizes: the number of each candidate's bytes, without the look-ahead.
    """
    pieces, found = target.pieces, []
    for text, size, encoding in zip(
        texts, sizes, target.fragment.encode_batch_fast(texts, add_special_tokens=False), strict=True
    ):
        ids = encoding.ids
        piece = pieces[ids[0]] if ids else None
        # A token that is longer than the candidate reaches into the look-ahead, and one of other bytes was changed by the
        # normaliser. In both cases the candidate stays in the tail.
        fits = piece is not None and len(piece) <= size and text.encode().startswith(piece)
        found.append(ids[0] if fits else TAIL)
    return found


def exact_tokens(target: TokenBytes) -> dict[bytes, int]:
    """The target token for each byte string that is a token and with which no longer token begins.

    This is for candidates that end inside a character (rule 3). If a longer token begins with a candidate's bytes, the
    bytes that complete the character decide which token it is. For example, a byte token of Llama-2 is hardly ever emitted
    where tokens of whole characters begin with the same byte.
    """
    found: dict[bytes, int] = {}
    for i, piece in enumerate(target.pieces):
        if piece:
            known = found.setdefault(piece, i)
            # Byte tokens come first in SentencePiece vocabularies, but text uses the plain token of the same byte.
            if known in target.byte_tokens:
                found[piece] = i
    ordered = sorted(found)
    return {piece: found[piece] for piece, after in zip(ordered, [*ordered[1:], b""]) if not after.startswith(piece)}


class CandidateTable:
    """Rule 3 of reference.py for candidates that begin a new pre-token.

    A candidate `opens` if it is a space followed by something that is not a space. Behind a target token that `closes`, it
    then begins a new pre-token: every pre-tokenizer that splits words cuts there, which is probed, and without such a
    pre-tokenizer the space and the character before it stand next to each other in no token of the target. The tokens of
    the prefix must also stay as they are, which is found out once per prefix. What any other candidate counts for depends
    on the prefix in any case.

    Attributes:
        counts_for: (source vocabulary,) int32, the target token that a candidate counts for at the beginning of a
            pre-token, or TAIL.
        opens: (source vocabulary,) bool, whether the candidate begins a new pre-token behind a target token that `closes`.
        closes: (target vocabulary,) bool, whether a space behind the token begins a new pre-token.
        lookahead: (source vocabulary,) uint8, indices into LOOKAHEADS.
        exact: the target token of exactly given bytes (`exact_tokens`).
        digit_led: (source vocabulary,) bool, whether the candidate begins with one of the digits 0 to 9.
        ends_number: (source vocabulary,) bool, whether the candidate begins with something else, and the target's text is
            always cut between a digit and that.
        merges_digits: whether the target has tokens of several digits.
        onward: (source vocabulary,) uint8, with how many of the ten digits behind it the candidate counts for another token
            than without, because the target merges them. It is 0 unless the token that it counts for reaches its end.
    """

    def __init__(self, target: TokenBytes, source: TokenBytes, boundaries: Boundaries):
        pieces = source.pieces
        self.lookahead = lookaheads(source, range(len(pieces)))
        self.exact = exact_tokens(target)
        self.counts_for = np.full(len(pieces), TAIL, dtype=np.int32)
        self.opens = np.zeros(len(pieces), dtype=bool)
        self.digit_led = np.zeros(len(pieces), dtype=bool)
        self.ends_number = np.zeros(len(pieces), dtype=bool)
        self.onward = np.zeros(len(pieces), dtype=np.uint8)
        self.merges_digits = most_merged_digits(target.pieces) > 1
        self._boundaries, self._cuts_behind_digit = boundaries, {}
        places, texts, sizes = [], [], []
        for i, piece in enumerate(pieces):
            if not piece:
                continue
            try:
                text = piece.decode()
            except UnicodeDecodeError:
                self.counts_for[i] = self.exact.get(piece, TAIL)
                continue
            self.opens[i] = text[0] == " " and len(text) > 1 and not text[1].isspace()
            self.digit_led[i] = text[0] in DIGITS
            self.ends_number[i] = not self.digit_led[i] and self.cut_behind_digit(text)
            places.append(i)
            texts.append(text + LOOKAHEADS[self.lookahead[i]])
            sizes.append(len(piece))
        self.counts_for[places] = first_tokens(target, texts, sizes)
        self.closes = boundaries.closes_before_space()
        if self.merges_digits:
            self._find_onward(target, pieces)

    def cut_behind_digit(self, text: str) -> bool:
        """Whether the target's text is always cut between a digit and this text, which begins with no digit."""
        # What a pre-tokenizer does depends on a character's category and script, so one character stands for its likes.
        alike = text[0]
        if self._boundaries.splits and text[0] != "'":  # pre-tokenizers know 's, 't and their like
            alike = tuple(map(_likes, text[: 1 + text[0].isascii()]))
        elif self._boundaries.splits:
            alike = text[:2]
        known = self._cuts_behind_digit.get(alike)
        if known is None:
            digits = "19" if self._boundaries.splits else DIGITS
            known = self._cuts_behind_digit[alike] = all(self._boundaries.cut_between(d, text[:2]) for d in digits)
        return known

    def _find_onward(self, target: TokenBytes, pieces: Sequence[bytes | None]) -> None:
        """Tokenises every candidate that ends in a digit once more with each of the ten digits behind it."""
        ids = [
            i
            for i, token in enumerate(self.counts_for.tolist())
            if token >= 0 and (piece := pieces[i]) and piece[-1:].isdigit() and len(target.piece(token)) == len(piece)
        ]
        texts = [(pieces[i] or b"").decode() + digit for i in ids for digit in DIGITS]
        encodings = target.fragment.encode_batch_fast(texts, add_special_tokens=False)
        first = np.array([encoding.ids[0] for encoding in encodings], dtype=np.int64).reshape(-1, len(DIGITS))
        self.onward[ids] = (first != self.counts_for[ids, None]).sum(1)


def _likes(character: str) -> str | tuple[str, int]:
    """What characters are alike to a pre-tokenizer: letters of one category and script, other characters only themselves."""
    category = unicodedata.category(character)
    return (category, ord(character) >> 8) if category[0] in "LM" or not character.isascii() else character


def same_tokens(left: TokenBytes, right: TokenBytes) -> bool:
    """Whether two tokenizers give every text the same ids, apart from control tokens."""

    def essence(tokens: TokenBytes):
        config = json.loads(tokens.fragment.to_str())
        added = {t["content"]: t["id"] for t in config["added_tokens"] if t["id"] not in tokens.specials}
        return added, config["normalizer"], config["pre_tokenizer"], config["model"]

    return left is right or (left.pieces == right.pieces and essence(left) == essence(right))
