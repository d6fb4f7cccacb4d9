"""Runs commands in folders that hold a recipe, its data, a model of their own and a finished run."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from profuser import cli
from profuser.cli import main_of
from profuser.errors import DataError
from profuser.recipe.places import resolve

RECIPE = """\
sources:
  - { name: guardian, model: ./guardian }
  - { name: scholar, model: "demo:scholar" }
target: guardian
data: { train: train.jsonl, heldout: heldout.jsonl, max_length: 96 }
generation: { max_new_tokens: 16 }
judges: [{ name: verifier, function: "profuser.demo.verify:score" }]
capture: { shard_size: 4 }
schedule: simultaneous
optim: { steps: 2, batch_size: 4, lr: 1.0e-3 }
evaluation: { match: "profuser.demo.verify:exact_match" }
"""
COMMANDS = {name: importlib.import_module(f"profuser.{name}.__main__").main for name in cli.COMMANDS}
STORE = "runs/recipe-store"


def rows(name: str, count: int) -> list[dict]:
    return [json.loads(line) for line in Path(resolve(f"demo:{name}.jsonl")).read_text().splitlines()[:count]]


def write_rows(path: str, content: list[dict]) -> None:
    Path(path).write_text(
        "".join(json.dumps({k: r[k] for k in ("prompt", "response", "skill", "answer")}) + "\n" for r in content)
    )


def run(command: str, *arguments: str) -> tuple[int, str, str]:
    """Runs a command and returns its exit code, stdout and stderr, as those of its process would be."""
    out = io.StringIO()
    argv, sys.argv = sys.argv, [command, *arguments]
    with tempfile.TemporaryFile("w+") as err:
        # The file descriptor is replaced as well, because the handlers of libraries' loggers hold the real stream.
        stream = os.dup(2)
        os.dup2(err.fileno(), 2)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main_of(COMMANDS[command])
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            os.dup2(stream, 2)
            os.close(stream)
            sys.argv = argv
        err.seek(0)
        return code, out.getvalue(), err.read()


@contextlib.contextmanager
def without_pictures() -> Generator[None]:
    """Leaves the pictures out of reports. They take most of a command's time, and tests/test_report.py looks at them."""
    nothing = {"light": "", "dark": ""}
    with (
        mock.patch("profuser.report.page._draw", return_value=nothing),
        mock.patch("profuser.report.comparison._curves", return_value=nothing),
    ):
        yield


def without_plan() -> contextlib.AbstractContextManager[object]:
    """Leaves out the plan that is set beside what a training took. It takes a second, and tests/test_plan_memory.py looks at it."""
    return mock.patch("profuser.pipeline.make_plan", side_effect=DataError("left out"))


@contextlib.contextmanager
def folder(origin: Path) -> Generator[Path]:
    """Makes a copy of a folder the working directory."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(origin, place, dirs_exist_ok=True)
        os.chdir(place)
        try:
            yield Path(place)
        finally:
            os.chdir(before)


def make_good(
    place: Path, recipe: str = RECIPE, train: list[dict] | None = None, heldout: list[dict] | None = None
) -> None:
    """Writes into a folder a recipe, its data, a model of its own and a finished run."""
    before = Path.cwd()
    os.chdir(place)
    try:
        Path("recipe.yaml").write_text(recipe)
        write_rows("train.jsonl", train or rows("fusion", 6))
        write_rows("heldout.jsonl", heldout or rows("heldout", 3))
        shutil.copytree(resolve("demo:guardian"), "guardian")
        code, _, err = run("train", "--config", "recipe.yaml")
        assert code == 0, err
    finally:
        os.chdir(before)


def prepared_files() -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(Path("runs").rglob("*")) if p.is_file()}


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    return [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
