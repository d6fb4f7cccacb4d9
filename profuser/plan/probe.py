"""Times a handful of examples with every model of a recipe, and extrapolates to all of them.

A model's time is not its operations alone: a small one spends most of it between them, and how long answers are is known of none. So
the handful goes through the phases of a real preparation, into a store that is thrown away, and the target is trained on that for a
few steps. What is loaded or opened counts as it is. What grows with the data is multiplied by the characters of all texts for those of
the handful, answers by the number of batches, training by the number of steps.

Left out are checkpoints, what judges think of the target while it is trained, the report, and what a whole shard would let other
engines than transformers do at the same time.
"""

from __future__ import annotations

import contextlib
import gc
import math
import tempfile
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator

from profuser.errors import ConfigError, Stopped
from profuser.models.load import free_memory, load_model
from profuser.prepare.data import Examples, Row, row_digest
from profuser.prepare.inputs import Inputs
from profuser.prepare.phases import Preparation
from profuser.prepare.responses import generate
from profuser.prepare.sharing import Took
from profuser.progress import Progress, silenced
from profuser.recipe.data import SPLITS, Split
from profuser.recipe.schedule import Stage, plan
from profuser.recipe.schema import Recipe
from profuser.stopping import working
from profuser.store.division import Division
from profuser.store.layout import Kind
from profuser.store.store import Store
from profuser.train.likelihood import likelihood
from profuser.train.loop import Trainer
from profuser.train.parallel import launch, settled_precision
from profuser.train.targets import Targets

Phase = Literal["prepare", "train", "evaluate"]

FIRST = 8
"""How many examples every model sees before the handful. What is set up at the first ones is not counted."""
LEAST = 64
"""The handful has at least so many examples, and at least two of the largest batches, so that it is batched as the data are."""
FIRST_STEPS, STEPS, MOST_STEPS = 2, 3, 30
"""How many steps of a stage go first and are not counted, and how many are timed at least and at most."""
SECONDS = 5.0
"""Between these two, steps are timed for so long."""


@dataclass(frozen=True, slots=True)
class Timed:
    """One piece of work: what was timed of it, and what all of it will take.

    amount: what was timed, such as 64 examples; empty where nothing grows. tokens: how many were computed for it, 0 if they are not
    counted. seconds: what it took. start: the seconds that do not grow with the data. factor: how many times as much there is of the rest.
    """

    phase: Phase
    what: str
    amount: str = ""
    tokens: int = 0
    seconds: float = 0.0
    start: float = 0.0
    factor: float = 0.0

    @property
    def total(self) -> float:
        """The seconds of all of it."""
        return self.start + self.seconds * self.factor


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much more there is of everything than in the handful, whose examples are of the training split.

    prompts: how many training prompts there are for one of the handful. texts: how many characters of training texts for one of its.
    all_texts: the same with the texts of all splits.
    heldout, validation: how many prompts of these splits there are for one of the handful.
    """

    prompts: float
    texts: float
    all_texts: float
    heldout: float
    validation: float

    @property
    def per_example(self) -> float:
        """How long a text of the training split is for one of the handful."""
        return self.texts / self.prompts

    @classmethod
    def of(cls, rows: dict[Split, Examples], handful: Sequence[Row]) -> Amounts:
        """Counts the rows of all splits beside those of a handful."""
        texts = {split: characters(of_split) for split, of_split in rows.items()}
        return cls(
            prompts=len(rows["train"]) / len(handful),
            texts=texts["train"] / characters(handful),
            all_texts=sum(texts.values()) / characters(handful),
            heldout=len(rows.get("heldout", ())) / len(handful),
            validation=len(rows.get("validation", ())) / len(handful),
        )


@dataclass
class Handful(Inputs):
    """The inputs of a recipe with a few of its rows alone.

    first: how many of them every model sees before the others. numbers: how many rows the recipe's splits have.
    answers_of: the splits whose prompts a source answers, by its name.
    """

    first: int
    numbers: dict[Split, int]
    answers_of: dict[str, list[Split]]

    @classmethod
    def of(cls, inputs: Inputs, store_dir: Path, count: int) -> Handful:
        """Takes `count` random rows of a split, because the kinds of rows may take turns, and others that go first."""
        # Held-out answers are like those to the training prompts, which a source may not be asked for: nobody votes on them, a file has
        # them, or a route leads to other sources.
        answers_of = {
            source.name: [split for split in SPLITS if inputs.answers(source, split)]
            for source in inputs.recipe.sources
        }
        splits: list[Split] = ["train", "heldout"] if ["heldout"] in answers_of.values() else ["train"]
        rows: dict[Split, Examples] = {}
        for split in splits:
            if split in inputs.rows:
                order = np.random.default_rng(0).permutation(len(inputs.rows[split])).tolist()
                first = [order[-1 - n % len(order)] for n in range(FIRST)]
                rows[split] = Examples([inputs.rows[split][i] for i in (*first, *order[:count])], ())
        given = {field.name: getattr(inputs, field.name) for field in fields(Inputs)}
        numbers = {split: len(inputs.rows.get(split, ())) for split in SPLITS}
        return cls(
            **given | {"rows": rows, "store_dir": store_dir}, first=FIRST, numbers=numbers, answers_of=answers_of
        )

    @cached_property
    def divisions(self) -> dict[Split, Division]:
        """The rows that go first, and the handful."""
        return {
            split: Division(
                2,
                np.array([0] * self.first + [1] * (len(rows) - self.first), np.int32),
                [row_digest(row) for row in rows],
            )
            for split, rows in self.rows.items()
        }

    def handful(self, split: Split = "train") -> Sequence[Row]:
        """The rows that are timed."""
        return self.rows[split][self.first :]


def characters(rows: Iterable[Row]) -> int:
    """Returns how long the texts of some rows are together; 1 if they are all empty."""
    return sum(len(str(row["prompt"])) + len(row["response"]) for row in rows) or 1


def default_count(recipe: Recipe) -> int:
    """Returns how many examples are timed: two of the largest batches of a recipe, at least LEAST, and at most a shard."""
    sizes = [recipe.capture.batch_size, *(judge.batch_size for judge in recipe.judges if judge.model is not None)]
    sizes += [recipe.generation_of(source).batch_size for source in recipe.sources]
    return min(max(LEAST, 2 * max(sizes)), recipe.capture.shard_size)


def probe(inputs: Inputs, opened: float, count: int | None = None) -> list[Timed]:
    """Times a recipe's phases on a handful of its examples, one model after the other.

    It writes into a temporary directory alone, which is removed. A model on a server is asked as well.

    Args:
        inputs: the inputs of the run. opened: how many seconds it took to open them.
        count: how many examples are timed; None takes default_count.
    Raises:
        ConfigError: nothing in the handful is of a mode that a stage trains on.
        DataError: what a preparation or training would raise.
    """
    with tempfile.TemporaryDirectory(prefix="profuser-") as place, contextlib.ExitStack() as held:
        handful = Handful.of(inputs, Path(place) / "store", count or default_count(inputs.recipe))
        amounts = Amounts.of(inputs.rows, handful.handful())
        held.enter_context(nothing_kept())
        print(f"timing {len(handful.handful())} examples with every model; nothing of it is kept", flush=True)
        held.enter_context(silenced())
        store, found = prepared(handful, amounts, opened, held)
        found += trained(handful, store, Path(place) / "run", amounts, len(inputs.rows["train"]))
        return found + evaluated(handful, amounts, found)


# -- prepare -----------------------------------------------------------------------------------------------------


def prepared(
    handful: Handful, amounts: Amounts, opened: float, held: contextlib.ExitStack
) -> tuple[Store, list[Timed]]:
    """Prepares the handful's store, which it holds in `held`, and returns it with what was timed."""
    import datasets  # what a preparation imports near its end is not to count as work on the data

    assert datasets
    with stopwatch() as encoding:
        assert handful.fitted
    with stopwatch() as beginning:
        preparation = Preparation.begin(handful, held)
    with stopwatch() as collecting:
        gc.collect()
    with stopwatch() as working:
        store = preparation.run()
    took = preparation.sharing.took
    # After each phase Python looks through all objects for garbage, most of which are those of libraries.
    fixed = collecting.seconds * len(preparation.seconds)
    beside = working.seconds - sum(one.begun + sum(shard.seconds for shard in one.shards) for one in took) - fixed
    works = [
        Timed("prepare", "open models and data, begin the store", start=opened + beginning.seconds),
        *(line for one in took if (line := of_shards(one, handful, amounts)) is not None),
        Timed(
            "prepare",
            "encode texts, count votes, sum up",
            amount=f"{len(handful.rows['train'])} examples",
            seconds=encoding.seconds + max(0.0, beside),
            start=fixed,
            factor=amounts.texts * len(handful.handful()) / len(handful.rows["train"]),
        ),
    ]
    return store, works


def of_shards(took: Took, handful: Handful, amounts: Amounts) -> Timed | None:
    """Returns what one piece of work of a preparation took, such as a source's answers; None where none of it was timed."""
    timed = [shard for shard in took.shards if shard.part.number == 1]
    answers = [shard for shard in timed if shard.kind.folder == "responses" and is_answered(shard.kind, handful)]
    # A source's held-out answers are timed where there are no others. Of all else the training split stands for the others.
    timed = answers[:1] or [shard for shard in timed if shard.kind.split == "train"]
    if not timed:
        return None
    (shard,) = timed
    unit = "prompts" if shard.kind.folder in ("responses", "scores", "winners") else "examples"
    return Timed(
        "prepare",
        took.label,
        amount=f"{len(shard.part)} {unit}",
        tokens=shard.tokens,
        seconds=shard.seconds,
        start=took.begun,
        factor=factor_of(shard.kind, handful, amounts),
    )


def factor_of(kind: Kind, handful: Handful, amounts: Amounts) -> float:
    """Returns how many times as much there is of what a shard of the handful holds, over all splits that have such shards."""
    recipe = handful.recipe
    match kind.folder:
        case "truth":
            return amounts.all_texts
        case "responses" if is_answered(kind, handful):
            return answers_factor(kind, handful, amounts)
        case "targets" if recipe.judges:
            return amounts.texts + (amounts.all_texts - amounts.texts) / 2  # the other splits have one mode of two
        case "targets":
            return amounts.all_texts
        case "scores" | "winners" | "responses":
            return amounts.texts


def is_answered(kind: Kind, handful: Handful) -> bool:
    """Whether a source answers the prompts of a shard, instead of a file."""
    return kind.split in handful.answers_of[kind.of]


def answers_factor(kind: Kind, handful: Handful, amounts: Amounts) -> float:
    """Returns how many times as much there is of a source's answers.

    A batch of transformers takes as long as its longest answer, however many prompts are in it, and none reaches over the end of a
    shard. A training prompt may get several responses, which are then batched together.
    """
    source = next(source for source in handful.recipe.sources if source.name == kind.of)
    timed, splits = len(handful.handful(kind.split)), handful.answers_of[source.name]
    if handful.engines[source.name] != "transformers":
        several = handful.responses_per_prompt("train") if kind.split == "train" else 1
        heldout = amounts.heldout * len(handful.handful()) / timed if "heldout" in splits else 0
        return heldout / several + (amounts.prompts if "train" in splits else 0)
    config = handful.recipe.generation_of(source)
    size = handful.recipe.capture.shard_size
    return sum(
        math.ceil(min(size, number - first) / config.batch_size)
        for number in (handful.numbers[split] for split in splits)
        for first in range(0, number, size)
    ) / math.ceil(timed / config.batch_size)


# -- train and evaluate ------------------------------------------------------------------------------------------


def trained(handful: Handful, store: Store, directory: Path, amounts: Amounts, instructions: int) -> list[Timed]:
    """Trains the target for a few steps of every stage, and measures it on the handful, as a validation does.

    Args:
        instructions: how many the run trains on.
    """
    recipe = handful.recipe
    stages = plan(recipe, instructions)
    check_modes(stages, Targets(store, "train"))
    # The handful has fewer epochs, but as many steps. What is measured while it trains is measured below.
    optim = replace(recipe.optim, steps=stages[-1].stop, trackers=[], export="last", eval_rewards=0)
    directory.mkdir()
    with stopwatch() as loading:
        accelerator: Accelerator = launch(
            settled_precision(recipe.optim.precision), deterministic=recipe.optim.deterministic
        )
        trainer = Trainer(replace(recipe, optim=optim), store, directory, accelerator)
    found = [Timed("train", "load the target", start=loading.seconds)]
    for index, stage in enumerate(trainer.stages):
        found.append(of_steps(trainer.trial(index), index, stage, amounts))

    # A validation, which is measured twice because something is set up at the first.
    for _ in range(2):
        with stopwatch() as measuring:
            likelihood(
                trainer.fusion,
                trainer.targets,
                trainer.pad_id,
                recipe.capture.batch_size,
                "score the handful",
                recipe.optim.mixing,
            )
    scored = f"{len(handful.rows['train'])} examples"
    share = len(handful.handful()) / len(handful.rows["train"])
    if amounts.validation:
        factor = validations(stages, recipe.optim.eval_every) * amounts.validation * share
        found.append(
            Timed(
                "train",
                "score the validation prompts",
                scored,
                seconds=measuring.seconds,
                factor=factor,
            )
        )
    if amounts.heldout:
        factor = 2 * amounts.heldout * share  # before and after fusion
        found.append(
            Timed("evaluate", "score the held-out ground truths", scored, seconds=measuring.seconds, factor=factor)
        )
    trainer.trackers.close()
    accelerator.free_memory()
    del trainer
    free_memory()
    return found


def of_steps(steps: Generator[tuple[float, int]], index: int, stage: Stage, amounts: Amounts) -> Timed:
    """Times steps of a stage: some at least, and then more of them for SECONDS."""
    taken: list[tuple[float, int]] = []
    with contextlib.closing(steps):
        for step in steps:
            taken.append(step)
            counted = taken[FIRST_STEPS:]
            if len(counted) == MOST_STEPS or (len(counted) >= STEPS and sum(s for s, _ in counted) >= SECONDS):
                break
    counted = taken[FIRST_STEPS:] or taken[-1:]
    seconds, tokens = (sum(of_all) for of_all in zip(*counted, strict=True))
    modes = " and ".join(mode.key for mode in stage.modes)
    return Timed(
        "train",
        f"stage {index + 1}, {modes} mode",
        amount=f"{len(counted)} steps",
        tokens=int(tokens),
        seconds=seconds,
        factor=(stage.stop - stage.first) / len(counted) * amounts.per_example,
    )


def check_modes(stages: Sequence[Stage], targets: Targets) -> None:
    """Raises ConfigError unless the handful has something to train on in every stage."""
    there = set(targets.modes.tolist())
    for number, stage in enumerate(stages, start=1):
        if not there.intersection(stage.modes):
            modes = " or ".join(mode.key for mode in stage.modes)
            raise ConfigError(
                f"--examples must be so many that some can be trained on in stage {number} ({modes} mode), of these none can; give more, "
                "or leave --probe out"
            )


def validations(stages: Sequence[Stage], every: int) -> int:
    """Returns how often the target is measured: before the first step, every so many steps, and at the end of each stage."""
    total = stages[-1].stop
    return len({0, *(stage.stop for stage in stages), *(range(every, total + 1, every) if every else ())})


def evaluated(handful: Handful, amounts: Amounts, found: Sequence[Timed]) -> list[Timed]:
    """Times the target's answers to held-out prompts, and how it is loaded for them.

    Args:
        found: what was timed before.
    """
    if not amounts.heldout:
        return []
    # A target that is a source has answered before fusion.
    recipe, target = handful.recipe, handful.recipe.target_config
    models = 1 if recipe.target in handful.chats else 2
    with stopwatch() as loading:
        model = load_model(target, handful.dtype, handful.device)
    rows = handful.rows["heldout" if "heldout" in handful.rows else "train"]
    prompts, config = [row["prompt"] for row in rows], recipe.generation_of(target)
    with Progress("answer the prompts", len(prompts), "prompts") as bar, torch.no_grad():
        generate(model, handful.target, prompts[: handful.first], config, max_length=recipe.data.max_length)
        asked = prompts[handful.first :]
        with stopwatch() as answering:
            generate(model, handful.target, asked, config, max_length=recipe.data.max_length, progress=bar.update)
    del model
    free_memory()
    return [
        Timed(
            "evaluate",
            f"{target.name}: answer the held-out prompts",
            amount=f"{len(asked)} prompts",
            tokens=bar.tokens,
            seconds=answering.seconds,
            start=2 * loading.seconds,
            factor=models
            * math.ceil(handful.numbers["heldout"] / config.batch_size)
            / math.ceil(len(asked) / config.batch_size),
        )
    ]


@contextlib.contextmanager
def nothing_kept() -> Generator[None]:
    """Lets the line of Ctrl-C or SIGTERM in a `with` block say that nothing of it is kept."""
    try:
        with working():
            yield
    except Stopped as stopped:
        raise type(stopped)("nothing of what was timed is kept") from None


# -- the clock ---------------------------------------------------------------------------------------------------


class Stopwatch:
    """The seconds of a `with` block, after its end."""

    seconds = math.nan


@contextlib.contextmanager
def stopwatch() -> Generator[Stopwatch]:
    """Measures the seconds of a `with` block."""
    watch, began = Stopwatch(), time.monotonic()
    yield watch
    watch.seconds = time.monotonic() - began
