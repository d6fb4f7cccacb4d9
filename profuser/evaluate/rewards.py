"""What the judges think of the target while it is trained: the mean of their scores of its answers to validation prompts.

This is what figure 4 of the ProFuser paper shows over epochs. The same prompts are answered at every validation, greedily, so that two
validations differ by the target alone. A file of scores cannot judge what is new, and such judges are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from profuser.errors import DataError
from profuser.evaluate.scores import prepared_rows
from profuser.prepare.data import Row
from profuser.prepare.judges import load_judge
from profuser.prepare.responses import generate
from profuser.progress import Progress
from profuser.recipe.schema import JudgeConfig, Recipe
from profuser.store.store import Store
from profuser.text.chat import ChatFormat
from profuser.train.metrics_log import REWARD
from profuser.train.sharding import is_main


@dataclass(frozen=True, slots=True)
class Rewards:
    """The validation prompts that are answered, and the judges' recipe, device and store."""

    recipe: Recipe
    rows: Sequence[Row]
    device: torch.device
    store: Store

    @classmethod
    def open(cls, recipe: Recipe, store: Store, device: torch.device) -> Rewards | None:
        """Takes as many validation prompts as `optim.eval_rewards` says, at random; None where it is 0.

        Raises:
            DataError: the prompts are no longer those that the store was prepared with.
        """
        if not recipe.optim.eval_rewards:
            return None
        rows = prepared_rows(recipe, store, "validation")
        order = np.random.default_rng(recipe.seed).permutation(len(rows))
        return cls(recipe, [rows[i] for i in sorted(order[: recipe.optim.eval_rewards])], device, store)

    def __call__(self, model: PreTrainedModel, chat: ChatFormat) -> dict[str, float | None]:
        """Lets a model answer the prompts, and returns each judge's mean score as `reward_NAME`; None where it scored nothing.

        Of several processes with a share of the model each, all must call it. The main one alone judges, the others get nothing.
        """
        with Progress("answer validation prompts", len(self.rows), "prompts", is_main(), brief=True) as bar:
            answers = generate(
                model,
                chat,
                [row["prompt"] for row in self.rows],
                replace(self.recipe.generation, temperature=0.0, responses_per_source=1),
                max_length=self.recipe.data.max_length,
                reasoning=self.recipe.reasoning_of(self.recipe.target_config),
                progress=bar.update,
            )
        if not is_main():
            return {}
        texts = [[response.text] for (response,) in answers]
        means = {}
        for config in self.recipe.scoring_judges:
            means[f"{REWARD}{config.name}"] = self._mean(config, texts)
        return means

    def _mean(self, config: JudgeConfig, texts: list[list[str]]) -> float | None:
        """Returns the mean of a judge's scores; None where it gave none. If it fails, a line says so, and the training goes on."""
        try:
            score = load_judge(config, self.device, date=self.store.date)
            with Progress(f"{config.name}: score the answers", len(texts), "answers", brief=True) as bar:
                given = [value for value in score(self.rows, texts, bar.update)[:, 0].tolist() if math.isfinite(value)]
        except DataError as error:
            print(f"judge {config.name} could not score the answers to the validation prompts ({error})", flush=True)
            return None
        return math.fsum(given) / len(given) if given else None
