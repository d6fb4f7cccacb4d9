"""What the ways of decoding have in common: an answer comes in steps, each of which appends a segment that some source wanted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A segment that sources want to write.

    text: the segment; empty stands for the end of the turn. sources: the numbers of the sources that want to write it.
    perplexities: of every source, nan for a source that was not asked or does not count here.
    score: what the candidates are compared by; lower is better.
    """

    text: str
    sources: tuple[int, ...]
    perplexities: tuple[float, ...]
    score: float


@dataclass(frozen=True, slots=True)
class Step:
    """One segment of an answer.

    won: the number of the candidate that was appended. left_out: the sources that were asked, and whose answer did not count.
    """

    candidates: tuple[Candidate, ...]
    won: int
    left_out: tuple[int, ...] = ()

    @property
    def winner(self) -> Candidate:
        return self.candidates[self.won]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of several sources.

    text: without spaces at its ends. finished: whether it ended with the end of a turn.
    steps: its segments, the end of the turn among them. source: the name of the source that wrote all of it, if `rerank` found
        that it is better than the joint one; else None.
    """

    text: str
    finished: bool
    steps: tuple[Step, ...]
    source: str | None = None

    @classmethod
    def of(cls, steps: tuple[Step, ...]) -> Answer:
        """The answer that was written in these steps."""
        finished = bool(steps) and not steps[-1].winner.text
        return cls("".join(step.winner.text for step in steps).strip(), finished, steps)
