"""A run directory and its record, run.json: what the run is of, whether it is complete, how long each phase took.

Beside it lie checkpoints/, metrics.jsonl and, once complete, the fused model with its scores and report.
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
from profuser.store.files import read_json, set_aside, write_json

SCHEMA_VERSION = 2


class RunDirectory:
    """The directory of one run; opening it changes nothing."""

    def __init__(self, run: Run):
        self.run, self.path = run, run.output_dir
        self.checkpoints = self.path / "checkpoints"

    def read(self) -> dict[str, Any]:
        """run.json's content; raises as `read_record`."""
        return read_record(self.path)

    @property
    def exists(self) -> bool:
        return (self.path / "run.json").exists()

    @property
    def begun(self) -> bool:
        """Whether training has got as far as a checkpoint, which fixes the recipe."""
        return any(self.checkpoints.glob("step-*"))

    def set_aside(self) -> None:
        """Rename an old run out of the way, for --fresh."""
        if aside := set_aside(self.path):
            print(f"renamed {self.path} to {aside}", flush=True)

    def complete(self) -> bool:
        """Whether the run is complete already.

        Raises:
            ConfigError: the directory holds a run of another recipe.
            DataError: it holds something else, or a run of another schema.
        """
        if not self.exists:
            if self.path.exists() and any(self.path.iterdir()):
                raise DataError(
                    f"output must be a run directory or empty, got {self.path} without run.json; give another --output"
                )
            return False
        old = self.read()
        complete = old["status"] == "complete"
        keys = [
            key for key in deciding_keys(old["recipe"], self.run.recipe.to_dict()) if key not in ("output", "store")
        ]
        if Path(old["store"]).resolve() != self.run.store_dir.resolve():
            keys.append("store")
        if keys and (complete or self.begun):
            raise ConfigError(
                f"{self.path} holds a run of another recipe ({', '.join(keys)} differ); give another --output, undo the "
                "change, or start over with --fresh"
            )
        if complete and not any(self.path.glob("*.safetensors")):
            print(f"{self.path} was complete, its model is gone: made again", flush=True)
            return False
        return complete

    def precision(self) -> str:
        """`optim.precision`, or what a run that goes on was begun with: on another device "auto" would mean another one."""
        name = self.run.recipe.optim.precision
        return self.read()["precision"] if name == "auto" and self.exists and self.begun else name

    def begin(self, precision: str) -> None:
        """Write the record of a run that begins or goes on; what it took before stays counted."""
        seconds = (self.read().get("seconds") or {}) if self.exists else {}
        self._write("running", precision=precision, seconds=seconds)

    def finish(self) -> None:
        """Write the record of a complete run."""
        record = self.read()
        self._write(
            "complete",
            precision=record["precision"],
            seconds=record["seconds"],
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            demo_data=demo_data(self.run.recipe),
        )

    def update(self, **facts: Any) -> None:
        write_json(self.path / "run.json", self.read() | facts)

    @contextlib.contextmanager
    def timed(self, phase: str, write: bool = True) -> Generator[None]:
        """Add what a phase takes to the record's seconds, also when it is interrupted; `write` on one process only."""
        start = time.monotonic()
        try:
            yield
        finally:
            if write:
                seconds: dict[str, float] = self.read().get("seconds") or {}
                seconds[phase] = round(seconds.get(phase, 0) + time.monotonic() - start, 1)
                self.update(seconds=seconds)

    def _write(self, status: str, **facts: Any) -> None:
        record = {
            "schema": SCHEMA_VERSION,
            "status": status,
            "recipe": self.run.recipe.to_dict(),
            "store": str(self.run.store_dir),
            **environment(),
            **facts,
        }
        write_json(self.path / "run.json", record)


def read_record(directory: Path) -> dict[str, Any]:
    """The run.json of a run directory.

    Raises:
        DataError: there is none, it is broken, or of another schema.
    """
    record = read_json(directory / "run.json", "status", "recipe", "store")
    if (schema := record.get("schema", 1)) != SCHEMA_VERSION:
        raise DataError(
            f"run {directory} has schema {schema}, this version reads {SCHEMA_VERSION}; train it again with "
            "`python -m profuser.train --fresh` and its recipe"
        )
    return record


def demo_data(recipe: Recipe) -> dict[str, Any] | None:
    """How the bundled demo's data were made imperfect; None for other data."""
    if not recipe.data.train.startswith(BUNDLED_PREFIX):
        return None
    return read_json(Path(resolve("demo:demo_data.json")))
