"""`align` puts a source's distributions of a response on a target's tokens, for use in a trainer of your own.

The response is the last message of a conversation, which either model reads in its own chat template. It may also follow a text
that the caller gives for either side, or be a text that stands alone. This package's own trainer uses the same alignment
(`engine.py`) and the same conversations (`ChatFormat`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from profuser.alignment.capture_rows import check_capture
from profuser.alignment.engine import CppByteAligner, byte_aligner
from profuser.alignment.follow_numbers import NumberFollower, number_rows
from profuser.alignment.ranges import RangeRequest, flat_maps, ranges_needed
from profuser.alignment.reference import PythonByteAligner
from profuser.alignment.types import PrefixRanges, SourceCapture
from profuser.alignment.vocab_map import ByteOrder, TextFormat
from profuser.errors import DataError
from profuser.models.head import evaluating, head_of
from profuser.text.chat import ChatFormat
from profuser.text.encoded import Encoded, encode_response
from profuser.text.token_bytes import TokenBytes

FIX_IN_CODE = "set tokenizer.chat_template, or pass the response alone with before=(target_text, source_text)"

Messages = Sequence[Mapping[str, Any]]
"""A conversation, as `apply_chat_template` takes it. Its last message is the response, of role "assistant"."""


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
        return _byte_order(self.token_bytes)

    def encode(self, text: str, before: str | None = None) -> Encoded:
        """Encodes the text as a response. Strings of control tokens in it are plain text.

        Args:
            before: the text before the response, in which strings of control tokens are control tokens. None means that the
                response stands alone.
        Raises:
            TypeError: the text is not a string.
            TokenBytesMismatch: the tokens do not hold the text's bytes exactly (reason "normaliser" or "decoder").
        """
        if not isinstance(text, str):
            raise TypeError(
                f"text must be a string, got {type(text).__name__}; align one text at a time, or a conversation as a list of messages "
                "with `role` and `content`"
            )
        if before is not None:
            return encode_response(self.token_bytes, [(self.token_bytes.seen_rendered(before), False)], text)
        ids, words = self.token_bytes.encode_parts([(text, True)])
        spans = self.token_bytes.spans(ids, text)
        self.token_bytes.check_whole(ids, spans, text)
        return Encoded(input_ids=ids, spans=spans, start=0, stop=len(ids), end_of_turn=None, words=words)


@dataclass(frozen=True, slots=True)
class AlignedText:
    """The N target tokens of a response, with a source's distribution for each of them.

    Row n is the distribution of token n itself, which a model gives at the position before that token. The last row of a
    conversation is the end of turn, unless the response was cut. A skipped token has no entries. The source's three arrays are
    in the form that `fused_linear_fusion_loss` takes.

    input_ids: (T,) int64, all that the target reads, the end of turn included.
    positions: (N,) int64, where the N tokens stand in it: target_ids is input_ids[positions]. The target's hidden states of
        these rows are those at positions - 1. A text that stands alone begins at 0, so that a token must be put before it.
    target_ids: (N,) int64.
    target_spans: (N, 2) int32, the bytes of the response that each token covers. The first may begin below 0, because it also
        holds bytes of the template. The end of turn covers none.
    source_ids: (N, K) int32, target tokens, -1 = padding.
    source_logprobs: (N, K) fp32, natural log.
    source_tail: (N,) fp32, the probability outside the K entries.
    reliability: (N,) fp32, the share of the source's mass that can follow the target's prefix.
    kind, skip_reason: (N,) uint8, indices into profuser.alignment.types.KINDS and SKIP_REASONS.
    """

    input_ids: Tensor
    positions: Tensor
    target_ids: Tensor
    target_spans: Tensor
    source_ids: Tensor
    source_logprobs: Tensor
    source_tail: Tensor
    reliability: Tensor
    kind: Tensor
    skip_reason: Tensor


class SourceRanges(tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]):
    """What `prefix_ranges` returns: the six tensors that `source_topk` takes as `ranges`, and the source's side of the response.

    input_ids: (T,) int64, all that the source reads, the end of turn included.
    positions: (M,) int64, where the response's M tokens stand in it, the end of turn included. The labels of `source_topk` are
        input_ids[positions], and its hidden states those at positions - 1.
    """

    input_ids: Tensor
    positions: Tensor

    def __new__(cls, ranges: Sequence[Tensor], input_ids: Tensor, positions: Tensor) -> SourceRanges:
        new = super().__new__(cls, ranges)
        new.input_ids, new.positions = input_ids, positions
        return new


def prefix_ranges(
    text: str | Messages,
    target: PreTrainedTokenizerBase,
    source: PreTrainedTokenizerBase,
    *,
    before: tuple[str, str] | None = None,
    complete: bool = True,
) -> SourceRanges:
    """What must be asked of a source before `align`: the tokens that it reads, their rows, and ranges beside its top k.

    `source_topk(..., ranges=prefix_ranges(...))` takes the ranges. Where a target token begins inside a source token, the
    alignment needs the source's mass among the tokens that begin with the same bytes up to that place (rule 2 of
    profuser/alignment/reference.py). Where many of the source's tokens count for one of the target's, their masses must be added
    before the top k are chosen (rule 7). And where a number may go on, the mass of all digits must be known (rule 8). This
    function needs neither model.

    Args:
        text, target, source, before, complete: as `align` takes them.
    Returns:
        A tuple with the attributes `input_ids` and `positions` of `SourceRanges`, of
        rows: (R,) int64, a row of the response's tokens, which are input_ids[positions], per range.
        lo, hi: (R,) int64, the range [lo, hi) of vocab_order.
        vocab_order: (V',) int64, the source's tokens sorted by their bytes.
        map_begin: (R,) int64, where the range's map begins in `mapped`, -1 without one.
        mapped: (L,) int64, what the tokens of the ranges count for.
    Raises:
        TokenBytesMismatch: a tokenizer changes the text.
        DataError: as in `align`, about the conversation.
    """
    pair = _pair(text, target, source, before, complete)
    needed = pair.needed()
    arrays = (needed.rows, needed.lo, needed.hi, _byte_order(pair.source.token_bytes).ids, *flat_maps([needed]))
    return SourceRanges([torch.from_numpy(x).long() for x in arrays], *_input(pair.own))


def follow_numbers(
    text: str | Messages,
    target: PreTrainedTokenizerBase,
    source: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    *,
    before: tuple[str, str] | None = None,
    complete: bool = True,
    top_k: int = 10,
) -> PrefixRanges:
    """Asks a source how its numbers in a response go on, for a target that has tokens of several digits; pass it to `align`.

    Without it, `align` estimates for which numbers the source would write further digits, and leaves much of their mass in the
    tail (rules 8 and 9 of profuser/alignment/reference.py). The source reads the response once more, and from every number of it
    the probable other ones.

    Args:
        text, target, source, before, complete: as `align` takes them. Of a text that stands alone, nothing is asked of a number
            with which it begins.
        model: the source's model.
        top_k: how many numbers are kept per row.
    Raises:
        DataError: the model cannot go on from one text along several branches; or as in `align`, about the conversation.
        TokenBytesMismatch: a tokenizer changes the text.
    """
    pair = _pair(text, target, source, before, complete)
    tokens = pair.target.token_bytes, pair.source.token_bytes
    with evaluating(model):
        follower = NumberFollower(*tokens, model, head_of(model), top_k)
        return follower.follow(pair.own, number_rows(tokens[0], pair.encoded, tokens[1], pair.own))


def align(
    text: str | Messages,
    target: PreTrainedTokenizerBase,
    source: PreTrainedTokenizerBase,
    top_ids: Tensor,
    top_logprobs: Tensor,
    own_logprobs: Tensor,
    ranges: Sequence[Tensor] | None = None,
    *,
    numbers: PrefixRanges | None = None,
    before: tuple[str, str] | None = None,
    complete: bool = True,
    top_k: int = 10,
    min_reliability: float = 0.1,
) -> AlignedText:
    """Turns a source's top-k distributions of its own tokens of a response into distributions of the target's tokens.

    Args:
        text: a conversation, whose last message is the response: a list of messages, which either model reads in its own chat
            template. Or the text of the response. The name of a control token in a message or response is plain text.
        target, source: Hugging Face tokenizers with a `tokenizers` backend, for conversations with a chat template.
        top_ids, top_logprobs: (M, k), the source's top-k ids and natural log-probabilities. Row m is the distribution of
            the source's own token m itself, so it comes from the position before that token. -1 = padding; a row that is
            all padding says nothing. The own tokens are input_ids[positions] of `prefix_ranges`.
        own_logprobs: (M,), the log-probability of the source's own token m (`-ce` of `source_topk`).
        ranges: (range_ids (R, k), range_logprobs (R, k), range_logmass (R,)), which `source_topk` returns for
            `prefix_ranges` of the same arguments. Without them, target tokens that begin inside a source token are skipped, and
            masses are added within the top k only.
        numbers: what `follow_numbers` returns for the same arguments. Without it, it is estimated how numbers go on (rule 8).
        before: (target_text, source_text), the text that stands before a response in a prompt of your own, with the control
            tokens of each model spelt out and a begin token where the model wants one. Such a response has no end of turn.
            Without it, a text stands alone: it is tokenised on both sides without begin or end tokens.
        complete: False for the response of a conversation that was cut. It has no end of turn.
        top_k: K, the number of entries that are kept per target token.
        min_reliability: a target token is skipped if less than this share of the source's mass can follow its prefix.
    Raises:
        TokenBytesMismatch: a tokenizer changes the text (reason "normaliser" or "decoder"); skip this text.
        DataError: the arrays do not belong to these tokens, are not log-probabilities, or contradict each other; there is no
            chat template; or the template does not render the conversation or alters the response.
        ValueError: ids are not integers, log-probabilities are not floats, or a setting is out of range.
        TypeError: the text is neither a string nor messages, or a tokenizer is not one of Hugging Face's.

    Example:
        >>> import torch
        >>> from profuser import align, prefix_ranges, source_topk
        >>> from profuser.recipe.places import resolve
        >>> from transformers import AutoTokenizer
        >>> target, source = (AutoTokenizer.from_pretrained(resolve(f"demo:{name}")) for name in ("guardian", "scholar"))
        >>> chat = [{"role": "user", "content": "What is a bozun?"}, {"role": "assistant", "content": "A stone."}]
        >>> needed = prefix_ranges(chat, target, source)
        >>> states = torch.randn(len(needed.input_ids), 8)  # what the source's last layer gives for needed.input_ids
        >>> head = torch.randn(len(source), 8)
        >>> hidden, labels = states[needed.positions - 1], needed.input_ids[needed.positions]
        >>> ids, logprobs, _, ce, *of_ranges = source_topk(hidden, head, labels, 10, ranges=needed)
        >>> aligned = align(chat, target, source, ids, logprobs, -ce, of_ranges)
        >>> tuple(aligned.source_ids.shape) == (len(aligned.target_ids), 10)
        True
        >>> target.decode(aligned.target_ids)
        'A stone.<|im_end|>'

    Source: the rules are this project's own, and profuser/alignment/reference.py states them.
    """
    # Tokenise the text on both sides, and check the arrays against the source's tokens.
    pair = _pair(text, target, source, before, complete)
    data, own = pair.response.encode(), pair.own
    spans = np.array(own.label_spans(len(data)), dtype=np.int32).reshape(-1, 2)
    ids, logprobs = _array(top_ids, np.int32), _array(top_logprobs, np.float32)
    for name, rows in (("top_ids", ids), ("top_logprobs", logprobs), ("own_logprobs", own_logprobs)):
        if len(rows) != len(spans):
            raise DataError(f"{name} must have a row for each of the source's {len(spans)} {_rows_of(pair, len(rows))}")
    if ranges is None:
        captured = PrefixRanges.none()
    else:
        needed = pair.needed()
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
    if numbers is not None:
        captured = captured.with_others(numbers)
    # Align them as the capture of one response.
    capture = SourceCapture(
        ids=np.array(own.input_ids, dtype=np.int32)[own.label_positions],
        begin=np.ascontiguousarray(spans[:, 0]),
        stop=np.ascontiguousarray(spans[:, 1]),
        top_ids=ids,
        top_logprobs=logprobs,
        own_logprobs=_array(own_logprobs, np.float32),
        ranges=captured,
    )
    check_capture(capture)
    check_consistent(capture)
    check_vocabulary(capture, len(pair.source.token_bytes.pieces))
    aligned = _aligner(pair.target, pair.source, top_k, min_reliability).align(data, pair.encoded, capture)
    # Spread the entries, which lie end to end, over rows of equal width.
    counts = np.diff(aligned.offsets)
    row = np.repeat(np.arange(len(counts)), counts)
    slot = np.arange(len(row)) - np.repeat(aligned.offsets[:-1], counts)
    width = min(top_k, len(pair.target.token_bytes.pieces))
    source_ids = np.full((len(counts), width), -1, dtype=np.int32)
    source_logprobs = np.zeros((len(counts), width), dtype=np.float32)
    source_ids[row, slot], source_logprobs[row, slot] = aligned.ids, aligned.logprobs
    input_ids, positions = _input(pair.encoded)
    return AlignedText(
        input_ids=input_ids,
        positions=positions,
        target_ids=input_ids[positions],
        target_spans=torch.tensor(pair.encoded.label_spans(len(data)), dtype=torch.int32).reshape(-1, 2),
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
    _check_tokenizer(tokenizer)
    return _plain_text(tokenizer, len(tokenizer))


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"a tokenizer must be one of Hugging Face's, got {type(tokenizer).__name__}; AutoTokenizer.from_pretrained loads it"
        )


@functools.lru_cache(maxsize=16)
def _plain_text(tokenizer: PreTrainedTokenizerBase, size: int) -> PlainText:
    # `size` is a part of the cache's key, so that a tokenizer to which tokens were added is read again.
    return PlainText(tokenizer)


def chat_of(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """The ChatFormat of a tokenizer; one per tokenizer, as in `plain_text`.

    Raises:
        TypeError: the tokenizer is not one of Hugging Face's.
        DataError: it has no chat template, or one that cannot be used.
    """
    _check_tokenizer(tokenizer)
    return _chat(tokenizer, len(tokenizer), repr(tokenizer.chat_template), repr(tokenizer.special_tokens_map))


@functools.lru_cache(maxsize=16)
def _chat(tokenizer: PreTrainedTokenizerBase, size: int, template: str, special: str) -> ChatFormat:
    # All that may be changed about a tokenizer is a part of the cache's key.
    return ChatFormat(tokenizer, fix=FIX_IN_CODE)


@functools.lru_cache(maxsize=16)
def _byte_order(tokens: TokenBytes) -> ByteOrder:
    return ByteOrder(tokens)


@functools.lru_cache(maxsize=8)
def _aligner(
    target: TextFormat, source: TextFormat, top_k: int, min_reliability: float
) -> CppByteAligner | PythonByteAligner:
    return byte_aligner(target, source, top_k=top_k, min_reliability=min_reliability)


class _Pair(NamedTuple):
    """One response in the tokens of both sides, each with the text before it."""

    response: str
    target: TextFormat
    source: TextFormat
    encoded: Encoded
    own: Encoded

    def needed(self) -> RangeRequest:
        tokens = self.source.token_bytes
        return ranges_needed(self.target.token_bytes, self.encoded, tokens, self.own, _byte_order(tokens))


def _pair(
    text: str | Messages,
    target: PreTrainedTokenizerBase,
    source: PreTrainedTokenizerBase,
    before: tuple[str, str] | None,
    complete: bool,
) -> _Pair:
    """Tokenises a text or conversation on both sides, as `align` takes it."""
    if isinstance(text, list | tuple) and all(isinstance(message, Mapping) for message in text):
        if before is not None:
            raise ValueError(
                "before must go with the text of a response alone, got it with messages; leave it out, or pass the last message's text"
            )
        chats = chat_of(target), chat_of(source)
        encoded, own = (chat.encode_messages(text, complete=complete) for chat in chats)
        pair = _Pair(text[-1]["content"], *chats, encoded, own)
    else:
        if before is not None and (isinstance(before, str) or [type(x) for x in before] != [str, str]):
            raise TypeError(
                f"before must be two strings, (target_text, source_text), got {before!r}; give one for either side"
            )
        text, sides = cast("str", text), (plain_text(target), plain_text(source))
        encoded, own = (side.encode(text, x) for side, x in zip(sides, before or (None, None)))
        pair = _Pair(text, *sides, encoded, own)
        if before is None:
            return pair
    for role, side in (("target", pair.encoded), ("source", pair.own)):
        if not side.label_positions:
            raise DataError("a response must not be empty, got no text; skip it")
        if side.start == 0:
            raise DataError(
                f"a response must have a token before it, which predicts its first one, the {role} has none; begin with a user's "
                "message or, in `before`, with a begin token"
            )
    return pair


def _rows_of(pair: _Pair, got: int) -> str:
    """What rows are expected of the source, and how to get them; the end of a message."""
    if pair.own.start:
        end = "without an" if pair.own.end_of_turn is None else "and its"
        return (
            f"tokens of the response {end} end of turn, got {got}; take what the model says at prefix_ranges(...).positions - 1 of "
            "its input_ids"
        )
    return (
        f"tokens of the text, got {got}; tokenize it with add_special_tokens=False, control tokens in it as plain text "
        "(split_special_tokens=True)"
    )


def _input(encoded: Encoded) -> tuple[Tensor, Tensor]:
    """All that a model reads, and the positions of the labels in it."""
    return torch.tensor(encoded.input_ids, dtype=torch.long), torch.tensor(encoded.label_positions, dtype=torch.long)


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
