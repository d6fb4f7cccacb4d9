"""What is known already of a shard that is not complete: results that came one by one, and are expensive to ask for again.

They stand in a file of the store's folder `unfinished`, one sealed line each, until the shard is written. A line that was not
written to its end, or is no longer what was written, counts for nothing.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from profuser.store.files import writing
from profuser.store.layout import Kind
from profuser.store.sealed import sealed, unsealed
from profuser.typed import parsed

FOLDER = "unfinished"


class Unfinished:
    """The results that are there of one shard. It is used as a context manager, and its file is removed where that ends well.

    Args:
        directory: the store's. kind, number: the shard.
        made_with: by what the results are made, in a few words; those that were made by other means do not count.
    Attributes:
        results: by the place in the shard, which is a list of numbers.
    """

    def __init__(self, directory: Path, kind: Kind, number: int, made_with: str):
        self.path = directory / FOLDER / f"{kind.shard(number).replace('/', '-')}.jsonl"
        self.made_with = made_with
        self.results: dict[tuple[int, ...], Any] = {}
        self._file: BinaryIO | None = None

    def __enter__(self) -> Unfinished:
        self._data = self.path.read_bytes() if self.path.exists() else b""
        for line in self._data.split(b"\n")[:-1]:
            with contextlib.suppress(ValueError):
                entry = unsealed(parsed(line), {"place": [int], "result": Any, "made_with": str})
                if entry["made_with"] == self.made_with:
                    self.results[tuple(entry["place"])] = entry["result"]
        return self

    def add(self, place: tuple[int, ...], result: Any) -> None:
        """Keeps a result, which must be JSON."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab")  # noqa: SIM115  # it is closed by __exit__
            self._file.truncate(self._data.rfind(b"\n") + 1)
        row = sealed({"place": list(place), "result": result, "made_with": self.made_with})
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        with writing(self.path, len(line)):
            self._file.write(line)
            self._file.flush()
        self.results[place] = result

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None:
            self.path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # there is none, or others are still in it
                self.path.parent.rmdir()
