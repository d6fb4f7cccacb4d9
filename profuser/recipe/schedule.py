"""How much each mode counts at each step of a run, and how high the learning rate is (ProFuser, section 3).

The named schedules are:
- progressive: the inference mode alone in the first stage; in the second the training mode, with a tenth of the inference
  mode beside it.
- reverse: the same with the modes exchanged. This is our reading, since the paper gives no weights for it.
- simultaneous: both modes with equal weight, in one stage.
- fusellm: the training mode alone, where Min-CE chooses the source.
- sft: the ground truth alone, without any distillation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

from profuser.errors import ConfigError
from profuser.recipe.optim import OptimConfig
from profuser.recipe.schema import Recipe, StageConfig


class Mode(IntEnum):
    """What a training sequence teaches: the ground truth (TRAINING), or the response that won the vote (INFERENCE)."""

    TRAINING = 0
    INFERENCE = 1

    @property
    def key(self) -> str:
        """The mode's name in metrics, summaries and recipes."""
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
    """A stage of a run with its weights. It takes the optimizer steps from `first` up to but not including `stop`."""

    inference_weight: float
    training_weight: float
    beta: float
    first: int
    stop: int

    def weight(self, mode: Mode) -> float:
        """The weight of a mode's loss in this stage."""
        return self.training_weight if mode == Mode.TRAINING else self.inference_weight

    @property
    def modes(self) -> list[Mode]:
        """The modes with a weight above 0 in this stage."""
        return [mode for mode in Mode if self.weight(mode) > 0]


MOST_STEPS = 2**53
"""Beyond it a step and the next one would be the same number in fp64."""


def stages_of(recipe: Recipe) -> list[StageConfig]:
    """Returns a recipe's stages, whether its schedule is named or spelt out."""
    return NAMED[recipe.schedule] if isinstance(recipe.schedule, str) else recipe.schedule


def needs_inference(recipe: Recipe) -> bool:
    """Whether some stage gives the inference mode a weight. That mode needs judges."""
    return any(stage.inference_weight > 0 for stage in stages_of(recipe))


def plan(recipe: Recipe, instructions: int) -> list[Stage]:
    """Lays the stages of a recipe out in optimizer steps. Each takes its share of optim.steps or, without that, of the epochs.

    Args:
        instructions: how many there are to train on.

    Raises:
        ConfigError: a stage would have no step, or there would be too many.
    """
    configs, optim = stages_of(recipe), recipe.optim
    total = optim.steps or max(len(configs), math.ceil(optim.epochs * instructions / optim.batch_size))
    if total >= MOST_STEPS:
        raise ConfigError(
            f"a run must take fewer than 2**53 steps, got {total}; lower optim.{'steps' if optim.steps else 'epochs'}"
        )
    whole = sum(c.share for c in configs)
    bounds = [round(total * sum(c.share for c in configs[:i]) / whole) for i in range(len(configs) + 1)]
    if empty := [i for i, (first, stop) in enumerate(pairwise(bounds), start=1) if first == stop]:
        raise ConfigError(
            f"every stage needs at least one step, stage {empty[0]} of {len(configs)} has none of {total}; raise "
            f"optim.{'steps' if optim.steps else 'epochs'}, or the stage's share"
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
    """Returns the index of the stage that contains an optimizer step. Steps are counted from 0."""
    return next(i for i, stage in enumerate(stages) if stage.first <= step < stage.stop)


def learning_rate(optim: OptimConfig, stage: Stage, step: int) -> float:
    """Returns a step's learning rate: in every stage it rises linearly to lr, then falls along a cosine to min_lr_ratio * lr."""
    steps, done = stage.stop - stage.first, step - stage.first
    warmup = math.ceil(optim.warmup_ratio * steps)
    if done < warmup:
        return optim.lr * (done + 1) / warmup
    progress = (done - warmup) / max(1, steps - warmup)
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def schedule_words(recipe: Recipe) -> str:
    """Returns the schedule's name, or the number of stages where the recipe spells them out."""
    return recipe.schedule if isinstance(recipe.schedule, str) else f"{len(recipe.schedule)} stages"
