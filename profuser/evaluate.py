"""Held-out scores: exact match per skill from generated answers, bits per byte of the ground truth.

Bits per byte, not per token, because vocabularies differ. The sources' answers and log-likelihoods come from the store;
what is generated here is the target's. Beside the scores: a few held-out prompts, and a few training prompts with their
votes. `python -m profuser.evaluate RUN_DIR` scores a finished run again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from profuser.ballots import judged_examples
from profuser.chat import ChatFormat
from profuser.cli import main_of
from profuser.config import Recipe, Run, SourceConfig, load_recipe, target_config
from profuser.data import data_hash, load_examples
from profuser.errors import DataError
from profuser.fusion_model import FusionModel
from profuser.models import chat_format, default_device, first_line, load_model, runtime_dtype
from profuser.progress import Progress
from profuser.responses import generate
from profuser.reward import load_function
from profuser.store import Store, read_json, write_json
from profuser.targets import TRAIN, Targets

Match = Callable[[dict, str], bool]


def contains_truth(example: dict, response: str) -> bool:
    """The default match: the ground truth's text occurs in the response, case and outer space aside."""
    return example["response"].casefold() in response.casefold()


def match_of(recipe: Recipe) -> Match:
    path = recipe.evaluation.match
    if path is None:
        return contains_truth
    function = load_function(path, "evaluation.match")

    def match(example: dict, response: str) -> bool:
        try:
            right = function(dict(example), response)
        except (Exception, SystemExit) as error:  # the user's own code may raise anything
            right = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(right, (bool, np.bool_)):
            return bool(right)
        raise DataError(
            f"evaluation.match: {path} must return True or False, on the prompt {example['prompt']!r} it gave {right!r}; fix the "
            "function and run the same command again: only the scores are missing"
        )

    return match


def accuracies(rows: Sequence[dict], correct: Sequence[bool]) -> dict[str, float]:
    """Share of correct answers per skill, and their mean over skills (each skill counts once)."""
    by_skill: dict[str, list[bool]] = {}
    for row, ok in zip(rows, correct):
        by_skill.setdefault(row["skill"], []).append(bool(ok))
    scores = {skill: sum(v) / len(v) for skill, v in by_skill.items()}
    return {**scores, "mean": sum(scores.values()) / len(scores)}


def bits_per_byte(rows: Sequence[dict], nll: Sequence[float], size: Sequence[int]) -> dict[str, float]:
    """Bits per byte of the responses, end of turn included in the bits, per skill and over all bytes."""
    totals: dict[str, list[float]] = {}
    for row, nats, count in zip(rows, nll, size):
        if count and math.isfinite(nats):
            for key in (row["skill"], "mean"):
                total = totals.setdefault(key, [0.0, 0.0])
                total[0] += nats
                total[1] += count
    return {key: nats / math.log(2) / count for key, (nats, count) in totals.items()}


@torch.no_grad()
def likelihood(model: FusionModel, targets: Targets, pad_id: int, recipe: Recipe, label: str) -> dict[str, Any]:
    """Teacher-forced statistics of the target on one split's ground truths.

    Returns:
        nll: dict example -> nats; response_bytes: dict example -> bytes; ce: nats per target token; kd: KL to the Min-CE
        winner in nats, mean over the positions that have a distribution.
    """
    was_training = model.training
    model.eval()
    sequences = sorted((s for s in targets.sequences if s.mode == TRAIN), key=lambda s: len(s.input_ids))
    nll, size = {}, {}
    kd_sum = kd_rows = ce_sum = tokens = 0.0
    device = next(model.parameters()).device
    size_of_batch = recipe.capture.batch_size
    with Progress(label, len(sequences), "examples", brief=True) as bar:
        for first in range(0, len(sequences), size_of_batch):
            batch = sequences[first : first + size_of_batch]
            tensors = {
                k: v.to(device) for k, v in targets.batch(batch, (1.0, 1.0), (1.0, 1.0), pad_id, recipe.optim).items()
            }
            out = model(**tensors, reduction="sum", return_stats=True)
            ce = out["ce"].view(len(batch), -1).double().sum(1).tolist()
            covered = out["source_mass"] > 0
            kd_sum += float(out["kd"][covered].double().sum())
            kd_rows += int(covered.sum())
            for s, nats in zip(batch, ce):
                nll[s.example], size[s.example] = nats, s.response_bytes
                ce_sum += nats
                tokens += s.labels
            bar.update(len(batch), tokens=sum(len(s.input_ids) for s in batch))
    model.train(was_training)
    return {"nll": nll, "response_bytes": size, "ce": ce_sum / max(tokens, 1), "kd": kd_sum / max(kd_rows, 1)}


def answer(model, chat: ChatFormat, rows: Sequence[dict], recipe: Recipe, label: str) -> list[str]:
    with Progress(f"{label}: answer the held-out prompts", len(rows), "prompts") as bar:
        answers = generate(
            model,
            chat,
            [r["prompt"] for r in rows],
            recipe.generation,
            max_length=recipe.data.max_length,
            seed=recipe.seed,
            progress=bar.update,
        )
    return [text for ((text, _),) in answers]


def source_answers(store: Store, sources: Sequence[str], split: str = "heldout") -> dict[str, list[str]]:
    return {
        s: [text for name in store.shards(f"capture/{split}-responses-{s}") for ((text, _),) in store.get_json(name)]
        for s in sources
    }


def prepared_rows(recipe: Recipe, store: Store, split: str) -> list[dict]:
    """The rows of a split, which must still be those that the store was prepared with."""
    location = getattr(recipe.data, split)
    rows = load_examples(recipe.data, location, recipe.data.limit if split == "train" else None)
    if data_hash(rows) != store.manifest["settings"]["capture"]["data"].get(split):
        name = {"train": "training", "heldout": "held-out"}[split]
        raise DataError(
            f"{location} must be the {name} data that {store.directory} was prepared with, its rows differ; restore it"
        )
    return rows


def evaluate(run: Run, store: Store) -> dict[str, Any]:
    """Score the fused model in the run directory against its sources; write scores.json and evaluation.json.

    Returns:
        The content of scores.json.
    """
    recipe, directory = run.recipe, run.output_dir
    if recipe.data.heldout is None:
        raise DataError("evaluation needs data.heldout, the recipe names none; add it")
    rows, training = prepared_rows(recipe, store, "heldout"), prepared_rows(recipe, store, "train")
    votes = judged_examples(store, recipe, training, first_of_each_skill(training, recipe.evaluation.examples))
    match, targets = match_of(recipe), Targets(store, "heldout")
    names = [s.name for s in recipe.sources]
    answers = source_answers(store, names)
    device = default_device()
    dtype = runtime_dtype(recipe.capture.dtype, device)
    before_config = target_config(recipe)
    statistics = {}
    for label, config in (
        ("target_before", before_config),
        ("fused", SourceConfig(name="fused", model=str(directory.resolve()))),
    ):
        model = load_model(config, dtype, device)
        chat = chat_format(config)
        if label == "target_before" and recipe.target in answers:
            answers[label] = answers[recipe.target]
        else:
            answers[label] = answer(model, chat, rows, recipe, label.replace("_", " "))
        pad = chat.tokenizer.pad_token_id or 0
        statistics[label] = likelihood(
            FusionModel(model, tail=recipe.optim.tail, temperature=recipe.optim.temperature),
            targets,
            pad,
            recipe,
            f"{label.replace('_', ' ')}: score the held-out ground truths",
        )
        if label == "fused":
            prompts, limit = [example["prompt"] for example in votes], recipe.data.max_length
            now = generate(model, chat, prompts, recipe.generation, max_length=limit, seed=recipe.seed)
            votes = [{**example, "fused": text} for example, ((text, _),) in zip(votes, now)]
        del model
    # A prompt without a ground truth can only be scored by a match of the user's own.
    asked = [i for i, row in enumerate(rows) if row["response"] or recipe.evaluation.match is not None]
    asked_rows = [rows[i] for i in asked]
    correct = {name: {i: match(rows[i], texts[i]) for i in asked} for name, texts in answers.items()}
    by_name = {name: accuracies(asked_rows, list(ok.values())) for name, ok in correct.items()}
    scores = {
        "sources": {n: by_name[n] for n in names},
        "target_before": by_name["target_before"],
        "fused": by_name["fused"],
    }
    bits = {n: bits_per_byte(rows, *source_likelihood(store, n)) for n in names}
    for label, s in statistics.items():
        index = range(len(rows))
        bits[label] = bits_per_byte(
            rows, [s["nll"].get(i, math.inf) for i in index], [s["response_bytes"].get(i, 0) for i in index]
        )
    counts: dict[str, int] = {}
    for row in asked_rows:
        counts[row["skill"]] = counts.get(row["skill"], 0) + 1
    evaluation = {
        "bits_per_byte": {
            "sources": {n: bits[n] for n in names},
            "target_before": bits["target_before"],
            "fused": bits["fused"],
        },
        "kd": {label: s["kd"] for label, s in statistics.items()},
        "ce": {label: s["ce"] for label, s in statistics.items()},
        "counts": counts,
        "examples": [
            {
                "skill": rows[i]["skill"],
                "prompt": rows[i]["prompt"],
                "ground_truth": rows[i]["response"],
                "responses": {n: answers[n][i] for n in answers},
                "correct": {n: bool(correct[n][i]) for n in answers},
            }
            for i in (asked[n] for n in first_of_each_skill(asked_rows, recipe.evaluation.examples))
        ],
        "votes": votes,
    }
    write_json(directory / "scores.json", scores)
    write_json(directory / "evaluation.json", evaluation)
    return scores


def source_likelihood(store: Store, source: str, split: str = "heldout") -> tuple[np.ndarray, np.ndarray]:
    """(nll in nats, response bytes) of a source on a split's ground truths, in the rows' order."""
    shards = [store.get(name) for name in store.shards(f"capture/{split}-gt-{source}")]
    return np.concatenate([s["nll"] for s in shards]), np.concatenate([s["response_bytes"] for s in shards])


def first_of_each_skill(rows: Sequence[dict], n: int) -> list[int]:
    """The first rows of every skill in turn: examples that nobody picked."""
    by_skill: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_skill.setdefault(row["skill"], []).append(i)
    turns = [i for turn in range(n) for group in by_skill.values() for i in group[turn : turn + 1]]
    return turns[:n]


def score_table(scores: dict[str, Any]) -> str:
    """scores.json as lines of text, in percent."""
    rows = [*scores["sources"].items(), ("target before", scores["target_before"]), ("fused", scores["fused"])]
    skills = list(scores["fused"])
    width, column = max(len(n) for n, _ in rows), max(10, *map(len, skills)) + 2
    head = " " * width + "".join(f"{s:>{column}}" for s in skills)
    return "\n".join(
        [head, *(f"{n:<{width}}" + "".join(f"{100 * values[s]:{column}.1f}" for s in skills) for n, values in rows)]
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m profuser.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="directory of a finished run, for instance runs/demo"
    )
    directory = parser.parse_args(argv).run_dir
    record = read_json(directory / "run.json", "status", "recipe", "store")
    if record["status"] != "complete":
        raise DataError(
            f"RUN_DIR must hold a finished run, {directory} is not complete; run profuser.train with its recipe again"
        )
    recipe = replace(load_recipe(record["recipe"]), output=str(directory))
    print(score_table(evaluate(Run(recipe=recipe, name=directory.name, options={}), Store.load(Path(record["store"])))))


if __name__ == "__main__":
    main_of(main)
