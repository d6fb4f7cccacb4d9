"""The judges of the inference mode: reward models and functions, each of which scores the responses of all sources.

Letters: E examples, C candidate responses per example.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from profuser.errors import DataError, first_line
from profuser.models.fingerprint import fingerprint
from profuser.models.load import load_reward_model
from profuser.models.padding import padded
from profuser.prepare.data import Row
from profuser.progress import silent
from profuser.recipe.places import load_function
from profuser.recipe.schema import JudgeConfig
from profuser.text.template import ChatTemplate, conversation


def judge_fingerprint(config: JudgeConfig) -> str:
    """Returns a short hash that changes whenever the judge may give other scores.

    For a reward model it covers the model's files; for a function it covers the code of the whole module that defines it, since
    the function may call others there.
    """
    if config.model is not None:
        return fingerprint(config.model)
    assert config.function is not None
    code = config.function
    module = inspect.getmodule(load_function(config.function, f"judges: {config.name}: function"))
    if module is not None:
        with contextlib.suppress(OSError, TypeError):  # a built-in or compiled module has no source code
            code = inspect.getsource(module)
    return hashlib.sha256(code.encode()).hexdigest()[:16]


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


def load_judge(config: JudgeConfig, device: torch.device | str = "cpu", *, date: datetime.date | None = None) -> Judge:
    """Loads the judge that a recipe names. `date` is what its chat template gets; None means today."""
    if config.function is not None:
        return _function_judge(config, config.function)
    assert config.model is not None
    return _reward_model_judge(config, config.model, device, date)


def _function_judge(config: JudgeConfig, path: str) -> Judge:
    """Makes a judge of the function `module:function` at `path`, whose results are checked."""
    function = load_function(path, f"judges: {config.name}: function")

    def score(
        examples: Sequence[Row], candidates: Sequence[Sequence[str]], progress: Callable[..., None] = silent
    ) -> np.ndarray:
        scores = np.full((len(examples), len(candidates[0])), np.nan, dtype=np.float32)
        for e, (example, responses) in enumerate(zip(examples, candidates)):
            shown = [c for c, text in enumerate(responses) if text]
            try:
                given = [float(x) for x in function(dict(example), [responses[c] for c in shown])] if shown else []
            except (Exception, SystemExit) as error:  # the function is the user's own, which may raise anything
                raise DataError(
                    f"judge {config.name}: {path} must return one number per response, on the prompt {example['prompt']!r} it "
                    f"raised {type(error).__name__}: {first_line(error)}; fix the function"
                ) from error
            if len(given) != len(shown):
                raise DataError(
                    f"judge {config.name}: {path} must return one number per response, got {len(given)} numbers for "
                    f"{len(shown)} responses; fix the function"
                )
            scores[e, shown] = given
            progress(1)
        return scores

    return score


def _reward_model_judge(
    config: JudgeConfig, location: str, device: torch.device | str, date: datetime.date | None
) -> Judge:
    """Makes a judge of the reward model at `location`.

    It gives a response the score that transformers' AutoModelForSequenceClassification gives to the whole conversation in the
    model's own chat template, alone and without padding.
    """
    model, tokenizer = load_reward_model(config.name, location, config.trust_remote_code, device)
    template = ChatTemplate(tokenizer, date=date)
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    pad = _pad_id(model)

    @torch.no_grad()
    def score(
        examples: Sequence[Row], candidates: Sequence[Sequence[str]], progress: Callable[..., None] = silent
    ) -> np.ndarray:
        # Render and tokenise the conversations. Of one that is too long for the model, the beginning is left out. Equal ones
        # are scored once, so that equal responses get equal scores whatever they are padded to.
        scores = np.full((len(examples), len(candidates[0])), np.nan, dtype=np.float32)
        places: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for e, responses in enumerate(candidates):
            for c, text in enumerate(responses):
                if text:
                    ids = template.ids(conversation(examples[e]["prompt"], text))[-limit:]
                    places.setdefault(tuple(ids), []).append((e, c))

        # Score them in batches of similar length.
        by_length = sorted(places, key=len)
        for first in range(0, len(by_length), config.batch_size):
            batch = by_length[first : first + config.batch_size]
            for ids, value in zip(batch, _rewards(model, batch, pad)):
                for place in places[ids]:
                    scores[place] = value
            progress(0, tokens=sum(map(len, batch)))
        progress(len(examples))
        return scores

    return score


def _pad_id(model: PreTrainedModel) -> int | None:
    """Returns the id that the model's configuration names as its padding, or None if it names none that the model has."""
    pad = model.config.get_text_config().pad_token_id
    embeddings = model.get_input_embeddings()
    size = getattr(embeddings, "num_embeddings", 1 << 62)
    return pad if pad is not None and 0 <= pad < size else None


def _rewards(model: PreTrainedModel, batch: Sequence[Sequence[int]], pad: int | None) -> list[float]:
    """Returns the score that a reward model gives to each conversation alone, from one forward pass over the padded batch.

    transformers reads the score at the last token that is not the padding's, or at the very last one where the model has no
    padding. More padding does not move the first of these places. For the second, the batch is padded with a token in which
    no conversation ends.
    """
    if pad is None:
        ends = {ids[-1] for ids in batch}
        pad = next(i for i in itertools.count() if i not in ends)
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = pad
    input_ids, mask = padded(batch, pad)
    logits = model(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device)).logits
    return logits[:, 0].float().tolist()
