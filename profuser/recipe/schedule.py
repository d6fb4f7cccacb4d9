"""Which mode counts how much, when, and how fast the target learns (ProFuser, section 3).

The named schedules as they proceed: progressive begins with the inference mode and goes on with the training mode beside
a tenth of the first; reverse exchanges the two (our reading, since the paper gives no weights for it); simultaneous
weighs both at once; fusellm takes the training mode alone, with the source that Min-CE chooses; sft is the ground truth
without any distillation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

from profuser.errors import ConfigError
from profuser.recipe.schema import OptimConfig, Recipe, StageConfig


class Mode(IntEnum):
    """What a training sequence's label is: the ground truth, or the response that won the vote."""

    TRAINING = 0
    INFERENCE = 1

    @property
    def key(self) -> str:
        """Its name in metrics, summaries and recipes."""
        return self.name.lower()


NAMED: dict[str, list[StageConfig]] = {
    "progressive": [StageConfig(inference_weight=1.0), StageConfig(inference_weight=0.1, training_weight=1.0)],
    "simultaneous": [StageConfig(inference_weight=1.0, training_weight=1.0)],
    "reverse": [StageConfig(training_weight=1.0), StageConfig(inference_weight=1.0, training_weight=0.1)],
    "fusellm": [StageConfig(training_weight=1.0)],
    "sft": [StageConfig(training_weight=1.0, beta=0.0)],
}


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage with its place on the run's axis of optimizer steps, [first, stop)."""

    inference_weight: float
    training_weight: float
    beta: float
    first: int
    stop: int

    def weight(self, mode: Mode) -> float:
        return self.training_weight if mode == Mode.TRAINING else self.inference_weight

    @property
    def modes(self) -> list[Mode]:
        """The modes that count in this stage."""
        return [mode for mode in Mode if self.weight(mode) > 0]


def stages_of(recipe: Recipe) -> list[StageConfig]:
    return NAMED[recipe.schedule] if isinstance(recipe.schedule, str) else recipe.schedule


def needs_inference(recipe: Recipe) -> bool:
    """Whether some stage weighs the inference mode, which needs judges."""
    return any(stage.inference_weight > 0 for stage in stages_of(recipe))


def plan(recipe: Recipe, instructions: int) -> list[Stage]:
    """The stages in optimizer steps; named or spelt out, they divide optim.steps (or epochs) by their shares."""
    configs, optim = stages_of(recipe), recipe.optim
    total = optim.steps or max(len(configs), math.ceil(optim.epochs * instructions / optim.batch_size))
    whole = sum(c.share for c in configs)
    bounds = [round(total * sum(c.share for c in configs[:i]) / whole) for i in range(len(configs) + 1)]
    if empty := [i for i, (first, stop) in enumerate(pairwise(bounds), start=1) if first == stop]:
        raise ConfigError(
            f"every stage needs at least one step, stage {empty[0]} of {len(configs)} has none of {total}; raise optim.steps"
        )
    return [
        Stage(
            inference_weight=c.inference_weight,
            training_weight=c.training_weight,
            beta=optim.beta if c.beta is None else c.beta,
            first=first,
            stop=stop,
        )
        for c, (first, stop) in zip(configs, pairwise(bounds))
    ]


def stage_at(stages: list[Stage], step: int) -> int:
    """Index of the stage that optimizer step `step` (from 0) belongs to."""
    return next(i for i, stage in enumerate(stages) if stage.first <= step < stage.stop)


def learning_rate(optim: OptimConfig, stage: Stage, step: int) -> float:
    """Linear warm-up, then a cosine to min_lr_ratio * lr; both within the stage."""
    steps, done = stage.stop - stage.first, step - stage.first
    warmup = math.ceil(optim.warmup_ratio * steps)
    if done < warmup:
        return optim.lr * (done + 1) / warmup
    progress = (done - warmup) / max(1, steps - warmup)
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def schedule_words(recipe: Recipe) -> str:
    """The schedule's name, or how many stages it spells out."""
    return recipe.schedule if isinstance(recipe.schedule, str) else f"{len(recipe.schedule)} stages"
