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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from profuser.alignment.merging import UNMERGED, Merging, merging_of
from profuser.alignment.spans import match_spans
from profuser.alignment.types import DIGITS, INSIDE, WHOLE
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
    map_of: (r,) int32, the range's map, an index into the pair's maps (`merging.Maps`), or UNMERGED.
    maps: the maps of the pair.
    target_size: the number of tokens of the target, above which maps spell the source's tokens.
    """

    rows: np.ndarray
    strip: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    map_of: np.ndarray
    maps: list[np.ndarray]
    target_size: int

    def spelt(self, ids: np.ndarray) -> np.ndarray:
        """What `source_topk` found in these ranges, as the maps spell it: (r, k) int32."""
        unmerged = (self.map_of == UNMERGED)[:, None] & (ids >= 0)
        return np.where(unmerged, ids + self.target_size, ids).astype(np.int32)


def flat_maps(requests: Sequence[RangeRequest]) -> tuple[np.ndarray, np.ndarray]:
    """Puts the maps that some requests of one pair use end to end, each once, as `source_topk` takes them.

    Returns:
        begin: (r,) int64, where the map of each range begins, or -1 without one.
        mapped: (l,) int32, the maps.
    """
    assert all(r.maps is requests[0].maps for r in requests), "requests of one pair share their maps"
    map_of = np.concatenate([r.map_of for r in requests]) if requests else np.zeros(0, np.int32)
    used = np.unique(map_of[map_of != UNMERGED])
    parts = [requests[0].maps[i] for i in used.tolist()]
    begins = np.full(used.max(initial=0) + 1, -1, dtype=np.int64)
    begins[used] = np.cumsum([0, *map(len, parts)])[:-1]
    begin = np.where(map_of == UNMERGED, -1, begins[map_of])
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
    merging = merging_of(target_tokens, source_tokens, order)
    clip = merging.source_lengths[source_ids] - (f - np.maximum(b, 0))
    target_clip = merging.target_lengths[target_ids] - (e - np.maximum(a, 0))
    a, b = np.maximum(a, 0), np.maximum(b, 0)

    # The target's token before each of its positions, -1 where no text stands there.
    before = np.array([-1, *target.input_ids][target.start : target.stop], dtype=np.int64)
    before[merging.target_control[before] & (before >= 0)] = -1

    # Target tokens that begin inside a source token (rule 2), and source tokens with bytes in front of the response that the
    # target's token does not have (rule 6).
    found: dict[tuple[int, int], tuple[int, int, int]] = {}
    inside = [(t, int(clip[position[t]] + a[t] - b[position[t]])) for t in np.flatnonzero(kind == INSIDE).tolist()]
    for t in np.flatnonzero((kind < INSIDE) & np.isin(position, np.flatnonzero(clip > 0))).tolist():
        j = int(position[t])
        ours, theirs = target_tokens.piece(int(target_ids[t])), source_tokens.piece(int(source_ids[j]))
        if ours[: target_clip[t]] != theirs[: clip[j]]:
            inside.append((t, int(clip[j])))
    for t, strip in inside:
        assert strip > 0, "encodings hold the response's bytes"
        j = int(position[t])
        entered = source_tokens.piece(int(source_ids[j]))[:strip]
        if (j, strip) not in found:
            found[j, strip] = (*order.range_of(entered), merging.prefix_map(entered, starts_text=before[t] < 0))
    prefixes = np.array([(*key, *value) for key, value in sorted(found.items())], dtype=np.int32).reshape(-1, 5)
    columns = [prefixes]
    if not merging.same_tokens:
        whole = _whole_rows(merging, kind, position, a, b, source_ids, before, clip, target_clip)
        columns.append(_columns(*whole, WHOLE, 0, len(order.ids)))
        if merging.merges_digits:
            # Behind an own token that ends in a digit, at its end of turn too (rule 8).
            rows = np.flatnonzero(merging.ends_in_digit[source_ids]) + 1
            rows = rows[rows < len(source_ids) + (source.end_of_turn is not None)]
            columns.append(_columns(rows, np.full(len(rows), UNMERGED), DIGITS, *merging.digit_range))
    table = np.concatenate(columns)
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    rows, strip, lo, hi, map_of = (np.ascontiguousarray(column) for column in table.T)
    return RangeRequest(rows, strip, lo, hi, map_of, merging.maps, len(target_tokens.pieces))


def _whole_rows(
    merging: Merging, kind, position, a, b, source_ids, before, clip, target_clip
) -> tuple[np.ndarray, np.ndarray]:
    """The rows that are merged over the whole vocabulary (rule 7), and the map of each."""
    # Rows where a target token begins. Where two begin, because one has no bytes, it is not decided what a token counts for.
    begins = kind < INSIDE
    count = np.bincount(position[begins], minlength=len(b))
    t = np.flatnonzero(begins & (target_clip == 0))
    t = t[(count[position[t]] == 1) & (clip[position[t]] == 0)]
    # Rows within a target token. What ends that token is told by the source's token before.
    within = np.flatnonzero((a[np.minimum(np.searchsorted(a, b), len(a) - 1)] != b) & (clip == 0))
    within = within[within > 0]
    rows = np.concatenate([position[t], within])
    map_of = np.concatenate([merging.start_maps(before[t]), merging.path_maps(source_ids[within - 1])])
    return rows[map_of != UNMERGED], map_of[map_of != UNMERGED]


def _columns(rows: np.ndarray, map_of: np.ndarray, strip: int, lo: int, hi: int) -> np.ndarray:
    """Ranges that differ in their rows and maps only, as rows of a table."""
    table = np.empty((len(rows), 5), dtype=np.int32)
    table[:, 0], table[:, 1:4], table[:, 4] = rows, (strip, lo, hi), map_of
    return table


def _spans(encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
    spans = np.asarray(encoded.spans, dtype=np.int32).reshape(-1, 2)
    return np.ascontiguousarray(spans[:, 0]), np.ascontiguousarray(spans[:, 1])
