"""`align` puts a source's distributions of a plain text on a target's tokens, for use in a trainer of your own.

There is no chat template, no begin token and no end of turn: the text is one response that stands alone. This package's
own trainer uses the same alignment (`engine.py`) for conversations, with a template around the response.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from profuser.alignment.engine import CppByteAligner, byte_aligner
from profuser.alignment.ranges import RangeRequest, flat_maps, ranges_needed
from profuser.alignment.reference import PythonByteAligner, check_capture
from profuser.alignment.types import PrefixRanges, SourceCapture
from profuser.alignment.vocab_map import ByteOrder
from profuser.errors import DataError
from profuser.text.encoded import Encoded
from profuser.text.token_bytes import TokenBytes


class PlainText:
    """A tokenizer as one side of an alignment of texts without a template (`vocab_map.TextFormat`)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.token_bytes = TokenBytes(tokenizer)
        self.end_ids: tuple[int, ...] = ()
        self.end_id: int | None = None
        self.closing = b""

    @functools.cached_property
    def byte_order(self) -> ByteOrder:
        return ByteOrder(self.token_bytes)

    def encode(self, text: str) -> Encoded:
        """Encodes the text as a response that stands alone. Strings of control tokens in it are plain text.

        Raises:
            TypeError: the text is not a string.
            TokenBytesMismatch: the tokens do not hold the text's bytes exactly (reason "normaliser" or "decoder").
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, got {type(text).__name__}; align one text at a time")
        ids, words = self.token_bytes.encode_parts([(text, True)])
        spans = self.token_bytes.spans(ids, text)
        self.token_bytes.check_whole(ids, spans, text)
        return Encoded(input_ids=ids, spans=spans, start=0, stop=len(ids), end_of_turn=None, words=words)


@dataclass(frozen=True, slots=True)
class AlignedText:
    """The N target tokens of a text, with a source's distribution for each of them.

    Row n is the distribution of token n itself, which a model gives at the position before that token. A skipped token has
    no entries. The source's three arrays are in the form that `fused_linear_fusion_loss` takes.

    target_ids: (N,) int64.
    target_spans: (N, 2) int32, the bytes of the text that each token covers.
    source_ids: (N, K) int32, target tokens, -1 = padding.
    source_logprobs: (N, K) fp32, natural log.
    source_tail: (N,) fp32, the probability outside the K entries.
    reliability: (N,) fp32, the share of the source's mass that can follow the target's prefix.
    kind, skip_reason: (N,) uint8, indices into profuser.alignment.types.KINDS and SKIP_REASONS.
    """

    target_ids: Tensor
    target_spans: Tensor
    source_ids: Tensor
    source_logprobs: Tensor
    source_tail: Tensor
    reliability: Tensor
    kind: Tensor
    skip_reason: Tensor


def prefix_ranges(
    text: str, target: PreTrainedTokenizerBase, source: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The ranges that `source_topk` needs besides its top k: `source_topk(..., ranges=prefix_ranges(...))`.

    Where a target token begins inside a source token, the alignment needs the source's mass among the tokens that begin
    with the same bytes up to that place (rule 2 of profuser/alignment/reference.py). Where many of the source's tokens count
    for one of the target's, their masses must be added before the top k are chosen (rule 7). And where a number may go on,
    the mass of all digits must be known (rule 8). This function needs neither model.

    Args:
        text: the text as `align` takes it.
        target, source: Hugging Face tokenizers with a `tokenizers` backend.
    Returns:
        rows: (R,) int64, a row of the source's tokens of `text` per range.
        lo, hi: (R,) int64, the range [lo, hi) of vocab_order.
        vocab_order: (V',) int64, the source's tokens sorted by their bytes.
        map_begin: (R,) int64, where the range's map begins in `mapped`, -1 without one.
        mapped: (L,) int64, what the tokens of the ranges count for.
    Raises:
        TokenBytesMismatch: a tokenizer changes the text.
    """
    ours, theirs = plain_text(target), plain_text(source)
    needed = _needed(text, ours, theirs)
    arrays = (needed.rows, needed.lo, needed.hi, theirs.byte_order.ids, *flat_maps([needed]))
    rows, lo, hi, vocab_order, map_begin, mapped = (torch.from_numpy(x).long() for x in arrays)
    return rows, lo, hi, vocab_order, map_begin, mapped


def align(
    text: str,
    target: PreTrainedTokenizerBase,
    source: PreTrainedTokenizerBase,
    top_ids: Tensor,
    top_logprobs: Tensor,
    own_logprobs: Tensor,
    ranges: Sequence[Tensor] | None = None,
    *,
    top_k: int = 10,
    min_reliability: float = 0.1,
) -> AlignedText:
    """Turns a source's top-k distributions of its own tokens of `text` into distributions of the target's tokens.

    Args:
        text: it is tokenised on both sides as it stands, without begin or end tokens. The name of a control token in it is
            plain text. What the source says of its own control tokens, for example of its end of turn, goes to the tail;
            conversations are aligned by profuser.prepare.
        target, source: Hugging Face tokenizers with a `tokenizers` backend.
        top_ids, top_logprobs: (M, k), the source's top-k ids and natural log-probabilities. Row m is the distribution of
            the source's own token m itself, so it comes from the position before that token. -1 = padding; a row that is
            all padding says nothing.
        own_logprobs: (M,), the log-probability of the source's own token m (`-ce` of `source_topk`).
        ranges: (range_ids (R, k), range_logprobs (R, k), range_logmass (R,)), which `source_topk` returns for
            `prefix_ranges(text, target, source)`. Without them, target tokens that begin inside a source token are skipped.
        top_k: K, the number of entries that are kept per target token.
        min_reliability: a target token is skipped if less than this share of the source's mass can follow its prefix.
    Raises:
        TokenBytesMismatch: a tokenizer changes the text (reason "normaliser" or "decoder"); skip this text.
        DataError: the arrays do not belong to these tokens, are not log-probabilities, or contradict each other.
        ValueError: ids are not integers, log-probabilities are not floats, or a setting is out of range.
        TypeError: the text is not a string, or a tokenizer is not one of Hugging Face's.

    Example:
        >>> import torch
        >>> from profuser import align, prefix_ranges, source_topk
        >>> from profuser.recipe.places import resolve
        >>> from transformers import AutoTokenizer
        >>> target, source = (AutoTokenizer.from_pretrained(resolve(f"demo:{name}")) for name in ("guardian", "scholar"))
        >>> text = "A bozun is a stone."
        >>> labels = torch.tensor(source(text, add_special_tokens=False).input_ids)
        >>> hidden = torch.randn(len(labels), 8)  # the source's hidden states, each from the position before its token
        >>> head = torch.randn(len(source), 8)
        >>> ranges = prefix_ranges(text, target, source)
        >>> ids, logprobs, _, ce, *of_ranges = source_topk(hidden, head, labels, 10, ranges=ranges)
        >>> aligned = align(text, target, source, ids, logprobs, -ce, of_ranges)
        >>> tuple(aligned.source_ids.shape) == (len(aligned.target_ids), 10)
        True

    Source: the rules are this project's own, and profuser/alignment/reference.py states them.
    """
    # Tokenise the text on both sides, and check the arrays against the source's tokens.
    ours, theirs = plain_text(target), plain_text(source)
    encoded, own = ours.encode(text), theirs.encode(text)
    spans = np.array(own.spans, dtype=np.int32).reshape(-1, 2)
    ids, logprobs = _array(top_ids, np.int32), _array(top_logprobs, np.float32)
    for name, rows in (("top_ids", ids), ("top_logprobs", logprobs), ("own_logprobs", own_logprobs)):
        if len(rows) != len(spans):
            raise DataError(
                f"{name} must have a row for each of the source's {len(spans)} tokens of the text, got {len(rows)}; tokenize it "
                "with add_special_tokens=False, control tokens in it as plain text (split_special_tokens=True)"
            )
    if ranges is None:
        captured = PrefixRanges.none()
    else:
        needed = _needed(text, ours, theirs)
        if len(ranges) != 3:
            raise ValueError(
                f"ranges must be (range_ids, range_logprobs, range_logmass) of source_topk, got {len(ranges)} values; pass the "
                "last three that it returns"
            )
        range_ids, range_logprobs, range_logmass = ranges
        if len(range_ids) != len(needed.rows):
            raise DataError(
                f"ranges must have one row per range of prefix_ranges ({len(needed.rows)}), got {len(range_ids)}; pass what "
                "source_topk returned for this text and this pair of tokenizers"
            )
        captured = PrefixRanges(
            rows=needed.rows,
            strip=needed.strip,
            logmass=_array(range_logmass, np.float32),
            ids=needed.spelt(_array(range_ids, np.int32)),
            logprobs=_array(range_logprobs, np.float32),
        )
    # Align them as the capture of one response.
    capture = SourceCapture(
        ids=np.array(own.input_ids, dtype=np.int32),
        begin=np.ascontiguousarray(spans[:, 0]),
        stop=np.ascontiguousarray(spans[:, 1]),
        top_ids=ids,
        top_logprobs=logprobs,
        own_logprobs=_array(own_logprobs, np.float32),
        ranges=captured,
    )
    check_capture(capture)
    check_consistent(capture)
    check_vocabulary(capture, len(theirs.token_bytes.pieces))
    aligned = _aligner(ours, theirs, top_k, min_reliability).align(text.encode(), encoded, capture)
    # Spread the entries, which lie end to end, over rows of equal width.
    counts = np.diff(aligned.offsets)
    row = np.repeat(np.arange(len(counts)), counts)
    slot = np.arange(len(row)) - np.repeat(aligned.offsets[:-1], counts)
    width = min(top_k, len(ours.token_bytes.pieces))
    source_ids = np.full((len(counts), width), -1, dtype=np.int32)
    source_logprobs = np.zeros((len(counts), width), dtype=np.float32)
    source_ids[row, slot], source_logprobs[row, slot] = aligned.ids, aligned.logprobs
    return AlignedText(
        target_ids=torch.tensor(encoded.input_ids, dtype=torch.long),
        target_spans=torch.tensor(encoded.spans, dtype=torch.int32).reshape(-1, 2),
        source_ids=torch.from_numpy(source_ids),
        source_logprobs=torch.from_numpy(source_logprobs),
        source_tail=torch.from_numpy(np.where(counts > 0, aligned.tail, 0).astype(np.float32)),
        reliability=torch.from_numpy(aligned.reliability.copy()),
        kind=torch.from_numpy(aligned.kind.copy()),
        skip_reason=torch.from_numpy(aligned.skip_reason.copy()),
    )


def check_consistent(capture: SourceCapture) -> None:
    """Raises DataError where the arrays contradict each other about a token, or add up to more mass than there is."""
    # An own token in the top k must have the same probability there. One that is missing from a full top k must be less
    # probable than its last entry. The slack covers what bf16 rounds off.
    own = np.maximum(capture.own_logprobs, np.finfo(np.float32).min)
    slack = 0.05 + 0.01 * np.abs(own)
    same = (capture.top_ids == capture.ids[:, None]) & (capture.top_logprobs > -np.inf)
    apart = same & (np.abs(np.where(same, capture.top_logprobs, own[:, None]) - own[:, None]) > slack[:, None])
    full = (capture.top_ids >= 0).all(1) & ~same.any(1)
    beyond = full & (own > capture.top_logprobs.min(axis=1, initial=np.inf) + slack)
    if (wrong := np.flatnonzero(apart.any(1) | beyond)).size:
        row = int(wrong[0])
        top = (
            f"{capture.top_logprobs[row][same[row]][0]:.3f} in the top k"
            if same[row].any()
            else f"a top k without the token, whose last entry is {capture.top_logprobs[row].min():.3f}"
        )
        raise DataError(
            f"own_logprobs must agree with the top k about the same token, got {capture.own_logprobs[row]:.3f} and {top} in row "
            f"{row}; row m of both speaks of token m"
        )
    # The entries of a row or range must not add up to more than its whole mass.
    ranges = capture.ranges
    for name, ids, logprobs, mass in (
        ("top_logprobs", capture.top_ids, capture.top_logprobs, np.ones(len(capture.ids))),
        ("range_logprobs", ranges.ids, ranges.logprobs, np.exp(ranges.logmass.astype(np.float64))),
    ):
        total = np.where(ids >= 0, np.exp(logprobs.astype(np.float64)), 0.0).sum(1)
        over = np.flatnonzero(total > 1.01 * mass + 1e-6)
        if len(over):
            row = int(over[0])
            raise DataError(
                f"{name} must add up to at most the mass they are part of ({mass[row]:.4g}), got {total[row]:.4g} in row {row}; "
                "pass natural log-probabilities, each id once"
            )


def check_vocabulary(capture: SourceCapture, size: int) -> None:
    """Raises DataError for probable ids beyond the source's vocabulary.

    Improbable ones are allowed: a head that is padded beyond its tokenizer gives such ids a little mass.
    """
    beyond = (capture.top_ids >= size) & (capture.top_logprobs > np.log(0.5))
    if beyond.any():
        raise DataError(
            f"top_ids must be of the source's tokenizer, which has {size} tokens, got {capture.top_ids[beyond][0]} with probability "
            f"{np.exp(capture.top_logprobs[beyond][0]):.2f}; pass the tokenizer of the model that gave them"
        )


def plain_text(tokenizer: PreTrainedTokenizerBase) -> PlainText:
    """The PlainText of a tokenizer; one per tokenizer, so that what was learnt about a pair is kept for the next text.

    Raises:
        TypeError: the tokenizer is not one of Hugging Face's.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"a tokenizer must be one of Hugging Face's, got {type(tokenizer).__name__}; AutoTokenizer.from_pretrained loads it"
        )
    return _plain_text(tokenizer, len(tokenizer))


@functools.lru_cache(maxsize=16)
def _plain_text(tokenizer: PreTrainedTokenizerBase, size: int) -> PlainText:
    # `size` is a part of the cache's key, so that a tokenizer to which tokens were added is read again.
    return PlainText(tokenizer)


@functools.lru_cache(maxsize=8)
def _aligner(
    target: PlainText, source: PlainText, top_k: int, min_reliability: float
) -> CppByteAligner | PythonByteAligner:
    return byte_aligner(target, source, top_k=top_k, min_reliability=min_reliability)


def _needed(text: str, target: PlainText, source: PlainText) -> RangeRequest:
    return ranges_needed(
        target.token_bytes, target.encode(text), source.token_bytes, source.encode(text), source.byte_order
    )


def _array(values: ArrayLike | Tensor, dtype: type[np.number]) -> np.ndarray:
    """The values as a contiguous array of `dtype`. Integers never become floats or the reverse."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    values = np.asarray(values)
    if np.issubdtype(values.dtype, np.floating) != np.issubdtype(dtype, np.floating):
        raise ValueError(f"ids must be integers and log-probabilities floating point, got {values.dtype}")
    if dtype == np.int32 and values.size and np.abs(values).max() > np.iinfo(np.int32).max:
        raise ValueError(f"ids must fit in 32 bits, got {values.min()}..{values.max()}")
    return np.ascontiguousarray(values.astype(dtype))
