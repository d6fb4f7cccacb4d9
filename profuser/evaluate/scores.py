"""Computes the held-out scores: the share of correct answers per skill, and bits per byte of the ground truth.

Bits are counted per byte and not per token, because vocabularies differ. The answers and log-likelihoods of the sources come
from the store; only the target's are computed here. The report also gets a few held-out prompts with all answers, and a few
training prompts with their votes.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from profuser.errors import DataError, first_line
from profuser.evaluate.match import load_match, try_match
from profuser.fusion_model import FusionModel
from profuser.models.load import chat_format, default_device, load_model, runtime_dtype
from profuser.prepare.data import Row, data_hash
from profuser.prepare.inputs import load_split, settled_dtype
from profuser.prepare.responses import generate, read_responses
from profuser.prepare.votes import judged_examples
from profuser.progress import Progress, silent
from profuser.recipe.data import Split
from profuser.recipe.parse import Run
from profuser.recipe.schema import Recipe, SourceConfig
from profuser.store import layout
from profuser.store.files import write_json
from profuser.store.sealed import damaged_files
from profuser.store.store import Store
from profuser.text.chat import ChatFormat
from profuser.train.likelihood import Likelihood, likelihood
from profuser.train.run_record import EVALUATION, SCORES, model_files, read_run
from profuser.train.targets import Targets


def accuracies(rows: Sequence[Row], correct: Sequence[bool]) -> dict[str, float]:
    """Returns the share of correct answers per skill, and under "mean" the mean of these shares: every skill counts once."""
    by_skill: dict[str, list[bool]] = {}
    for row, is_right in zip(rows, correct):
        by_skill.setdefault(row["skill"], []).append(is_right)
    scores = {skill: sum(of_skill) / len(of_skill) for skill, of_skill in by_skill.items()}
    return {**scores, "mean": sum(scores.values()) / len(scores)}


def bits_per_byte(
    rows: Sequence[Row], nll: Sequence[float] | np.ndarray, size: Sequence[int] | np.ndarray
) -> dict[str, float]:
    """Returns the bits per byte of the responses, per skill and under "mean" over all bytes. The bits include the end of turn.

    Args:
        nll: the nats of each row's response. A row with a value that is not finite is left out.
        size: the length of each row's response in bytes.
    """
    nats_of: defaultdict[str, float] = defaultdict(float)
    bytes_of: Counter[str] = Counter()
    for row, nats, count in zip(rows, nll, size):
        if count and math.isfinite(nats):
            for key in (row["skill"], "mean"):
                nats_of[key] += nats
                bytes_of[key] += count
    return {key: nats / math.log(2) / bytes_of[key] for key, nats in nats_of.items()}


def evaluate(run: Run, store: Store) -> dict[str, Any]:
    """Scores the fused model in the run directory beside its sources, and writes scores.json and evaluation.json.

    Returns:
        The content of scores.json.

    Raises:
        DataError: the recipe has no held-out prompts, the data is not what the store was prepared with, a model cannot be
            loaded, or evaluation.match returned something else than True or False.
    """
    # The data, and everything that can be wrong before a model is loaded.
    recipe, directory = run.recipe, run.output_dir
    if recipe.data.location("heldout") is None:
        raise DataError(
            "evaluation needs data.heldout, the recipe of the run names none; add it, and train with another --output"
        )
    rows, training = prepared_rows(recipe, store, "heldout"), prepared_rows(recipe, store, "train")
    try_match(recipe.evaluation.match, rows[0])
    names = [source.name for source in recipe.sources]
    votes = judged_examples(store, recipe, training, first_of_each_skill(training, recipe.evaluation.examples))
    match, targets = load_match(recipe.evaluation.match), Targets(store, "heldout")
    device = default_device()
    dtype = runtime_dtype(settled_dtype(recipe.capture.dtype, run.store_dir, device), device)
    prompts = [row["prompt"] for row in rows]

    # The sources' answers and likelihoods, from the store.
    answers = {name: source_answers(store, name) for name in names}
    bits = {name: bits_per_byte(rows, *source_likelihood(store, name)) for name in names}

    # The target's, before and after fusion. The fused model answers the training prompts of the report as well.
    statistics: dict[str, Likelihood] = {}
    fused = SourceConfig(name="fused", model=str(directory.resolve()))
    for key, config in (("target_before", recipe.target_config), ("fused", fused)):
        with said_to_differ(directory) if key == "fused" else contextlib.nullcontext():
            label = key.replace("_", " ")
            model = load_model(config, dtype, device)
            chat = chat_format(config, date=store.date)
            if (
                key == "target_before" and recipe.target in answers
            ):  # the target is a source, which has answered already
                answers[key] = answers[recipe.target]
            else:
                with Progress(f"{label}: answer the held-out prompts", len(rows), "prompts") as bar:
                    answers[key] = answer(model, chat, prompts, recipe, bar)
            statistics[key] = target_likelihood(model, chat, targets, recipe, label)
            # A ground truth that the target could not be scored on has no bits.
            examples = range(len(rows))
            nll, size = statistics[key].nll, statistics[key].response_bytes
            bits[key] = bits_per_byte(
                rows, [nll.get(i, math.inf) for i in examples], [size.get(i, 0) for i in examples]
            )
            if key == "fused":
                now = answer(model, chat, [example["prompt"] for example in votes], recipe)
                votes = [example | {"fused": text} for example, text in zip(votes, now)]
            del model

    # Which answers are right. A prompt without a ground truth can only be scored by a match of the user's own.
    asked = [i for i, row in enumerate(rows) if row["response"] or recipe.evaluation.match is not None]
    correct = {name: {i: match(rows[i], texts[i]) for i in asked} for name, texts in answers.items()}
    asked_rows = [rows[i] for i in asked]
    scores = by_model(names, {name: accuracies(asked_rows, list(right.values())) for name, right in correct.items()})

    # Write the scores, and what the report shows beside them.
    shown = [asked[i] for i in first_of_each_skill(asked_rows, recipe.evaluation.examples)]
    evaluation = {
        "bits_per_byte": by_model(names, bits),
        "kd": {key: of_model.kd for key, of_model in statistics.items()},
        "ce": {key: of_model.ce for key, of_model in statistics.items()},
        "data": data_hash(rows),
        "counts": dict(Counter(row["skill"] for row in asked_rows)),
        "examples": [
            {
                "skill": rows[i]["skill"],
                "prompt": str(rows[i]["prompt"]),
                "ground_truth": rows[i]["response"],
                "responses": {name: texts[i] for name, texts in answers.items()},
                "correct": {name: right[i] for name, right in correct.items()},
            }
            for i in shown
        ],
        "votes": [example | {"prompt": str(example["prompt"])} for example in votes],
    }
    write_json(directory / SCORES, scores)
    write_json(directory / EVALUATION, evaluation)
    return scores


@contextlib.contextmanager
def said_to_differ(directory: Path) -> Generator[None]:
    """Says of a fused model that cannot be scored whether its files are still those that training wrote.

    Raises:
        DataError: something failed, and they are not. Whatever fails with a model that is as it was written is raised as it is.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a damaged configuration may fail in any way, and anywhere
        if not (differing := damaged_files(directory, model_files(read_run(directory)))):
            raise
        there = [name for name in differing if (directory / name).exists()]
        wrong = f"{', '.join(there)} differs" if there else f"{', '.join(differing)} is missing"
        removed = "remove that file, and " if there else ""
        raise DataError(
            f"{directory} must hold the model that training wrote, {wrong} ({first_line(error)}); {removed}"
            "`python -m profuser.train` with the recipe makes it again"
        ) from error


def prepared_rows(recipe: Recipe, store: Store, split: Split) -> Sequence[Row]:
    """Reads the rows of a split.

    Raises:
        DataError: they are no longer the rows that the store was prepared with.
    """
    rows = load_split(recipe, split)
    if data_hash(rows) != store.settings.sources["data"].get(split):
        name = {"train": "training", "heldout": "held-out"}.get(split, split)
        raise DataError(
            f"{recipe.data.location(split)} must be the {name} data that {store.directory} was prepared with, its rows differ; "
            "restore it"
        )
    return rows


def answer(
    model: PreTrainedModel, chat: ChatFormat, prompts: Sequence[str], recipe: Recipe, bar: Progress | None = None
) -> list[str]:
    """Lets the target answer prompts, one response each, with the settings with which the sources answered them."""
    answers = generate(
        model,
        chat,
        prompts,
        recipe.generation_of(recipe.target_config),
        max_length=recipe.data.max_length,
        seed=recipe.seed,
        of=f"{recipe.target_config.name} heldout",
        progress=silent if bar is None else bar.update,
    )
    return [responses[0].text for responses in answers]


def source_answers(store: Store, source: str) -> list[str]:
    """Reads what a source answered to the held-out prompts, in the order of the rows."""
    kind = layout.responses("heldout", source)
    responses = store.by_example(kind, lambda n: read_responses(store, "heldout", source, n))
    return [response.text for (response,) in responses]


def source_likelihood(store: Store, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads the nats that a source gives each held-out ground truth, and the bytes of it, in the order of the rows."""
    kind = layout.truth("heldout", source)
    return store.array_by_example(kind, "nll"), store.array_by_example(kind, "response_bytes")


def target_likelihood(
    model: PreTrainedModel, chat: ChatFormat, targets: Targets, recipe: Recipe, label: str
) -> Likelihood:
    """Computes the statistics of the target, before or after fusion, on the held-out ground truths."""
    fusion = FusionModel(model, **recipe.optim.loss_options)
    label = f"{label}: score the held-out ground truths"
    return likelihood(fusion, targets, chat.end_id, recipe.capture.batch_size, label, recipe.optim.mixing)


def by_model(names: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Arranges the values of all models as scores.json does: the sources', the target's before fusion, the fused model's."""
    return {
        "sources": {name: values[name] for name in names},
        "target_before": values["target_before"],
        "fused": values["fused"],
    }


def first_of_each_skill(rows: Sequence[Row], n: int) -> list[int]:
    """Returns the indices of n rows: the first of every skill, then the second of every skill, and so on.

    The report shows these, so that nobody has picked its examples by their results.
    """
    by_skill: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_skill.setdefault(row["skill"], []).append(i)
    turns = [i for turn in range(n) for group in by_skill.values() for i in group[turn : turn + 1]]
    return turns[:n]
