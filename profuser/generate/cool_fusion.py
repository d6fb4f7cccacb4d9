"""Cool-Fusion (arXiv 2407.19807): several models write one answer together, segment by segment, without training.

Every source greedily writes its shortest segment that ends with a word. Every source then judges every segment by its
perplexity, exp of the mean NLL over its own tokens of the segment. The segment with the lowest mean perplexity is appended to
the answer of all. The end of the turn is a segment of its own. Of equal segments the one of the first source wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from profuser.errors import ConfigError
from profuser.generate.boundaries import word_ends
from profuser.generate.speaker import Speaker, Voice, Writing, segment_of
from profuser.recipe.schema import DecodeConfig


@dataclass(frozen=True, slots=True)
class Candidate:
    """A segment that sources want to write.

    text: the segment; empty stands for the end of the turn. sources: the numbers of the sources that want to write it.
    perplexities: of every source. score: their mean, by the criterion; lower is better.
    """

    text: str
    sources: tuple[int, ...]
    perplexities: tuple[float, ...]
    score: float


@dataclass(frozen=True, slots=True)
class Step:
    """One segment of an answer: the candidates, and which of them won."""

    candidates: tuple[Candidate, ...]
    won: int

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


class CoolFusion:
    """Lets sources answer prompts together.

    Args:
        voices: the sources.
        config: the options.
        max_new_tokens: an answer is cut when it has this many tokens in the vocabulary of one of the sources.

    Raises:
        ConfigError: there is not one weight for each of the sources.
    """

    def __init__(self, voices: Sequence[Voice], config: DecodeConfig, max_new_tokens: int):
        if config.weights is not None and len(config.weights) != len(voices):
            raise ConfigError(
                f"decode.weights must have one weight for each of the {len(voices)} sources, got {len(config.weights)}"
            )
        self.voices, self.config, self.max_new_tokens = voices, config, max_new_tokens
        self.weights = config.weights or [1.0] * len(voices)

    def answer(self, prompt: str) -> Answer:
        """Answers one prompt."""
        joint = Answer.of(tuple(self.steps(prompt)))
        return self._best(prompt, joint) if self.config.rerank else joint

    def steps(self, prompt: str) -> Iterator[Step]:
        """The segments of the answer to one prompt, as they are chosen. The last one is empty if the turn ended."""
        speakers = self._new(prompt)
        choose = self._chooser(speakers)
        while max(speaker.tokens for speaker in speakers) < self.max_new_tokens:
            step = choose()
            if step is None:
                return
            yield step
            if not step.winner.text:
                return

    def _chooser(self, speakers: Sequence[Speaker]) -> Callable[[], Step | None]:
        """What chooses one segment after the other and appends it. It gives None where there is none that can be held."""
        return lambda: self._chosen(speakers)

    def _chosen(self, speakers: Sequence[Speaker]) -> Step | None:
        """Chooses the next segment together, and appends it to what each source has read."""
        step = self._step(speakers)
        if step is not None and step.winner.text:
            for speaker in speakers:
                speaker.goes_on(step.winner.text)
        return step

    def _new(self, prompt: str) -> list[Speaker]:
        return [Speaker(voice, prompt) for voice in self.voices]

    def _step(self, speakers: Sequence[Speaker]) -> Step | None:
        """Chooses the next segment; None if there is none that all sources can hold."""
        wanted: dict[str, list[int]] = {}
        for number, speaker in enumerate(speakers):
            wanted.setdefault(self._segment(speaker, speakers), []).append(number)
        of_speaker = [speaker.likelihoods([text or None for text in wanted]) for speaker in speakers]
        candidates = [
            Candidate(text, tuple(sources), tuple(map(_perplexity, nlls)), self._score(nlls))
            for (text, sources), nlls in zip(wanted.items(), zip(*of_speaker, strict=True), strict=True)
        ]
        best = min(range(len(candidates)), key=lambda n: (candidates[n].score, candidates[n].sources[0]))
        return None if math.isinf(candidates[best].score) else Step(tuple(candidates), best)

    def _segment(self, speaker: Speaker, speakers: Sequence[Speaker]) -> str:
        """The segment that one source would write."""
        most = self.config.max_segment_tokens
        for tokens in range(1, most + 1):
            writing = speaker.writes(tokens)
            segment = segment_of(writing)
            if segment is None:
                continue
            if self.config.segment == "shortest" or not segment:
                return segment
            if (aligned := self._aligned(writing, speakers)) is not None:
                return aligned
            if writing.ended:
                return writing.text
        return speaker.writes(most).text

    def _aligned(self, writing: Writing, speakers: Sequence[Speaker]) -> str | None:
        """The shortest segment at whose end every source's tokens can be cut."""
        for place in word_ends(writing.text):
            if all(speaker.cuts_at(writing.text, place) for speaker in speakers):
                return writing.text[:place]
        return None

    def _score(self, nlls: Sequence[float]) -> float:
        """The mean over the sources, by the criterion; +inf for what one of them cannot hold, whatever its weight."""
        if math.inf in nlls:
            return math.inf
        values = nlls if self.config.criterion == "mean_nll" else [_perplexity(nll) for nll in nlls]
        return sum(w * value for w, value in zip(self.weights, values, strict=True)) / sum(self.weights)

    def _best(self, prompt: str, joint: Answer) -> Answer:
        """The best of the joint answer and of those that each source writes alone, by the same rule."""
        answers = [joint]
        for voice in self.voices:
            alone = Speaker(voice, prompt)
            writing = alone.writes(self.max_new_tokens)
            answers.append(Answer(writing.text.strip(), writing.ended, (), voice.name))
        judges = self._new(prompt)
        texts = [answer.text for answer in answers]
        of_judge = [judge.likelihoods([text or None for text in texts]) for judge in judges]
        scores = [self._score(nlls) for nlls in zip(*of_judge, strict=True)]
        return answers[min(range(len(answers)), key=scores.__getitem__)]


def _perplexity(nll: float) -> float:
    """exp(nll); +inf where that is too large for a float."""
    return math.exp(nll) if nll < 700 else math.inf
