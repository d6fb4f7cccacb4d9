"""Scores models on tasks of lm-evaluation-harness, and keeps every result: one file for each model and task.

A result is reused as long as the model's files, the task with its data, the options and this package's code stay what they were.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import LM

from profuser.environment import environment
from profuser.errors import ConfigError
from profuser.evaluate.contestants import Alone, Contestant
from profuser.evaluate.language_models import ModelAlone, ModelsTogether
from profuser.evaluate.scoring import Benchmark, Item
from profuser.evaluate.statistics import Sample
from profuser.recipe.places import PACKAGE_DIR
from profuser.store.sealed import unsealed, write_sealed
from profuser.typed import COUNT, NUMBER, parsed

ITEM = {"id": int, "values": {str: NUMBER}, "prompt": str, "answer?": str, "target": str, "size?": COUNT}
RESULT = {"key": {}, "primary": str, "items": [ITEM], "values": {str: NUMBER}, "higher_is_better": bool}
"""The shape of what is read of a result."""


@dataclass(frozen=True)
class Result:
    """The result of one model on one task.

    primary: the name of the value that is the score. sample: that value of every item. higher: whether more is better.
    items: what else is known of the items.
    """

    primary: str
    sample: Sample
    higher: bool
    items: list[Item]

    @property
    def is_share(self) -> bool:
        """Whether the score may be a share, such as that of right answers, and not a judge's number or bits."""
        return self.higher and self.sample.sizes is None and not self.primary.startswith(JUDGED)

    @classmethod
    def of(cls, content: dict[str, Any]) -> Result:
        """The result that a file holds."""
        primary, items = content["primary"], content["items"]
        values = np.array([item["values"][primary] for item in items], dtype=float)
        sizes = np.array([item["size"] for item in items], dtype=float) if "size" in items[0] else None
        return cls(primary, Sample(values, sizes), content["higher_is_better"], items)


JUDGED = "judged by "
"""What stands before a judge's name, in place of the name of a value."""

Results = dict[str, dict[str, Result]]
"""By the model's name and the task's."""


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
    """
    likelihoods = next((benchmark for benchmark in benchmarks if benchmark.needs_likelihoods), None)
    joint = next((contestant for contestant in contestants if contestant.joint), None)
    if likelihoods is not None and joint is not None:
        raise ConfigError(
            f"task {likelihoods.name} needs log-likelihoods, {joint.name} has none, because several models answer together; leave "
            "out one of the two"
        )
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


def result_path(output: Path, model: str, task: str, key: dict[str, Any]) -> Path:
    """Where a result is kept."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return output / plain(model) / f"{plain(task)}-{digest}.json"


def plain(name: str) -> str:
    """Returns a name as a part of a path."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "_"


def kept(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """Returns a result that is there, or None where there is none, or one that is damaged or of something else."""
    try:
        content = unsealed(parsed(path.read_bytes()), RESULT)
    except (OSError, ValueError):
        return None
    return content if content["key"] == key and content["items"] else None


@cache
def code_digest() -> str:
    """Returns a short hash of this package's Python code, which stands for its commit and for what is not committed yet."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE_DIR.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE_DIR)};".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
