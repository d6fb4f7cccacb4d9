"""Prints the first lines of a run: what it does, with which models, on which device, how long it should take, and with which data."""

from __future__ import annotations

from profuser.alignment.spans import ENGINE
from profuser.environment import threads
from profuser.prepare.data import shared_prompts
from profuser.prepare.estimate import expected, sentence
from profuser.prepare.phases import Preparation
from profuser.recipe.schedule import plan


def announce(command: str, preparation: Preparation, processes: int = 1, first_step: int | None = None) -> None:
    """Prints the first lines of a run.

    Args:
        command: the command's name. processes: how many processes train.
        first_step: how many steps a training that is resumed has done, 0 for a new one; None where only the store is prepared.
    """
    inputs = preparation.inputs
    recipe, rows = inputs.recipe, inputs.rows["train"]
    size = f"{len(rows)} instructions"
    if first_step is not None:
        steps = plan(recipe, len(rows))[-1].stop
        size += f", {f'{steps - first_step} of ' if first_step else ''}{steps} steps ({inputs.schedule})"
    ranks = f", {processes} processes" if processes > 1 else ""
    time = sentence(expected(inputs, preparation.unmade, first_step))
    print(
        f"profuser.{command} {inputs.name}: {', '.join(inputs.source_names)} -> {recipe.target}, {size}; {inputs.device}, "
        f"{threads()}{ranks}; alignment: {ENGINE}; {time}",
        flush=True,
    )
    # Which engine "auto" is, as far as anything is still to be answered. Without a GPU nobody expects another than transformers.
    for engine in dict.fromkeys(preparation.settled_engines()):
        if engine != "transformers" or inputs.device.type == "cuda":
            print(f"generation.engine auto is {engine} here", flush=True)
    # How many examples each split has, and how they were read. Splits that share their examples were read alike.
    words = {"train": "training", "validation": "validation", "heldout": "held-out"}
    sizes = ", ".join(f"{len(examples):,} {words[split]}" for split, examples in inputs.rows.items())
    print(f"data: {sizes} examples", flush=True)
    for note in dict.fromkeys(note for examples in inputs.rows.values() for note in examples.notes):
        print(note, flush=True)
    # What is computed on prompts that are trained on says nothing about new ones.
    for split in [split for split in inputs.rows if split != "train"]:
        if shared := shared_prompts(inputs.rows[split], rows):
            print(
                f"data.{split} shares prompts with data.train: {shared} of its {len(inputs.rows[split])} prompts are trained on, "
                "and say nothing about new ones",
                flush=True,
            )
    # The schedule of this name does not switch the rest of FuseLLM's method on.
    align = recipe.align
    if recipe.schedule == "fusellm" and (align.mode, align.min_ce_unit) != ("fusellm", "token"):
        print(
            f"schedule: fusellm keeps align.mode: {align.mode} and align.min_ce_unit: {align.min_ce_unit}; to repeat FuseLLM itself, take "
            "fusellm and token, as in profuser/recipes/fusellm.yaml",
            flush=True,
        )
