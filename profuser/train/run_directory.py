"""The directory of a run, as a command that trains uses it.

Its record, run.json, says with which recipe and store the run was made, whether it is complete, how long each phase took, and
what its files are. Beside it lie checkpoints/, metrics.jsonl and, when the run is complete, the fused model with its scores and
its report.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from profuser.environment import environment
from profuser.errors import ConfigError, DataError
from profuser.recipe.compare import deciding_keys, differing_keys
from profuser.recipe.parse import Run, load_recipe
from profuser.recipe.places import resolve
from profuser.recipe.schema import Recipe
from profuser.stopping import working
from profuser.store.files import TEMPORARY, remove_temporary
from profuser.store.lease import FOLDER, hold
from profuser.store.sealed import damaged_files, digest_of_file
from profuser.train.checkpoint import checkpoints
from profuser.train.run_record import MEASURED, PEAKS, check_own, model_files, read_run, restore_metrics, write_run
from profuser.typed import parsed, read_json


class RunDirectory:
    """The directory of one run. Opening it changes nothing on the disk."""

    def __init__(self, run: Run):
        self.run, self.path = run, run.output_dir
        self.checkpoints = self.path / "checkpoints"

    def read(self) -> dict[str, Any]:
        """Returns the content of run.json. It raises what `read_run` raises."""
        return read_run(self.path)

    @property
    def exists(self) -> bool:
        """Whether the directory holds a run."""
        return (self.path / "run.json").exists()

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint. From then on the recipe may no longer change."""
        return bool(checkpoints(self.checkpoints))

    @contextlib.contextmanager
    def held(self) -> Generator[None]:
        """Holds the directory until the end of a `with` block, so that no two processes train the same run.

        What killed processes have left in it while they were writing is removed.

        Raises:
            ConfigError: another process trains another recipe there.
            DataError: the directory holds something else than a run.
        """
        self._check_place()
        own = {"recipe": self.run.recipe.to_dict(), "store": str(self.run.store_dir.resolve())}
        with working(), hold(self.path, "run", own, differing_runs, use="alone"):
            remove_temporary([self.path, self.checkpoints])
            yield

    def _check_place(self) -> None:
        """Raises DataError if the directory holds something else than a run or leases."""
        if self.exists or not self.path.exists():
            return
        if any(path.name != FOLDER and not TEMPORARY.fullmatch(path.name) for path in self.path.iterdir()):
            raise DataError(
                f"output must be a run directory or empty, got {self.path} without run.json; give another --output"
            )

    def complete(self) -> bool:
        """Whether the run is complete already. Damaged metrics are restored, and what differs from what was written is printed.

        Raises:
            ConfigError: the directory holds a run of another recipe, or of another store.
            DataError: the directory holds something else, or a run of another schema; or its record is that of another run.
        """
        self._check_place()
        if not self.exists:
            return False

        # A run that has saved anything must be of this recipe, apart from keys that do not change the outcome.
        old = self.read()
        complete = old["status"] == "complete"
        keys = differing_runs(old, {"recipe": self.run.recipe.to_dict(), "store": str(self.run.store_dir)})
        if keys and (complete or self.begun):
            if complete:
                check_own(self.path, old)
            raise ConfigError(
                f"{self.path} holds a run of another recipe ({', '.join(keys)} differ); give another --output, undo the "
                "change, or start over with --fresh"
            )
        if not complete:
            return False
        written, now = old["recipe"].get("optim", {}).get("export", "last"), self.run.recipe.optim.export
        if written != now:
            if not self.begun:
                raise ConfigError(
                    f"optim.export must be {written} as it was, or {self.checkpoints} must hold the run's checkpoints, got {now} and "
                    "none; set it back, or start over with --fresh"
                )
            print(
                f"{self.path} was written with optim.export: {written}, now {now}: making the model again", flush=True
            )
            return False

        # The record alone is not enough: the model must be there. One that was edited on purpose can still be read.
        differing = damaged_files(self.path, model_files(old))
        if lost := [name for name in differing if not _is_readable(self.path / name)]:
            print(
                f"{self.path} was complete, but {', '.join(lost)} is gone or damaged: making the model again",
                flush=True,
            )
            return False
        if differing:
            print(
                f"{', '.join(differing)} in {self.path} is not what training wrote; if nobody changed it on purpose, delete it, "
                "and the same command makes it again",
                flush=True,
            )
        restore_metrics(self.path, old)
        return True

    def precision(self) -> str:
        """Returns `optim.precision`. Where that is "auto", a run that goes on keeps the arithmetic that it was begun with.

        On another device "auto" could mean something else.
        """
        name = self.run.recipe.optim.precision
        return self.read()["precision"] if name == "auto" and self.exists and self.begun else name

    def begin(self, precision: str) -> None:
        """Writes the record of a run that begins or goes on. The time that it has taken before stays counted."""
        old = self.read() if self.exists else {"prepared": False}
        self._write("running", precision=precision, seconds=old.get("seconds") or {}, **_prepared(old), **_peaks(old))

    def finish(self, model: Sequence[str], step: int, data: Mapping[str, str], memory: Mapping[str, int]) -> None:
        """Writes the record of a complete run.

        Args:
            model: the names of the fused model's files, whose weights are those after `step`.
            data: a hash of the rows of every split.
            memory: the most memory that this process has taken. One that completed the run before may have taken more.
        """
        record = self.read()
        names = [*model, *(name for name in MEASURED if (self.path / name).exists())]
        self._write(
            "complete",
            precision=record["precision"],
            seconds=record["seconds"],
            **_prepared(record),
            exported_step=step,
            data=dict(data),
            **{name: max(size, _peaks(record).get(name, 0)) for name, size in memory.items()},
            demo_data=demo_data(self.run.recipe),
            files={name: digest_of_file(self.path / name) for name in names},
        )

    def update(self, **facts: Any) -> None:
        """Sets some entries of the record."""
        write_run(self.path, self.read() | facts)

    @contextlib.contextmanager
    def timed(self, phase: str, write: bool = True) -> Generator[None]:
        """Adds the time that a phase takes to the record, even if the phase is interrupted.

        `write` must be true in one process only.
        """
        start = time.monotonic()
        try:
            yield
        finally:
            if write:
                seconds: dict[str, float] = self.read().get("seconds") or {}
                seconds[phase] = round(seconds.get(phase, 0) + time.monotonic() - start, 1)
                self.update(seconds=seconds)

    def _write(self, status: str, **facts: Any) -> None:
        """Writes the whole record anew."""
        record = {
            "status": status,
            "recipe": self.run.recipe.to_dict(),
            "store": str(self.run.store_dir),
            **environment(),
            **facts,
        }
        write_run(self.path, record)


def differing_runs(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns the keys of the recipe that make two runs different ones. Both come as dicts with `recipe` and `store`.

    A key that there was not yet when a run was begun has its default.
    """
    recipes = [old["recipe"], new["recipe"]]
    if differing_keys(*recipes):
        recipes = [_with_defaults(recipe) for recipe in recipes]
    keys = [key for key in deciding_keys(*recipes) if key not in ("output", "store")]
    return keys if Path(old["store"]).resolve() == Path(new["store"]).resolve() else [*keys, "store"]


def _with_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe as it would be recorded now. One with keys or values that there are no longer stays as it is."""
    with contextlib.suppress(ConfigError):
        return load_recipe(recipe).to_dict()
    return recipe


def _prepared(record: dict[str, Any]) -> dict[str, Any]:
    """Returns what a record says of whether its run made any of its store. One that is older says nothing."""
    return {key: value for key, value in record.items() if key == "prepared"}


def _peaks(record: dict[str, Any]) -> dict[str, int]:
    """Returns the most memory that a process took which completed the run before."""
    return {name: record[name] for name in PEAKS if name in record}


def _is_readable(path: Path) -> bool:
    """Whether a file of a model can be read at all. Weights must have all that their header says, and JSON must be JSON."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy"):
                return True
        content = path.read_bytes()
        return path.suffix != ".json" or isinstance(parsed(content), dict)
    except (OSError, ValueError, SafetensorError):
        return False


def demo_data(recipe: Recipe) -> dict[str, Any] | None:
    """Returns the record of how the bundled demo's fusion data were made, flaws included; None for other data."""
    location = recipe.data.location("train")
    if location is None or location.paths != ["demo:fusion.jsonl"]:
        return None
    return read_json(Path(resolve("demo:demo_data.json")))
