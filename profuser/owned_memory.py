"""Watches how much memory a process owns, because Linux remembers only the most that it had together with mapped files."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

STATM = Path("/proc/self/statm")
EVERY_SECONDS = 0.02


def owned_memory() -> int | None:
    """Returns the bytes of memory that are this process's own: those of no file and not shared. It is None where /proc is missing."""
    if not STATM.exists():
        return None
    _, resident, shared, *_ = map(int, STATM.read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


class OwnedMemory:
    """The most memory that this process has owned in a `with` block, looked at fifty times a second."""

    def __init__(self) -> None:
        self._peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="owned memory", daemon=True)

    def __enter__(self) -> OwnedMemory:
        if owned_memory() is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    @property
    def peak(self) -> int | None:
        """The most that was seen so far, in bytes; None where it cannot be seen."""
        now = owned_memory()
        return None if now is None else max(self._peak, now)

    def _watch(self) -> None:
        while not self._ended.wait(EVERY_SECONDS):
            self._peak = max(self._peak, owned_memory() or 0)
