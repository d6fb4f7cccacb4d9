"""`python -m profuser.experiments.number_fusion`: do the alignment's rules for numbers help where sums are fused?

A source that adds well is fused into a target that has learnt little and cuts numbers differently: single digits into tokens of
up to three, and the reverse (`sums.py`). Two fifths of the ground truths are terse and a tenth is wrong, so that much of what
there is to learn stands in the source's distributions. The arms differ in one thing each: SFT, FuseLLM's alignment, this
checkout's rules, and those of every other checkout that `--variant NAME=DIR` names, which trains with its own code. All begin with
the same models and take the same data, steps and seeds. Only what all arms share was tuned: the training before the fusion, so that
the sources are good and the targets weak, and once the amount of data, after a first try in which no arm got more than 2 of 150 sums right.

Exact match is counted on held-out sums. How long a model takes its numbers to be is measured at three places (`number_lengths.py`):

- the first number of its answer. It may be either of the two, so the true distribution of its length is known;
- the final answer's first digit, behind the right working;
- the final answer's first digit without any working, where even a good model is uncertain. This is the place that terse
  ground truths train.

The text before these places is given. Behind a model's own text its earlier mistakes would count as well, and the arms would be
compared at different places.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from profuser.cli import main_of
from profuser.demo.build import write_rows
from profuser.demo.pretrain import save
from profuser.environment import environment
from profuser.errors import ConfigError, ProfuserError
from profuser.experiments.number_lengths import LONGEST, against, number_lengths
from profuser.experiments.page import write_section
from profuser.experiments.pool import stoppable_pool
from profuser.experiments.sums import Sum, Sums, Training, pretrained, tokenizer_of
from profuser.models.load import chat_format, load_model
from profuser.recipe.schema import SourceConfig
from profuser.store.files import write_json
from profuser.text.chat import ChatFormat
from profuser.typed import read_json

SECTION = "number_fusion"
DIRECTIONS = {"one → several": ("single", "triple"), "several → one": ("triple", "single")}
"""The tokenizers of the source and of the target."""
HERE = Path(__file__).resolve().parents[2]
PLACES = ("first number", "answer", "answer without working")


@dataclass(frozen=True, slots=True)
class Arm:
    """How the target is trained: with which options beside the recipe, and with the code of which checkout."""

    name: str
    options: tuple[str, ...] = ()
    checkout: Path = HERE


ARMS = (
    Arm("SFT", ("--schedule=sft",)),
    Arm("FuseLLM's alignment", ("--align.mode=fusellm",)),
    Arm("these rules"),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The sizes of the experiment, and how the models are trained."""

    fusion: int = 3000
    heldout: int = 150
    measured: int = 40
    """At how many held-out sums the lengths of numbers are measured."""
    sources: dict[str, Training] = field(
        default_factory=lambda: {"single": Training(steps=1700), "triple": Training(steps=2600)}
    )
    targets: dict[str, Training] = field(
        default_factory=lambda: {name: Training(steps=800) for name in ("single", "triple")}
    )
    steps: int = 150
    batch_size: int = 32
    lr: float = 1.5e-3


def recipe_of(settings: Settings, source: Path, target: Path, data: Path) -> dict[str, Any]:
    """The recipe of all arms. It has only keys that earlier versions know as well."""
    return {
        "sources": [{"name": "source", "model": str(source)}],
        "target": str(target),
        "data": {"train": str(data / "fusion.jsonl"), "heldout": str(data / "heldout.jsonl"), "max_length": 192},
        "generation": {"max_new_tokens": 96, "batch_size": 128},
        "capture": {"top_k": 10, "batch_size": 64, "shard_size": 512},
        "schedule": "fusellm",
        "optim": {
            "steps": settings.steps,
            "batch_size": settings.batch_size,
            "micro_batch_size": settings.batch_size,
            "lr": settings.lr,
            "warmup_ratio": 0.05,
            "weight_decay": 0.01,
            "beta": 1.0,
            "eval_every": 0,
            "data_workers": 0,
        },
        "evaluation": {"match": "profuser.demo.verify:exact_match", "examples": 3},
    }


def opened(folder: Path) -> tuple[PreTrainedModel, ChatFormat]:
    config = SourceConfig(name=folder.name, model=str(folder))
    return load_model(config, torch.float32), chat_format(config)


def pretrain_one(settings: Settings, role: str, name: str, folder: Path) -> None:
    """Trains and saves a model before the fusion, unless that was done already."""
    if (folder / "config.json").exists():
        return
    torch.set_num_threads(1)
    tokenizer, sums = tokenizer_of(name), Sums(settings.fusion, settings.heldout)
    training = (settings.sources if role == "source" else settings.targets)[name]
    problems = sums.pretraining(random.Random(f"{role} {name}"))
    model = pretrained(tokenizer, problems, training, lambda line: say(f"{role} {name}: {line}"))
    save(model, tokenizer, folder)


# -- the runs ----------------------------------------------------------------------------------------------------------


FUSE = """
from profuser.cli import main_of
from profuser.pipeline import train
from profuser.recipe.parse import parse_run
main_of(lambda argv: [train(parse_run("train", [*argv[1:], f"--seed={n}", f"--output={argv[0]}/{n}"])) for n in SEEDS])
"""
"""What the code of a checkout is asked to do. It is the command `train` without its report, for several seeds."""


def fuse(arm: Arm, recipe: Path, directory: Path, seeds: Sequence[int]) -> list[Path]:
    """Trains one arm on every seed, on one store, with the code of its checkout. Returns the run directories.

    Raises:
        ProfuserError: a run has failed.
    """
    folder = directory / arm.name.replace(" ", "-")
    runs = {seed: folder / str(seed) for seed in seeds}
    if missing := [seed for seed, run in runs.items() if not (run / "scores.json").exists()]:
        options = [f"--config={recipe}", f"--store={folder / 'store'}", *arm.options]
        command = [sys.executable, "-c", FUSE.replace("SEEDS", repr(missing)), str(folder), *options]
        variables = os.environ | {"PYTHONPATH": str(arm.checkout), "OMP_NUM_THREADS": "1"}
        # Python looks into the working directory first, which must be no checkout.
        done = subprocess.run(command, env=variables, cwd=directory, capture_output=True, text=True)
        if done.returncode:
            raise ProfuserError(
                f"the arm {arm.name} failed with {done.stderr[-2000:].strip()!r}; mend it, and the same command goes on"
            )
        say(f"{directory.name}: {arm.name}")
    return list(runs.values())


# -- the measures ------------------------------------------------------------------------------------------------------


def places_of(chat: ChatFormat, problem: Sum) -> list[list[int]]:
    """The ids before each of PLACES."""
    places = [chat.prompt_ids(problem.prompt)]
    for response in (problem.worked, problem.terse):
        encoded = chat.encode(problem.prompt, response)
        begin = response.rindex(" ") + 1
        first = next(t for t, (start, _) in enumerate(encoded.spans) if start == begin)
        places.append(encoded.input_ids[: encoded.start + first])
    return places


def true_lengths(problem: Sum) -> np.ndarray:
    """(places, LONGEST): the true probabilities of the length of the number at each of PLACES."""
    lengths = np.zeros((len(PLACES), LONGEST))
    for number in (problem.first, problem.second):
        lengths[0, len(str(number)) - 1] += 0.5
    lengths[1:, len(problem.answer) - 1] = 1.0
    return lengths


def lengths_of(folder: Path, problems: Sequence[Sum]) -> dict[str, dict[str, float]]:
    """How well a model's lengths of numbers agree with the truth, at each of PLACES."""
    model, chat = opened(folder)
    ids = [places_of(chat, problem) for problem in problems]
    true = np.stack([true_lengths(problem) for problem in problems])
    return {
        place: against(number_lengths(model, chat, [of_problem[n] for of_problem in ids]), true[:, n])
        for n, place in enumerate(PLACES)
    }


def measured(run: Path, problems: Sequence[Sum]) -> dict[str, Any]:
    """The figures of a fused model."""
    evaluation = read_json(run / "evaluation.json")
    return {
        "exact": read_json(run / "scores.json")["fused"]["mean"],
        "bits": evaluation["bits_per_byte"]["fused"]["mean"],
        "kd": evaluation["kd"]["fused"],
        "commit": read_json(run / "run.json").get("commit"),
        "lengths": lengths_of(run, problems),
    }


def direction(
    title: str, arms: Sequence[Arm], settings: Settings, seeds: Sequence[int], directory: Path, workers: int
) -> dict[str, Any]:
    """Runs and measures all arms of one direction, whose models are trained already."""
    source, target = DIRECTIONS[title]
    folder = directory / f"{source}-{target}"
    folder.mkdir(parents=True, exist_ok=True)
    before, good = directory / f"target-{target}", directory / f"source-{source}"
    recipe = folder / "recipe.yaml"
    # JSON is YAML, too.
    recipe.write_text(json.dumps(recipe_of(settings, good, before, directory), indent=2) + "\n", encoding="utf-8")
    with ThreadPoolExecutor(workers) as pool:
        runs = dict(zip(arms, pool.map(lambda arm: fuse(arm, recipe, folder, seeds), arms)))
    problems = Sums(settings.fusion, settings.heldout).heldout[: settings.measured]
    one_run = runs[arms[0]][0]
    scores, bits = read_json(one_run / "scores.json"), read_json(one_run / "evaluation.json")["bits_per_byte"]
    found = {
        name: {"exact": exact["mean"], "bits": of_model["mean"], "lengths": lengths_of(model, problems)}
        for name, model, exact, of_model in (
            ("target before", before, scores["target_before"], bits["target_before"]),
            ("source", good, scores["sources"]["source"], bits["sources"]["source"]),
        )
    }
    return {"models": found, "arms": {arm.name: [measured(run, problems) for run in runs[arm]] for arm in arms}}


# -- the page ----------------------------------------------------------------------------------------------------------


def spread(values: Iterable[float], digits: int) -> str:
    """Mean and standard deviation, as 0.52 ± 0.03."""
    numbers = list(values)
    sd = f" ± {np.std(numbers, ddof=1):.{digits}f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.{digits}f}{sd}"


def section(results: dict[str, Any], command: str) -> str:
    """The results as Markdown."""
    head = ["", "exact match (%)", "bits per byte", *(f"{p}: {m}" for p in PLACES for m in ("right", "bias"))]
    blocks = [
        f"Command: `{command}`; {results['hardware']}; torch {results['versions']['torch']}, transformers "
        f"{results['versions']['transformers']}; commit {results['commit']}.",
        f"Mean ± standard deviation over fusion seeds {results['seeds']}; the models before the fusion are the same in all arms. "
        "*Right* is the probability of the number's true length (at the first number, which may be either of two, the mass on "
        "which both distributions agree), *bias* by how many digits the numbers are longer than the true ones. Bits per byte are "
        "those of the held-out right worked answers.",
    ]
    for title, of_direction in results["directions"].items():
        rows = [(name, [figures]) for name, figures in of_direction["models"].items()]
        rows += list(of_direction["arms"].items())
        lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
        for name, seeds in rows:
            cells = [spread((100 * s["exact"] for s in seeds), 1), spread((s["bits"] for s in seeds), 3)]
            for place in PLACES:
                cells.append(spread((s["lengths"][place]["right"] for s in seeds), 3))
                cells.append(spread((s["lengths"][place]["bias"] for s in seeds), 2))
            lines.append("| " + " | ".join([name, *cells]) + " |")
        blocks += [
            f"From {title.replace(' → ', ' digit to ' if title.startswith('one') else ' digits to ')}:",
            "\n".join(lines),
        ]
    return "\n\n".join(blocks)


def say(line: str) -> None:
    print(line, flush=True)


def arms_of(variants: Sequence[str], more: Sequence[Sequence[str]]) -> list[Arm]:
    """All arms: the three of always, other checkouts given as NAME=DIR, and other options given as [NAME, option, ...].

    Raises:
        ConfigError: a variant is no checkout, or two arms have the same name.
    """
    arms = list(ARMS)
    for variant in variants:
        name, _, place = variant.partition("=")
        if not place or not (Path(place) / "profuser" / "__init__.py").is_file():
            raise ConfigError(f"--variant must be NAME=DIR with the directory of a checkout, got {variant!r}; fix it")
        arms.append(Arm(name, checkout=Path(place).resolve()))
    arms += [Arm(name, tuple(f"--{option}" for option in options)) for name, *options in more]
    names = [arm.name for arm in arms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"arms must have different names, got {twice[0]!r} twice; rename one")
    return arms


def experiment(
    arms: Sequence[Arm], settings: Settings, seeds: Sequence[int], directory: Path, workers: int
) -> dict[str, Any]:
    """Trains all models and measures them. What is finished in the directory is not done again.

    Raises:
        ConfigError: the directory holds models that were trained with other settings.
    """
    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    record = json.loads(json.dumps(asdict(settings)))
    if (directory / "settings.json").exists() and read_json(directory / "settings.json") != record:
        raise ConfigError(
            f"--output must be a directory that was begun with these settings, got {directory}; name another"
        )
    write_json(directory / "settings.json", record)
    sums = Sums(settings.fusion, settings.heldout)
    write_rows(directory / "fusion.jsonl", sums.fusion_rows())
    write_rows(directory / "heldout.jsonl", sums.heldout_rows())
    results: dict[str, Any] = {"seeds": list(seeds), "settings": record, **environment(), "directions": {}}
    for title, (source, target) in DIRECTIONS.items():
        with stoppable_pool(workers) as pool:
            models = [("source", source), ("target", target)]
            for job in [pool.submit(pretrain_one, settings, *model, directory / "-".join(model)) for model in models]:
                job.result()
        results["directions"][title] = direction(title, arms, settings, seeds, directory, workers)
        write_json(directory / "results.json", results)
    return results


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m profuser.experiments.{SECTION}", description=__doc__.split("\n")[0].split(": ", 1)[1]
    )
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME=DIR",
        help="an arm with the code of another checkout, with its C++ extension built; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--arm", action="append", default=[], nargs="+", metavar=("NAME", "KEY=VALUE"),
        help="an arm of this checkout with other keys of the recipe; may be given several times",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the seeds of the fusion runs")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/number_fusion"),
        help="the directory of all models and of results.json",
    )
    parser.add_argument("--workers", type=int, default=2, help="how many runs at a time, each with one thread")
    parser.add_argument("--write", type=Path, help=f"replace the {SECTION} section of this Markdown file by the tables")
    args = parser.parse_args(argv)
    arms = arms_of(args.variant, args.arm)
    torch.set_num_threads(1)
    results = experiment(arms, Settings(), args.seeds, args.output, args.workers)
    shown = [f"--variant '{variant.partition('=')[0]}=DIR'" for variant in args.variant]
    shown += [f"--arm {shlex.join(arm)}" for arm in args.arm]
    text = section(results, " ".join([f"python -m profuser.experiments.{SECTION}", *shown]))
    print(text)
    if args.write:
        write_section(args.write, SECTION, text)


if __name__ == "__main__":
    main_of(main)
