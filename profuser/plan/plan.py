"""The plan of a run: what it will need, found before any weights are read and any directory is touched.

What is on this machine is opened as a run would open it, so that the plan finds the same mistakes. A recipe whose models are not
here is planned for GPUs, by the models' configurations alone, with assumptions that the plan lists.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from profuser.errors import ConfigError
from profuser.models.load import default_device
from profuser.plan.architecture import Architecture, open_architecture
from profuser.plan.asked import Asked, asked_of_each, won_share
from profuser.plan.lengths import RANGES, RESPONSE_SHARE, TOKENS, Lengths, assumed, measured
from profuser.plan.memory import (
    ADAPTER,
    PIECES,
    PROCESS,
    RETURNED,
    Pass,
    Preparing,
    TrainingMemory,
    answering,
    checkpoint_bytes,
    reading,
    training_memory,
)
from profuser.plan.probe import Timed, probe
from profuser.plan.store_size import Counts, capture_bytes, targets_bytes
from profuser.prepare.estimate import expected
from profuser.prepare.inputs import Inputs, load_split
from profuser.recipe.data import SPLITS, Split
from profuser.recipe.optim import EIGHT_BIT
from profuser.recipe.parse import Run
from profuser.recipe.places import files_of
from profuser.recipe.schedule import Stage, plan
from profuser.recipe.schema import Recipe, SourceConfig
from profuser.train.checks import check_training

PROCESSES = (1, 8, 16)
INSTRUCTIONS = 100_000
"""How many instructions are assumed where neither the data nor a number is there."""
TFLOPS = 100.0
"""The assumed speed of a GPU in 10^12 operations per second, a bit more than a third of what an A100 can do at most in bf16."""

AllLengths = dict[str, dict[Split, Lengths]]
"""The lengths of every split's conversations in every model's tokens."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a phase computes: operations, which all processes share.

    rounds: of answering, how many tokens are written one after the other. Each round reads all weights, `read` bytes.
    """

    phase: str
    flops: float
    rounds: int = 0
    read: float = 0


JUDGES = "judges"
"""What a judge does while the store is made."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will need. Sizes are in bytes and times in seconds.

    device: what it is planned for, cuda or cpu. available: the memory of that device, None where it is not here.
    one: the largest forward pass with one process. other_activations: what it keeps with gradient checkpointing, if the recipe has
    none, or without.
    training: the memory of a process, for every number of processes, whole and sharded.
    checkpoint: what writing one adds. preparing: the models that make the store.
    store: the bytes of its parts. seconds: of each phase on this machine, None where no probe of it fits.
    timed: what a handful of examples took with the models themselves, None unless they were timed.
    """

    name: str
    recipe: Recipe
    device: str
    bf16: bool
    available: int | None
    instructions: int
    lengths: Lengths
    models: dict[str, Architecture]
    stages: list[Stage]
    one: Pass
    other_activations: int
    training: list[TrainingMemory]
    checkpoint: int
    preparing: list[Preparing]
    store: dict[str, int]
    seconds: dict[str, float] | None
    timed: list[Timed] | None
    work: list[Work]
    assumed: list[str] = field(default_factory=list)

    @property
    def target(self) -> Architecture:
        """The target's model."""
        return self.models[self.recipe.target_config.name]

    def memory(self, processes: int) -> TrainingMemory:
        """The memory of each of so many processes, sharded if the recipe says so."""
        sharded = is_sharded(self.recipe) and processes > 1
        return next(m for m in self.training if (m.processes, m.sharded) == (processes, sharded))

    def peak(self, processes: int) -> int:
        """The most memory that the main process takes on its device: on a CPU also what is no tensor, and a checkpoint's bytes.

        What a process has freed in small pieces mostly stays its own on a CPU. So a checkpoint is written beside what the training took at
        its peak, as it is if training goes on meanwhile, and the training takes its memory beside what made the store.
        """
        memory = self.memory(processes)
        alone = [model.peak for model in self.preparing]
        if self.recipe.optim.eval_rewards:  # the judges are loaded beside the target
            alone += [memory.lasting + model.peak for model in self.preparing if model.doing == JUDGES]
        if self.device != "cpu":
            return max([memory.peak, *alone])
        optim = self.recipe.optim
        # With gradient checkpointing, what a step frees returns to the system (profuser/train/freed_memory.py).
        in_pieces = not optim.gradient_checkpointing and self.one.tokens * self.target.inner * 4 < RETURNED
        held = memory.peak if in_pieces or optim.async_checkpoints else memory.lasting + memory.gradients
        kept = max((model.kept for model in self.preparing), default=0)
        of_adapter = 0
        if self.recipe.adapter is not None:
            of_adapter = ADAPTER
            if optim.tokens_per_micro_batch is None and not optim.gradient_checkpointing:
                of_adapter += round(PIECES * self.one.activations)
        return PROCESS + max([max(memory.peak, held + self.checkpoint) + kept + of_adapter, *alone])


def is_sharded(recipe: Recipe) -> bool:
    """Whether the recipe shards weights, gradients and moments over the processes."""
    return recipe.optim.shard


def make_plan(
    run: Run,
    *,
    processes: Sequence[int] = PROCESSES,
    instructions: int | None = None,
    tokens: int | None = None,
    device: str | None = None,
    timed: bool = True,
    probed: bool = False,
    examples: int | None = None,
) -> Plan:
    """Plans a run.

    Args:
        processes: the numbers of processes to plan for.
        instructions: how many there are to train on; None counts those of the data.
        tokens: the mean length of a conversation; None measures it.
        device: cuda or cpu; None takes the one that is here.
        timed: whether this machine is probed for how long it will take.
        probed: whether this is found with the models themselves, on so many `examples`; None takes a number that suits the recipe.
    Raises:
        ConfigError, DataError: what a run would raise, as far as it is seen without loading a model, or with the models if they are
            `probed`.
    """
    recipe, notes = run.recipe, []
    models = {model.name: open_architecture(model) for model in (*recipe.sources, recipe.target_config)}
    judges = [
        open_architecture(
            SourceConfig(
                name=judge.name, model=judge.model, base=judge.base, trust_remote_code=judge.trust_remote_code
            ),
            "scores",
        )
        for judge in recipe.judges
        if judge.model is not None
    ]
    here = all(model.here for model in (*models.values(), *judges))
    if bundled := [model.name for model in (*models.values(), *judges) if model.bundled]:
        notes.append(
            f"{', '.join(bundled)}: not on this machine, counted by the configuration that comes with profuser"
        )

    # What the run's device will be, and in which arithmetic the target is trained there.
    if device is None:
        device = default_device().type if here else "cuda"
        if not here and not torch.cuda.is_available():
            notes.append("it runs on GPUs, because the models are not on this machine; --device cpu plans for a CPU")
    cuda = device == "cuda"
    bf16 = recipe.optim.precision == "bf16" or (recipe.optim.precision == "auto" and cuda)

    # How many instructions there are, and how long they are.
    began = time.monotonic()
    inputs = Inputs.open(run) if here and instructions is None else None
    opened = time.monotonic() - began
    if inputs is not None and device == default_device().type:  # else the run will be on another machine
        check_training(recipe, default_device(), sharded=False)
        if (changes := inputs.changes(renews=True)) is not None and changes.data:
            notes.append(
                f"{', '.join(changes.data)} changed since the store was made: run `python -m profuser.prepare` before the training"
            )
    if probed and inputs is None:
        away = [model.name for model in (*models.values(), *judges) if not model.here]
        raise ConfigError(
            f"--probe must have all models on this machine, {', '.join(away)} {'is' if len(away) == 1 else 'are'} not; download them, or "
            "leave it out"
        )
    if instructions is None:
        instructions = len(inputs.rows["train"]) if inputs else count_instructions(recipe, notes)
    target = replace(models[recipe.target_config.name], adapter=recipe.adapter)
    limit = recipe.data.max_length
    if inputs is not None and tokens is None:
        chats = {**inputs.chats, target.name: inputs.target}
        lengths = {
            name: {
                split: measured(inputs.target, chats[name], rows, models[name].vocabulary, limit)
                for split, rows in inputs.rows.items()
            }
            for name in models
        }
    else:
        mean = min(tokens or TOKENS, limit)
        lengths = {
            name: dict.fromkeys(SPLITS, assumed(mean, limit, model.vocabulary == target.vocabulary))
            for name, model in models.items()
        }
        notes.append(
            f"a conversation has {mean:,} tokens, {RESPONSE_SHARE:.0%} of them in the response, and at most {limit:,} (data.max_length)"
            "; --tokens changes the mean"
        )
        if others := [name for name, model in models.items() if model.vocabulary != target.vocabulary]:
            notes.append(f"{', '.join(others)}: {RANGES} prefix ranges for every token, as between two tokenizers")
    if recipe.capture.choice == "route" and inputs is None:
        notes.append("the routes name all sources equally often (capture.choice: route)")
    if recipe.judges:
        notes.append("the sources' answers are as long as the ground truth, for training and in the store")

    # The parts of the plan.
    asked = asked_of_each(recipe, inputs)
    of_target = lengths[target.name]["train"]
    stages = plan(recipe, instructions)
    modes = max(len(stage.modes) for stage in stages)
    length = longest_row(recipe, of_target)
    whole, copies = target.saved(1, length, bf16=bf16, checkpointing=False)
    saved = {False: whole, True: target.saved(1, length, bf16=bf16, checkpointing=True)[0]}
    checkpointing = recipe.optim.gradient_checkpointing
    own = saved[checkpointing], copies  # autocast keeps its copies until the forward pass ends, also with checkpointing
    divisible = not target.quantized and recipe.optim.name != EIGHT_BIT
    training = []
    for n in processes:
        one = largest_pass(recipe, modes, of_target, own, n)
        training.extend(
            training_memory(
                target, recipe.optim, one, processes=n, sharded=sharded, cuda=cuda, top_k=recipe.capture.top_k
            )
            for sharded in ((False, True) if n > 1 and divisible else (False,))
        )
    one = largest_pass(recipe, modes, of_target, own, processes[0])
    seconds = None
    if timed and not probed and inputs is not None and device == default_device().type:
        rows = inputs.rows
        seconds = expected(inputs, lambda kind: len(rows[kind.split]), 0)
    return Plan(
        name=run.name,
        recipe=recipe,
        device=device,
        bf16=bf16,
        available=available_memory(device),
        instructions=instructions,
        lengths=of_target,
        models=models,
        stages=stages,
        one=one,
        other_activations=one.rows * saved[not checkpointing],
        training=training,
        checkpoint=checkpoint_bytes(target, recipe.optim, cuda=cuda),
        preparing=preparing_memory(
            recipe,
            [source for source in recipe.sources if asked[source.name].is_run],
            asked,
            models,
            judges,
            lengths,
            cuda,
        ),
        store=store_bytes(recipe, asked, models, lengths, instructions, inputs),
        seconds=seconds,
        timed=probe(inputs, opened, examples) if probed and inputs is not None else None,
        work=work_of(recipe, asked, models, judges, lengths, stages, instructions, 2 if cuda else 4),
        assumed=notes,
    )


def count_instructions(recipe: Recipe, notes: list[str]) -> int:
    """Counts the training instructions of a recipe whose models are elsewhere, or assumes a number and notes that."""
    location = recipe.data.location("train")
    if location is not None and all(map(files_of, location.paths)):
        return len(load_split(recipe, "train"))
    notes.append(f"{location} is not here: {INSTRUCTIONS:,} instructions; --instructions changes that")
    return INSTRUCTIONS


def longest_row(recipe: Recipe, lengths: Lengths) -> int:
    """Returns the length of a forward pass's rows where it is largest.

    A pass with a budget of tokens is packed up to it, in rows that may be longer than the longest sequence (profuser.models.packing).
    """
    budget, longest = recipe.optim.tokens_per_micro_batch, max(1, lengths.longest)
    return longest if budget is None else budget // max(1, budget // longest)


def largest_pass(recipe: Recipe, modes: int, lengths: Lengths, of_row: tuple[int, int], processes: int) -> Pass:
    """Returns the largest forward pass of a process.

    Args:
        modes: how many sequences an instruction has at most. of_row: what the pass keeps for each row, and in 16-bit copies.
    """
    optim, length = recipe.optim, longest_row(recipe, lengths)
    if budget := optim.tokens_per_micro_batch:
        rows = budget // length
        passes = math.ceil(optim.batch_size * modes * lengths.mean / (budget * processes))
    else:
        passes = math.ceil(optim.batch_size / (processes * optim.micro_batch_size))
        rows = math.ceil(optim.batch_size * modes / (processes * passes))
    return Pass(rows, length, rows * of_row[0], of_row[1], max(1, passes))


def preparing_memory(
    recipe: Recipe,
    sources: Sequence[SourceConfig],
    asked: Mapping[str, Asked],
    models: dict[str, Architecture],
    judges: Sequence[Architecture],
    lengths: AllLengths,
    cuda: bool,
) -> list[Preparing]:
    """Returns what each judge needs while the store is made, and each of the `sources`, which are those that have to be loaded. One
    process has one model at a time."""
    capture = recipe.capture
    itemsize = 2 if capture.dtype == "bfloat16" or (capture.dtype == "auto" and cuda) else 4
    found = []
    for source in sources:
        own, of = models[source.name], lengths[source.name]["train"]
        generation = recipe.generation_of(source)
        prompt = of.longest if recipe.data.max_length <= of.longest else of.longest - round(of.response)
        length = min(recipe.data.max_length, prompt + generation.max_new_tokens)
        if asked[source.name].answers or asked[source.name].answers_heldout:
            rows = generation.batch_size * generation.responses_per_source
            found.append(answering(own, source.name, itemsize, rows, length))
        found.append(
            reading(own, source.name, "is captured", itemsize, capture.responses_at_once(of.longest), of.longest)
        )
    sizes = {judge.name: judge.batch_size for judge in recipe.judges}
    longest = lengths[recipe.target_config.name]["train"].longest
    # Judges are loaded in fp32.
    return found + [reading(judge, judge.name, JUDGES, 4, sizes[judge.name], longest) for judge in judges]


def store_bytes(
    recipe: Recipe,
    asked: Mapping[str, Asked],
    models: dict[str, Architecture],
    lengths: AllLengths,
    instructions: int,
    inputs: Inputs | None,
) -> dict[str, int]:
    """Returns the bytes of the parts of a store: of every source's captures, and of the targets. Answers and scores are small."""
    k, sources = recipe.capture.top_k, len(recipe.sources)
    examples: dict[Split, int] = {"train": instructions}
    if inputs is not None:
        examples = {split: len(rows) for split, rows in inputs.rows.items()}

    def shards(number: int) -> int:
        return math.ceil(number / recipe.capture.shard_size)

    parts = {}
    for source in recipe.sources:
        vocabulary, of = models[source.name].vocabulary, lengths[source.name]
        # Every source has a row per prompt, and tokens for those that it is asked about, or that it won.
        captured: list[tuple[int, float, Lengths]] = [
            (number, number * (1.0 if split == "heldout" else asked[source.name].share), of[split])
            for split, number in examples.items()
        ]
        if recipe.judges:
            captured.append((instructions, instructions * won_share(asked, source.name), of["train"]))
        parts[source.name] = sum(
            capture_bytes(Counts(number, read * one.response, read * one.ranges, shards(number)), vocabulary, k)
            for number, read, one in captured
        )
    # A shard of targets holds both modes. In inference mode the winner alone is captured on its response.
    keeping = sources if recipe.keep == "all" else 1
    vocabulary, of = models[recipe.target_config.name].vocabulary, lengths[recipe.target_config.name]
    written = [(number, keeping, of[split], shards(number)) for split, number in examples.items()]
    if recipe.judges:
        written.append((instructions, 1, of["train"], 0))
    parts["targets"] = sum(
        targets_bytes(
            Counts(number, number * one.mean, number * one.response * speakers, files), vocabulary, k, sources
        )
        for number, speakers, one, files in written
    )
    return parts


def work_of(
    recipe: Recipe,
    asked: Mapping[str, Asked],
    models: dict[str, Architecture],
    judges: Sequence[Architecture],
    lengths: AllLengths,
    stages: Sequence[Stage],
    instructions: int,
    itemsize: int,
) -> list[Work]:
    """Returns what each phase computes. A forward pass of n tokens through P parameters costs 2 P n operations."""
    score = answer = 0.0
    rounds, read = 0, 0.0
    for source in recipe.sources:
        own, of, one = models[source.name], lengths[source.name]["train"], asked[source.name]
        prompts = instructions * one.share
        captured = (prompts if one.scores else 0) + (
            instructions * won_share(asked, source.name) if recipe.judges else 0
        )
        score += 2 * own.parameters * captured * of.mean
        if one.answers:
            generation = recipe.generation_of(source)
            answer += 2 * own.parameters * prompts * generation.responses_per_source * of.response
            of_source = math.ceil(prompts / generation.batch_size) * generation.max_new_tokens
            rounds, read = rounds + of_source, read + of_source * own.parameters * itemsize
    shown = instructions * sum(one.share for one in asked.values()) * recipe.generation.responses_per_source
    target = recipe.target_config.name
    judging = sum(2 * judge.parameters * shown * lengths[target]["train"].mean for judge in judges)
    # A backward pass costs two forward passes, and gradient checkpointing one more.
    passes = 4 if recipe.optim.gradient_checkpointing else 3
    sequences = sum((stage.stop - stage.first) * len(stage.modes) for stage in stages) * recipe.optim.batch_size
    fuse = passes * 2 * models[target].parameters * sequences * lengths[target]["train"].mean
    work = [
        Work("score", score),
        Work("answer", answer, rounds=rounds, read=read),
        Work("judge", judging),
        Work("fuse", fuse),
    ]
    return [one for one in work if one.flops]


def available_memory(device: str) -> int | None:
    """Returns the memory of the device that is here, in bytes; None where there is none of its kind."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # a system that does not say
        return None
