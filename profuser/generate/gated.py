"""Decoding in which one source writes, and the others are asked only where it is not sure (after SAFE, arXiv 2510.15346).

The first source writes its own answer. Before each of its segments the entropy of its next token is compared with a running
threshold: the mean of the entropies of all tokens that it has written, plus `gate` standard deviations. Where the entropy is higher,
the segment is chosen by all sources as in Cool-Fusion. Until then the others read nothing; they catch up when they are asked.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from profuser.generate.cool_fusion import Candidate, CoolFusion, Step

LEAST_TOKENS = 8
"""So many tokens are written before a threshold is known. Until then nobody is asked."""


class Gated(CoolFusion):
    """Cool-Fusion with a gate. It takes the same arguments."""

    def steps(self, prompt: str) -> Iterator[Step]:
        main, *others = speakers = self._new(prompt)
        entropies: list[float] = []
        while max(speaker.tokens for speaker in speakers) < self.max_new_tokens:
            segment = self._segment(main, [main])
            if main.entropy <= self._threshold(entropies):
                yield Step((Candidate(segment, (0,), (math.nan,), math.nan),), 0)
                if not segment:
                    return
                entropies += main.goes_on_alone(segment)
                continue
            entropies.append(main.entropy)
            for other in others:
                other.goes_on(main.response[len(other.response) :])
            step = self._step(speakers)
            if step is None:
                return
            yield step
            if not step.winner.text:
                return
            for speaker in speakers:
                speaker.goes_on(step.winner.text)

    def _threshold(self, entropies: list[float]) -> float:
        if len(entropies) < LEAST_TOKENS:
            return math.inf
        return statistics.fmean(entropies) + self.config.gate * statistics.pstdev(entropies)
