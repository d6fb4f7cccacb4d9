"""Instruction data from reasoning-gym's seeded tasks, whose answers can be verified, and judges and a score for it.

    python -m profuser.experiments.reasoning_tasks --out data/reasoning-gym

This writes train.jsonl, validation.jsonl and heldout.jsonl. A row has the task's question as prompt, `Answer: X.` as the
ground truth, the task's name as the skill, and the task's own entry, which its verifier reads. No prompt occurs twice, be it
in one file or in two. The tasks are easy and their settings small, because the models of smollm2.yaml are small. Tasks whose
verifier needs more than the answer's text are left out on purpose.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from profuser.cli import main_of
from profuser.errors import ConfigError, DataError
from profuser.store.files import write_atomic

TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 2, "max_value": 30},
    "letter_counting": {"min_words": 1, "max_words": 3},
    "leg_counting": {"min_animals": 1, "max_animals": 2, "min_instances": 1, "max_instances": 5},
    "calendar_arithmetic": {"tasks": ["weekday_of_date"]},
}
"""The tasks of reasoning-gym 0.1.25 that are used, with their settings."""

SPLITS = {"train": 80, "validation": 20, "heldout": 40}
"""How many prompts per task each file has."""

ANSWER = re.compile(r"(?:\bis:?|answer:|=)\s+([^\n]+)", re.IGNORECASE)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def answer_of(response: str) -> str:
    """The answer in a response: the rest of a line after the last `is`, `Answer:` or `=`, or else its last number or word."""
    found = ANSWER.findall(response) or NUMBER.findall(response) or response.split() or [""]
    return found[-1].strip(" .*$")


def correct(example: dict, response: str) -> bool:
    """Whether the task's own verifier gives the response's answer its full score."""
    return verified(example, response) >= 0.99


def verifier(example: dict, responses: list[str]) -> list[float]:
    """A judge that gives each response the task's own score of its answer, from 0 to 1."""
    return [verified(example, response) for response in responses]


def form(example: dict, responses: list[str]) -> list[float]:
    """A judge that gives 1 where the response's answer and the ground truth's are both numbers, or neither is."""
    wanted = is_number(answer_of(example["response"]))
    return [float(is_number(answer_of(response)) == wanted) for response in responses]


def is_number(text: str) -> bool:
    return NUMBER.fullmatch(text) is not None


def verified(example: dict, response: str) -> float:
    return float(gym().get_score_answer_fn(example["skill"])(answer_of(response), json.loads(example["entry"])))


@cache
def gym() -> ModuleType:
    """The reasoning_gym package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise ConfigError(
            "these tasks need the reasoning-gym package, it is not installed; run `pip install reasoning-gym==0.1.25`"
        ) from None
    return reasoning_gym


def rows_of(task: str, count: int, seed: int) -> list[dict[str, str]]:
    """`count` rows of one task, no two of which have the same prompt."""
    data = gym().create_dataset(task, size=20 * count, seed=seed, **TASKS[task])
    rows: dict[str, dict[str, str]] = {}
    for entry in data:
        prompt = entry["question"].strip()
        rows.setdefault(
            prompt,
            {
                "prompt": prompt,
                "response": f"Answer: {entry['answer']}.",
                "skill": task,
                "entry": json.dumps({k: entry[k] for k in ("question", "answer", "metadata")}, default=str),
            },
        )
        if len(rows) == count:
            return list(rows.values())
    raise DataError(f"{task} must give {count} different prompts, it gave {len(rows)}; ask for fewer with --scale")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m profuser.experiments.reasoning_tasks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("data/reasoning-gym"), help="the directory of the three files")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the tasks")
    parser.add_argument(
        "--scale", type=float, default=1.0, help=f"multiplies the sizes of the files, {SPLITS} prompts per task"
    )
    args = parser.parse_args(argv)
    if not 0 < args.scale <= 100:
        raise ConfigError(f"--scale must be in (0, 100], got {args.scale:g}; 1 is the recipe's size")
    sizes = {split: max(1, round(args.scale * size)) for split, size in SPLITS.items()}
    tasks = [rows_of(task, sum(sizes.values()), 1000 * args.seed + n) for n, task in enumerate(TASKS)]
    turns = zip(*tasks)  # one prompt of every task in turn, so that the first rows of a file have equally many of each
    for split, size in sizes.items():
        rows = [row for turn in itertools.islice(turns, size) for row in turn]
        path = args.out / f"{split}.jsonl"
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        print(f"{path}: {len(rows)} prompts")


if __name__ == "__main__":
    main_of(main)
