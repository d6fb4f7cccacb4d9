"""Finds the source positions at which the alignment needs more than the top k, because a target token begins inside a token.

If a target token begins at byte a inside the source token [b, f), only those of the source's tokens count that begin with
the bytes [b, a) (rule 2 of reference.py). They are one range of the source's vocabulary in byte order. The capture
therefore needs one slice of a row's logits to get their exact mass and the top k among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from profuser.alignment.spans import match_spans
from profuser.alignment.types import INSIDE
from profuser.alignment.vocab_map import ByteOrder
from profuser.text.encoded import Encoded
from profuser.text.token_bytes import TokenBytes


@dataclass(slots=True)
class RangeRequest:
    """Ranges of a source's vocabulary that its capture must hold, sorted by (rows, strip).

    rows: (r,) int32, rows of the capture.
    strip: (r,) int32, the number of bytes of the row's own token with which the tokens of the range begin.
    lo, hi: (r,) int32, the range [lo, hi) of the vocabulary in byte order.
    """

    rows: np.ndarray
    strip: np.ndarray
    lo: np.ndarray
    hi: np.ndarray


def ranges_needed(
    target_tokens: TokenBytes, target: Encoded, source_tokens: TokenBytes, source: Encoded, order: ByteOrder
) -> RangeRequest:
    """The ranges that are needed to align `source` to `target`, which are two encodings of one response."""
    a, e = _spans(target)
    b, f = _spans(source)
    kind, position = match_spans(a, e, b, f)
    source_ids = source.input_ids[source.start : source.stop]
    target_ids = target.input_ids[target.start : target.stop]
    clip = _clips(source_tokens, source_ids, b, f)
    a, b = np.maximum(a, 0), np.maximum(b, 0)
    # Pairs (row, strip): first for the target tokens that begin inside a source token (rule 2).
    pairs: set[tuple[int, int]] = set()
    for t in np.flatnonzero(kind == INSIDE).tolist():
        j = int(position[t])
        pairs.add((j, int(clip[j] + a[t] - b[j])))
    # Then for the source tokens with bytes in front of the response that the target's token does not have (rule 6).
    clipped = np.flatnonzero(clip > 0)
    for t in np.flatnonzero((kind < INSIDE) & np.isin(position, clipped)).tolist():
        j = int(position[t])
        ours, theirs = target_tokens.piece(target_ids[t]), source_tokens.piece(source_ids[j])
        if ours[: len(ours) - int(e[t] - a[t])] != theirs[: clip[j]]:
            pairs.add((j, int(clip[j])))
    found = sorted(pairs)
    assert all(strip > 0 for _, strip in found), "encodings hold the response's bytes"
    ranges = [order.range_of(source_tokens.piece(source_ids[j])[:strip]) for j, strip in found]
    columns = np.array([(*pair, *span) for pair, span in zip(found, ranges)], dtype=np.int32).reshape(-1, 4)
    return RangeRequest(*(np.ascontiguousarray(column) for column in columns.T))


def _spans(encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
    spans = np.asarray(encoded.spans, dtype=np.int32).reshape(-1, 2)
    return np.ascontiguousarray(spans[:, 0]), np.ascontiguousarray(spans[:, 1])


def _clips(tokens: TokenBytes, ids: list[int], begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The number of bytes that each token has in front of the response or of its section."""
    lengths = np.array([len(tokens.piece(i)) for i in ids], dtype=np.int32)
    return lengths - (end - np.maximum(begin, 0))
