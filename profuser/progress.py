"""Progress of long work: a tqdm bar on a terminal, a line every few seconds otherwise; each with tokens/s and the time left."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15


def in_words(seconds: float) -> str:
    """`40 s`, `6 min`, `3 h`: no more digits than the estimate is worth."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"


def silent(n: int = 1, *, tokens: int = 0) -> None:
    """In place of a Progress's `update`, where nobody looks."""


class Progress:
    """Use as a context manager.

    Args:
        label: what is being done; total: how much of it, in `unit`; initial: what an interrupted run had done.
        brief: a part of something that shows its own progress: says nothing unless it takes long.
    """

    def __init__(
        self, label: str, total: int, unit: str = "it", show: bool = True, initial: int = 0, brief: bool = False
    ):
        self.label, self.total, self.unit, self.brief = label, total, unit, brief
        self.show, self.done, self.initial = show and total > 0, initial, initial
        self.note = ""
        self.tokens = 0
        self.bar: tqdm | None = None

    def __enter__(self) -> Progress:
        self.start = self.last = time.monotonic()
        if self.show and sys.stderr.isatty():
            self.bar = tqdm(total=self.total, initial=self.initial, desc=self.label, unit=self.unit, leave=False)
        return self

    def update(self, n: int = 1, *, tokens: int = 0, note: str = "") -> None:
        """`n` more are done, in which `tokens` were computed; the note, such as a loss, stays until the next one."""
        self.done += n
        self.tokens += tokens
        self.note = note or self.note
        if self.bar is not None:
            self.bar.set_postfix_str(", ".join(self._facts()), refresh=False)
            self.bar.update(n)
        elif self.done < self.total and time.monotonic() - self.last >= SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            self._line()

    def __exit__(self, kind, *_) -> None:
        if self.bar is not None:
            self.bar.close()
        if kind is None and not (self.brief and time.monotonic() - self.start < SECONDS_BETWEEN_LINES):
            self._line()

    def _facts(self) -> list[str]:
        seconds = time.monotonic() - self.start
        rate = f"{self.tokens / seconds:,.0f} tokens/s" if self.tokens and seconds else ""
        return [fact for fact in (rate, self.note) if fact]

    def _line(self) -> None:
        if not self.show:
            return
        seconds = time.monotonic() - self.start
        now = self.done - self.initial
        left = [f"{seconds / now * (self.total - self.done):.0f} s left"] if now and self.done < self.total else []
        facts = ", ".join([f"{self.done}/{self.total} {self.unit} in {seconds:.0f} s", *left, *self._facts()])
        print(f"{self.label}: {facts}", flush=True)
