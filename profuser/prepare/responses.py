"""Lets a model answer prompts in batches: the candidates of the vote, and the held-out answers that are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from profuser.models.padding import padded
from profuser.progress import silent
from profuser.recipe.data import Split
from profuser.recipe.schema import GenerationConfig, Reasoning
from profuser.store import layout
from profuser.store.store import Store
from profuser.text.chat import ChatFormat
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


def _is_answer(value: Any) -> bool:
    kinds = [*map(type, value)] if isinstance(value, list) else []
    return kinds == [str, bool, int] and value[2] in Verdict.__members__.values()


ANSWERS = [[Rule("a text, whether it is finished, and a verdict", _is_answer)]]
"""The shape of a shard of responses: for every example a list of answers with the fields of Response."""


def read_responses(store: Store, split: Split, source: str, number: int) -> list[list[Response]]:
    """Reads one shard of a source's responses. It raises what Store.get raises."""
    kind = layout.responses(split, source)
    return [
        [Response(text, finished, Verdict(verdict)) for text, finished, verdict in answers]
        for answers in store.get_json(kind, number, ANSWERS)
    ]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    chat: ChatFormat,
    prompts: Sequence[str],
    config: GenerationConfig,
    *,
    max_length: int,
    seed: int = 0,
    responses: int = 1,
    reasoning: Reasoning | None = None,
    progress: Callable[..., None] = silent,
) -> list[list[Response]]:
    """Lets a model answer every prompt, through its own chat template.

    Args:
        max_length: the longest sequence in tokens, prompt and response together. A prompt that leaves no room gets empty
            responses.
        seed: the seed of sampling; it is not used by greedy decoding.
        responses: how many responses each prompt gets; more than one needs a temperature above 0.
        reasoning: what becomes of the reasoning before an answer; None takes the config's.
        progress: called as `Progress.update` is, with the number of prompts answered and of tokens generated for them.

    Returns:
        A list of responses for each prompt.
    """
    # Prompts of similar length are answered together. Those without room for a response are done already.
    encoded = [chat.prompt_ids(prompt) for prompt in prompts]
    by_length = sorted((i for i in range(len(prompts)) if len(encoded[i]) < max_length), key=lambda i: len(encoded[i]))
    answers = [[Response("", True, Verdict.OK)] * responses for _ in prompts]
    progress(len(prompts) - len(by_length))

    # These override the model's own generation config, in which a repetition penalty or a top_k would change the answers.
    sampling: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}
    if config.temperature > 0:
        sampling |= {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
        torch.manual_seed(seed)
    ends = set(chat.end_ids)
    pad = chat.end_id  # it has a row in every model, which the tokenizer's padding need not have
    for first in range(0, len(by_length), config.batch_size):
        # Generate for one batch. What comes back are the new tokens: the prompts, padded at the left, are cut off.
        batch = by_length[first : first + config.batch_size]
        input_ids, attention_mask = padded([encoded[i] for i in batch], pad, left=True)
        output = model.generate(  # pyrefly: ignore[not-callable]  # a PreTrainedModel may have it, from GenerationMixin
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            max_new_tokens=min(config.max_new_tokens, max_length - min(len(encoded[i]) for i in batch)),
            num_return_sequences=responses,
            eos_token_id=sorted(ends),
            pad_token_id=pad,
            **sampling,
        )[:, input_ids.shape[1] :].tolist()

        # Take each response up to its end of turn. The rows of one prompt's responses follow one another.
        generated = 0
        for row, ids in enumerate(output):
            index = batch[row // responses]
            # A response gets the room that its own prompt leaves, whatever other prompts are in the batch.
            ids = ids[: max_length - len(encoded[index])]
            end = next((t for t, token in enumerate(ids) if token in ends), None)
            generated += len(ids) if end is None else end + 1
            text, verdict = said(chat, ids[:end], strip_reasoning=(reasoning or config.reasoning) == "strip")
            answers[index][row % responses] = Response(text, end is not None, verdict)
        progress(len(batch), tokens=generated)
    return answers
