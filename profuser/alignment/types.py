"""What goes into an alignment and what comes out: a source's capture, the aligned distributions, and their kinds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KINDS = ("same_span", "shared_prefix", "inside", "skipped")
SAME_SPAN, SHARED_PREFIX, INSIDE, SKIPPED = range(len(KINDS))
SKIP_REASONS = ("", "no_prefix_range", "low_reliability", "empty", "no_source_position", "not_matched")
(
    ALIGNED,
    SKIP_NO_PREFIX_RANGE,  # the capture does not hold the mass of the source's tokens that begin with these bytes
    SKIP_LOW_RELIABILITY,
    SKIP_EMPTY,  # nothing that the source said counts for a token
    SKIP_NO_SOURCE_POSITION,
    SKIP_NOT_MATCHED,  # mode fusellm only
) = range(len(SKIP_REASONS))


@dataclass(slots=True)
class SourceCapture:
    """What one source says about one response; row j is its distribution OF its own token j.

    Rows are its tokens start..stop and then its end of turn, if the response was not cut.
    ids: (m,) int32 own tokens; begin, stop: (m,) int32 byte spans relative to the response (end of turn: n, n; the
        first begin may be < 0).
    top_ids: (m, k) int32, -1 = padding; top_logprobs: (m, k) float32, natural log, absolute.
    own_logprobs: (m,) float32, the own token's, whether it is among the top k or not.
    ranges: what the rows say about the tokens that begin with given bytes.
    """

    ids: np.ndarray
    begin: np.ndarray
    stop: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    own_logprobs: np.ndarray
    ranges: PrefixRanges


@dataclass(slots=True)
class PrefixRanges:
    """A source's distribution among its tokens that begin with the first `strip` bytes of a row's own token.

    rows, strip: (r,) int32, sorted by (rows, strip), no pair twice.
    logmass: (r,) float32, log of the exact probability of all of these tokens.
    ids: (r, k) int32, the most probable of them, -1 = padding; logprobs: (r, k) float32, natural log, absolute.
    """

    rows: np.ndarray
    strip: np.ndarray
    logmass: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray

    @classmethod
    def none(cls, k: int = 1) -> PrefixRanges:
        """For a source none of whose tokens is entered."""
        return cls(
            rows=np.zeros(0, np.int32),
            strip=np.zeros(0, np.int32),
            logmass=np.zeros(0, np.float32),
            ids=np.zeros((0, k), np.int32),
            logprobs=np.zeros((0, k), np.float32),
        )


@dataclass(slots=True)
class Aligned:
    """A source's distributions over the target's tokens start..stop and its end of turn, if the response was not cut.

    kind: (n,) uint8 into KINDS, by structure alone; source_position: (n,) int32 row of the capture, -1 none.
    offsets: (n + 1,) int64 into ids (nnz,) int32 and logprobs (nnz,) float32, a position's entries by falling mass.
    tail: (n,) float32, probability outside the entries (1 where skipped); reliability: (n,) float32, 1 - dropped mass.
    skip_reason: (n,) uint8 into SKIP_REASONS, 0 = aligned.
    """

    kind: np.ndarray
    source_position: np.ndarray
    offsets: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    tail: np.ndarray
    reliability: np.ndarray
    skip_reason: np.ndarray
