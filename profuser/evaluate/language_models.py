"""The contestants as language models of lm-evaluation-harness.

Answers are written through a model's own chat format, greedily unless a task samples, by the same code that answers for a vote or a
score: the whole context of a task is the user's turn. Log-likelihoods are the harness's own, of the plain text.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import lm_eval.api.task
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from profuser.errors import ConfigError, DataError, first_line
from profuser.evaluate.contestants import Alone, Answerer, Joint, LoadedJoint
from profuser.models.load import load_tokenizer
from profuser.progress import Progress
from profuser.recipe.generation import GenerationConfig, Reasoning
from profuser.text.token_bytes import TokenBytes, TokenBytesMismatch

# The harness shows a bar while it builds a task's requests, also where there is no terminal.
lm_eval.api.task.tqdm = partial(tqdm, disable=True)  # pyrefly: ignore[bad-assignment]

MAX_NEW_TOKENS = 256
"""How long an answer is at most where the task does not say it: the harness's own value."""
KNOWN = {"until", "do_sample", "temperature", "top_p", "max_gen_toks"}
"""What a task may say about how answers are written."""
NO_LIMIT = 1 << 30


class ModelAlone(HFLM):
    """One model."""

    def __init__(self, contestant: Alone, batch_size: int):
        loaded = contestant.load()
        # The harness changes its tokenizer's padding.
        tokenizer: Any = load_tokenizer(contestant.source)
        super().__init__(pretrained=loaded.model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self.name, self.loaded, self.reasoning = contestant.name, loaded, contestant.reasoning
        self.at_once = batch_size

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        limit, chat = self.max_length, self.loaded.chat
        assert chat is not None, "a model without a chat template is refused for a task with answers"
        encoded = chat.prompt_ids
        if cut := sum(len(encoded(request.args[0])) >= limit for request in requests):
            print(
                f"{self.name}: {cut} of {len(requests)} prompts leave no room for an answer in {limit} tokens",
                flush=True,
            )
        return answers_to(self.loaded, self.name, requests, self.at_once, limit, self.reasoning)

    def bits_of(self, texts: Sequence[str]) -> list[float]:
        """Returns the bits that the model needs for each text, behind the token with which its texts begin.

        Raises:
            DataError: the model's tokens do not hold a text exactly, so that its bits would be those of another text.
        """
        tokenizer: Any = self.tokenizer
        token_bytes = TokenBytes(tokenizer)
        for text in texts:
            try:
                token_bytes.spans(token_bytes.encode(text), text)
            except TokenBytesMismatch as error:
                raise DataError(
                    f"{self.name}: a model's tokens must hold the text exactly to count bits per byte, {first_line(error)}; leave "
                    "the model out"
                ) from None
        before, self.add_bos_token = self.add_bos_token, False  # the token of the beginning is put there by the harness
        try:
            requests = [Instance("loglikelihood_rolling", {}, (text,), n) for n, text in enumerate(texts)]
            return [-nats / math.log(2) for nats in self.loglikelihood_rolling(requests, disable_tqdm=True)]
        finally:
            self.add_bos_token = before

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)


class ModelsTogether(LM):
    """Models that answer together. They have no log-likelihoods."""

    def __init__(self, contestant: Joint):
        super().__init__()
        self.name, self.loaded = contestant.name, contestant.load()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return answers_to(self.loaded, self.name, requests, 1, NO_LIMIT, None)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("whoever lets models answer together refuses tasks that need log-likelihoods")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError("whoever lets models answer together refuses tasks that need log-likelihoods")


def answers_to(
    loaded: Answerer,
    name: str,
    requests: Sequence[Instance],
    batch_size: int,
    max_length: int,
    reasoning: Reasoning | None,
) -> list[str]:
    """Answers requests of the harness, each as its task says.

    Raises:
        ConfigError: a task wants answers to be written in a way that is not known here.
    """
    answers = [""] * len(requests)
    alike: defaultdict[str, list[int]] = defaultdict(list)
    arguments: list[tuple[Any, ...]] = [request.args for request in requests]
    for number, (_, given) in enumerate(arguments):
        alike[repr(given)].append(number)
    with Progress(f"{name}: {requests[0].task_name}", len(requests), "prompts") as bar:
        for numbers in alike.values():
            given = arguments[numbers[0]][1]
            # Who samples and gives no temperature means 1, as everywhere in transformers.
            usual = {"temperature": 1.0} if given.get("do_sample") else {}
            settings: Any = normalize_gen_kwargs(usual | given, MAX_NEW_TOKENS)
            if unknown := sorted(set(settings) - KNOWN):
                raise ConfigError(
                    f"task {requests[0].task_name}: generation_kwargs may be {', '.join(sorted(KNOWN))}, got {unknown[0]}; take it out"
                )
            sampled = bool(settings["do_sample"]) and settings["temperature"] > 0
            if sampled and isinstance(loaded, LoadedJoint):
                raise ConfigError(
                    f"task {requests[0].task_name} says how answers are sampled, {name} answers as its recipe says; take one of the two out"
                )
            generation = GenerationConfig(
                max_new_tokens=settings["max_gen_toks"],
                temperature=settings["temperature"] if sampled else 0.0,
                top_p=float(settings.get("top_p", 1.0)) if sampled else 1.0,
                batch_size=batch_size,
                reasoning=reasoning or "keep",
            )
            prompts = [arguments[number][0] for number in numbers]
            texts = loaded.answer(prompts, generation, max_length=max_length, progress=bar.update)
            for number, text in zip(numbers, texts):
                answers[number] = postprocess_generated_text(text, settings["until"], None)
    return answers
