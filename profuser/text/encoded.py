"""A text or conversation in the tokens of one tokenizer, with the bytes of the response that each token covers."""

from __future__ import annotations

from dataclasses import dataclass


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
