"""What --fresh may rename out of the way: a store or a run of ours, and nothing that a person or this very command needs.

`set_aside` in `lease.py` then renames it. Nothing is ever deleted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from profuser.errors import ConfigError, DataError
from profuser.recipe.data import SPLITS
from profuser.recipe.parse import Run
from profuser.recipe.places import is_path, resolve
from profuser.store.lease import FOLDER, OPTIONS, Directory, set_aside

RECORDS: dict[Directory, tuple[str, str]] = {"store": ("manifest.json", "shards"), "run": ("run.json", "recipe")}
"""The file by which a directory of ours is known, and a key of that file."""

PARTS: dict[Directory, tuple[str, ...]] = {
    "store": ("truth", "responses", "scores", "winners", "targets"),
    "run": ("checkpoints", "metrics.jsonl", "report.html"),
}
"""What else lies in such a directory, by which it is known where that file is damaged or missing."""


def start_over(run: Run, what: Directory) -> None:
    """Renames the old store or run of a recipe out of the way, and prints that it does.

    Raises:
        ConfigError, DataError: it must not be renamed (`check_fresh`), or it is in use.
    """
    check_fresh(run, what)
    directory = run.store_dir if what == "store" else run.output_dir
    if aside := set_aside(directory, what):
        print(f"renamed the old {what} {directory} to {aside}", flush=True)


def check_fresh(run: Run, what: Directory) -> None:
    """Checks that --fresh may rename the directory of a recipe's store or run. It changes nothing.

    Raises:
        ConfigError: the directory is the working or the home directory, or one of their parents, or something that the recipe
            needs lies in it.
        DataError: it holds something else than a store or run.
    """
    directory = run.store_dir if what == "store" else run.output_dir
    if not directory.exists():
        return
    for name, place in needed(run, what):
        if place.is_relative_to(directory.resolve()):
            raise ConfigError(
                f"--fresh renames the old {what} and must leave {name} in its place, {directory} holds it; give another "
                f"{OPTIONS[what]}"
            )
    if not is_ours(directory, what):
        raise DataError(
            f"--fresh renames only a {what} of profuser's or an empty directory, {directory} is neither; give another "
            f"{OPTIONS[what]}"
        )


def needed(run: Run, what: Directory) -> Iterator[tuple[str, Path]]:
    """Yields what must stay in its place, each with its name and its path without symbolic links."""
    recipe = run.recipe
    yield "the working directory", Path.cwd().resolve()
    yield "the home directory", Path.home().resolve()
    yield from (("the recipe", path.resolve()) for path in run.files)
    yield ("the run", run.output_dir.resolve()) if what == "store" else ("the store", run.store_dir.resolve())
    models = {model.name: model.model for model in (*recipe.sources, recipe.target_config)}
    models |= {f"the base of {source.name}": source.base for source in recipe.sources if source.base is not None}
    models |= {f"judge {judge.name}": judge.model for judge in recipe.judges if judge.model is not None}
    models |= {f"the base of judge {judge.name}": judge.base for judge in recipe.judges if judge.base is not None}
    templates = {f"the chat template of {m.name}": m.chat_template for m in (*recipe.sources, *recipe.judges)}
    data = [
        (f"data.{split}", path)
        for split in SPLITS
        if (place := recipe.data.location(split)) is not None
        for path in place.paths
    ]
    data += [(f"the responses of {source.name}", source.responses) for source in recipe.sources]
    data += [(f"the log-probabilities of {source.name}", source.logprobs) for source in recipe.sources]
    data += [(f"the scores of judge {judge.name}", judge.scores) for judge in recipe.judges]
    for name, location in [*models.items(), *data, *templates.items()]:
        if location is not None and "\n" not in location and is_path(location):
            yield name, Path(resolve(location)).resolve()


def is_ours(directory: Path, what: Directory) -> bool:
    """Whether a directory is empty, or a store or run of profuser's, be it of another version or damaged."""
    if not directory.is_dir():
        return False
    record, key = RECORDS[what]
    there = {path.name for path in directory.iterdir()} - {FOLDER}
    if record not in there:  # one of these names alone may be anybody's
        return not there or len(there.intersection(PARTS[what])) > 1
    try:
        content = json.loads((directory / record).read_bytes())
        known = isinstance(content, dict) and key in content
    except (OSError, ValueError, RecursionError):
        known = False
    return known or not there.isdisjoint(PARTS[what])
