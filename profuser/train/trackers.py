"""Shows a training in tensorboard, trackio or wandb as well, through accelerate's classes for them.

What the project itself reads is metrics.jsonl. A tracker shows the same to people while the run goes on, so that trouble with one,
such as a network that fails, ends nothing but its own view.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from profuser.errors import ConfigError, first_line

PROJECT = "profuser"
"""The project under which trackio and wandb list the runs."""
MODULES = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb"}
"""The module that each tracker needs. Its package, and the extra that installs it, have the tracker's name."""
LOGIN_SECONDS = 60
"""How long wandb waits at a terminal for somebody to log in, before a run goes on without it."""

Value = bool | int | float | str


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError unless the package of each tracker can be imported."""
    for name in names:
        try:
            importlib.import_module(MODULES[name])
        except Exception as error:  # a package that does not fit the others may raise anything
            raise ConfigError(
                f"optim.trackers: {name} needs the package {name}, which cannot be imported ({first_line(error)}); run "
                f"`pip install 'profuser[{name}]'`, or take it out of the list"
            ) from error


class Trackers:
    """The trackers of one run. Whatever a tracker raises is said once, and the others and the training go on.

    Args:
        names: those of optim.trackers; none on all processes but the main one.
        directory: the run directory. settings: the recipe as nested plain values.
    """

    def __init__(self, names: Sequence[str], directory: Path, settings: Mapping[str, Any]):
        self.names, self.directory, self.settings = names, directory, settings
        self._open: dict[str, GeneralTracker] = {}

    def start(self, step: int) -> None:
        """Opens the trackers for a training of which `step` steps are done."""
        for name in self.names:
            with self._without_harm(name):
                tracker = self._made(name, step)
                tracker.start()
                self._open[name] = tracker
                if step == 0 or name != "tensorboard":  # whose folder has the settings already
                    tracker.store_init_configuration(dict(flat_settings(self.settings)))

    def _made(self, name: str, step: int) -> GeneralTracker:
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            # What was shown of steps that are done again now is hidden, so that no step stands twice.
            return kind("tensorboard", str(self.directory), purge_step=step + 1 if step else 0)
        # The others get a run for every start, in one group.
        run = self.directory.resolve().name
        options: dict[str, Any] = {"name": f"{run} from step {step}" if step else run, "group": run}
        if name == "wandb":
            options |= {"dir": str(self.directory), "settings": {"login_timeout": LOGIN_SECONDS}}
        return kind(PROJECT, **options)

    def log(self, line: Mapping[str, Any]) -> None:
        """Shows a line of metrics.jsonl."""
        values = dict(flat_line(line))
        for name, tracker in list(self._open.items()):
            with self._without_harm(name):
                tracker.log(values, step=line["step"])

    def close(self) -> None:
        """Ends the view of this run. wandb waits here until all has been sent."""
        for name, tracker in list(self._open.items()):
            with self._without_harm(name):
                tracker.finish()
        self._open.clear()

    @contextlib.contextmanager
    def _without_harm(self, name: str) -> Generator[None]:
        try:
            yield
        except Exception as error:  # any kind of trouble in a library that only shows something
            self._open.pop(name, None)
            print(
                f"tracker {name} failed ({first_line(error)}): going on without it, metrics.jsonl has all that it shows",
                flush=True,
            )


def flat_line(line: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    """Yields the values of a line of metrics.jsonl by names such as stage1/loss and stage1/eval/ce."""
    for key, value in line.items():
        if key in ("step", "stage"):
            continue
        inner = {f"{key}/{name}": x for name, x in value.items()} if isinstance(value, Mapping) else {key: value}
        yield from ((f"stage{line['stage'] + 1}/{name}", x) for name, x in inner.items() if x is not None)


def flat_settings(value: Any, place: str = "") -> Iterator[tuple[str, Value]]:
    """Yields a recipe's settings by their places, such as optim.lr and sources[0].name; those that are null are left out."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat_settings(inner, f"{place}.{key}" if place else key)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from flat_settings(inner, f"{place}[{number}]")
    elif value is not None:
        yield place, value
