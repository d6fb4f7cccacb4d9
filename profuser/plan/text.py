"""Puts a plan into words: the text of --dry-run, the line with estimate and measurement, and what to change when memory was short."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from profuser.plan.memory import PROCESS, TrainingMemory
from profuser.plan.plan import Plan, is_sharded
from profuser.plan.probe import Timed
from profuser.progress import in_words
from profuser.recipe.schedule import schedule_words
from profuser.train.run_record import peak_of

GIB = 1 << 30
MODULE = "profuser.train"
GPUS = 8
"""How many GPUs a machine has at most. More processes than that are started on several machines."""
COLUMNS = {
    "weights": "weights",
    "gradients": "gradients",
    "moments": "AdamW",
    "exchange": "exchange",
    "activations": "activations",
    "copies": "copies",
    "loss": "loss",
    "update": "update",
    "peak": "peak",
}
"""The parts of a process's memory, each with the head of its column."""


def size(bytes_: float) -> str:
    """Formats a size as `7.3 MiB`, `5.1 GiB` or `1.2 TiB`."""
    for unit, scale in (("MiB", 1 << 20), ("GiB", GIB), ("TiB", 1 << 40)):
        if bytes_ < 1000 * scale:
            return f"{bytes_ / scale:.1f} {unit}"
    return f"{bytes_ / (1 << 50):.1f} PiB"


def plan_text(plan: Plan, argv: Sequence[str], tflops: float | None, default_tflops: float) -> str:
    """Returns the text of --dry-run.

    Args:
        argv: the command line without what asks for the plan. tflops: the speed of a process that the user gives.
    """
    parts = [
        head(plan),
        assumptions(plan),
        models(plan),
        training(plan),
        preparing(plan),
        store(plan),
        time(plan, tflops, default_tflops),
        commands(plan, argv),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def head(plan: Plan) -> list[str]:
    """What is planned."""
    sources = ", ".join(source.name for source in plan.recipe.sources)
    arithmetic = "bf16" if plan.bf16 else "fp32"
    done = "nothing was loaded or written" if plan.timed is None else "nothing of what was timed was kept"
    return [
        f"plan of {plan.name}: {sources} -> {plan.recipe.target}, {plan.instructions:,} instructions, {plan.stages[-1].stop:,} "
        f"steps ({schedule_words(plan.recipe)}), {arithmetic} on {plan.device}; {done}"
    ]


def assumptions(plan: Plan) -> list[str]:
    """What the plan could not know."""
    return ["assumed:", *(f"  - {note}" for note in plan.assumed)] if plan.assumed else []


def models(plan: Plan) -> list[str]:
    """The sizes of the models."""
    return ["models:"] + [
        f"  {model.name}: {model.parameters:,} parameters, {model.layers} layers, vocabulary {model.vocabulary:,}"
        for model in plan.models.values()
    ]


def training(plan: Plan) -> list[str]:
    """The memory of a process at training, for every number of processes, beside what the device has."""
    most = max(memory.peak for memory in plan.training)
    unit, scale, digits = ("GiB", GIB, 1) if most >= 4 * GIB else ("MiB", 1 << 20, 0)

    def cells(memory: TrainingMemory) -> list[str]:
        return [f"{getattr(memory, part) / scale:,.{digits}f}" for part in COLUMNS]

    rows = [["processes", *COLUMNS.values()]]
    rows += [[way(memory), *cells(memory)] for memory in plan.training]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  "
        + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    one, with_it = plan.one, plan.recipe.optim.gradient_checkpointing
    on, off = (one.activations, plan.other_activations) if with_it else (plan.other_activations, one.activations)
    lines = [
        f"memory of each process while it trains, in {unit}:",
        *table,
        "  peak is the most of what is held at one time: activations, copies and loss are gone before AdamW's update",
        f"  a forward pass has up to {one.tokens:,} tokens ({one.rows} rows of {one.length:,}): activations of {size(on)} with "
        f"optim.gradient_checkpointing, {size(off)} without; the recipe has it {'on' if with_it else 'off'}",
        "  loss is the fp32 gradients of head and hidden states, and the logits of a chunk of tokens, never of all of them",
    ]
    processes = plan.training[0].processes
    host = "" if plan.device == "cpu" else " of the machine's memory, not the GPU's,"
    lines.append(f"  a checkpoint takes another {size(plan.checkpoint)}{host} while it is written")
    if plan.device == "cpu":
        lines.append(
            f"  the process with {size(PROCESS)} of Python and libraries, and all else: {size(plan.peak(processes))}"
        )
    if plan.available is None:
        lines.append("  this machine has no such device to compare with")
    else:
        fits = "enough" if plan.peak(processes) <= plan.available else "TOO LITTLE"
        of = "one process" if processes == 1 else f"each of {processes} processes"
        lines.append(f"  the {plan.device} here has {size(plan.available)}: {fits} for {of}")
    return lines


def way(memory: TrainingMemory) -> str:
    """The number of processes, and how they share the model."""
    if memory.processes == 1:
        return "1"
    return f"{memory.processes}, {'sharded' if memory.sharded else 'DDP'}"


def preparing(plan: Plan) -> list[str]:
    """The memory of the models that make the store."""
    return ["memory while the store is made, one model at a time in each process:"] + [
        f"  {model.name} {model.doing}: weights {size(model.weights)}, working {size(model.working)}"
        for model in plan.preparing
    ]


def store(plan: Plan) -> list[str]:
    """The bytes of the store, and the steps that read it."""
    parts = ", ".join(f"{name} {size(n)}" for name, n in plan.store.items())
    stages = ", ".join(
        f"stage {number}: {stage.stop - stage.first:,} steps of {' and '.join(mode.key for mode in stage.modes)} mode"
        for number, stage in enumerate(plan.stages, start=1)
    )
    return [
        f"store, with top_k {plan.recipe.capture.top_k}: {size(sum(plan.store.values()))} ({parts})",
        f"steps of {plan.recipe.optim.batch_size} instructions: {stages}",
    ]


def time(plan: Plan, tflops: float | None, default_tflops: float) -> list[str]:
    """How long the phases take: by a handful of examples if they were timed, by probes of this machine where these fit, else by the
    operations at a stated speed."""
    if plan.timed is not None:
        return probed(plan.timed)
    if plan.seconds is not None and tflops is None:
        parts = ", ".join(f"{phase} {in_words(seconds)}" for phase, seconds in plan.seconds.items())
        return [f"time with one process here, by short probes: {in_words(sum(plan.seconds.values()))} ({parts})"]
    speed = tflops or default_tflops
    said = "as given" if tflops else "an assumption and no measurement; --tflops changes it"
    numbers = list(dict.fromkeys(memory.processes for memory in plan.training))
    lines = [f"time at {speed:g} TFLOP/s per process ({said}):"]
    for work in plan.work:
        seconds = work.flops / (speed * 1e12)
        words = ", ".join(f"{in_words(seconds / n)} with {n}" for n in numbers)
        if work.rounds:
            words += f", if speed alone counted; but each of {work.rounds:,} rounds reads a model's weights, {size(work.read)} in all"
        lines.append(f"  {work.phase}: {work.flops:.3g} FLOP, {words}")
    return lines


def probed(timed: Sequence[Timed]) -> list[str]:
    """The table of what was timed, with the sums of the phases."""
    rows = [["", "timed", "tokens/s", "start", "all"]]
    for phase in dict.fromkeys(one.phase for one in timed):
        of_phase = [one for one in timed if one.phase == phase]
        rows.append([phase, "", "", "", exactly(sum(one.total for one in of_phase))])
        rows += [
            [
                f"  {one.what}",
                f"{one.amount} in {exactly(one.seconds)}" if one.amount else "",
                f"{one.tokens / one.seconds:,.0f}" if one.tokens and one.seconds else "",
                exactly(one.start) if one.start else "",
                exactly(one.total),
            ]
            for one in of_phase
        ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"  {row[0].ljust(widths[0])}  {row[1].ljust(widths[1])}  "
        + "  ".join(cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True))
        for row in rows
    ]
    return [
        f"time with one process here, by what was timed with the models themselves: {in_words(sum(one.total for one in timed))}",
        *lines,
        "  start does not grow with the data; checkpoints and the report are left out",
    ]


def exactly(seconds: float) -> str:
    """Formats a duration for a table, with three digits if it is short: `0.25 s`, `41.3 s`, `12.6 min`, `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.{2 if seconds < 10 else 1}f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def commands(plan: Plan, argv: Sequence[str]) -> list[str]:
    """What to type."""
    lines = ["commands:"]
    for n in dict.fromkeys(memory.processes for memory in plan.training):
        launcher, machines = "python" if n == 1 else f"torchrun --nproc-per-node {n}", n // GPUS
        if several := plan.device == "cuda" and machines > 1 and n % GPUS == 0:
            launcher = (
                f"torchrun --nnodes {machines} --nproc-per-node {GPUS} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
            )
        line = " ".join([launcher, "-m", MODULE, shlex.join(argv)]).rstrip()
        lines.append(f"  {line}" + (f"  # on each of {machines} machines, HOST is one of them" if several else ""))
    return lines


def beside(plan: Plan, record: dict[str, Any], processes: int) -> str:
    """Returns the line that sets what was estimated beside what run.json measured.

    The estimated time is that of a run which begins with nothing. A store that was there already is left out.
    """
    peak = peak_of(record)
    assert peak is not None
    measured, which = peak
    line = f"memory {which}: {size(measured)} at most, estimated {size(plan.peak(processes))}"
    if plan.seconds is None:
        return line
    seconds = record["seconds"]
    estimated = {
        "prepare": (plan.seconds["score"] + plan.seconds["answer"]) / processes,
        "train": plan.seconds["fuse"] / processes,
        "evaluate": plan.seconds.get("evaluate", 0.0),
    }
    times = ", ".join(
        f"{phase} {in_words(seconds[phase])}, estimated {in_words(s)}"
        for phase, s in estimated.items()
        if s and phase in seconds and (phase != "prepare" or record.get("prepared") is not False)
    )
    return f"{line}; time: {times}"


def remedies(plan: Plan, processes: int) -> str:
    """Returns what a message about too little memory says: the estimate, and three settings to change."""
    recipe, memory = plan.recipe, plan.memory(processes)
    optim, generation = recipe.optim, recipe.generation
    of_training = [] if optim.gradient_checkpointing else ["optim.gradient_checkpointing: true"]
    if optim.tokens_per_micro_batch:
        of_training.append(f"a lower optim.tokens_per_micro_batch (now {optim.tokens_per_micro_batch})")
    else:
        of_training.append(f"a lower optim.micro_batch_size (now {optim.micro_batch_size})")
    of_training.append(f"a lower data.max_length (now {recipe.data.max_length})")
    if processes > 1 and not optim.compile and any(one.sharded for one in plan.training) and not is_sharded(recipe):
        of_training.insert(0, "optim.shard: true")
    capture = recipe.capture
    counted = "batch_size" if capture.tokens_per_batch is None else "tokens_per_batch"
    of_store = [
        f"a lower generation.batch_size (now {generation.batch_size})",
        f"a lower capture.{counted} (now {getattr(capture, counted)})",
    ]
    prepared = max((model.peak for model in plan.preparing), default=0)
    settings = [*of_store, *of_training] if prepared > memory.peak else [*of_training, *of_store]
    has = "" if plan.available is None else f" of the {size(plan.available)} that there are"
    return (
        f"the estimate was {size(plan.peak(processes))}{has} (training {size(memory.peak)}, making the store {size(prepared)}); set "
        f"{settings[0]}, {settings[1]} or {settings[2]}"
    )
