"""The voters of the inference mode: reward models and functions, each scoring every source's responses."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from profuser.errors import DataError, first_line
from profuser.models.fingerprint import fingerprint
from profuser.models.load import chat_format, load_reward_model
from profuser.models.padding import padded
from profuser.prepare.data import Row
from profuser.progress import silent
from profuser.recipe.places import load_function
from profuser.recipe.schema import JudgeConfig, SourceConfig
from profuser.text.token_bytes import TokenBytesMismatch


def judge_fingerprint(config: JudgeConfig) -> str:
    """Changes with a judge's weights, or with the source of the module that its function stands in."""
    if config.model is not None:
        return fingerprint(config.model)
    assert config.function is not None
    source = config.function
    module = inspect.getmodule(load_function(config.function, f"judges: {config.name}: function"))
    if module is not None:
        with contextlib.suppress(OSError, TypeError):  # of a built-in or compiled module there is no text
            source = inspect.getsource(module)
    return hashlib.sha256(source.encode()).hexdigest()[:16]


class Judge(Protocol):
    """Scores C candidate responses of each example."""

    def __call__(
        self, examples: Sequence[Row], candidates: Sequence[Sequence[str]], progress: Callable[..., None] = silent
    ) -> np.ndarray:
        """float32 (E, C); NaN where a candidate was empty, and so not shown, or got no score.

        progress: called as `Progress.update` is.
        """
        ...


def load_judge(config: JudgeConfig, device: torch.device | str = "cpu") -> Judge:
    """The judge that a recipe names, ready to score."""
    if config.function is not None:
        return _function_judge(config, config.function)
    assert config.model is not None
    return _reward_model_judge(config, config.model, device)


def _function_judge(config: JudgeConfig, path: str) -> Judge:
    function = load_function(path, f"judges: {config.name}: function")

    def score(
        examples: Sequence[Row], candidates: Sequence[Sequence[str]], progress: Callable[..., None] = silent
    ) -> np.ndarray:
        scores = np.full((len(examples), len(candidates[0])), np.nan, dtype=np.float32)
        for e, (example, responses) in enumerate(zip(examples, candidates)):
            shown = [c for c, text in enumerate(responses) if text]
            try:
                given = [float(x) for x in function(dict(example), [responses[c] for c in shown])] if shown else []
            except (Exception, SystemExit) as error:  # the user's own code may raise anything
                raise DataError(
                    f"judge {config.name}: {path} must return one number a response, on the prompt {example['prompt']!r} it "
                    f"raised {type(error).__name__}: {first_line(error)}; fix the function"
                ) from error
            if len(given) != len(shown):
                raise DataError(
                    f"judge {config.name}: {path} must return one number a response, got {len(given)} for "
                    f"{len(shown)}; fix the function"
                )
            scores[e, shown] = given
            progress(1)
        return scores

    return score


@dataclass(frozen=True, slots=True)
class _Shown:
    """One response as a reward model sees it: of which example, at which place, in which tokens."""

    example: int
    place: int
    input_ids: list[int]


def _reward_model_judge(config: JudgeConfig, location: str, device: torch.device | str) -> Judge:
    model, tokenizer = load_reward_model(config.name, location, config.trust_remote_code, device)
    chat = chat_format(SourceConfig(name=config.name, model=location), tokenizer)
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    if model.config.pad_token_id is None:  # the model looks for the last token that is not padding
        model.config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    pad = model.config.pad_token_id

    @torch.no_grad()
    def score(
        examples: Sequence[Row], candidates: Sequence[Sequence[str]], progress: Callable[..., None] = silent
    ) -> np.ndarray:
        scores = np.full((len(examples), len(candidates[0])), np.nan, dtype=np.float32)
        shown: list[_Shown] = []
        for e, responses in enumerate(candidates):
            for c, text in enumerate(responses):
                # A text that the judge's tokenizer cannot give back stays without a score.
                with contextlib.suppress(TokenBytesMismatch):
                    if text:
                        ids = chat.encode(examples[e]["prompt"], text).input_ids[-limit:]
                        shown.append(_Shown(example=e, place=c, input_ids=ids))
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
