"""The directory of a run and its record, run.json.

The record says with which recipe and store the run was made, whether it is complete, and how long each phase took. Beside it
lie checkpoints/, metrics.jsonl and, when the run is complete, the fused model with its scores and its report.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from profuser.environment import environment
from profuser.errors import ConfigError, DataError
from profuser.recipe.compare import deciding_keys
from profuser.recipe.parse import Run
from profuser.recipe.places import BUNDLED_PREFIX, resolve
from profuser.recipe.schema import Recipe
from profuser.stopping import working
from profuser.store.files import read_json, write_json
from profuser.store.lease import FOLDER, hold

SCHEMA_VERSION = 2


class RunDirectory:
    """The directory of one run. Opening it changes nothing on the disk."""

    def __init__(self, run: Run):
        self.run, self.path = run, run.output_dir
        self.checkpoints = self.path / "checkpoints"

    def read(self) -> dict[str, Any]:
        """Returns the content of run.json. It raises what `read_record` raises."""
        return read_record(self.path)

    @property
    def exists(self) -> bool:
        """Whether the directory holds a run."""
        return (self.path / "run.json").exists()

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint. From then on the recipe may no longer change."""
        return any(self.checkpoints.glob("step-*"))

    @contextlib.contextmanager
    def held(self) -> Generator[None]:
        """Holds the directory until the end of a `with` block, so that no two processes train the same run.

        Raises:
            ConfigError: another process trains another recipe there.
            DataError: the directory holds something else than a run.
        """
        self._check_place()
        own = {"recipe": self.run.recipe.to_dict(), "store": str(self.run.store_dir.resolve())}
        with working(), hold(self.path, "run", own, differing_runs, writes=True):
            yield

    def _check_place(self) -> None:
        """Raises DataError if the directory holds something else than a run or leases."""
        if not self.exists and self.path.exists() and any(path.name != FOLDER for path in self.path.iterdir()):
            raise DataError(
                f"output must be a run directory or empty, got {self.path} without run.json; give another --output"
            )

    def complete(self) -> bool:
        """Whether the run is complete already.

        Raises:
            ConfigError: the directory holds a run of another recipe, or of another store.
            DataError: the directory holds something else, or a run of another schema.
        """
        self._check_place()
        if not self.exists:
            return False

        # A run that has saved anything must be of this recipe, apart from keys that do not change the outcome.
        old = self.read()
        complete = old["status"] == "complete"
        keys = differing_runs(old, {"recipe": self.run.recipe.to_dict(), "store": str(self.run.store_dir)})
        if keys and (complete or self.begun):
            raise ConfigError(
                f"{self.path} holds a run of another recipe ({', '.join(keys)} differ); give another --output, undo the "
                "change, or start over with --fresh"
            )

        # The record alone is not enough: the model must be there.
        if complete and not any(self.path.glob("*.safetensors")):
            print(f"{self.path} was complete, but its model is gone: making it again", flush=True)
            return False
        return complete

    def precision(self) -> str:
        """Returns `optim.precision`. Where that is "auto", a run that goes on keeps the arithmetic that it was begun with.

        On another device "auto" could mean something else.
        """
        name = self.run.recipe.optim.precision
        return self.read()["precision"] if name == "auto" and self.exists and self.begun else name

    def begin(self, precision: str) -> None:
        """Writes the record of a run that begins or goes on. The time that it has taken before stays counted."""
        seconds = (self.read().get("seconds") or {}) if self.exists else {}
        self._write("running", precision=precision, seconds=seconds)

    def finish(self) -> None:
        """Writes the record of a complete run."""
        record = self.read()
        self._write(
            "complete",
            precision=record["precision"],
            seconds=record["seconds"],
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            demo_data=demo_data(self.run.recipe),
        )

    def update(self, **facts: Any) -> None:
        """Sets some entries of the record."""
        write_json(self.path / "run.json", self.read() | facts)

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
            "schema": SCHEMA_VERSION,
            "status": status,
            "recipe": self.run.recipe.to_dict(),
            "store": str(self.run.store_dir),
            **environment(),
            **facts,
        }
        write_json(self.path / "run.json", record)


def differing_runs(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns the keys of the recipe that make two runs different ones. Both come as dicts with `recipe` and `store`."""
    keys = [key for key in deciding_keys(old["recipe"], new["recipe"]) if key not in ("output", "store")]
    return keys if Path(old["store"]).resolve() == Path(new["store"]).resolve() else [*keys, "store"]


def read_record(directory: Path) -> dict[str, Any]:
    """Reads the run.json of a run directory.

    Raises:
        DataError: the file is missing, broken or of another schema.
    """
    fix = (
        "give the directory of a run, restore it, or start over with `python -m profuser.train --fresh` and its recipe"
    )
    record = read_json(directory / "run.json", "status", "recipe", "store", fix=fix)
    if (schema := record.get("schema", 1)) != SCHEMA_VERSION:
        raise DataError(
            f"run {directory} has schema {schema}, this version reads {SCHEMA_VERSION}; train it again with "
            "`python -m profuser.train --fresh` and its recipe"
        )
    return record


def demo_data(recipe: Recipe) -> dict[str, Any] | None:
    """Returns the record of how the bundled demo's data were made, flaws included; None for other data."""
    location = recipe.data.location("train")
    if location is None or not location.path.startswith(BUNDLED_PREFIX):
        return None
    return read_json(Path(resolve("demo:demo_data.json")))
