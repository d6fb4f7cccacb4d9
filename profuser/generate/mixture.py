"""The exact mixture of sources at one forward pass per token (arXiv 2605.00419).

Sampling from the weighted mean of the sources' distributions is the same as sampling a source by the weights and then a token
from its distribution alone. The others are not asked; a source reads what it has missed when its turn comes. The distributions
are those over the tokens that are text or end a turn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import AsyncIterator, Sequence

import torch

from profuser.errors import DataError
from profuser.generate.decoder import Decoder
from profuser.generate.speaker import Speaker, Voice
from profuser.generate.steps import Candidate, Step
from profuser.recipe.schema import DecodeConfig
from profuser.text.token_bytes import Spelling


class Mixture(Decoder):
    """The sources must share a vocabulary: every token of one is, by its bytes, a token of every other one, under any id.

    The answer to a prompt depends on `decode.seed` and on the prompt alone, and not on what was answered before it.

    Raises:
        DataError: they do not.
    """

    def __init__(self, voices: Sequence[Voice], config: DecodeConfig, max_new_tokens: int):
        super().__init__(voices, config, max_new_tokens)
        spellings = [_spellings(voice) for voice in voices]
        for voice, known in zip(voices, spellings):
            if different := spellings[0].keys() ^ known.keys():
                raise DataError(
                    f"decode.method mixture needs sources that share a vocabulary: {voices[0].name} and {voice.name} differ in "
                    f"{len(different):,} tokens, as {min(different)[0]!r}; use decode.method cool"
                )
        # ids[n][m][token] is the id that token `token` of source n has in source m.
        self.ids = [[{i: others[key] for key, i in own.items()} for others in spellings] for own in spellings]
        self.barred = [_barred(voice, set(own.values())) for voice, own in zip(voices, spellings)]

    async def choices(self, speakers: Sequence[Speaker]) -> AsyncIterator[Step]:
        prompt = speakers[0].prompt
        seed = hashlib.sha256(f"{self.config.seed} {prompt}".encode()).digest()
        random = torch.Generator().manual_seed(int.from_bytes(seed[:8], "big", signed=True))
        weights = torch.tensor(self.weights, dtype=torch.float64)
        while speakers[0].tokens < self.max_new_tokens:
            chosen = int(weights.multinomial(1, generator=random))
            speaker = speakers[chosen]
            row = (await speaker.row()).cpu().double().masked_fill(self.barred[chosen], -math.inf)
            row = (row / self.config.temperature).softmax(0)
            token = int(row.multinomial(1, generator=random))
            ended = token in speaker.voice.chat.end_ids
            text = "" if ended else [s.says(self.ids[chosen][n][token]) for n, s in enumerate(speakers)][chosen]
            if text or ended:  # and not only a part of a character
                perplexities = [math.nan] * len(speakers)
                perplexities[chosen] = 1 / float(row[token])
                yield Step((Candidate(text, (chosen,), tuple(perplexities), 0.0),), 0)


def _spellings(voice: Voice) -> dict[Spelling, int]:
    """The tokens that are text."""
    spellings = voice.chat.token_bytes.spellings[: len(voice.head.weight)]
    return {spelling: i for i, spelling in enumerate(spellings) if spelling is not None}


def _barred(voice: Voice, text: set[int]) -> torch.Tensor:
    """(V,) bool, the tokens that neither are text nor end a turn."""
    barred = torch.ones(len(voice.head.weight), dtype=torch.bool)
    barred[[*text, *voice.chat.end_ids]] = False
    return barred
