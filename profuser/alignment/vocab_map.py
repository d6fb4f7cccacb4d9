"""What the tokens of a source's vocabulary count for in the target's, as far as that does not depend on the text.

`CandidateTable` says which target token a candidate counts for where it begins a new pre-token, one int32 a source token:
with a pre-tokenizer that splits these are nearly all candidates. `ByteOrder` is the source's vocabulary sorted by bytes:
the tokens that begin with given bytes are one contiguous range of it (rule 2 in reference.py).
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from profuser.alignment.boundaries import Boundaries
from profuser.text.token_bytes import TokenBytes

# What a candidate counts for when it is not a target token.
TAIL, DROPPED, END = -1, -2, -3

LOOKAHEADS = ("", "x", " x")
"""What may have to follow a candidate that ends in spaces, because it is not the end of the text."""


class TextFormat(Protocol):
    """One side of an alignment; `profuser.text.chat.ChatFormat` and `profuser.alignment.align.PlainText` are."""

    @property
    def token_bytes(self) -> TokenBytes: ...
    @property
    def end_ids(self) -> tuple[int, ...]: ...  # tokens with the role end of turn
    @property
    def end_id(self) -> int | None: ...  # the one that closes a response
    @property
    def closing(self) -> bytes: ...  # text between a response and its end of turn


class ByteOrder:
    """The tokens of a vocabulary sorted by their bytes; control tokens and those without bytes are left out.

    Args:
        size: rows of the model's head; a tokenizer may know more tokens.
    Attributes:
        ids: (V',) int32, the tokens in this order.
    """

    def __init__(self, tokens: TokenBytes, size: int | None = None):
        ordered = sorted((piece, i) for i, piece in enumerate(tokens.pieces[:size]) if piece)
        self.ids = np.array([i for _, i in ordered], dtype=np.int32)
        self._sorted = [piece for piece, _ in ordered]
        self._ranges: dict[bytes, tuple[int, int]] = {}

    def range_of(self, prefix: bytes) -> tuple[int, int]:
        """[lo, hi) in `ids`: the tokens that begin with `prefix`, it itself among them."""
        known = self._ranges.get(prefix)
        if known is None:
            lo = bisect.bisect_left(self._sorted, prefix)
            beyond = prefix.rstrip(b"\xff")
            hi = len(self._sorted)
            if beyond:
                hi = bisect.bisect_left(self._sorted, beyond[:-1] + bytes([beyond[-1] + 1]), lo=lo)
            known = self._ranges[prefix] = (lo, hi)
        return known


def lookaheads(tokens: TokenBytes, ids: Sequence[int]) -> np.ndarray:
    """(len(ids),) uint8 into LOOKAHEADS: what to put after a candidate when its text is tokenised.

    A candidate that ends in spaces is not the end of the text, and tokenizers of the GPT family give a word its last
    space: `x` would take one from the candidate, ` x` does not. The first that keeps the candidate a token of its own
    tokenizer is taken, else `x`.
    """
    result = np.zeros(len(ids), dtype=np.uint8)
    spaced, texts = [], []
    for n, i in enumerate(ids):
        text = (tokens.pieces[i] or b"").decode(errors="replace")
        if text[-1:].isspace():
            spaced.append(n)
            texts += [text + follow for follow in LOOKAHEADS[1:]]
    encodings = tokens.fragment.encode_batch_fast(texts, add_special_tokens=False)
    for m, n in enumerate(spaced):
        kept = [encoding.ids[:1] == [ids[n]] for encoding in encodings[2 * m : 2 * m + 2]]
        result[n] = 2 if kept == [False, True] else 1
    return result


def first_tokens(target: TokenBytes, texts: list[str], sizes: list[int]) -> list[int]:
    """Per text the target token that it begins with, TAIL where that reaches beyond the first `size` bytes."""
    pieces, found = target.pieces, []
    for text, size, encoding in zip(
        texts, sizes, target.fragment.encode_batch_fast(texts, add_special_tokens=False), strict=True
    ):
        ids = encoding.ids
        piece = pieces[ids[0]] if ids else None
        # Longer than the candidate: reaches into the look-ahead. Other bytes: the normaliser changed them.
        fits = piece is not None and len(piece) <= size and text.encode().startswith(piece)
        found.append(ids[0] if fits else TAIL)
    return found


def exact_tokens(target: TokenBytes) -> dict[bytes, int]:
    """The target token of exactly these bytes, where no longer one begins with them.

    For candidates that end inside a character. Where a longer token begins with their bytes, how the character ends decides
    which it is: a byte token of Llama-2 is hardly ever emitted where whole characters begin like it.
    """
    found: dict[bytes, int] = {}
    for i, piece in enumerate(target.pieces):
        if piece:
            known = found.setdefault(piece, i)
            # They come first in SentencePiece vocabularies, but text uses the plain one.
            if known in target.byte_tokens:
                found[piece] = i
    ordered = sorted(found)
    return {piece: found[piece] for piece, after in zip(ordered, [*ordered[1:], b""]) if not after.startswith(piece)}


class CandidateTable:
    """Rule 3 of reference.py for candidates that begin a new pre-token.

    Attributes:
        counts_for: (source vocabulary,) int32, the target token that a candidate counts for at the beginning of a
            pre-token, or TAIL.
        opens: (source vocabulary,) bool, the candidate begins a new pre-token after a target token that `closes`.
        closes: (target vocabulary,) bool.
        lookahead: (source vocabulary,) uint8 into LOOKAHEADS.
        exact: the target token of exactly given bytes.
    A candidate opens when it is a space and then something else: every pre-tokenizer that splits words cuts there (probed),
    and without one the cut must be between characters that no token of the target holds next to each other. What stands
    before must also stay as it is, which is found out once a prefix. Everything else depends on the prefix anyway.
    """

    def __init__(self, target: TokenBytes, source: TokenBytes, boundaries: Boundaries):
        pieces = source.pieces
        self.lookahead = lookaheads(source, range(len(pieces)))
        self.exact = exact_tokens(target)
        self.counts_for = np.full(len(pieces), TAIL, dtype=np.int32)
        self.opens = np.zeros(len(pieces), dtype=bool)
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
            places.append(i)
            texts.append(text + LOOKAHEADS[self.lookahead[i]])
            sizes.append(len(piece))
        self.counts_for[places] = first_tokens(target, texts, sizes)
        self.closes = boundaries.closes_before_space()


def same_tokens(left: TokenBytes, right: TokenBytes) -> bool:
    """Whether two tokenizers give every text the same ids (control tokens aside)."""

    def essence(tokens: TokenBytes):
        config = json.loads(tokens.fragment.to_str())
        added = {t["content"]: t["id"] for t in config["added_tokens"] if t["id"] not in tokens.specials}
        return added, config["normalizer"], config["pre_tokenizer"], config["model"]

    return left is right or (left.pieces == right.pieces and essence(left) == essence(right))
