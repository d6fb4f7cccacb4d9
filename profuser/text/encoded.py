"""A text or conversation in one tokenizer, with the response located in it byte by byte."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation in one tokenizer.

    input_ids: the whole conversation, up to and including the end of turn.
    spans: per token of [start, stop) its byte span relative to the response; the first may begin before 0 and the last
        may end beyond the response, where the token also holds bytes of the template.
    start, stop: the tokens that hold a byte of the response are input_ids[start:stop].
    end_of_turn: index of the token that ends the turn (>= stop); None when the response was cut.
    words: per token of input_ids the number of its pre-token, ascending.
    """

    input_ids: list[int]
    spans: list[tuple[int, int]]
    start: int
    stop: int
    end_of_turn: int | None
    words: list[int]

    @property
    def label_positions(self) -> list[int]:
        """Indices in input_ids of the tokens that are someone's label: the response's, and the end of turn."""
        return [*range(self.start, self.stop), *([] if self.end_of_turn is None else [self.end_of_turn])]

    @property
    def label_mask(self) -> list[bool]:
        """Over input_ids: whether a token is a label."""
        return [self.start <= i < self.stop or i == self.end_of_turn for i in range(len(self.input_ids))]
