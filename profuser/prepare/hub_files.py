"""Files of data sets on the Hub: which there are, and what stands in them.

The library `huggingface_hub` tries each request again, up to five times. What then still fails ends in an error of one line.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from profuser.errors import DataError, first_line

ON_HUB = "hf://"
"""How the library `datasets` begins the place of a file on the Hub."""


def file_system() -> Any:
    """Returns the Hub as a file system, the one that the library `datasets` has used, so that what it has listed is known already."""
    import datasets.config
    from huggingface_hub import HfFileSystem

    return HfFileSystem(endpoint=datasets.config.HF_ENDPOINT, token=None)


def files_below(place: str) -> list[str]:
    """Returns all files of a data set by their paths in it. `place` is hf://datasets/… and may name a revision."""
    hub = file_system()
    return [hub.resolve_path(file).path_in_repo for file in hub.find(place)]


def content(place: str, file: str) -> bytes:
    """Returns a small file of a data set, such as its README. It is kept here."""
    from huggingface_hub import hf_hub_download

    found = file_system().resolve_path(place)
    return Path(hf_hub_download(found.repo_id, file, repo_type=found.repo_type, revision=found.revision)).read_bytes()


def here_or_there(files: Sequence[str]) -> list[str]:
    """Returns where some files of the Hub are read: here, if they have been downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    hub, found = file_system(), []
    for file in files:
        place = hub.resolve_path(file)
        here = try_to_load_from_cache(
            place.repo_id, place.path_in_repo, revision=place.revision, repo_type=place.repo_type
        )
        found.append(here if isinstance(here, str) else file)
    return found


class FileOnHub(io.RawIOBase):
    """An open file on the Hub, of which a block at a time is fetched. `name` is what messages call it.

    Raises:
        DataError: the Hub does not send what is read, or sends less than the size that it says.
    """

    def __init__(self, url: str, name: str):
        self._name = name
        self._file: Any = None
        with self._reaching():
            self._file = file_system().open(url, "rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int | None = -1) -> bytes:
        left = self._file.size - self._file.tell()
        wanted, got = left if size is None or size < 0 else min(size, left), b""
        with self._reaching():
            while len(got) < wanted:
                if not (more := self._file.read(wanted - len(got))):
                    raise EOFError(f"nothing came from byte {self._file.tell()} on, of {self._file.size}")
                got += more
        return got

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()

    @contextlib.contextmanager
    def _reaching(self) -> Generator[None]:
        try:
            yield
        except Exception as error:  # the libraries below raise their own kinds
            raise DataError(
                f"data {self._name} cannot be read on the Hub ({first_line(error)}); run again when the Hub answers, or leave "
                "data.limit out to download it"
            ) from None
