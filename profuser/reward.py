"""Inference mode's vote: R judges score every source's responses and each gives one vote (ProFuser, section 3).

A judge splits its vote equally among its tied best; one with a NaN or with all scores equal abstains. Most votes win;
ties go to the higher mean z-score (standardised per judge over the whole data set), then to the lowest index.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence

import numpy as np
import torch

from profuser.config import JudgeConfig, SourceConfig
from profuser.errors import ConfigError, DataError
from profuser.models import chat_format, fingerprint, first_line, load_reward_model
from profuser.progress import silent
from profuser.token_bytes import TokenBytesMismatch


def vote(scores: np.ndarray, eligible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Winners of all examples.

    Args:
        scores: float (E, R, C), one score an example, judge and candidate; ineligible candidates' are ignored.
        eligible: bool (E, C): the candidates that take part.

    Returns:
        winner: int (E,), -1 where nothing is eligible.
        votes: float (E, C), summed over the judges.
    """
    scores = np.where(eligible[:, None, :], scores.astype(np.float64), -np.inf)
    broken = np.isnan(scores).any(-1)  # (E, R)
    counted = eligible[:, None, :] & ~broken[..., None] & np.isfinite(scores)
    safe = np.where(counted, scores, 0.0)
    n = np.maximum(counted.sum((0, 2)), 1)
    mean = safe.sum((0, 2)) / n
    std = np.sqrt(np.where(counted, (safe - mean[:, None]) ** 2, 0.0).sum((0, 2)) / n)
    z = np.where(counted, (safe - mean[:, None]) / np.where(std > 0, std, 1.0)[:, None], 0.0)
    best = scores.max(-1, keepdims=True)
    worst = np.where(eligible[:, None, :], scores, np.inf).min(-1, keepdims=True)
    # A lone candidate makes "all scores equal" true and every judge abstain; it wins by the index rule anyway.
    abstains = broken | (best == worst)[..., 0]
    top = (scores == best) & eligible[:, None, :] & ~abstains[..., None]
    votes = (top / np.maximum(top.sum(-1, keepdims=True), 1)).sum(1)
    judging = np.maximum((~broken).sum(1), 1)
    mean_z = z.sum(1) / judging[:, None]
    winner = np.full(len(scores), -1)
    for e in range(len(scores)):
        open_to = np.flatnonzero(eligible[e])
        if len(open_to):
            winner[e] = min(open_to, key=lambda c: (-round(votes[e, c], 9), -round(mean_z[e, c], 9), c))
    return winner, votes


def load_function(path: str, key: str) -> Callable:
    """`module:function` → the function."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module of the user's own may raise anything when it is imported
        raise ConfigError(
            f"{key} must be an importable module:function, got {path!r} ({first_line(error)}); fix the name, or run where the "
            "module lies (or set PYTHONPATH)"
        ) from None
    if not callable(function):
        raise ConfigError(f"{key} must be a function, got {path!r}, a {type(function).__name__}; fix the name")
    return function


def judge_fingerprint(config: JudgeConfig) -> str:
    """Changes with a judge's weights, or with the source of the module that its function stands in."""
    if config.model is not None:
        return fingerprint(config.model)
    function = load_function(config.function, f"judges: {config.name}: function")
    try:
        source = inspect.getsource(inspect.getmodule(function))
    except (OSError, TypeError):  # of a built-in or compiled module there is none
        source = config.function
    return hashlib.sha256(source.encode()).hexdigest()[:16]


Judge = Callable[..., np.ndarray]
"""(examples, candidates, progress) -> float32 (E, C); NaN where a candidate was empty (not shown) or got no score.
progress: called as `Progress.update` is."""


def load_judge(config: JudgeConfig, device: torch.device | str = "cpu") -> Judge:
    """A judge that scores C candidate responses of each example (a data row: prompt, response = ground truth, ...)."""
    if config.function is not None:
        return _function_judge(config)
    return _reward_model_judge(config, device)


def _function_judge(config: JudgeConfig) -> Judge:
    function = load_function(config.function, f"judges: {config.name}: function")

    def score(examples: Sequence[dict], candidates: Sequence[Sequence[str]], progress=silent) -> np.ndarray:
        scores = np.full((len(examples), len(candidates[0])), np.nan, dtype=np.float32)
        for e, (example, responses) in enumerate(zip(examples, candidates)):
            shown = [c for c, text in enumerate(responses) if text]
            try:
                given = [float(x) for x in function(dict(example), [responses[c] for c in shown])] if shown else []
            except (Exception, SystemExit) as error:  # the user's own code may raise anything
                raise DataError(
                    f"judge {config.name}: {config.function} must return one number a response, on the prompt {example['prompt']!r} it "
                    f"raised {type(error).__name__}: {first_line(error)}; fix the function"
                ) from error
            if len(given) != len(shown):
                raise DataError(
                    f"judge {config.name}: {config.function} must return one number a response, got {len(given)} for "
                    f"{len(shown)}; fix the function"
                )
            scores[e, shown] = given
            progress(1)
        return scores

    return score


def _reward_model_judge(config: JudgeConfig, device: torch.device | str) -> Judge:
    model, tokenizer = load_reward_model(config.name, config.model, config.trust_remote_code, device)
    chat = chat_format(SourceConfig(name=config.name, model=config.model), tokenizer)
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    if model.config.pad_token_id is None:  # the model looks for the last token that is not padding
        model.config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    pad = model.config.pad_token_id

    @torch.no_grad()
    def score(examples: Sequence[dict], candidates: Sequence[Sequence[str]], progress=silent) -> np.ndarray:
        scores = np.full((len(examples), len(candidates[0])), np.nan, dtype=np.float32)
        shown = []
        for e, responses in enumerate(candidates):
            for c, text in enumerate(responses):
                # A text that the judge's tokenizer cannot give back stays without a score.
                with contextlib.suppress(TokenBytesMismatch):
                    if text:
                        shown.append((e, c, chat.encode(examples[e]["prompt"], text).input_ids[-limit:]))
        shown.sort(key=lambda item: len(item[2]))
        for first in range(0, len(shown), config.batch_size):
            batch = shown[first : first + config.batch_size]
            width = max(len(ids) for _, _, ids in batch)
            input_ids = torch.tensor([ids + [pad] * (width - len(ids)) for _, _, ids in batch])
            mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for _, _, ids in batch])
            logits = model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits[:, 0].float().cpu()
            for (e, c, _), value in zip(batch, logits.tolist()):
                scores[e, c] = value
            progress(0, tokens=sum(len(ids) for _, _, ids in batch))
        progress(len(examples))
        return scores

    return score
