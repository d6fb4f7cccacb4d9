"""Progress of long work: a tqdm bar on a terminal, a line every few seconds otherwise."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15


class Progress:
    """Use as a context manager; `update(n)` may carry a note such as a loss. `initial` was done before, by a resumed run."""

    def __init__(self, label: str, total: int, unit: str = "it", show: bool = True, initial: int = 0):
        self.label, self.total, self.unit = label, total, unit
        self.show, self.done, self.initial = show and total > 0, initial, initial
        self.note = ""

    def __enter__(self) -> Progress:
        self.start = self.last = time.monotonic()
        self.bar = (
            tqdm(total=self.total, initial=self.initial, desc=self.label, unit=self.unit, leave=False)
            if self.show and sys.stderr.isatty()
            else None
        )
        return self

    def update(self, n: int = 1, note: str = "") -> None:
        self.done += n
        self.note = note or self.note
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(n)
        elif time.monotonic() - self.last >= SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            self._line()

    def __exit__(self, kind, *_) -> None:
        if self.bar is not None:
            self.bar.close()
        if kind is None:
            self._line()

    def _line(self) -> None:
        if not self.show:
            return
        seconds = time.monotonic() - self.start
        now = self.done - self.initial
        left = seconds / now * (self.total - self.done) if now else 0
        tail = f", {left:.0f} s left" if self.done < self.total else ""
        note = f", {self.note}" if self.note else ""
        print(f"{self.label}: {self.done}/{self.total} {self.unit} in {seconds:.0f} s{tail}{note}", flush=True)
