"""The types that an alignment takes and returns: a source's capture, the aligned distributions, and their kinds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KINDS = ("same_span", "shared_prefix", "inside", "skipped")
SAME_SPAN, SHARED_PREFIX, INSIDE, SKIPPED = range(len(KINDS))
SKIP_REASONS = ("", "no_prefix_range", "low_reliability", "empty", "no_source_position", "not_matched")
(
    ALIGNED,
    SKIP_NO_PREFIX_RANGE,  # the capture does not hold the mass of the source's tokens that begin with the needed bytes
    SKIP_LOW_RELIABILITY,
    SKIP_EMPTY,  # nothing that the source says counts for a token of the target
    SKIP_NO_SOURCE_POSITION,
    SKIP_NOT_MATCHED,  # only in mode fusellm
) = range(len(SKIP_REASONS))


WHOLE, DIGITS, NUMBERS = 0, -1, -2
"""In place of the number of bytes: the range is the whole vocabulary, the tokens that begin with a digit, or all numbers."""


@dataclass(slots=True)
class SourceCapture:
    """What one source says about one response of n bytes.

    There is one row per token of the response in the source's tokenizer, and then one for its end of turn, if the response
    was not cut. Row j is the distribution of the source's own token j itself.

    ids: (m,) int32, the source's own tokens.
    begin, stop: (m,) int32, their byte spans relative to the response. The first begin may be below 0. The span of the end
        of turn is (n, n).
    top_ids: (m, k) int32, -1 = padding.
    top_logprobs: (m, k) float32, natural log, not renormalised to the top k.
    own_logprobs: (m,) float32, natural log, the own token's, whether it is among the top k or not.
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

    rows, strip: (r,) int32, sorted by (rows, strip). No pair comes twice. In place of a number of bytes, WHOLE stands for all
        tokens, DIGITS for those that begin with a digit, and NUMBERS for the numbers that the source was asked for.
    logmass: (r,) float32, natural log of the exact probability of all these tokens together.
    ids: (r, k) int32, the most probable of what these tokens count for, as the maps of `merging` spell it; -1 = padding. The
        row's own token is not among them, unless the range was not merged. Numbers have the ids of `numbers`.
    logprobs: (r, k) float32, natural log, not renormalised to the range.
    """

    rows: np.ndarray
    strip: np.ndarray
    logmass: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray

    @classmethod
    def none(cls, k: int = 1) -> PrefixRanges:
        """The ranges of a source inside whose tokens no target token begins: there are none."""
        return cls(
            rows=np.zeros(0, np.int32),
            strip=np.zeros(0, np.int32),
            logmass=np.zeros(0, np.float32),
            ids=np.zeros((0, k), np.int32),
            logprobs=np.zeros((0, k), np.float32),
        )

    def with_others(self, others: PrefixRanges) -> PrefixRanges:
        """These ranges and others of the same rows, which are of other kinds."""
        if not len(others.rows):
            return self
        both = (self, others)
        rows, strip = (np.concatenate([getattr(x, name) for x in both]) for name in ("rows", "strip"))
        order = np.lexsort((strip, rows))
        width = max(x.ids.shape[1] for x in both)

        def columns(name: str, padding: float) -> np.ndarray:
            wide = [
                np.pad(of, ((0, 0), (0, width - of.shape[1])), constant_values=padding)
                for of in (getattr(x, name) for x in both)
            ]
            return np.concatenate(wide)[order]

        logmass = np.concatenate([x.logmass for x in both])[order]
        return PrefixRanges(rows[order], strip[order], logmass, columns("ids", -1), columns("logprobs", -np.inf))


@dataclass(slots=True)
class Aligned:
    """A source's distributions for the n target positions of a response.

    The positions are the target's tokens of the response, and then its end of turn, if the response was not cut.

    kind: (n,) uint8, indices into KINDS. The spans alone decide it, but in mode fusellm a position that takes no row of
        the source is SKIPPED.
    source_position: (n,) int32, rows of the capture, -1 where there is none.
    offsets: (n + 1,) int64. The entries of position t are [offsets[t], offsets[t + 1]) of ids and logprobs, the most
        probable first.
    ids: (nnz,) int32, target tokens.
    logprobs: (nnz,) float32, natural log.
    tail: (n,) float32, the probability outside the entries, 1 where the position is skipped.
    reliability: (n,) float32, 1 - dropped / exact mass (rule 5 of reference.py).
    skip_reason: (n,) uint8, indices into SKIP_REASONS, 0 = aligned.
    """

    kind: np.ndarray
    source_position: np.ndarray
    offsets: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    tail: np.ndarray
    reliability: np.ndarray
    skip_reason: np.ndarray
