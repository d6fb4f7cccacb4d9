"""How long the texts of a recipe are, in tokens: measured on a sample of its data, or assumed where these are not there."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from profuser.alignment.ranges import ranges_needed
from profuser.alignment.vocab_map import ByteOrder
from profuser.prepare.data import Row
from profuser.text.chat import ChatFormat
from profuser.text.token_bytes import TokenBytesMismatch

SAMPLE = 256
"""How many rows are tokenised to learn how long the texts are."""
TOKENS, RESPONSE_SHARE, RANGES = 512, 0.75, 1.1
"""What is assumed without data: the tokens of a conversation, the share of its response, and the prefix ranges of a token of a source
whose tokenizer is another than the target's."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """The lengths of one model's conversations, in its own tokens.

    mean: tokens of a conversation. longest: the most. response: of these the mean of the response's, its end of turn included.
    ranges: the mean number of prefix ranges that a response needs of this model as a source.
    """

    mean: float
    longest: int
    response: float
    ranges: float


def measured(target: ChatFormat, source: ChatFormat, rows: Sequence[Row], vocabulary: int, limit: int) -> Lengths:
    """Returns the lengths of a sample of conversations, in the source's tokens.

    Args:
        vocabulary: how many rows the source's head has. limit: the longest conversation that is used, in tokens.
    """
    order = ByteOrder(source.token_bytes, vocabulary)
    found: list[tuple[int, int, int]] = []
    # They are drawn at random, because the kinds of rows may take turns.
    for i in np.random.default_rng(0).permutation(len(rows))[:SAMPLE].tolist():
        row = rows[i]
        with contextlib.suppress(TokenBytesMismatch):
            own, theirs = (chat.encode(row["prompt"], row["response"]) for chat in (source, target))
            ranges = ranges_needed(target.token_bytes, theirs, source.token_bytes, own, order)
            tokens, response = len(own.input_ids), len(own.label_positions)
            left = max(0, response - max(0, tokens - limit))  # of the response, of which the end is cut
            found.append((min(tokens, limit), left, round(len(ranges.rows) * left / max(1, response))))
    conversations, responses, ranges = np.array(found or [(0, 0, 0)]).T
    return Lengths(float(conversations.mean()), int(conversations.max()), float(responses.mean()), float(ranges.mean()))


def assumed(tokens: int, longest: int, same_tokens: bool) -> Lengths:
    """Returns what is assumed of a source. `same_tokens` says whether its tokens are the target's."""
    response = RESPONSE_SHARE * tokens
    return Lengths(tokens, longest, response, 0.0 if same_tokens else RANGES * response)
