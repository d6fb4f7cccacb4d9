"""Decides whether a response fits all tokenizers, and finds the longest part that does if it is too long.

All sources of an example are scored on the same bytes. A response that is too long is therefore cut once, at the last
boundary between target tokens at which it fits the target and every source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from profuser.text.chat import ChatFormat
from profuser.text.conversation import Prompt
from profuser.text.encoded import Encoded
from profuser.text.token_bytes import TokenBytesMismatch


class Verdict(IntEnum):
    """Whether a response is used and, if not, why. The store keeps the number."""

    OK = 0
    EMPTY = 1
    TOO_LONG = 2
    NORMALISER = 3
    DECODER = 4
    NOT_WINNER = 5
    CONTROL = 6
    REASONING = 7
    BROKEN = 8

    @property
    def label(self) -> str:
        """The verdict in the words that summaries use."""
        return _LABELS[self]

    @classmethod
    def of(cls, error: TokenBytesMismatch) -> Verdict:
        """The verdict on a response whose bytes a tokenizer's tokens do not hold."""
        return cls[error.reason.upper()]


_LABELS = {
    Verdict.OK: "ok",
    Verdict.EMPTY: "empty response, skipped",
    Verdict.TOO_LONG: "over-long, skipped",
    Verdict.NORMALISER: "text that a normaliser changes, skipped",
    Verdict.DECODER: "text that a decoder cannot give back, skipped",
    Verdict.NOT_WINNER: "not the winner",
    Verdict.CONTROL: "response with control tokens, skipped",
    Verdict.REASONING: "response whose answer cannot be told from its reasoning, skipped",
    Verdict.BROKEN: "response whose bytes are not UTF-8, skipped",
}


@dataclass(frozen=True, slots=True)
class Fitted:
    """The part of a response that is scored and learnt.

    text: the part itself, empty unless the verdict is OK.
    cut: whether something was cut off, so that the text has no end of turn.
    verdict: whether the response is used and, if not, why.
    """

    text: str
    cut: bool
    verdict: Verdict

    @classmethod
    def unused(cls, verdict: Verdict) -> Fitted:
        return cls("", False, verdict)


def fit(
    target: ChatFormat,
    sources: Sequence[ChatFormat],
    prompt: Prompt,
    response: str,
    max_length: int,
    *,
    cuts: bool = True,
) -> Fitted:
    """Returns the response if it fits every tokenizer, else its longest prefix that does and ends where a target token ends.

    A text that the target's own tokenizer changes cannot be aligned at all. A text that only a source's tokenizer changes is
    still used here; it is refused when that source is captured.

    Args:
        max_length: the number of tokens that a conversation may have in each tokenizer.
        cuts: whether a response that is too long is cut, and not left out.
    """
    # Encode the conversation on all sides. A source whose tokenizer changes the text is left out.
    if not response:
        return Fitted.unused(Verdict.EMPTY)
    try:
        encoded = [target.encode(prompt, response)]
    except TokenBytesMismatch as error:
        return Fitted.unused(Verdict.of(error))
    able = [target]
    for chat in sources:
        if chat is target:  # which is encoded already
            continue
        try:
            encoded.append(chat.encode(prompt, response))
        except TokenBytesMismatch:
            continue
        able.append(chat)
    if all(len(e.input_ids) <= max_length for e in encoded):
        return Fitted(response, False, Verdict.OK)
    if not cuts:
        return Fitted.unused(Verdict.TOO_LONG)
    # Try the boundaries between target tokens from the last one that can fit.
    raw = response.encode()
    limit = min(last_byte(e, max_length) for e in encoded)
    for stop in sorted({end for _, end in encoded[0].spans if 0 < end <= limit}, reverse=True):
        try:
            text = raw[:stop].decode()
        except UnicodeDecodeError:  # this boundary lies inside a character
            continue
        if all(len(chat.encode(prompt, text, complete=False).input_ids) <= max_length for chat in able):
            return Fitted(text, True, Verdict.OK)
    return Fitted.unused(Verdict.TOO_LONG)


def last_byte(encoded: Encoded, max_length: int) -> int:
    """The number of the response's bytes that lie in the first max_length tokens."""
    kept = max(0, min(encoded.stop, max_length) - encoded.start)
    return encoded.spans[kept - 1][1] if kept else 0
