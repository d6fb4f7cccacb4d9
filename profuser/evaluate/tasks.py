"""Finds the tasks that a command line names: bundled ones, those of lm-evaluation-harness, and the user's own.

A name stands for a task of the harness, one of its groups or tags, `demo` or one of its tasks, or `paper`. What ends with .yaml or
has a slash is the path of a file, or of a folder of them, in the harness's format, and `bits_per_byte:FILE` stands for a text.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path

import datasets
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from profuser.errors import ConfigError, DataError, first_line
from profuser.evaluate.results import Column
from profuser.evaluate.scoring import TEXT, Benchmark, HarnessTask, Text

BUNDLED = Path(__file__).resolve().parent / "tasks"

PAPER = {
    "mmlu": 5,
    "arc_challenge": 25,
    "gsm8k": 5,
    "truthfulqa_mc2": 0,
    "hellaswag": 10,
    "winogrande": 5,
}
"""The tasks that `paper` stands for, and how many examples each shows.

The ProFuser paper names six benchmarks, of which HellaSwag and Winogrande are inferred here, as is the number of examples: with them
the six are those of the Open LLM Leaderboard of that time.
"""

SHOWN_MEMBERS = 8
"""A group with at most so many tasks has a column for each of them as well."""


def select(names: Sequence[str], shots: int | None = None) -> tuple[list[Benchmark], list[Column]]:
    """Loads tasks, their data and texts, and returns them with the columns of the table.

    Args:
        shots: how many examples every task shows; None leaves each its own. A task that never shows any stays as it is.

    Raises:
        ConfigError: a name is unknown, or two different tasks have one name.
        DataError: a task cannot be loaded, for instance because its data are not there.
    """
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    asked: dict[str, int | None] = {}
    for name in names:
        asked |= dict(PAPER) if name == "paper" else {name: None}
    manager = manager_for([name for name in asked if not name.startswith(TEXT)])
    benchmarks: dict[str, Benchmark] = {}
    columns: list[Column] = []
    for name, usual in asked.items():
        if name.startswith(TEXT):
            text = Text(Path(name.removeprefix(TEXT)))
            benchmarks[text.name] = text
            columns.append(Column(text.name, (text.name,)))
            continue
        for spec in specs_of(name, manager):
            built = built_of(spec, manager)
            title = spec if len(spec) < 40 else Path(spec).stem
            found, new = members_of(title, built)
            for task in found:
                own = task.get_config("num_fewshot")
                wanted = shots if shots is not None else usual
                if wanted is not None and own != 0:
                    task.set_config(key="num_fewshot", value=wanted)
                elif own is None:
                    task.set_config(key="num_fewshot", value=0)
                benchmark = HarnessTask(task)
                if benchmarks.setdefault(benchmark.name, benchmark).digest != benchmark.digest:
                    raise ConfigError(
                        f"--tasks: tasks must have names of their own, two are called {benchmark.name}; rename one"
                    )
            columns += [column for column in new if column.name not in {c.name for c in columns}]
    return list(benchmarks.values()), columns


def manager_for(names: Sequence[str]) -> TaskManager:
    """Returns the harness's register of tasks. The thousands that it brings are only read where one of them is meant.

    Raises:
        ConfigError: a name is a path, and there is nothing.
    """
    paths: list[str | Path] = [BUNDLED]
    for name in filter(is_place, names):
        if not Path(name).exists():
            raise ConfigError(
                f"--tasks: {name} must be an existing YAML file or folder of them, there is none; fix the path"
            )
        paths += [name] if Path(name).is_dir() else []
    own = TaskManager(include_path=paths, include_defaults=False)
    if all(is_place(name) or name in own.all_tasks for name in names):
        return own
    return TaskManager(include_path=paths)


def is_place(name: str) -> bool:
    """Whether a name is the path of the user's own tasks."""
    return "/" in name or name.endswith((".yaml", ".yml"))


def specs_of(name: str, manager: TaskManager) -> list[str]:
    """Returns what the harness is to load for a name. It raises ConfigError where there is no such task."""
    if is_place(name) and Path(name).is_dir():
        inside = TaskManager(include_path=name, include_defaults=False)
        if not inside.all_tasks:
            raise ConfigError(
                f"--tasks: a folder must hold tasks in the format of lm-evaluation-harness, {name} holds none; name another"
            )
        return inside.all_groups or inside.all_subtasks
    if is_place(name) or name in manager.all_tasks:
        return [name]
    near = difflib.get_close_matches(name, ["paper", *manager.all_tasks], n=1)
    hint = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists those of lm-evaluation-harness"
    if Path(name).exists():
        hint = f"write ./{name} for the path"
    raise ConfigError(
        f"--tasks: a task must be demo, paper, {TEXT}FILE, a task of lm-evaluation-harness or a YAML file, got {name}; {hint}"
    )


def built_of(spec: str, manager: TaskManager) -> Task | Group | list[Task]:
    """Loads a task with its data. It raises DataError where that fails."""
    try:
        return manager._load_spec(spec)  # `load` would lose which group a task is asked for by
    except Exception as error:  # datasets, the Hub and a task's own code may raise anything
        raise DataError(
            f"task {spec}: it could not be loaded ({first_line(error)}); its data must be on this machine or on the Hub, "
            "and its YAML must be in the harness's format"
        ) from error


def members_of(name: str, built: Task | Group | list[Task]) -> tuple[list[Task], list[Column]]:
    """Returns the tasks of what was loaded, and its columns."""
    if isinstance(built, Task):
        return [built], [Column(built.task_name, (built.task_name,))]
    tasks = built if isinstance(built, list) else built.get_all_tasks()
    weighted = isinstance(built, Group) and any(m.weight_by_size for m in built.aggregate_metric_list or [])
    own = [Column(task.task_name, (task.task_name,)) for task in tasks]
    together = Column(built.name if isinstance(built, Group) else name, tuple(t.task_name for t in tasks), weighted)
    return tasks, [*(own if len(own) <= SHOWN_MEMBERS else []), together]
