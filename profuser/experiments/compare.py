"""`python -m profuser.experiments.compare`: compares progressive fusion with baselines and controls, of the demo by default.

Every arm trains for the same number of optimizer steps on each seed, and arms on the same data share one store. The baselines are SFT,
FuseLLM with Min-CE and with AvgCE, SimulFuse, ReverseFuse, progressive fusion that mixes the sources of a ground truth, SFT on the
well-formed ground truths alone, and SFT and progressive fusion on clean ground truths. Two controls show what the distributions
contribute: progressive fusion without KD (beta = 0), and with every KD row moved to the next token. A third, progressive fusion in which a
prompt's route names the source that was trained for its skill, shows what knowing the right source would give. The arms on well-formed,
on clean and on routed ground truths train on the demo's own files, so that a recipe on other data has none of them. Finished runs are
kept, so after an interruption the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from profuser.cli import main_of
from profuser.demo.pretrain import SOURCES
from profuser.environment import environment
from profuser.errors import ConfigError
from profuser.experiments.page import write_section
from profuser.experiments.pool import stoppable_pool
from profuser.pipeline import train
from profuser.prepare.phases import prepare
from profuser.ragged import offsets_of
from profuser.recipe.data import DataLocation
from profuser.recipe.optim import Combine
from profuser.recipe.parse import Run, parse_run
from profuser.recipe.places import DEFAULT_RECIPE, resolve
from profuser.recipe.schema import Recipe, ScheduleName
from profuser.store import layout
from profuser.store.files import write_atomic, write_json
from profuser.store.marks import labels_of, marks_of, rows_of
from profuser.store.store import Store
from profuser.train.run_directory import RunDirectory, demo_data
from profuser.typed import read_json


@dataclass(frozen=True, slots=True)
class Arm:
    """One row of the table: how the recipe is changed, and which data it trains on."""

    name: str
    label: str
    data: str = "fusion"
    """One of fusion, mixed (with the distributions of all sources), routed, wellformed, clean and shifted."""
    schedule: ScheduleName = "progressive"
    beta: float | None = None
    combine: Combine = "min_ce"
    combine_temperature: float = 1.0


DEMOS_OWN = ("routed", "wellformed", "clean")
"""The data of arms that there are of the demo alone."""

ARMS = (
    Arm("progressive", "ProFuser (progressive)"),
    Arm("sft", "SFT", schedule="sft"),
    Arm("sft-wellformed", "SFT, well-formed ground truth only", data="wellformed", schedule="sft"),
    Arm("fusellm", "FuseLLM (Min-CE only)", schedule="fusellm"),
    Arm("avg-ce", "FuseLLM with AvgCE", data="mixed", schedule="fusellm", combine="avg_ce"),
    Arm("simultaneous", "SimulFuse", schedule="simultaneous"),
    Arm("reverse", "ReverseFuse", schedule="reverse"),
    Arm(
        "softmax", "ProFuser, sources mixed by softmax(−CE / 0.1)", "mixed", combine="softmax", combine_temperature=0.1
    ),
    Arm("route", "control: ProFuser, a route names the source of each skill", data="routed"),
    Arm("beta0", "control: progressive without KD (beta = 0)", beta=0.0),
    Arm("shifted", "control: progressive, KD rows moved by one token", data="shifted"),
    Arm("sft-clean", "SFT, clean ground truth", data="clean", schedule="sft"),
    Arm("progressive-clean", "ProFuser, clean ground truth", data="clean"),
)


WELLFORMED = "fusion_wellformed.jsonl"
ROUTED = "fusion_routed.jsonl"


def demo_rows() -> list[dict[str, Any]]:
    """The demo's training rows."""
    return [json.loads(line) for line in Path(resolve("demo:fusion.jsonl")).read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_atomic(path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())


def wellformed_rows() -> Iterator[dict[str, Any]]:
    """The demo's training rows whose ground truth is a worked one."""
    return (row for row in demo_rows() if row["form"] == "worked")


def routed_rows() -> Iterator[dict[str, Any]]:
    """The demo's training rows with a route, the source that is strong in the prompt's skill."""
    strong = {source.skill: source.name for source in SOURCES}
    return (row | {"route": strong[row["skill"]]} for row in demo_rows())


def chosen_arms(names: Sequence[str] | None, recipe: Recipe) -> list[Arm]:
    """Returns the arms of these names, or all that a recipe can have.

    Raises:
        ConfigError: an arm cannot be had of the recipe, or the recipe has no held-out prompts.
    """
    if recipe.data.location("heldout") is None:
        raise ConfigError("the comparison needs data.heldout, the recipe names none; add it")
    # What the arms on some data need, where the recipe has something else.
    lacks: dict[str, str] = {}
    if recipe.capture.choice != "min_ce":
        lacks["mixed"] = f"capture.choice: min_ce, the recipe has {recipe.capture.choice}"
    sources = {source.name for source in recipe.sources}
    if not {spec.name for spec in SOURCES} <= sources:
        lacks["routed"] = f"the demo's sources, the recipe has {', '.join(sorted(sources))}"
    if demo_data(recipe) is None:
        lacks |= dict.fromkeys(DEMOS_OWN, f"the demo's data, the recipe has {recipe.data.train}")
    if names is None:
        return [arm for arm in ARMS if arm.data not in lacks]
    if wrong := next((arm for arm in ARMS if arm.name in names and arm.data in lacks), None):
        raise ConfigError(f"--arms {wrong.name} must come with {lacks[wrong.data]}; leave it out")
    return [arm for arm in ARMS if arm.name in names]


def shift_rows(store: Store, directory: Path) -> Store:
    """A copy of a store in which every training row stands one label later.

    The distributions are right, but at the wrong tokens. The directory gets its name when all rows are moved.
    """
    unfinished = directory.with_name(f"{directory.name}.tmp")
    for old in (unfinished, directory):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(store.directory, unfinished)
    copy, kind = Store.open(unfinished), layout.targets("train")
    for number in copy.numbers(kind):
        arrays = copy.get(kind, number)
        examples, origin = len(np.unique(arrays["example"])), copy.origin(kind, number)
        copy.put(kind, number, shifted(arrays), examples=examples, origin=origin)
    copy.finish(copy.seconds)
    unfinished.rename(directory)
    return Store.open(directory)


def shifted(shard: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gives every row the token of the next row of the same sequence and source. The last row of each is dropped."""
    marks, has_next = [np.zeros(0, np.uint64)], [np.zeros(0, bool)]
    for begin, stop in pairwise(shard["offsets"]):
        old = shard["marks"][begin:stop]
        source, position = rows_of(old, shard["source_ce"].shape[1])
        is_next, has_one = np.zeros(len(source), bool), np.zeros(len(source), bool)
        is_next[1:] = has_one[:-1] = source[1:] == source[:-1]
        marks.append(marks_of(labels_of(old), source[is_next], position[is_next]))
        has_next.append(has_one)
    has_next = np.concatenate(has_next)
    kept = np.flatnonzero(has_next)
    sequence = np.repeat(np.arange(len(shard["row_offsets"]) - 1), np.diff(shard["row_offsets"]))
    counts = shard["entry_counts"].astype(np.int64)
    entries = np.repeat(has_next, counts)
    row_offsets = offsets_of(np.bincount(sequence[kept], minlength=len(shard["row_offsets"]) - 1))
    return dict(shard) | {
        "marks": np.concatenate(marks).astype(shard["marks"].dtype),
        "row_tail": shard["row_tail"][kept],
        "row_offsets": row_offsets,
        "entry_offsets": offsets_of(counts[kept])[row_offsets],
        "entry_counts": shard["entry_counts"][kept],
        "entry_ids": shard["entry_ids"][entries],
        "entry_logprobs": shard["entry_logprobs"][entries],
    }


def run_of(
    base: Run, arm: Arm, seed: int, directory: Path, stores: Mapping[str, tuple[str | list[str] | DataLocation, str]]
) -> Run:
    train_data, store = stores[arm.data]
    beta = base.recipe.optim.beta if arm.beta is None else arm.beta
    optim = replace(base.recipe.optim, beta=beta, combine=arm.combine, combine_temperature=arm.combine_temperature)
    recipe = replace(
        base.recipe,
        data=replace(base.recipe.data, train=train_data),
        judges=[] if arm.data == "wellformed" else base.recipe.judges,
        schedule=arm.schedule,
        capture=replace(base.recipe.capture, choice="route") if arm.data == "routed" else base.recipe.capture,
        optim=optim,
        store=store,
        output=str(directory / f"{arm.name}-{seed}"),
        seed=seed,
    )
    return Run(recipe=recipe, name=f"{arm.name}-{seed}")


def work(run: Run) -> str:
    if not RunDirectory(run).complete():
        train(run)
    return run.name


def collect(runs: dict[tuple[str, int], Run], seeds: list[int]) -> dict[str, Any]:
    """All results: of every arm a list over the seeds of {"fused", "kd", "ce"}, and the scores of the sources."""
    arms: dict[str, list[dict[str, Any]]] = {}
    scores, evaluation = {}, {}
    for (arm, _), run in runs.items():
        scores, evaluation = read_json(run.output_dir / "scores.json"), read_json(run.output_dir / "evaluation.json")
        arms.setdefault(arm, []).append(
            {"fused": scores["fused"], "kd": evaluation["kd"]["fused"], "ce": evaluation["ce"]["fused"]}
        )
    return {
        "seeds": seeds,
        "sources": scores["sources"],
        "target_before": scores["target_before"],
        "kd_before": evaluation["kd"]["target_before"],
        "arms": arms,
        **environment(),
    }


def table(results: dict[str, Any], target: str, command: str, demo: dict[str, Any] | None) -> str:
    """The results as Markdown. `demo` says how the demo's fusion data were made; it is None for other data."""
    skills = [s for s in results["target_before"] if s != "mean"]
    head = ["", *skills, "mean", "held-out KD"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]

    def spread(values: list[float], scale: float, digits: int) -> str:
        sd = f" ± {scale * np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{scale * np.mean(values):.{digits}f}{sd}"

    for name, scores in results["sources"].items():
        label = f"source {name}" + (" = target before" if name == target else "")
        kd = f"{results['kd_before']:.3f}" if name == target else ""
        lines.append(f"| {label} | " + " | ".join(f"{100 * scores[k]:.1f}" for k in [*skills, "mean"]) + f" | {kd} |")
    for arm in ARMS:
        if arm.name in results["arms"]:
            seeds = results["arms"][arm.name]
            cells = [spread([s["fused"][k] for s in seeds], 100, 1) for k in [*skills, "mean"]]
            lines.append(f"| {arm.label} | " + " | ".join(cells) + f" | {spread([s['kd'] for s in seeds], 1, 3)} |")
    best = max(s["mean"] for s in results["sources"].values())
    strong = max(skills, key=lambda k: results["target_before"][k])
    progressive = results["arms"].get("progressive", [])
    gains = ", ".join(f"{100 * (s['fused']['mean'] - best):+.1f}" for s in progressive)
    after = ", ".join(f"{100 * s['fused'][strong]:.1f}" for s in progressive)
    of_each_seed = (
        f"ProFuser's mean minus that of the best single source, for each seed: {gains} points. The target's strongest skill "
        f"({strong}): {100 * results['target_before'][strong]:.1f} before, {after} after (for each seed)."
    )
    return "\n".join(
        [
            f"Held-out {'exact match' if demo else 'correct answers'} in %, mean ± standard deviation over fusion seeds "
            f"{results['seeds']} (sources and store are fixed). Held-out KD is the KL of the fused model to the Min-CE winner on "
            "held-out ground truths, in nats per covered token.",
            *([f"Ground truth of the fusion data: {demo_line(demo)}."] if demo else []),
            f"Command: `{command}`; {results['hardware']}; torch {results['versions']['torch']}, transformers "
            f"{results['versions']['transformers']}; commit {results['commit']}.",
            "",
            *lines,
            *(["", of_each_seed] if progressive else []),
        ]
    )


def demo_line(demo: dict[str, Any]) -> str:
    return f"{100 * demo['terse']:.0f} % terse, {100 * demo['wrong']:.0f} % wrong"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m profuser.experiments.compare", description=__doc__.split("\n")[0])
    parser.add_argument("--config", default=str(DEFAULT_RECIPE), help="the recipe that the arms change")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the seeds of the fusion runs")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=[a.name for a in ARMS],
        help="which arms to run; by default all, or of a recipe on other data than the demo's all that do not need these",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/compare"), help="the directory of the runs and of results.json"
    )
    parser.add_argument("--workers", type=int, default=2, help="how many runs at a time, each with one thread")
    parser.add_argument("--write", type=Path, help="replace the demo section of this Markdown file by the table")
    args = parser.parse_args(argv)
    base = parse_run("train", ["--config", args.config])
    demo = demo_data(base.recipe)
    arms = chosen_arms(args.arms, base.recipe)
    if args.write and demo is None:
        raise ConfigError(
            f"--write puts the demo's results into a page, {args.config} trains on {base.recipe.data.train}; leave it out, the "
            "table is printed"
        )
    stores: dict[str, tuple[str | list[str] | DataLocation, str]] = {
        "fusion": (base.recipe.data.train, str(base.store_dir)),
        "mixed": (base.recipe.data.train, str(args.output / "store-mixed")),
        "wellformed": (str(args.output / WELLFORMED), str(args.output / "store-wellformed")),
        "routed": (str(args.output / ROUTED), str(args.output / "store-routed")),
        "clean": ("demo:fusion_clean.jsonl", str(args.output / "store-clean")),
        "shifted": (base.recipe.data.train, str(args.output / "store-shifted")),
    }
    if any(arm.data == "wellformed" for arm in arms):
        write_jsonl(args.output / WELLFORMED, wellformed_rows())
    if any(arm.data == "routed" for arm in arms):
        write_jsonl(args.output / ROUTED, routed_rows())
    for data in dict.fromkeys("fusion" if a.data == "shifted" else a.data for a in arms):
        print(f"store for {data} ground truth: {stores[data][1]}", flush=True)
        # A store does not depend on the schedule; it has the distributions of all sources where an arm mixes them.
        arm = Arm(data, data, data=data, schedule="sft", combine="avg_ce" if data == "mixed" else "min_ce")
        store = prepare(run_of(base, arm, 0, args.output, stores))
        if data == "fusion" and any(a.data == "shifted" for a in arms):
            shift_rows(store, Path(stores["shifted"][1]))
    runs = {(a.name, s): run_of(base, a, s, args.output, stores) for s in args.seeds for a in arms}
    with stoppable_pool(args.workers, initializer=torch.set_num_threads, initargs=(1,), max_tasks_per_child=1) as pool:
        for n, done in enumerate(as_completed([pool.submit(work, run) for run in runs.values()]), start=1):
            print(f"{n}/{len(runs)}: {done.result()}", flush=True)
    results = collect(runs, args.seeds)
    write_json(args.output / "results.json", results)
    text = table(results, base.recipe.target, "python -m profuser.experiments.compare " + " ".join(argv), demo)
    print(text)
    if args.write:
        write_section(args.write, "demo", text)


if __name__ == "__main__":
    main_of(main)
