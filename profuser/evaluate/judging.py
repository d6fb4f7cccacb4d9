"""Lets the judges of a recipe score the answers that models gave to tasks, one judge after the other.

Every answer is scored by itself, so that a model's scores do not depend on which others are compared with it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

from profuser.errors import ConfigError
from profuser.evaluate.results import JUDGED, Column, Result, Results, kept, result_path
from profuser.evaluate.scoring import Benchmark, HarnessTask
from profuser.models.load import default_device
from profuser.prepare.inputs import settled_date
from profuser.prepare.judges import Judge, judge_fingerprint, load_judge, open_judge, try_function_judge
from profuser.progress import Progress
from profuser.recipe.parse import parse_run
from profuser.recipe.schema import JudgeConfig, Recipe
from profuser.store.sealed import write_sealed


def judges_of(path: str) -> Recipe:
    """Returns a recipe whose judges are opened.

    Raises:
        ConfigError: the recipe is wrong, or has no judges.
        DataError: a judge is missing or broken.
    """
    recipe = parse_run("evaluate", [f"--config={path}"], {}, "").recipe
    if not recipe.judges:
        raise ConfigError(f"--judges must be a recipe with judges, {path} has none; add them or leave the option out")
    for judge in recipe.judges:
        open_judge(judge)
    return recipe


def judge_answers(
    results: Results,
    benchmarks: Sequence[Benchmark],
    columns: Sequence[Column],
    recipe: Recipe,
    output: Path,
    fresh: bool,
) -> list[Column]:
    """Adds to the results what every judge gives the answers, as further tasks, and returns their columns.

    Raises:
        ConfigError: no task has answers.
        DataError: a judge fails.
    """
    answered = [b for b in benchmarks if isinstance(b, HarnessTask) and not b.needs_likelihoods]
    if not answered:
        raise ConfigError(
            "--judges must come with a task that has answers, all of these are about log-likelihoods; leave it out"
        )
    more: list[Column] = []
    for judge in recipe.judges:
        score: Judge | None = None
        for benchmark in answered:
            for model, found in results.items():
                items = found[benchmark.name].items
                rows, answers = [benchmark.row(item) for item in items], [item.get("answer", "") for item in items]
                asked = hashlib.sha256(json.dumps([rows, answers], sort_keys=True, default=str).encode()).hexdigest()
                key = {"judge": judge_fingerprint(judge), "asked": asked, "date": recipe.date}
                name = named(benchmark.name, judge)
                path = result_path(output, model, name, key)
                content = None if fresh else kept(path, key)
                if content is None:
                    if score is None:
                        try_function_judge(judge, rows[0], 1)
                        score = load_judge(judge, default_device(), date=settled_date(recipe.date, None))
                    with Progress(f"{judge.name}: {model}, {benchmark.name}", len(rows), "answers", brief=True) as bar:
                        given = score(rows, [[answer] for answer in answers], bar.update)[:, 0].tolist()
                    primary = f"{JUDGED}{judge.name}"
                    finite = [value for value in given if math.isfinite(value)]
                    content = {
                        "name": model,
                        "task": name,
                        "key": key,
                        "primary": primary,
                        "higher_is_better": True,
                        "values": {primary: math.fsum(finite) / len(finite)} if finite else {},
                        "items": [
                            {**item, "values": {primary: value if math.isfinite(value) else None}}
                            for item, value in zip(items, given)
                        ],
                    }
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_sealed(path, content)
                found[name] = Result.of(content)
        names = {benchmark.name for benchmark in answered}
        more += [
            Column(named(column.name, judge), tuple(named(task, judge) for task in column.tasks), column.weighted)
            for column in columns
            if names.issuperset(column.tasks)
        ]
        del score
    return more


def named(task: str, judge: JudgeConfig) -> str:
    """What a judge's scores of a task are called."""
    return f"{task}, {judge.name}"
