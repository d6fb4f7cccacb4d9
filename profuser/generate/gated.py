"""Decoding in which one source writes, and the others are asked only where it is not sure (after SAFE, arXiv 2510.15346).

The first source writes its own answer. Before each of its segments the entropy of its next token is compared with a running
threshold: the mean of the entropies of all tokens that it has written, plus `gate` standard deviations. Where the entropy is higher,
the segment is chosen by all sources as in Cool-Fusion. Until then the others read nothing; they catch up
when they are asked. Where the tokens of one of them cannot hold what is written so far, nobody is asked any more.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import AsyncIterator, Sequence

from profuser.generate.cool_fusion import CoolFusion
from profuser.generate.speaker import Speaker
from profuser.generate.steps import Candidate, Step

LEAST_TOKENS = 8
"""So many tokens are written before a threshold is known. Until then nobody is asked."""


class Gated(CoolFusion):
    """Cool-Fusion with a gate."""

    async def choices(self, speakers: Sequence[Speaker]) -> AsyncIterator[Step]:
        main, *others = speakers
        entropies: list[float] = []
        while True:
            segment = await self.segment(main, [main])
            sure = main.entropy <= self._threshold(entropies)
            # What another source's tokens cannot hold, it cannot go on from either.
            if sure or (main.response and not all(other.encoded(main.response) for other in others)):
                entropies.extend(main.goes_on_alone(segment) if segment else ())
                yield Step((Candidate(segment, (0,), (math.nan,) * len(speakers), math.nan),), 0)
                continue
            entropies.append(main.entropy)
            for other in others:
                if missed := main.response[len(other.response) :]:
                    other.goes_on(missed)
            if (step := await self.together(speakers)) is None:
                return
            yield step

    def _threshold(self, entropies: list[float]) -> float:
        if len(entropies) < LEAST_TOKENS:
            return math.inf
        return statistics.fmean(entropies) + self.config.gate * statistics.pstdev(entropies)
