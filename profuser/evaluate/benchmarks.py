"""Scores models on tasks of lm-evaluation-harness, and keeps every result: one file for each model and task.

A result is reused as long as the model's files, the task with its data, the options and this package's code stay what they were.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

from lm_eval.api.model import LM

from profuser.environment import environment
from profuser.errors import ConfigError
from profuser.evaluate.contestants import Alone, Contestant
from profuser.evaluate.language_models import ModelAlone, ModelsTogether
from profuser.evaluate.results import Result, Results, kept, result_path
from profuser.evaluate.scoring import Benchmark
from profuser.recipe.places import PACKAGE_DIR
from profuser.store.sealed import write_sealed


def run_benchmarks(
    contestants: Sequence[Contestant],
    benchmarks: Sequence[Benchmark],
    output: Path,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    fresh: bool = False,
) -> Results:
    """Scores models on tasks, as far as there are no results yet, and returns all results.

    Args:
        output: the directory of the results. limit: how many items of each task are asked, counted from the first; None asks all.
        fresh: whether results that are there are made again.
    Raises:
        ConfigError: a task needs log-likelihoods, and a contestant has none.
        DataError: a task needs answers, and a contestant has no chat template.
    """
    likelihoods = next((benchmark for benchmark in benchmarks if benchmark.needs_likelihoods), None)
    joint = next((contestant for contestant in contestants if contestant.joint), None)
    if likelihoods is not None and joint is not None:
        raise ConfigError(
            f"task {likelihoods.name} needs log-likelihoods, {joint.name} has none, because several models answer together; leave "
            "out one of the two"
        )
    if not all(benchmark.needs_likelihoods for benchmark in benchmarks):
        for contestant in contestants:
            contestant.check_answers()
    results: Results = {}
    for contestant in contestants:
        lm, found = None, {}
        for benchmark in benchmarks:
            key = {
                "model": contestant.identity,
                "task": benchmark.digest,
                "limit": limit,
                "code": code_digest(),
                "lm_eval": version("lm_eval"),
                "reasoning": contestant.reasoning,
            }
            path = result_path(output, contestant.name, benchmark.name, key)
            content = None if fresh else kept(path, key)
            if content is None:
                lm = lm or loaded(contestant, batch_size)
                start = time.monotonic()
                content = {"name": contestant.name, "task": benchmark.name, "key": key} | benchmark.scored(lm, limit)
                content |= {"seconds": round(time.monotonic() - start, 3), "environment": environment()}
                path.parent.mkdir(parents=True, exist_ok=True)
                write_sealed(path, content)
            found[benchmark.name] = Result.of(content)
        results[contestant.name] = found
        del lm
    return results


def loaded(contestant: Contestant, batch_size: int) -> LM:
    """Loads a contestant for the harness."""
    return ModelAlone(contestant, batch_size) if isinstance(contestant, Alone) else ModelsTogether(contestant)


@cache
def code_digest() -> str:
    """Returns a short hash of this package's Python code, which stands for its commit and for what is not committed yet."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE_DIR.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE_DIR)};".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
