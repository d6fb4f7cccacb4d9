"""The results of models on tasks, and the files in which they are kept: one for each model and task, which proves itself."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from profuser.evaluate.statistics import Sample
from profuser.store.sealed import unsealed
from profuser.typed import COUNT, NUMBER, parsed

Item = dict[str, Any]
"""One item of a task: its `id`, its `values` by metric and filter, the `prompt`, the `target`, and perhaps `answer` and `size`."""

ITEM = {"id": int, "values": {str: (NUMBER, None)}, "prompt": str, "answer?": str, "target": str, "size?": COUNT}
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
        given = [item["values"][primary] for item in items]
        values = np.array([np.nan if value is None else value for value in given], dtype=float)
        sizes = np.array([item["size"] for item in items], dtype=float) if "size" in items[0] else None
        return cls(primary, Sample(values, sizes), content["higher_is_better"], items)


JUDGED = "judged by "
"""What stands before a judge's name, in place of the name of a value."""

Results = dict[str, dict[str, Result]]
"""By the model's name and the task's."""


@dataclass(frozen=True)
class Column:
    """A column of the table: a task, or several with one score.

    weighted: whether every item counts alike; otherwise every task does.
    """

    name: str
    tasks: tuple[str, ...]
    weighted: bool = True


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
