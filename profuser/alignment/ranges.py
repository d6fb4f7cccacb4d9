"""Finds out what the alignment needs to know of a source's distributions beyond their top k: ranges of the vocabulary.

The source's vocabulary is put into byte order, in which the tokens that begin with given bytes are one range. Of a range,
the capture keeps the exact mass of all its tokens and the top k among them, or among what they count for (rule 7 of
reference.py). Three kinds of range are needed:

- If a target token begins at byte a inside the source token [b, f), only those of the source's tokens count that begin
  with the bytes [b, a) (rule 2).
- Where the source's and the target's token begin together, and at the later source tokens within one target token (rule 4),
  the whole vocabulary is a range. It is merged before it is cut to its top k (rule 7).
- Behind a source token that ends in a digit, the tokens that begin with a digit are a range, because a target that merges
  digits needs the probability that the number goes on (rule 8).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from profuser.alignment.merging import START, Merging, merging_of
from profuser.alignment.spans import match_spans
from profuser.alignment.types import DIGITS, INSIDE, SKIPPED, WHOLE
from profuser.alignment.vocab_map import ByteOrder
from profuser.text.encoded import Encoded
from profuser.text.token_bytes import TokenBytes


@dataclass(slots=True)
class RangeRequest:
    """Ranges of a source's vocabulary that its capture must hold, sorted by (rows, strip).

    rows: (r,) int32, rows of the capture.
    strip: (r,) int32, the number of bytes of the row's own token with which the tokens of the range begin, or WHOLE for the
        whole vocabulary, or DIGITS for the tokens that begin with a digit.
    lo, hi: (r,) int32, the range [lo, hi) of the vocabulary in byte order.
    maps: r maps (hi - lo,) int32, what each token of the range counts for (`merging`). Without one, tokens count for
        themselves.
    target_size: the number of tokens of the target, above which maps spell the source's tokens.
    """

    rows: np.ndarray
    strip: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    maps: Sequence[np.ndarray | None]
    target_size: int

    def spelt(self, ids: np.ndarray) -> np.ndarray:
        """What `source_topk` found in these ranges, as the maps spell it: (r, k) int32."""
        unmerged = np.array([found is None for found in self.maps], dtype=bool)
        return np.where(unmerged[:, None] & (ids >= 0), ids + self.target_size, ids).astype(np.int32)


def flat_maps(maps: Sequence[np.ndarray | None]) -> tuple[np.ndarray, np.ndarray]:
    """Puts the maps of some ranges end to end, each once, as `source_topk` takes them.

    Returns:
        begin: (r,) int64, where the map of each range begins, or -1 without one.
        mapped: (l,) int32, the maps.
    """
    begins: dict[int, int] = {}
    parts: list[np.ndarray] = []
    end = 0
    for found in maps:
        if found is not None and id(found) not in begins:
            begins[id(found)] = end
            parts.append(found)
            end += len(found)
    begin = np.array([-1 if found is None else begins[id(found)] for found in maps], dtype=np.int64)
    return begin, np.concatenate(parts) if parts else np.zeros(0, np.int32)


def ranges_needed(
    target_tokens: TokenBytes, target: Encoded, source_tokens: TokenBytes, source: Encoded, order: ByteOrder
) -> RangeRequest:
    """The ranges that are needed to align `source` to `target`, which are two encodings of one response."""
    a, e = _spans(target)
    b, f = _spans(source)
    kind, position = match_spans(a, e, b, f)
    source_ids = np.array(source.input_ids[source.start : source.stop], dtype=np.int64)
    target_ids = np.array(target.input_ids[target.start : target.stop], dtype=np.int64)
    clip, target_clip = _clips(source_tokens, source_ids, b, f), _clips(target_tokens, target_ids, a, e)
    a, b = np.maximum(a, 0), np.maximum(b, 0)
    merging = merging_of(target_tokens, source_tokens, order)
    found: dict[tuple[int, int], tuple[int, int, np.ndarray | None]] = {}

    # The boundary that each target token begins behind (rule 7).
    starts = merging.boundaries.prefix_starts(
        target.input_ids[: target.stop], target.words[: target.stop], target.start
    )
    empty = starts[:-1] == np.arange(target.start, target.stop) if len(target_ids) else np.zeros(0, bool)

    def prefix(j: int, strip: int, t: int) -> None:
        entered = source_tokens.piece(int(source_ids[j]))[:strip]
        boundary = START if empty[t] else merging.behind(entered)
        merged = None if merging.same_tokens else merging.prefix_map(entered, boundary)
        found.setdefault((j, strip), (*order.range_of(entered), merged))

    # Target tokens that begin inside a source token (rule 2).
    for t in np.flatnonzero(kind == INSIDE).tolist():
        j = int(position[t])
        prefix(j, int(clip[j] + a[t] - b[j]), t)
    # Source tokens with bytes in front of the response that the target's token does not have (rule 6).
    clipped = np.flatnonzero(clip > 0)
    for t in np.flatnonzero((kind < INSIDE) & np.isin(position, clipped)).tolist():
        j = int(position[t])
        ours, theirs = target_tokens.piece(int(target_ids[t])), source_tokens.piece(int(source_ids[j]))
        if ours[: len(ours) - int(e[t] - a[t])] != theirs[: clip[j]]:
            prefix(j, int(clip[j]), t)
    assert all(strip > 0 for _, strip in found), "encodings hold the response's bytes"

    if not merging.same_tokens:
        behind = np.array(
            target.input_ids[target.start - 1 : target.stop - 1] if target.start else [-1, *target_ids[:-1]]
        )
        for j, merged in _whole_rows(merging, kind, position, a, b, source_ids, behind, clip, target_clip, empty):
            found[j, WHOLE] = (0, len(order.ids), merged)
        if merging.merges_digits:
            # Behind an own token that ends in a digit, its end of turn included (rule 8).
            rows = np.flatnonzero(merging.ends_in_digit[source_ids]) + 1
            last = len(source_ids) + (source.end_of_turn is not None)
            for j in rows[rows < last].tolist():
                found[j, DIGITS] = (*merging.digit_range, None)
    keys = sorted(found)
    columns = np.array([(*key, *found[key][:2]) for key in keys], dtype=np.int32).reshape(-1, 4)
    rows, strip, lo, hi = (np.ascontiguousarray(column) for column in columns.T)
    return RangeRequest(rows, strip, lo, hi, [found[key][2] for key in keys], len(target_tokens.pieces))


def _whole_rows(
    merging: Merging, kind, position, a, b, source_ids, behind, clip, target_clip, empty
) -> Iterator[tuple[int, np.ndarray]]:
    """The rows that are merged over the whole vocabulary, each with its map (rule 7).

    `behind` has the token before each of the target's, and `empty` says whether nothing of the pre-token stands before it.
    """
    # Rows where a target token begins. Where two begin, because one has no bytes, it is not decided what a token counts for.
    begins = (kind < INSIDE) & (target_clip == 0)
    rows, counts = np.unique(position[(kind != SKIPPED) & (kind < INSIDE)], return_counts=True)
    once = np.isin(position, rows[counts == 1])
    for t in np.flatnonzero(begins & once).tolist():
        j = int(position[t])
        if clip[j]:
            continue
        merged = merging.start_map(START if empty[t] else merging.behind_target(int(behind[t])))
        if merged is not None:
            yield j, merged
    # Rows within a target token.
    for j in np.flatnonzero(~np.isin(b, a) & (clip == 0)).tolist():
        if j and (merged := merging.path_map(merging.behind_source(int(source_ids[j - 1])))) is not None:
            yield j, merged


def _spans(encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
    spans = np.asarray(encoded.spans, dtype=np.int32).reshape(-1, 2)
    return np.ascontiguousarray(spans[:, 0]), np.ascontiguousarray(spans[:, 1])


def _clips(tokens: TokenBytes, ids: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The number of bytes that each token has in front of the response or of its section."""
    lengths = np.array([len(tokens.piece(i)) for i in ids.tolist()], dtype=np.int32)
    return lengths - (end - np.maximum(begin, 0))
