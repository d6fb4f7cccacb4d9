"""A text or conversation in the tokens of one tokenizer, with the bytes of the response that each token covers."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from profuser.text.token_bytes import TokenBytes

Part = tuple[str, bool]
"""A part of a conversation's text, and whether it is literal: strings of control tokens in a literal part are plain text."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation in the tokens of one tokenizer.

    input_ids: the whole conversation, up to and including the end of turn.
    spans: one byte span, relative to the response, per token of [start, stop). The first may begin before 0 and the last
        may end beyond the response, because such a token also holds bytes of the template.
    start, stop: the tokens that hold a byte of the response are input_ids[start:stop].
    end_of_turn: the index of the token that ends the turn (>= stop). It is None if the response was cut.
    words: the number of the pre-token that each token of input_ids belongs to, ascending.
    """

    input_ids: list[int]
    spans: list[tuple[int, int]]
    start: int
    stop: int
    end_of_turn: int | None
    words: list[int]

    @property
    def label_positions(self) -> list[int]:
        """The indices in input_ids of the tokens that are labels: those of the response, and the end of turn."""
        return [*range(self.start, self.stop), *([] if self.end_of_turn is None else [self.end_of_turn])]

    @property
    def label_mask(self) -> list[bool]:
        """Whether each token of input_ids is a label."""
        return [self.start <= i < self.stop or i == self.end_of_turn for i in range(len(self.input_ids))]

    def label_spans(self, response_bytes: int) -> list[tuple[int, int]]:
        """The byte spans of the tokens that are labels. The end of turn covers no byte, so that its span is empty."""
        return [*self.spans, *([] if self.end_of_turn is None else [(response_bytes, response_bytes)])]


def encode_response(
    tokens: TokenBytes, before: Sequence[Part], response: str, after: str = "", end_ids: Collection[int] = ()
) -> Encoded:
    """Tokenises a response together with what stands before it and behind it.

    The whole text is tokenised at once, so that tokens across the seams are those that the model sees. Only the response must
    be kept byte by byte, so that `before` must be given in the form that its tokens hold (`TokenBytes.seen`).

    Args:
        before: the text before the response, in parts. response: it is literal.
        after: the template's text behind the response, empty where the response was cut.
        end_ids: the tokens with the role end of turn. The first of them behind the response ends the conversation.
    Raises:
        TokenBytesMismatch: the tokens do not hold the response's bytes exactly (reason "normaliser" or "decoder").
    """
    # Find the bytes of every part.
    parts = [*before, (response, True), (after, False)]
    text = "".join(part for part, _ in parts)
    ends = list(itertools.accumulate(len(part.encode()) for part, _ in parts))
    literal = [(end - len(part.encode()), end) for (part, is_literal), end in zip(parts, ends) if is_literal]
    begin, end = literal[-1]

    # Tokenise the whole. If a control token covers a byte of a literal part, tokenise again in parts, so that strings of
    # control tokens in these texts stay plain text.
    ids, words = tokens.encode_words(text)
    spans = tokens.spans(ids, text)
    if any(
        i in tokens.specials and b < f and any(first < f and b < stop for first, stop in literal)
        for i, (b, f) in zip(ids, spans, strict=True)
    ):
        ids, words = tokens.encode_parts(parts)
        spans = tokens.spans(ids, text)

    # Find the tokens that hold the response's bytes. An empty response has none.
    held = [n for n, (b, f) in enumerate(spans) if b < end and f > begin and b < f]
    if held and begin < end:
        start, stop = held[0], held[-1] + 1
    else:
        start = stop = next((n for n, (b, _) in enumerate(spans) if b >= begin), len(ids))
    tokens.check_whole(ids[start:stop], spans[start:stop], text)
    # Find the end of turn, and drop what follows it.
    end_of_turn = next((n for n in range(stop, len(ids)) if ids[n] in end_ids), None) if after else None
    length = stop if end_of_turn is None else end_of_turn + 1
    return Encoded(
        input_ids=ids[:length],
        spans=[(b - begin, f - begin) for b, f in spans[start:stop]],
        start=start,
        stop=stop,
        end_of_turn=end_of_turn,
        words=words[:length],
    )
