"""Damages every file of a finished run and store, in every way, and watches what the commands do about it.

`walk` is what tests/test_reliability.py tests and what docs/reliability.md is made of. A command passes if it gives the undamaged
result, says what it made again or that a model differs, or ends with exit code 3 and one line. The advice of that line is then
followed, after which the same command must succeed.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_runs import RECIPE, STORE, make_good, rows, run, without_pictures

from profuser.store.store import Store
from profuser.train.run_record import METRICS, model_files, read_run, write_run

RUN = "runs/recipe"
COMMANDS = {
    "train": ("train", "--config", "recipe.yaml"),
    "prepare": ("prepare", "--config", "recipe.yaml"),
    "evaluate": ("evaluate", RUN),
    "report": ("report", RUN),
    "doctor": ("doctor", "--config", "recipe.yaml"),
}
FLIPS = 10
DAMAGES = ("truncated", "emptied", "a bit flipped", "deleted", "a directory", "another run's")
OUTCOMES = ("undamaged", "made again", "said to differ", "exit 3")


@dataclass(frozen=True, slots=True)
class Places:
    """Folders with a finished run: `good`, another run's, and one that was interrupted after its last checkpoint."""

    good: Path
    other: Path
    interrupted: Path


@dataclass(frozen=True, slots=True)
class Trial:
    """One command after one damage. place: the name of a folder of Places. at: where a bit is flipped, as a share of the file."""

    place: str
    command: str
    file: str
    damage: str
    at: float = 0.0

    def __str__(self) -> str:
        return f"{self.command} in {self.place}, {self.file} {self.damage} ({self.at:.3f})"


@dataclass(slots=True)
class Tally:
    """What became of trials: how many had which outcome, by damage and command, and what went wrong."""

    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def make_places(root: Path) -> Places:
    """Makes the folders. The recipe saves a checkpoint after each of its two steps."""
    places = Places(*(root / name for name in ("good", "other", "interrupted")))
    for place, seed in ((places.good, 0), (places.other, 1)):
        place.mkdir()
        changed = RECIPE.replace("optim: {", f"seed: {seed}\noptim: {{ checkpoint_every: 1, log_every: 1,")
        make_good(place, changed, *((rows("fusion", 13)[6:], rows("heldout", 7)[4:]) if seed else ()))
    shutil.copytree(places.good, places.interrupted)
    with inside(places.interrupted):
        record = read_run(Path(RUN))
        for name in (*model_files(record), "scores.json", "evaluation.json", "report.html"):
            (Path(RUN) / name).unlink()
        write_run(Path(RUN), {key: value for key, value in record.items() if key != "files"} | {"status": "running"})
    return places


@contextmanager
def inside(place: Path) -> Generator[None]:
    """Makes a folder the working directory."""
    before = Path.cwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


def files_of(place: Path) -> list[str]:
    """All files of the run and the store in a folder."""
    return sorted(str(path.relative_to(place)) for path in (place / "runs").rglob("*") if path.is_file())


def trials(places: Places) -> list[Trial]:
    """All trials there are: every file of the finished run and store, and what an interrupted run resumes from."""
    rng = random.Random(0)
    found = []
    kinds = [(damage, rng.random()) for damage in DAMAGES for _ in range(FLIPS if damage == "a bit flipped" else 1)]
    for file in files_of(places.good):
        for damage, at in kinds:
            found += [Trial("good", command, file, damage, at) for command in COMMANDS]
    for file in files_of(places.interrupted):
        if file.startswith(f"{RUN}/"):
            found += [Trial("interrupted", "train", file, damage, at) for damage, at in kinds]
    return found


def damage(path: Path, trial: Trial, other: Path) -> None:
    """Damages a file. It is written anew, because it may be a link to the original."""
    content = path.read_bytes()
    path.unlink()
    if trial.damage == "truncated":
        path.write_bytes(content[: len(content) * 2 // 3])
    elif trial.damage == "emptied":
        path.write_bytes(b"")
    elif trial.damage == "a bit flipped":
        flipped, at = bytearray(content), int(trial.at * len(content) * 8)
        if content:
            flipped[at // 8] ^= 1 << at % 8
        path.write_bytes(flipped)
    elif trial.damage == "a directory":
        path.mkdir()
    elif trial.damage == "another run's" and other.is_file():
        path.write_bytes(other.read_bytes())


def result_of(command: str, out: str) -> Any:
    """What a command is for, as far as it must not depend on what was damaged."""
    store, directory = Path(STORE), Path(RUN)
    if command == "prepare":
        opened = Store.open(store)
        assert not opened.damaged()
        assert not opened.damaged_findings()
        summary = {k: v for k, v in json.loads((store / "summary.json").read_text()).items() if k != "seconds"}
        shards = {path.name: path.read_bytes() for path in store.glob("*/*") if path.is_file()}
        return summary, shards, (store / "samples.parquet").read_bytes()
    if command == "doctor":
        return out
    if command == "report":
        return (directory / "report.html").read_bytes()
    scores = [json.loads((directory / name).read_text()) for name in ("scores.json", "evaluation.json")]
    if command == "train":
        lines = [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]
        timing = ("tokens_per_second", "data_wait", "sha256")
        metrics = [{k: v for k, v in line.items() if k not in timing} for line in lines]
        return scores, metrics, {name: (directory / name).read_bytes() for name in model_files(read_run(directory))}
    return scores


SAID = re.compile("damaged|missing|gone|again|restored|renamed|is not what")


def attempt(trial: Trial, places: Places) -> str:
    """Damages a file and runs a command. It returns the outcome, or raises AssertionError."""
    path = Path(trial.file)
    damage(path, trial, places.other / trial.file)
    code, out, err = run(*COMMANDS[trial.command])
    if code in (75, 130):  # this process, and not the trial, is to end
        raise KeyboardInterrupt
    assert "Traceback" not in err, err
    if code == 0:
        if result_of(trial.command, out) == expected(places.good, trial.command):
            return "made again" if SAID.search(out) else "undamaged"
        said = rf"{re.escape(path.name)} in {RUN} is (not what training wrote|missing, which training wrote)"
        assert re.search(said, out), f"a silent difference: {out[-500:]}"
        if trial.command == "train":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            code, out, err = run(*COMMANDS["train"])
            assert code == 0, err
            assert result_of("train", out) == expected(places.good, "train"), "after following the advice"
        return "said to differ"
    assert code == 3, (code, err)
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    again = follow(trial.command, err)
    assert again[0] == 0, f"{err} -> {again[2]}"
    return "exit 3"


def follow(command: str, line: str) -> tuple[int, str, str]:
    """Follows the advice of an error, and runs the command again."""
    advice = line.split("; ", 1)[1]
    arguments = list(COMMANDS[command])
    if found := re.search(r"wrote, (.*) differs? \(.*; remove that file", line):
        for name in found[1].split(", "):
            shutil.rmtree(path) if (path := Path(RUN) / name).is_dir() else path.unlink(missing_ok=True)
    if "move this one away" in advice:
        Path(line.split()[1]).parent.rename("away")
    if found := re.search(r"`python -m profuser\.(\w+)( --fresh)?( \S+)?`", advice):
        name, fresh, directory = found.groups()
        done = run(name, directory.strip()) if directory else run(*COMMANDS[name], *([fresh.strip()] if fresh else []))
        assert done[0] == 0, f"{line} -> {done[2]}"
    elif found := re.search(r"give another --(\w+)", advice):
        arguments += [f"--{found[1]}", "elsewhere"]
    else:
        raise AssertionError(f"no advice that can be followed: {line}")
    return run(*arguments)


@functools.cache
def expected(good: Path, command: str) -> Any:
    """The result of a command in a folder in which nothing is damaged."""
    with copy_of(good):
        code, out, err = run(*COMMANDS[command])
        assert code == 0, err
        return result_of(command, out)


def walk(places: Places, chosen: Iterable[Trial]) -> Tally:
    """Makes trials, each in a folder of its own. What goes wrong is printed to stderr at once."""
    tally = Tally()
    with without_pictures():
        for trial in chosen:
            with copy_of(getattr(places, trial.place)):
                try:
                    tally.counts[trial.damage, trial.command, attempt(trial, places)] += 1
                except Exception as error:
                    tally.wrong.append(f"{trial}: {type(error).__name__}: {error}"[:700])
                    print(tally.wrong[-1], file=sys.stderr, flush=True)
    return tally


@contextmanager
def copy_of(origin: Path) -> Generator[None]:
    """Makes a copy of a folder the working directory. Its files are links, so that this takes no time."""
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(origin, place, dirs_exist_ok=True, copy_function=os.link)
        with inside(Path(place)):
            yield
