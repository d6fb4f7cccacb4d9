"""EVA (arXiv 2404.09492): the sources' distributions are averaged token by token in the vocabulary of the first one.

The distributions of the others are projected onto that vocabulary by `vocabulary_projection`. Of every distribution the most
probable tokens count. A source whose best token is not among the best few of any other is left out of the step; if that is so
for all of them, none is left out. The most probable token of the weighted mean is appended; ties go to the lower id.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import AsyncIterator, Sequence

import torch
from torch import Tensor

from profuser.errors import DataError
from profuser.generate.asking import each
from profuser.generate.decoder import Decoder
from profuser.generate.speaker import Speaker, Voice
from profuser.generate.steps import Candidate, Step
from profuser.generate.vocabulary_projection import Projection, project
from profuser.recipe.schema import DecodeConfig

TOP = 320
"""So many of a distribution's tokens count."""


class Eva(Decoder):
    """The first source is the main one, in whose tokens the answer is written.

    Attributes:
        projections: of every other source, in their order.
    """

    def __init__(self, voices: Sequence[Voice], config: DecodeConfig, max_new_tokens: int):
        super().__init__(voices, config, max_new_tokens)
        self.projections = [_projection(voice, voices[0]) for voice in voices[1:]]

    def notes(self) -> list[str]:
        main = self.voices[0].name
        return [
            f"eva: {p.projected:,} tokens of {voice.name} count for tokens of {main}, and {p.dropped:,} for none "
            f"({p.anchors:,} spellings are the same)"
            for voice, p in zip(self.voices[1:], self.projections, strict=True)
        ]

    async def choices(self, speakers: Sequence[Speaker]) -> AsyncIterator[Step]:
        main, *others = speakers
        while True:
            # What another source's tokens cannot hold, it cannot go on from. It is asked again where it can.
            able = [other.response == main.response for other in others]
            asked = [main, *itertools.compress(others, able)]
            own, *rows = [_top(row.exp()) for row in await each(speaker.row() for speaker in asked)]
            of_others = iter(rows)
            said = [
                own,
                *(
                    projection(next(of_others).to(own.device)) if can else None
                    for projection, can in zip(self.projections, able, strict=True)
                ),
            ]
            kept = faithful(said, self.config.top_n)
            mean = torch.zeros_like(own)
            for weight, row, keep in zip(self.weights, said, kept, strict=True):
                if row is not None and keep:
                    mean += weight * row
            token = int(mean.argmax())
            text = await self._append(main, token)
            if text is None:
                return
            for other in others:
                if other.encoded(main.response) is not None:
                    other.goes_on(main.response[len(other.response) :])
            yield _step(token, text, said, kept)

    async def _append(self, main: Speaker, token: int) -> str | None:
        """Appends a token, and those of the main source that complete its last character, which the others could not read.

        Returns:
            The text by which the answer grows, empty if the turn ended, or None if the answer is too long.
        """
        while token not in main.voice.chat.end_ids:
            if text := main.says(token):
                return text
            if main.tokens >= self.max_new_tokens:
                return None
            token = int((await main.row()).argmax())
        return ""


def _step(token: int, text: str, said: Sequence[Tensor | None], kept: Sequence[bool]) -> Step:
    shares = [float(row[token]) if row is not None and keep else math.nan for row, keep in zip(said, kept)]
    perplexities = tuple(1 / share if share else math.inf for share in shares)
    wanted = tuple(n for n, row in enumerate(said) if row is not None and kept[n] and int(row.argmax()) == token)
    left_out = tuple(n for n, keep in enumerate(kept) if not keep)
    return Step((Candidate(text, wanted or (0,), perplexities, 0.0),), 0, left_out)


def faithful(said: Sequence[Tensor | None], top_n: int) -> list[bool]:
    """Which distributions count: those whose best token is among the `top_n` best of another. All, if that is true of none."""
    best = [None if row is None else int(row.argmax()) for row in said]
    top = [set() if row is None else set(row.topk(min(top_n, len(row))).indices.tolist()) for row in said]
    kept = [
        token is not None and any(token in others for m, others in enumerate(top) if m != n)
        for n, token in enumerate(best)
    ]
    return kept if any(kept) else [row is not None for row in said]


def _top(probabilities: Tensor) -> Tensor:
    """A distribution of which only the most probable tokens are kept, with the sum 1."""
    values, indices = probabilities.topk(min(TOP, len(probabilities)))
    return torch.zeros_like(probabilities).scatter(0, indices, values / values.sum())


def _projection(voice: Voice, main: Voice) -> Projection:
    if main.chat.end_id is None:
        raise DataError(
            f"decode.method eva needs a first source with an end of turn, {main.name} has none; use another method"
        )
    return project(
        voice.chat.token_bytes,
        voice.head.weight.detach(),
        main.chat.token_bytes,
        main.head.weight.detach(),
        (voice.chat.end_ids, main.chat.end_id),
    )
