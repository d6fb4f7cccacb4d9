"""The judges of the inference mode: reward models and functions, each of which scores the responses of all sources.

Letters: E examples, C candidate responses per example.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from profuser.errors import DataError, first_line, in_short
from profuser.models.fingerprint import fingerprint
from profuser.models.load import chat_format, load_reward_model, open_reward_model, template_text
from profuser.models.padding import padded
from profuser.prepare.data import Row
from profuser.progress import silent
from profuser.recipe.places import load_function
from profuser.recipe.schema import JudgeConfig, SourceConfig
from profuser.text.chat import ChatFormat
from profuser.text.token_bytes import TokenBytesMismatch


def judge_fingerprint(config: JudgeConfig) -> str:
    """Returns a short hash that changes whenever the judge may give other scores.

    For a reward model it covers the model's files; for a function it covers the code of the whole module that defines it, since
    the function may call others there.
    """
    if config.model is not None:
        files = fingerprint(config.model)
        if config.chat_template is None:
            return files
        template = template_text(f"judge {config.name}", config.chat_template)
        return hashlib.sha256(f"{files} {template}".encode()).hexdigest()[:16]
    assert config.function is not None
    code = config.function
    module = inspect.getmodule(load_function(config.function, f"judges: {config.name}: function"))
    if module is not None:
        with contextlib.suppress(OSError, TypeError):  # a built-in or compiled module has no source code
            code = inspect.getsource(module)
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def open_judge(config: JudgeConfig) -> None:
    """Opens what a recipe names as a judge, without loading a model, so that what is wrong with it is found at the start.

    Raises:
        ConfigError: the function cannot be imported.
        DataError: the reward model's files are missing or broken, it is of another kind, or it has no usable chat template.
    """
    if config.function is not None:
        load_function(config.function, f"judges: {config.name}: function")
    if config.model is not None:
        open_reward_model(config.name, config.model, config.trust_remote_code)
        reward_chat(config, config.model)


def reward_chat(config: JudgeConfig, location: str) -> ChatFormat:
    """Returns the chat format in which the reward model at `location` reads a conversation."""
    source = SourceConfig(
        name=f"judge {config.name}",
        model=location,
        chat_template=config.chat_template,
        trust_remote_code=config.trust_remote_code,
    )
    try:
        return chat_format(source)
    except DataError as error:
        prefix = "" if source.name in str(error) else f"{source.name}: "
        raise DataError(f"{prefix}{error}") from error


class Judge(Protocol):
    """A function that scores the C candidate responses to each of E prompts."""

    def __call__(
        self, examples: Sequence[Row], candidates: Sequence[Sequence[str]], progress: Callable[..., None] = silent
    ) -> np.ndarray:
        """Returns the scores, (E, C) float32.

        A score is NaN where the judge gave none. An empty candidate is not shown to the judge, and its score is NaN as well.

        Args:
            examples: E rows of the data. candidates: for each of them C responses.
            progress: called as `Progress.update` is.
        """
        ...


def load_judge(config: JudgeConfig, device: torch.device | str = "cpu") -> Judge:
    """Loads the judge that a recipe names."""
    if config.function is not None:
        return _function_judge(config, config.function)
    assert config.model is not None
    return _reward_model_judge(config, config.model, device)


def _function_judge(config: JudgeConfig, path: str) -> Judge:
    """Makes a judge of the function `module:function` at `path`, whose results are checked."""
    function = load_function(path, f"judges: {config.name}: function")

    def score(
        examples: Sequence[Row], candidates: Sequence[Sequence[str]], progress: Callable[..., None] = silent
    ) -> np.ndarray:
        scores = np.full((len(examples), len(candidates[0])), np.nan, dtype=np.float32)
        for e, (example, responses) in enumerate(zip(examples, candidates)):
            shown = [c for c, text in enumerate(responses) if text]
            given = _numbers(config.name, path, function, example, [responses[c] for c in shown]) if shown else []
            scores[e, shown] = given
            progress(1)
        return scores

    return score


def _numbers(judge: str, path: str, function: Callable, example: Row, responses: Sequence[str]) -> list[float]:
    """Calls a judge's function, and checks that it gives one number per response."""
    rule = f"judge {judge}: {path} must return one number per response, on the prompt {example['prompt']!r} it"
    try:
        given = function(dict(example), list(responses))
    except (Exception, SystemExit) as error:  # the function is the user's own, which may raise anything
        raise DataError(f"{rule} raised {type(error).__name__}: {first_line(error)}; fix the function") from error
    try:
        # The numbers of a text would be its digits, and those of a set or mapping are in no order.
        numbers = None if isinstance(given, (str, bytes, set, frozenset, dict)) else [float(x) for x in given]
    except Exception:  # a generator of the user's own may raise anything, too
        numbers = None
    if numbers is None:
        raise DataError(f"{rule} returned {in_short(given)}; fix the function")
    if len(numbers) != len(responses):
        raise DataError(f"{rule} returned {len(numbers)} numbers for {len(responses)} responses; fix the function")
    return numbers


def try_function_judge(config: JudgeConfig, example: Row, candidates: int) -> None:
    """Calls a judge that is a function once, on so many responses, so that a wrong one is found before any model has run.

    Raises:
        DataError: the function fails, or returns something else than one number per response.
    """
    if config.function is not None:
        text = example["response"] or "An answer."
        load_judge(config)([example], [[text, *(f"{text} {n}" for n in range(1, candidates))]])


@dataclass(frozen=True, slots=True)
class _Shown:
    """A response as a reward model sees it: its example, its place among the candidates, and the conversation's tokens."""

    example: int
    place: int
    input_ids: list[int]


def _reward_model_judge(config: JudgeConfig, location: str, device: torch.device | str) -> Judge:
    """Makes a judge of the reward model at `location`, which scores whole conversations."""
    model, tokenizer = load_reward_model(config.name, location, config.trust_remote_code, device)
    chat = reward_chat(config, location)
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    # The model scores at the last token that is not padding, so that it must know the padding's id.
    if model.config.pad_token_id is None:
        model.config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    pad = model.config.pad_token_id

    @torch.no_grad()
    def score(
        examples: Sequence[Row], candidates: Sequence[Sequence[str]], progress: Callable[..., None] = silent
    ) -> np.ndarray:
        # Encode the candidates. Of a conversation that is too long for the model, the beginning is left out.
        scores = np.full((len(examples), len(candidates[0])), np.nan, dtype=np.float32)
        shown: list[_Shown] = []
        for e, responses in enumerate(candidates):
            for c, text in enumerate(responses):
                # A response whose bytes the judge's tokenizer changes gets no score.
                with contextlib.suppress(TokenBytesMismatch):
                    if text:
                        ids = chat.encode(examples[e]["prompt"], text).input_ids[-limit:]
                        shown.append(_Shown(example=e, place=c, input_ids=ids))

        # Score them in batches of similar length.
        shown.sort(key=lambda candidate: len(candidate.input_ids))
        for first in range(0, len(shown), config.batch_size):
            batch = shown[first : first + config.batch_size]
            input_ids, mask = padded([candidate.input_ids for candidate in batch], pad)
            logits = model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits[:, 0].float().cpu()
            for candidate, value in zip(batch, logits.tolist()):
                scores[candidate.example, candidate.place] = value
            progress(0, tokens=sum(len(candidate.input_ids) for candidate in batch))
        progress(len(examples))
        return scores

    return score
