"""Builds the bundled demo from nothing: `python -m profuser.demo.build [--parts ...] [--out DIR]`.

It makes the data, the tokenizers, three sources and two reward models, and then measures them on the validation set
(`data/measured.json`). Everything is seeded. The held-out set is written here but never read. `--workers 2` trains two
models at a time, each with one thread.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jsonargparse
import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from profuser.demo.judges import JUDGES, JudgeSettings, pairwise_accuracy, train_judge
from profuser.demo.pretrain import SOURCES, TARGET, PretrainSettings, accuracies, pretrain, respond, save
from profuser.demo.skills import SKILLS, DataSettings, World, row_of
from profuser.demo.tokenizers import position_kinds, tokenizer_texts, train_narrow, train_wide, with_template
from profuser.demo.verify import exact_match
from profuser.prepare.judges import load_judge
from profuser.prepare.vote_rules import NOBODY, vote
from profuser.recipe.schema import JudgeConfig
from profuser.text.chat import ChatFormat

DEMO_DIR = Path(__file__).resolve().parent
PARTS = ("data", "tokenizers", "sources", "judges", "measure")
VERIFIER = JudgeConfig(name="verifier", function="profuser.demo.verify:score")
SPECS = {spec.name: spec for spec in (*SOURCES, *JUDGES)}


@dataclass(kw_only=True)
class BuildSettings:
    """What is built, and where it goes."""

    out: str = str(DEMO_DIR)
    """The folder in which data/ and models/ are written."""
    parts: str = ",".join(PARTS)
    """The parts to build, separated by commas. A part that is left out is taken from `out` as it is."""
    workers: int = 1
    """How many sources or judges are trained at the same time."""
    data: DataSettings = field(default_factory=DataSettings)
    pretrain: PretrainSettings = field(default_factory=PretrainSettings)
    judges: JudgeSettings = field(default_factory=JudgeSettings)


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def build_data(out: Path, world: World) -> None:
    """Writes the four JSONL files, and demo_data.json, which records the flaws of the fusion data."""
    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    flawed, clean = world.fusion_rows()
    write_rows(folder / "fusion.jsonl", flawed)
    write_rows(folder / "fusion_clean.jsonl", clean)
    write_rows(folder / "validation.jsonl", map(row_of, world.validation))
    write_rows(folder / "heldout.jsonl", map(row_of, world.heldout))
    record = asdict(world.settings) | {
        "rows": {"fusion": len(flawed), "validation": len(world.validation), "heldout": len(world.heldout)}
    }
    (folder / "demo_data.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def build_tokenizers(out: Path, world: World) -> None:
    """Saves into every model's directory its tokenizer with its chat template."""
    trained = {
        "wide": train_wide(tokenizer_texts(world, "wide")),
        "narrow": train_narrow(tokenizer_texts(world, "narrow")),
    }
    for name, spec in SPECS.items():
        with_template(trained[spec.tokenizer], spec.template).save_pretrained(out / "models" / name)


def tokenizer_of(out: Path, name: str) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(out / "models" / name)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)  # `build_tokenizers` has saved one
    return tokenizer


def model_of(out: Path, name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(out / "models" / name, dtype=torch.float32).eval()


def train_one(name: str, settings: BuildSettings) -> None:
    """Trains one source or judge and saves it. With several `--workers` it runs in a process of its own."""
    torch.set_num_threads(1)
    out, spec = Path(settings.out), SPECS[name]
    tokenizer = tokenizer_of(out, name)
    if spec in JUDGES:
        model = train_judge(spec, read_rows(out / "data" / "fusion.jsonl"), tokenizer, settings.judges, report=log)
    else:
        model = pretrain(spec, World(settings.data), tokenizer, settings.pretrain, report=log)
    save(model, tokenizer, out / "models" / name)


def train_all(names: list[str], settings: BuildSettings) -> None:
    if settings.workers == 1:
        for name in names:
            train_one(name, settings)
        return
    with multiprocessing.get_context("spawn").Pool(settings.workers) as pool:
        pool.starmap(train_one, [(name, settings) for name in names], chunksize=1)


def measure(out: Path) -> dict:
    """Measures the sources' accuracies, how the tokenizers differ, and the judges on the fusion prompts."""
    fusion, clean, validation = (
        read_rows(out / "data" / f"{name}.jsonl") for name in ("fusion", "fusion_clean", "validation")
    )
    tokenizers = {spec.name: tokenizer_of(out, spec.name) for spec in SOURCES}
    figures: dict = {"validation": {}, "fusion_prompts": {}, "positions": {}, "pairwise": {}, "vote": {}}
    for name in tokenizers:
        if name != TARGET:
            counts = position_kinds(ChatFormat(tokenizers[TARGET]), ChatFormat(tokenizers[name]), fusion)
            figures["positions"][name] = {kind: n / sum(counts.values()) for kind, n in sorted(counts.items())}
    responses = []
    for name, tokenizer in tokenizers.items():
        model = model_of(out, name)
        figures["validation"][name] = accuracies(
            validation, respond(model, tokenizer, [row["prompt"] for row in validation])
        )
        responses.append(respond(model, tokenizer, [row["prompt"] for row in fusion]))
        figures["fusion_prompts"][name] = accuracies(clean, responses[-1])

    candidates = list(zip(*responses))
    configs = [JudgeConfig(name=spec.name, model=str(out / "models" / spec.name)) for spec in JUDGES]
    judges = {config.name: load_judge(config) for config in [*configs, VERIFIER]}
    figures["pairwise"] = {config.name: pairwise_accuracy(judges[config.name], fusion) for config in configs}
    scores = {name: judge(fusion, candidates)[:, None] for name, judge in judges.items()}
    scores["all"] = np.concatenate(list(scores.values()), axis=1)
    eligible = np.array([[bool(text) for text in texts] for texts in candidates])
    winners = {name: vote(values, eligible).winner.tolist() for name, values in scores.items()}
    right = [[exact_match(row, text) for text in texts] for row, texts in zip(clean, candidates)]
    for name, chosen in winners.items():  # of the prompts that somebody won
        won = [i for i, source in enumerate(chosen) if source != NOBODY]
        figures["vote"][name] = _shares([clean[i] for i in won], [right[i][chosen[i]] for i in won])
    figures["vote"]["random"] = _shares(clean, [sum(hits) / len(hits) for hits in right])
    figures["vote"]["oracle"] = _shares(clean, [any(hits) for hits in right])
    figures["wins"] = {
        skill: {
            spec.name: sum(w == s for w, row in zip(winners["all"], clean) if row["skill"] == skill)
            for s, spec in enumerate(SOURCES)
        }
        for skill in SKILLS
    }
    return figures


def _shares(rows: list[dict], hits: list[float]) -> dict[str, float]:
    """The share of hits in percent for each skill, and the mean of the skills."""
    table = {}
    for skill in SKILLS:
        of_skill = [float(hit) for hit, row in zip(hits, rows) if row["skill"] == skill]
        table[skill] = 100 * sum(of_skill) / len(of_skill)
    return table | {"mean": sum(table.values()) / len(table)}


def print_figures(figures: dict) -> None:
    for title in ("validation", "fusion_prompts", "vote"):
        print(f"\n{title} (% right){'':12}" + "".join(f"{column:>11}" for column in (*SKILLS, "mean")))
        for name, table in figures[title].items():
            print(f"  {name:30}" + "".join(f"{table[column]:11.1f}" for column in (*SKILLS, "mean")))
    print("\ntarget positions on the fusion responses")
    for name, shares in figures["positions"].items():
        print(f"  {name:30}" + "  ".join(f"{kind} {share:.1%}" for kind, share in shares.items()))
    print("pairwise accuracy (%)")
    for name, table in figures["pairwise"].items():
        print(f"  {name:30}" + "  ".join(f"{kind} {value:.1f}" for kind, value in table.items()))
    print("vote wins", json.dumps(figures["wins"]))


def sizes_mb(out: Path) -> dict[str, float]:
    """How many megabytes (1e6 bytes) every model directory and the data take on disk."""
    folders = {name: out / "models" / name for name in SPECS} | {"data": out / "data"}
    return {
        name: sum(f.stat().st_size for f in folder.iterdir()) / 1e6
        for name, folder in folders.items()
        if folder.exists()
    }


def log(line: str) -> None:
    print(line, flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = jsonargparse.ArgumentParser(prog="python -m profuser.demo.build", description=__doc__)
    parser.add_class_arguments(BuildSettings, None, as_group=False)
    settings = BuildSettings(**vars(parser.instantiate(parser.parse_args(argv))))
    parts = settings.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"parts must be among {', '.join(PARTS)}, got {sorted(unknown)[0]!r}; fix --parts")
    torch.set_num_threads(1)
    out, world = Path(settings.out), World(settings.data)
    seconds = {}
    for part in (part for part in PARTS if part in parts):
        began = time.perf_counter()
        log(f"== {part}")
        if part == "data":
            build_data(out, world)
        elif part == "tokenizers":
            build_tokenizers(out, world)
        elif part == "sources":
            train_all([spec.name for spec in SOURCES], settings)
        elif part == "judges":
            train_all([spec.name for spec in JUDGES], settings)
        else:
            figures = measure(out)
            print_figures(figures)
            (out / "data" / "measured.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        seconds[part] = round(time.perf_counter() - began, 1)
    sizes = sizes_mb(out)
    log(f"seconds {seconds}, total {sum(seconds.values()):.0f}")
    log("MB " + ", ".join(f"{name} {size:.2f}" for name, size in sizes.items()) + f", total {sum(sizes.values()):.2f}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
