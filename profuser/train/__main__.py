"""`python -m profuser.train` prepares what is missing, fuses, scores and reports. Without arguments it runs the bundled demo."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from profuser.cli import main_of
from profuser.errors import ConfigError, OutOfMemoryError, ProfuserError, first_line, is_lack_of_memory

if TYPE_CHECKING:
    from profuser.recipe.parse import Run

FLAGS = {
    "fresh": "rename an existing run aside and start over (the store stays)",
    "dry-run": "only print the plan: memory, disk, steps, time and commands; loads and writes nothing",
    "probe": "with --dry-run: load every model and time a handful of examples with it; nothing of that is kept",
}
OWN = ("processes", "instructions", "tokens", "tflops", "device", "examples")
"""The options of --dry-run, which have values."""
UNTIMED = ("instructions", "tokens", "tflops", "device")
"""Those that stand for something which --probe finds out."""


def run_of(argv: list[str]) -> Run:
    """Reads the command line."""
    from profuser.recipe.parse import OwnValue, parse_run

    values = {
        "processes": OwnValue("with --dry-run: plan for this many processes instead of 1, 8 and 16"),
        "instructions": OwnValue(
            "with --dry-run: how many training instructions there will be, if the data are not here"
        ),
        "tokens": OwnValue("with --dry-run: the mean length of a conversation, instead of that of the data"),
        "tflops": OwnValue("with --dry-run: the speed of a process in 10^12 operations per second", float),
        "device": OwnValue("with --dry-run: plan for cuda or cpu instead of what is here", words=("cuda", "cpu")),
        "examples": OwnValue("with --probe: how many examples are timed, instead of a few batches"),
    }
    description = "Prepare what is missing, fuse, score, report. Without arguments: the bundled demo."
    return parse_run("train", argv, FLAGS, description, values)


def main(argv: list[str]) -> None:
    run = run_of(argv)
    given = [name for name in (*OWN, "probe") if run.options[name]]
    if given and not run.options["dry-run"]:
        raise ConfigError(f"--{given[0]} must come with --dry-run, got it alone; add --dry-run, or leave it out")
    try:
        if run.options["dry-run"]:
            print_plan(run, argv)
        else:
            run.check_places()
            from profuser.pipeline import train_and_report

            train_and_report(run)
    except Exception as error:
        if not is_lack_of_memory(error):
            raise
        advice = advice_of(run)
        if advice is None:
            raise
        raise OutOfMemoryError(f"out of memory ({first_line(error)}); {advice}") from error


def print_plan(run: Run, argv: list[str]) -> None:
    """Does what --dry-run asks for. `argv` is the command line."""
    from profuser.plan.plan import PROCESSES, TFLOPS, make_plan
    from profuser.plan.text import plan_text

    if run.options["fresh"]:
        raise ConfigError("--dry-run must stand without --fresh, got both; it touches no run, so leave --fresh out")
    check_probe(run)
    options = {name: run.options[name] for name in OWN}
    tflops, processes = options.pop("tflops"), options.pop("processes")
    probed = run.options["probe"]
    plan = make_plan(run, processes=(processes,) if processes else PROCESSES, probed=probed, **options)
    print(plan_text(plan, without_own(argv), tflops, TFLOPS))


def check_probe(run: Run) -> None:
    """Raises ConfigError where the options of --probe contradict each other, or several processes would time at once."""
    given = [name for name in OWN if run.options[name] is not None]
    if not run.options["probe"]:
        if "examples" in given:
            raise ConfigError("--examples must come with --probe, got it alone; add --probe, or leave it out")
        return
    if other := [name for name in UNTIMED if name in given]:
        raise ConfigError(
            f"--probe must stand without --{other[0]}, got both; it finds that out here, so leave --{other[0]} out"
        )
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(f"--probe must run in one process, got {processes}; start it with `python -m profuser.train`")


def without_own(argv: list[str]) -> list[str]:
    """Returns a command line without what asks for the plan."""
    kept, waiting = [], list(argv)
    while waiting:
        word = waiting.pop(0)
        name, equals, _ = word.removeprefix("--").partition("=")
        if not word.startswith("--"):  # a value, such as the name of a source
            kept.append(word)
        elif name in OWN and not equals:
            waiting.pop(0)
        elif name not in (*OWN, "dry-run", "probe"):
            kept.append(word)
    return kept


def advice_of(run: Run) -> str | None:
    """Returns the estimate of a run's memory, and three settings to change; None where it cannot be estimated."""
    from profuser.plan.plan import make_plan
    from profuser.plan.text import remedies

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        return remedies(make_plan(run, processes=(processes,), timed=False), processes)
    except (ProfuserError, MemoryError, RuntimeError):  # there may be too little memory for the plan, too
        return None


if __name__ == "__main__":
    main_of(main)
