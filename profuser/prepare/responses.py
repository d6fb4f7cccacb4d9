"""Lets a model answer prompts in batches: the candidates of the vote, and the held-out answers that are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from profuser.models.continuation import Sampling, continuations
from profuser.prepare.draws import draws_of, names_of
from profuser.progress import silent
from profuser.recipe.data import Split
from profuser.recipe.generation import GenerationConfig, Reasoning
from profuser.store import layout
from profuser.store.store import Store
from profuser.text.chat import ChatFormat
from profuser.text.conversation import Prompt
from profuser.text.fit import Verdict
from profuser.text.said import said
from profuser.typed import Rule


class Response(NamedTuple):
    """What a model answered: the text, stripped, whether the model ended its turn, and whether the text can be used."""

    text: str
    finished: bool
    verdict: Verdict

    @property
    def left_out(self) -> str:
        """Why the text cannot be used, in words; empty if it can."""
        return "" if self.verdict == Verdict.OK else Verdict(self.verdict).label

    @property
    def eligible(self) -> bool:
        """Whether the response takes part in the vote."""
        return bool(self.text) and self.finished and not self.left_out


def is_answer(value: Any) -> bool:
    """Whether a value of a JSON file has the fields of a Response."""
    kinds = [*map(type, value)] if isinstance(value, list) else []
    return kinds == [str, bool, int] and value[2] in Verdict.__members__.values()


ANSWERS = [[Rule("a text, whether it is finished, and a verdict", is_answer)]]
"""The shape of a shard of responses: for every example a list of answers with the fields of Response."""


def read_responses(store: Store, split: Split, source: str, number: int) -> list[list[Response]]:
    """Reads one shard of a source's responses. It raises what Store.get raises."""
    kind = layout.responses(split, source)
    return [
        [Response(text, finished, Verdict(verdict)) for text, finished, verdict in answers]
        for answers in store.get_json(kind, number, ANSWERS)
    ]


def generate(
    model: PreTrainedModel,
    chat: ChatFormat,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    *,
    max_length: int,
    seed: int = 0,
    of: str = "",
    names: Sequence[str] = (),
    responses: int = 1,
    reasoning: Reasoning | None = None,
    progress: Callable[..., None] = silent,
) -> list[list[Response]]:
    """Lets a model answer every prompt, through its own chat template.

    Args:
        max_length: the longest sequence in tokens, prompt and response together. A prompt that leaves no room gets empty
            responses.
        seed: the seed of sampling; it is not used by greedy decoding.
        of: whose responses these are. names: what stands for the prompts in the draws (`names_of`), where they are a part of
            more. Sampling depends on both.
        responses: how many responses each prompt gets; more than one needs a temperature above 0.
        reasoning: what becomes of the reasoning before an answer; None takes the config's.
        progress: called as `Progress.update` is, with the number of prompts answered and of tokens generated for them.

    Returns:
        A list of responses for each prompt.
    """
    # Prompts of similar length are answered together. Those without room for a response are done already.
    encoded = [chat.prompt_ids(prompt) for prompt in prompts]
    wanted = [(i, n) for i in range(len(prompts)) for n in range(responses) if len(encoded[i]) < max_length]
    wanted.sort(key=lambda place: len(encoded[place[0]]))
    answers = [[Response("", True, Verdict.OK)] * responses for _ in prompts]
    progress(sum(len(ids) >= max_length for ids in encoded))

    names = names or names_of(prompts)
    sampling = Sampling(config.temperature, config.top_p) if config.temperature > 0 else None
    strip = (reasoning or config.reasoning) == "strip"
    size = config.batch_size * responses
    for start in range(0, len(wanted), size):
        # A response gets the room that its own prompt leaves, whatever other prompts are in the batch.
        batch = wanted[start : start + size]
        rooms = [min(config.max_new_tokens, max_length - len(encoded[i])) for i, _ in batch]
        written = continuations(
            model,
            [encoded[i] for i, _ in batch],
            ends=set(chat.end_ids),
            pad=chat.end_id,  # it has a row in every model, which the tokenizer's padding need not have
            rooms=rooms,
            sampling=sampling,
            draws=[draws_of(seed, of, names[i], n, room) for (i, n), room in zip(batch, rooms)] if sampling else (),
        )
        for (i, n), ids in zip(batch, written):
            answers[i][n] = response_of(chat, ids, strip_reasoning=strip)
        progress(len(batch) // responses, tokens=sum(map(len, written)))
    return answers


def response_of(chat: ChatFormat, ids: Sequence[int], *, strip_reasoning: bool) -> Response:
    """Returns the response that the tokens spell which a model wrote. It is unfinished unless there is an end of turn among them."""
    end = next((t for t, token in enumerate(ids) if token in chat.end_ids), None)
    text, verdict = said(chat, ids[:end], strip_reasoning=strip_reasoning)
    return Response(text, end is not None, verdict)
