"""Describes finished runs in docs/results.md: which source won how often, how they aligned, and what was learnt.

python -m profuser.experiments.real_model runs/smollm2 runs/into-smollm2 --write docs/results.md
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from profuser.alignment.types import KINDS
from profuser.cli import main_of
from profuser.experiments.page import write_section
from profuser.progress import in_words
from profuser.recipe.schedule import Mode
from profuser.train.run_record import peak_of
from profuser.typed import read_json

SECTION = "real_model"


def section(runs: list[Path]) -> str:
    """The section as Markdown, with one part per run directory."""
    command = f"python -m profuser.experiments.real_model {' '.join(map(str, runs))} --write docs/results.md"
    return "\n\n".join([f"Written by `{command}`.", *(part(run) for run in runs)])


def part(run: Path) -> str:
    record, evaluation, scores = (read_json(run / f"{name}.json") for name in ("run", "evaluation", "scores"))
    summary = read_json(Path(record["store"]) / "summary.json")
    seconds = ", ".join(f"{phase} {in_words(s)}" for phase, s in record["seconds"].items())
    memory = f", {peak[0] / 2**30:.1f} GiB {peak[1]}" if (peak := peak_of(record)) else ""
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("torch", "transformers"))
    facts = (
        f"`{run.name}`: {', '.join(summary['sources'])} into {summary['target']}, {summary['examples']} instructions; "
        f"{in_words(sum(record['seconds'].values()))} ({seconds}){memory}; "
        f"{record['hardware']}, {versions}, commit {record['commit']}."
    )
    return "\n\n".join([f"### {run.name}", facts, *tables(summary, evaluation, scores)])


def tables(summary: dict[str, Any], evaluation: dict[str, Any], scores: dict[str, Any]) -> list[str]:
    names = summary["sources"]
    wins = {"Min-CE": summary["min_ce_wins"], "vote": summary["vote_wins"]}
    rows = [
        [label, *(share(by_skill, name) for name in names), share(by_skill, "none")]
        for label, by_skill in wins.items()
        if by_skill
    ]
    parts = ["The share of the training examples that each source wins, in %:", table(["mode", *names, "none"], rows)]

    rows = [
        [
            name,
            "ground truth" if mode == Mode.TRAINING.key else "own responses",
            f"{a['positions']:,}",
            *(percent(a[kind]) for kind in KINDS),
            percent(a["coverage"]),
            percent(a["mapped_mass"]),
            *(percent(reliable(a["reliability"], floor)) for floor in (0.1, 0.5, 0.9)),
        ]
        for mode, sources in summary["alignment"].items()
        for name, a in sources.items()
    ]
    head = ["source", "on", "positions", *(k.replace("_", " ") for k in KINDS), "coverage", "mapped mass"]
    parts += [
        "What alignment makes of the target's positions, in %:",
        table([*head, *(f"reliability ≥ {floor}" for floor in (0.1, 0.5, 0.9))], rows),
    ]

    bits = evaluation["bits_per_byte"]
    rows = [
        ["KL to the Min-CE winner, nats", *(f"{evaluation['kd'][x]:.3f}" for x in ("target_before", "fused"))],
        ["cross-entropy, nats per target token", *(f"{evaluation['ce'][x]:.3f}" for x in ("target_before", "fused"))],
        ["bits per byte", *(f"{bits[x]['mean']:.3f}" for x in ("target_before", "fused"))],
    ]
    parts += ["On the held-out ground truth:", table(["", "before", "after"], rows)]

    models = {**scores["sources"], "target before": scores["target_before"], "**fused**": scores["fused"]}
    skills = list(scores["fused"])
    rows = [[name, *(percent(values[skill]) for skill in skills)] for name, values in models.items()]
    asked = sum(evaluation["counts"].values())
    return [*parts, f"The share of correct answers to the {asked} held-out prompts, in %:", table(["", *skills], rows)]


def share(by_skill: dict[str, dict[str, int]], name: str) -> str:
    total = sum(sum(counts.values()) for counts in by_skill.values())
    return percent(sum(counts.get(name, 0) for counts in by_skill.values()) / total)


def reliable(histogram: list[int], floor: float) -> float:
    """The share of the covered positions whose reliability is at least `floor`, a multiple of the histogram's bin width."""
    return sum(histogram[round(floor * len(histogram)) :]) / max(1, sum(histogram))


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m profuser.experiments.real_model", description=__doc__.split("\n")[0]
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="the directory of a finished run")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help=f"replace the {SECTION} section of this Markdown file"
    )
    args = parser.parse_args(argv)
    text = section(args.runs)
    if args.write is None:
        print(text)
    else:
        write_section(args.write, SECTION, text)


if __name__ == "__main__":
    main_of(main)
