"""Watches how much memory a process owns, because Linux remembers only the most that it had together with mapped files."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from types import TracebackType

STATUS = Path("/proc/self/status")
EVERY_SECONDS = 0.05


def resident() -> dict[str, int] | None:
    """Returns the bytes of this process's memory by kind: RssAnon, which no file has and which is not shared, RssFile and RssShmem, and
    VmHWM, the most that all of them have been together. It is None where /proc is missing."""
    if not STATUS.exists():
        return None
    found = re.findall(
        r"^(VmHWM|RssAnon|RssFile|RssShmem):\s+(\d+) kB",
        STATUS.read_text(encoding="utf-8", errors="replace"),
        re.MULTILINE,
    )
    return {kind: 1024 * int(size) for kind, size in found}


class OwnedMemory:
    """The most memory that this process has owned in a `with` block, looked at twenty times a second.

    Where there was a new peak since the last look, it counts without the mapped files that are there now. Memory that comes and goes
    between two looks is seen in this way, too, also while a library keeps Python waiting.
    """

    def __init__(self) -> None:
        self._peak, self._highest = 0, (resident() or {}).get("VmHWM", 0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="owned memory", daemon=True)

    def __enter__(self) -> OwnedMemory:
        if resident() is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._look()
        self._ended.set()

    @property
    def peak(self) -> int | None:
        """The most that was seen, in bytes; None where it cannot be seen."""
        if not self._ended.is_set():
            self._look()
        return self._peak or None

    def _look(self) -> None:
        if (now := resident()) is None:
            return
        owned = now["RssAnon"]
        if now["VmHWM"] > self._highest:
            self._highest = now["VmHWM"]
            owned = max(owned, self._highest - now["RssFile"] - now["RssShmem"])
        self._peak = max(self._peak, owned)

    def _watch(self) -> None:
        while not self._ended.wait(EVERY_SECONDS):
            self._look()
