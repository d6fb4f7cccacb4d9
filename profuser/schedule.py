"""Which mode counts how much, when, and how fast the target learns (ProFuser, section 3; schedules in order of stages).

progressive: inference mode first, then the ground truth with a tenth of the first. reverse: the modes exchanged (our
reading; the paper gives no weights for it). simultaneous: both at once. fusellm: ground truth with Min-CE only. sft:
the ground truth alone, without distillation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from profuser.config import OptimConfig, Recipe, StageConfig
from profuser.errors import ConfigError

NAMED: dict[str, list[StageConfig]] = {
    "progressive": [StageConfig(infer_weight=1.0), StageConfig(infer_weight=0.1, train_weight=1.0)],
    "simultaneous": [StageConfig(infer_weight=1.0, train_weight=1.0)],
    "reverse": [StageConfig(train_weight=1.0), StageConfig(infer_weight=1.0, train_weight=0.1)],
    "fusellm": [StageConfig(train_weight=1.0)],
    "sft": [StageConfig(train_weight=1.0, beta=0.0)],
}


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage with its place on the run's axis of optimizer steps: [first, stop)."""

    infer_weight: float
    train_weight: float
    beta: float
    first: int
    stop: int


def stages_of(recipe: Recipe) -> list[StageConfig]:
    return NAMED[recipe.schedule] if isinstance(recipe.schedule, str) else recipe.schedule


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
        Stage(c.infer_weight, c.train_weight, optim.beta if c.beta is None else c.beta, first, stop)
        for c, (first, stop) in zip(configs, pairwise(bounds))
    ]


def stage_at(stages: list[Stage], step: int) -> int:
    """Index of the stage that optimizer step `step` (from 0) belongs to."""
    return next(i for i, s in enumerate(stages) if s.first <= step < s.stop)


def learning_rate(optim: OptimConfig, stage: Stage, step: int) -> float:
    """Linear warm-up, then a cosine to min_lr_ratio * lr; both within the stage."""
    steps, done = stage.stop - stage.first, step - stage.first
    warmup = math.ceil(optim.warmup_ratio * steps)
    if done < warmup:
        return optim.lr * (done + 1) / warmup
    progress = (done - warmup) / max(1, steps - warmup)
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
