"""Scores a finished run's model, its sources and any other models on a new file, without a store.

Every model answers with the settings of the run's recipe, and its answers are judged by the recipe's match. What was answered is
kept under the run's directory, in evaluations/, so that only what is new is answered: another model, other rows, other settings.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from profuser.errors import ConfigError, DataError
from profuser.evaluate.comparison import Compared, as_json, compare
from profuser.evaluate.contestants import Alone, Contestant, contestants_of, fused_of
from profuser.evaluate.finished import open_run
from profuser.evaluate.match import load_match, try_match
from profuser.evaluate.results import Column, Result
from profuser.evaluate.scores import accuracies, by_model
from profuser.evaluate.statistics import Sample
from profuser.models.load import default_device, runtime_dtype
from profuser.prepare.data import Row, data_hash, load_examples, prompt_digest, shared_prompts
from profuser.prepare.data_sets import read_tables
from profuser.prepare.inputs import load_split, settled_date, settled_dtype
from profuser.progress import Progress
from profuser.recipe.data import DataConfig, DataLocation
from profuser.recipe.schema import Recipe, SourceConfig
from profuser.store.files import write_json
from profuser.store.sealed import unsealed, write_sealed
from profuser.train.run_record import EVALUATIONS
from profuser.typed import parsed


def score_on(directory: Path, file: str, specs: Sequence[str]) -> tuple[dict[str, Any], list[Compared]]:
    """Scores a run's models and others on a file, and writes the scores under the run's directory.

    Args:
        file: where the rows are, as `place_of` takes it. specs: further models, as `contestants_of` takes them.

    Returns:
        What scores.json holds, with the scores of the further models under "models"; and the comparison of all models.
    Raises:
        ConfigError, DataError: the run, the file or a model is missing or broken, or the match failed.
    """
    # The rows, and everything that can be wrong before a model is loaded.
    run, _ = open_run(directory)
    recipe = run.recipe
    location = place_of(file)
    rows = new_rows(recipe, location)
    if recipe.evaluation.match is None and not any(row["response"] for row in rows):
        raise DataError(
            f"{file} must hold a ground truth to score the answers by, every response is empty; fill them in, or train with a "
            "function as evaluation.match"
        )
    try_match(recipe.evaluation.match, rows[0])
    match = load_match(recipe.evaluation.match)
    device = default_device()
    dtype = runtime_dtype(settled_dtype(recipe.capture.dtype, run.store_dir, device), device)
    date = settled_date(recipe.date, run.store_dir)

    def alone(source: SourceConfig) -> Alone:
        return Alone(source.name, source, dtype, date, recipe.reasoning_of(source))

    own = {source.name: alone(source) for source in recipe.sources}
    own |= {"target_before": alone(recipe.target_config), "fused": fused_of(directory, "fused")}
    others = contestants_of(specs, taken=list(own))
    for contestant in (*own.values(), *others):
        contestant.check_answers()
    if shared := shared_with_training(recipe, rows):
        print(f"{shared} of {len(rows)} prompts in {file} are training prompts as well", flush=True)

    # The answers, and which of them are right. A row without a ground truth can only be scored by a match of the user's own.
    answers = {name: kept_answers(directory, contestant, rows, recipe) for name, contestant in own.items()}
    more = {contestant.name: kept_answers(directory, contestant, rows, recipe) for contestant in others}
    asked = [i for i, row in enumerate(rows) if row["response"] or recipe.evaluation.match is not None]
    asked_rows = [rows[i] for i in asked]

    def judged(texts: Sequence[str]) -> list[bool]:
        return [match(rows[i], texts[i]) for i in asked]

    right, right_of_more = ({n: judged(texts) for n, texts in group.items()} for group in (answers, more))
    names = [source.name for source in recipe.sources]
    scores = by_model(names, {name: accuracies(asked_rows, values) for name, values in right.items()})
    scores["models"] = {name: accuracies(asked_rows, values) for name, values in right_of_more.items()}

    # What was found out, beside the answers.
    compared = compared_by_skill(asked_rows, {"fused": right["fused"]} | right | right_of_more)
    content = {
        "data": file,
        "counts": dict(Counter(row["skill"] for row in asked_rows)),
        "scores": scores,
        "comparison": as_json(compared),
        "rows": [
            {
                "skill": row["skill"],
                "prompt": str(row["prompt"]),
                "ground_truth": row["response"],
                "responses": {n: texts[i] for n, texts in (answers | more).items()},
                "correct": {n: values[k] for n, values in (right | right_of_more).items()},
            }
            for k, (i, row) in enumerate(zip(asked, asked_rows))
        ],
    }
    write_json(result_path(directory, location.paths[0], rows), content)
    return scores, compared


def compared_by_skill(rows: Sequence[Row], right: Mapping[str, Sequence[bool]]) -> list[Compared]:
    """Compares models on every skill, and on their mean, in which every skill counts once."""
    of_skill: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        of_skill.setdefault(row["skill"], []).append(i)
    results = {
        model: {
            skill: Result("correct", Sample(np.array([values[i] for i in places], dtype=float)), True, [])
            for skill, places in of_skill.items()
        }
        for model, values in right.items()
    }
    columns = [Column(skill, (skill,)) for skill in of_skill]
    return compare(results, [*columns, Column("mean", tuple(of_skill), weighted=False)])


def result_path(directory: Path, file: str, rows: Sequence[Row]) -> Path:
    """Where the scores on these rows of a file are written."""
    return directory / EVALUATIONS / f"{Path(file).name.partition('.')[0]}-{data_hash(rows)}.json"


def place_of(text: str) -> DataLocation:
    """Returns the place that --data names: a file, a folder or a data set, or a mapping that also chooses of what it holds.

    Raises:
        ConfigError: a mapping has other keys than path, config and split, or has no path.
    """
    if not text.lstrip().startswith("{"):
        return DataLocation(path=text)
    with contextlib.suppress(yaml.YAMLError, TypeError):
        given = yaml.safe_load(text)
        if all(isinstance(value, str) for value in given.values()):
            return DataLocation(**given)
    raise ConfigError(
        f"--data must be a path, or a mapping of path, config and split, got {text}; write '{{ path: data, config: main }}'"
    )


def new_rows(recipe: Recipe, location: DataLocation) -> Sequence[Row]:
    """Reads the rows of a new file, in the columns that the recipe names or else in those of the usual names.

    Raises:
        DataError: it is missing or broken, or has no rows.
    """
    data, usual = recipe.data, DataConfig(train=location)
    tables = read_tables(location, "heldout", option="--data")
    columns = {column for _, table in tables for row in table for column in row}
    named = {data.messages_column} if data.messages_column else {data.prompt_column, data.response_column}
    if not named <= columns:
        data = replace(
            data, messages_column=None, prompt_column=usual.prompt_column, response_column=usual.response_column
        )
    if data.skill_column not in columns:
        data = replace(data, skill_column=usual.skill_column if usual.skill_column in columns else None)
    return load_examples(data, location, None, "heldout")


def shared_with_training(recipe: Recipe, rows: Sequence[Row]) -> int:
    """Counts the rows whose prompt the run was trained on; 0 where its training data are no longer there."""
    try:
        return shared_prompts(rows, load_split(recipe, "train"))
    except DataError:
        return 0


def kept_answers(directory: Path, contestant: Contestant, rows: Sequence[Row], recipe: Recipe) -> list[str]:
    """Returns a model's answers to the rows: those that are kept, or else new ones, which are kept from then on."""
    prompts = [row["prompt"] for row in rows]
    generation = replace(recipe.generation_of(recipe.target_config), reasoning=recipe.generation.reasoning)
    settings = {
        "max_new_tokens": generation.max_new_tokens,
        "sampling": [generation.temperature, generation.top_p, recipe.seed] if generation.temperature > 0 else None,
        "max_length": recipe.data.max_length,
        "reasoning": contestant.reasoning or generation.reasoning,
    }
    digests = [prompt_digest(prompt).hex() for prompt in prompts]
    key = {"model": contestant.identity, "prompts": digests, "settings": settings}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = directory / EVALUATIONS / "answers" / f"{digest}.json"
    try:
        kept = unsealed(parsed(path.read_bytes()), {"answers": [str], "model": {}, "settings": {}})["answers"]
        if len(kept) == len(prompts):
            return kept
    except (OSError, ValueError):  # not there, or damaged: answered again
        pass
    loaded = contestant.load()
    with Progress(f"{contestant.name}: answer the prompts", len(prompts), "prompts") as bar:
        answers = loaded.answer(
            prompts, generation, max_length=recipe.data.max_length, seed=recipe.seed, progress=bar.update
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(path, {"model": contestant.identity, "settings": settings, "answers": answers})
    return answers
