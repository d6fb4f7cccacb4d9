"""Cool-Fusion (arXiv 2407.19807): several models write one answer together, segment by segment, without training.

Every source greedily writes its shortest segment that ends with a word. Every source then judges every segment by its
perplexity, exp of the mean NLL over its own tokens of the segment. The segment with the lowest mean perplexity is appended to
the answer of all. The end of the turn is a segment of its own. Of equal segments the one of the first source wins.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence

from profuser.generate.asking import each
from profuser.generate.boundaries import word_ends
from profuser.generate.decoder import Decoder, perplexity
from profuser.generate.speaker import Speaker, Writing, segment_of
from profuser.generate.steps import Candidate, Step


class CoolFusion(Decoder):
    """All sources are asked for every segment."""

    async def choices(self, speakers: Sequence[Speaker]) -> AsyncIterator[Step]:
        while (step := await self.together(speakers)) is not None:
            yield step

    async def together(self, speakers: Sequence[Speaker]) -> Step | None:
        """Chooses the next segment, and appends it to what each source has read. None if there is none that all can hold."""
        wanted: dict[str, list[int]] = {}
        for number, text in enumerate(await each(self.segment(speaker, speakers) for speaker in speakers)):
            wanted.setdefault(text, []).append(number)
        of_speaker = await each(speaker.likelihoods([text or None for text in wanted]) for speaker in speakers)
        candidates = [
            Candidate(text, tuple(sources), tuple(map(perplexity, nlls)), self.score(nlls))
            for (text, sources), nlls in zip(wanted.items(), zip(*of_speaker, strict=True), strict=True)
        ]
        best = min(range(len(candidates)), key=lambda n: (candidates[n].score, candidates[n].sources[0]))
        if math.isinf(candidates[best].score):
            return None
        step = Step(tuple(candidates), best)
        if step.winner.text:
            for speaker in speakers:
                speaker.goes_on(step.winner.text)
        return step

    async def segment(self, speaker: Speaker, speakers: Sequence[Speaker]) -> str:
        """The segment that one source would write."""
        most = self.config.max_segment_tokens
        for tokens in range(1, most + 1):
            writing = await speaker.writes(tokens)
            segment = segment_of(writing)
            if segment is None:
                continue
            if self.config.segment == "shortest" or not segment:
                return segment
            if (aligned := _aligned(writing, speakers)) is not None:
                return aligned
            if writing.ended:
                return writing.text
        return (await speaker.writes(most)).text


def _aligned(writing: Writing, speakers: Sequence[Speaker]) -> str | None:
    """The shortest segment at whose end every source's tokens can be cut."""
    for place in word_ends(writing.text):
        if all(speaker.cuts_at(writing.text, place) for speaker in speakers):
            return writing.text[:place]
    return None
