"""Shows the progress of long work, with tokens per second and the time left.

On a terminal it is a tqdm bar, anywhere else a line every few seconds.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Generator

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15

_is_silent = False


@contextlib.contextmanager
def silenced() -> Generator[None]:
    """Keeps this process from printing and from showing progress, where another one of the same command does. Errors are still said."""
    global _is_silent
    before, _is_silent = _is_silent, True
    try:
        with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stdout(nothing):
            yield
    finally:
        _is_silent = before


def in_words(seconds: float) -> str:
    """Formats a duration as `40 s`, `6 min` or `3 h`. An estimate is not worth more digits."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"


def silent(n: int = 1, *, tokens: int = 0) -> None:
    """Does nothing. It is passed in place of `Progress.update` where no progress is shown."""


class Progress:
    """The progress of one piece of work. It is used as a context manager.

    Args:
        label: what is being done. total: how much there is to do, in units called `unit`.
        show: whether anything is shown at all. initial: how much was done before, by a run that was interrupted.
        brief: whether nothing is shown unless the work takes long. This is for a part of other work with its own progress.
        cost: how much the first n units cost together, in any measure, where some take longer than others.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str = "it",
        show: bool = True,
        initial: int = 0,
        brief: bool = False,
        cost: Callable[[int], float] = float,
    ):
        self.label, self.total, self.unit, self.brief, self.cost = label, total, unit, brief, cost
        self.show, self.done, self.initial = show and total > 0 and not _is_silent, initial, initial
        self.note = ""
        self.tokens = 0
        self.bar: tqdm | None = None

    def __enter__(self) -> Progress:
        self.start = self.last = time.monotonic()
        if self.show and sys.stderr.isatty():
            self.bar = tqdm(total=self.total, initial=self.initial, desc=self.label, unit=self.unit, leave=False)
        return self

    def update(self, n: int = 1, *, tokens: int = 0, note: str = "") -> None:
        """Says that `n` more units are done, and how many tokens were computed for them.

        `note` is shown with the progress, for instance the loss. It stays until there is another one.
        """
        self.done += n
        self.tokens += tokens
        self.note = note or self.note
        if self.bar is not None:
            self.bar.set_postfix_str(", ".join(self._facts()), refresh=False)
            self.bar.update(n)
        elif self.done < self.total and time.monotonic() - self.last >= SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            self._line(going_on=True)

    def __exit__(self, kind, *_) -> None:
        if self.bar is not None:
            self.bar.close()
        if kind is None and not (self.brief and time.monotonic() - self.start < SECONDS_BETWEEN_LINES):
            self._line()

    def _facts(self) -> list[str]:
        """Returns the tokens per second and the note, as far as there are any."""
        seconds = time.monotonic() - self.start
        rate = f"{self.tokens / seconds:,.0f} tokens/s" if self.tokens and seconds else ""
        return [fact for fact in (rate, self.note) if fact]

    def _line(self, *, going_on: bool = False) -> None:
        """Prints a line with what is done, the other facts, and the time left if the work is `going_on`."""
        if not self.show:
            return
        seconds = time.monotonic() - self.start
        now = self.cost(self.done) - self.cost(self.initial)
        left = self.cost(self.total) - self.cost(self.done)
        left = [f"{seconds / now * left:.0f} s left"] if now and going_on else []
        facts = ", ".join([f"{self.done}/{self.total} {self.unit} in {seconds:.0f} s", *left, *self._facts()])
        print(f"{self.label}: {facts}", flush=True)
