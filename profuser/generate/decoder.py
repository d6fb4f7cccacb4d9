"""The interface of all ways of decoding: several sources answer a prompt, step by step, and several prompts side by side."""

from __future__ import annotations

import itertools
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from profuser.errors import ConfigError, DataError, in_short
from profuser.generate.asking import alone, each, side_by_side
from profuser.generate.speaker import Speaker, Voice
from profuser.generate.steps import Answer, Step
from profuser.models.branches import fault_together
from profuser.progress import silent
from profuser.recipe.schema import DecodeConfig
from profuser.text.conversation import Prompt

logger = logging.getLogger(__name__)


class Decoder(ABC):
    """Lets sources answer prompts together.

    Args:
        voices: the sources.
        config: the options.
        max_new_tokens: an answer is cut when it has this many tokens in the vocabulary of one of the sources.

    Attributes:
        on_step: is called with 0 after every step of every answer, as `Progress.update` is, to show that the work goes on.

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
        self.on_step: Callable[..., None] = silent

    @abstractmethod
    def choices(self, speakers: Sequence[Speaker]) -> AsyncIterator[Step]:
        """Chooses one step after the other and appends its segment to what the speakers have read.

        It stops where nothing can be chosen. The caller stops it behind the end of the turn, and when the answer is long enough.
        """

    def check_fits(self, prompt: Prompt) -> None:
        """Raises DataError where a prompt and the longest answer have more tokens than a source has positions.

        It does the same where a source's chat template does not render a conversation.
        """
        room = self.max_new_tokens + self.config.max_segment_tokens
        for voice in self.voices:
            limit = getattr(voice.model.config.get_text_config(), "max_position_embeddings", None)
            if isinstance(limit, int) and (tokens := len(voice.chat.prompt_ids(prompt)) + room) > limit:
                raise DataError(
                    f"{voice.name}: a prompt and its answer must have at most {limit:,} tokens, {in_short(str(prompt))[:60]} may take "
                    f"{tokens:,}; shorten it, or lower generation.max_new_tokens"
                )

    def steps(self, prompt: Prompt) -> Iterator[Step]:
        """The segments of the answer to one prompt, as they are chosen. The last one is empty if the turn ended."""
        steps = self._steps(prompt)
        while (step := alone(_next(steps))) is not None:
            yield step

    def notes(self) -> list[str]:
        """Lines that a user should know of before the first answer."""
        return []

    def answer(self, prompt: Prompt) -> Answer:
        """Answers one prompt."""
        return alone(self._answer(prompt))

    def answers(self, prompts: Sequence[Prompt], batch_size: int = 1) -> Iterator[Answer]:
        """Answers prompts, `batch_size` of them at a time, and yields the answers in the order of the prompts.

        Raises:
            DataError: one of several that are answered at a time is too long for a source.
        """
        batch_size = min(batch_size, len(prompts))
        if batch_size > 1 and (fault := self._fault_together(prompts)):
            logger.warning("prompts are answered one at a time: %s", fault)
            batch_size = 1
        if batch_size <= 1:
            yield from map(self.answer, prompts)
        else:
            yield from side_by_side(map(self._answer, prompts), batch_size)

    def score(self, nlls: Sequence[float]) -> float:
        """What a segment is compared by, from its mean NLLs by the sources: their mean by the criterion; lower is better.

        It is +inf for what one of them cannot hold, whatever its weight.
        """
        if math.inf in nlls:
            return math.inf
        values = nlls if self.config.criterion == "mean_nll" else [perplexity(nll) for nll in nlls]
        # A perplexity may be too large for a float, and 0 times infinity is no number.
        return sum(w * value for w, value in zip(self.weights, values, strict=True) if w) / sum(self.weights)

    async def _steps(self, prompt: Prompt) -> AsyncIterator[Step]:
        self.check_fits(prompt)
        speakers = [Speaker(voice, prompt) for voice in self.voices]
        async for step in self.choices(speakers):
            self.on_step(0)
            yield step
            if not step.winner.text or max(speaker.tokens for speaker in speakers) >= self.max_new_tokens:
                return

    async def _answer(self, prompt: Prompt) -> Answer:
        joint = Answer.of(tuple([step async for step in self._steps(prompt)]))
        return await self._best(prompt, joint) if self.config.rerank else joint

    def _fault_together(self, prompts: Sequence[Prompt]) -> str | None:
        """Why a source cannot read several of the prompts at a time, or None if all sources can.

        It is tried with the shortest prompt beside the longest one, behind which stand as many tokens as its answer may have. So a
        model is found out whose attention has a window or whose positions depend on the longest text of a batch.
        """
        for prompt in prompts:
            self.check_fits(prompt)
        for voice in self.voices:
            shortest, *_, longest = sorted(map(voice.chat.prompt_ids, prompts), key=len)
            room = self.max_new_tokens + self.config.max_segment_tokens
            answered = [*longest, *itertools.islice(itertools.cycle(longest), room)]
            if fault := fault_together(voice.model, [shortest, answered]):
                return f"{voice.name} cannot read several together, {fault}"
        return None

    async def _best(self, prompt: Prompt, joint: Answer) -> Answer:
        """The best of the joint answer and of those that each source writes alone, by their mean perplexities."""
        answers = [joint]
        writings = await each(Speaker(voice, prompt).writes(self.max_new_tokens) for voice in self.voices)
        for voice, writing in zip(self.voices, writings, strict=True):
            answers.append(Answer(writing.text.strip(), writing.ended, (), voice.name))
        texts = [answer.text or None for answer in answers]
        of_judge = await each(Speaker(voice, prompt).likelihoods(texts) for voice in self.voices)
        scores = [self.score(nlls) for nlls in zip(*of_judge, strict=True)]
        return answers[min(range(len(answers)), key=scores.__getitem__)]


async def _next(steps: AsyncIterator[Step]) -> Step | None:
    return await anext(steps, None)


def perplexity(nll: float) -> float:
    """exp(nll); +inf where that is too large for a float."""
    return math.exp(nll) if nll < 700 else math.inf
