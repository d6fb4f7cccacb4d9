"""What a contestant is scored on, and how: a task of lm-evaluation-harness, or the bits per byte of a text."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import evaluate
from lm_eval.api.model import LM
from lm_eval.api.task import Task

from profuser.errors import DataError, ProfuserError, first_line
from profuser.evaluate.language_models import ModelAlone
from profuser.evaluate.results import Item
from profuser.recipe.utf8 import read_utf8

PRIMARY = {"arc_challenge": "acc_norm,none", "hellaswag": "acc_norm,none", "gsm8k": "exact_match,strict-match"}
"""Which of a task's values is its score. Of a task that is not here, it is the first one that every item has."""

FEWSHOT_SEED = 1234
"""The harness's own seed of what examples are shown."""

TEXT = "bits_per_byte:"
"""What stands before the path of a text."""
PASSAGE_BYTES = 1000
"""A text is cut at blank lines into passages of at least so many bytes."""


class HarnessTask:
    """A task of lm-evaluation-harness."""

    def __init__(self, task: Task):
        self.task, self.name = task, task.task_name

    @property
    def needs_likelihoods(self) -> bool:
        """Whether it asks for log-likelihoods and not for answers."""
        return self.task.OUTPUT_TYPE != "generate_until"

    @cached_property
    def digest(self) -> str:
        """A short hash of what it asks, of how it counts, and of its data."""
        digest = hashlib.sha256()
        config = json.dumps(self.task.dump_config(), sort_keys=True, default=str)
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", config).encode())
        shown = list(self.task.fewshot_docs() or []) if self.task.get_config("num_fewshot") else []
        for doc in (*self.task.eval_docs, *shown):
            digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
        return digest.hexdigest()[:16]

    def scored(self, lm: LM, limit: int | None) -> dict[str, Any]:
        """Scores a model: the `values` of the task, those of every item, and which of them is the score.

        Raises:
            DataError: the task's own functions or templates fail, or it gives no numbers.
        """
        self.task.set_fewshot_seed(seed=FEWSHOT_SEED)
        try:
            out: Any = evaluate(lm, {"tasks": {self.name: self.task}}, limit=limit, bootstrap_iters=0)
        except (ProfuserError, OSError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a task's functions are its author's own, which may raise anything
            raise DataError(
                f"task {self.name}: it failed with {type(error).__name__}: {first_line(error)}; fix the task's YAML or its functions"
            ) from error
        items: dict[int, Item] = {}
        for sample in out["samples"][self.name]:
            number, prompt = sample["doc_id"], str(sample["arguments"][0][0])
            item = items.setdefault(
                number, {"id": number, "values": {}, "prompt": prompt, "target": str(sample["target"])}
            )
            if not self.needs_likelihoods:
                item["answer"] = str(sample["resps"][0][0])
            for metric in sample["metrics"]:
                if isinstance(sample[metric], (bool, int, float, np.number)):
                    item["values"][f"{metric},{sample['filter']}"] = float(sample[metric])
        rows = [items[number] for number in sorted(items)]
        primary = self._primary(rows)
        return {
            "primary": primary,
            "higher_is_better": (self.task.higher_is_better() or {}).get(primary.partition(",")[0], True),
            "values": {k: float(v) for k, v in out["results"][self.name].items() if _is_value(k, v)},
            "items": rows,
            "shots": self.task.get_config("num_fewshot"),
        }

    def row(self, item: Item) -> dict[str, Any]:
        """An item as a row of data, for a judge: its prompt, its ground truth, and all other columns of the task's data."""
        return {**self.task.eval_docs[item["id"]], "prompt": item["prompt"], "response": item["target"]}

    def _primary(self, items: Sequence[Item]) -> str:
        common = [key for key in items[0]["values"] if all(key in item["values"] for item in items)]
        if PRIMARY.get(self.name) in common:
            return PRIMARY[self.name]
        if not common:
            raise DataError(
                f"task {self.name}: a task must give a number for every item, this one gives none; leave it out"
            )
        return common[0]


def _is_value(key: str, value: object) -> bool:
    """Whether an entry of the harness's results is a value of the task."""
    return isinstance(value, (int, float)) and "," in key and "stderr" not in key


class Text:
    """A held-out text, on which a model's bits per byte are measured.

    Every passage is scored by itself, behind the token with which the model's texts begin.

    Raises:
        DataError: the file is missing, not UTF-8 or empty.
    """

    needs_likelihoods = True

    def __init__(self, path: Path):
        self.name = f"{TEXT}{path}"
        self.passages = passages_of(path)

    @cached_property
    def digest(self) -> str:
        """A short hash of the text."""
        return hashlib.sha256(json.dumps(self.passages).encode()).hexdigest()[:16]

    def scored(self, lm: LM, limit: int | None) -> dict[str, Any]:
        """Measures a model's bits per byte on every passage, and on all of them."""
        assert isinstance(lm, ModelAlone)
        passages = self.passages[:limit]
        bits, sizes = lm.bits_of(passages), [len(passage.encode()) for passage in passages]
        return {
            "primary": "bits_per_byte",
            "higher_is_better": False,
            "values": {"bits_per_byte": math.fsum(bits) / sum(sizes)},
            "items": [
                {"id": n, "values": {"bits_per_byte": b / size}, "size": size, "prompt": "", "target": passage}
                for n, (b, size, passage) in enumerate(zip(bits, sizes, passages))
            ],
            "shots": 0,
        }


def passages_of(path: Path) -> list[str]:
    """Cuts a text at blank lines into passages of at least PASSAGE_BYTES each, the last of which may be shorter."""
    try:
        text = read_utf8(path)
    except OSError:
        raise DataError(f"{TEXT}FILE must be an existing text, got {path}; fix the path") from None
    except ValueError as error:
        raise DataError(f"{path} must be UTF-8, {error}") from None
    passages: list[str] = []
    paragraphs: list[str] = []
    for paragraph in filter(str.strip, re.split(r"\n\s*\n", text)):
        paragraphs.append(paragraph.strip("\n"))
        if len("\n\n".join(paragraphs).encode()) >= PASSAGE_BYTES:
            passages.append("\n\n".join(paragraphs))
            paragraphs = []
    if paragraphs:
        passages.append("\n\n".join(paragraphs))
    if not passages:
        raise DataError(f"{TEXT}FILE must hold a text, {path} is empty; name another")
    return passages


Benchmark = HarnessTask | Text
