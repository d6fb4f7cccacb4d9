"""A list whose items lie on the disk, for what there is one of for every example of a run."""

from __future__ import annotations

import os
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

import numpy as np

T = TypeVar("T")


class DiskList(Sequence[T], Generic[T]):
    """Items of any kind in a file without a name, which is gone when the list is. In memory, an item takes the 8 bytes of its place.

    An item is read each time that it is asked for, so that changing it changes nothing in the list. A process that is forked has the
    list as well. The file is where temporary files are (`TMPDIR`).

    Args:
        items: what is to be in it, taken one after the other.
    Raises:
        OSError: the disk is full.
    """

    def __init__(self, items: Iterable[T] = ()):
        self._file = tempfile.TemporaryFile(prefix="profuser-")  # noqa: SIM115  # it is open as long as the list is there
        self._ends = array("q", [0])  # item n lies between the n-th and the next
        self._order: np.ndarray | None = None
        self.extend(items)

    def extend(self, items: Iterable[T]) -> None:
        """Adds items at the end."""
        assert self._order is None, "a list that was put in order does not grow"
        for item in items:
            self._write(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
        self._write()

    def _write(self, item: bytes | None = None) -> None:
        """Adds a pickled item; None puts what was added into the file."""
        try:
            if item is None:
                self._file.flush()
            else:
                self._ends.append(self._ends[-1] + self._file.write(item))
        except OSError as error:  # the file has no name that could be told
            raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from None

    def in_order(self, places: np.ndarray) -> DiskList[T]:
        """Returns a list of the same items, whose n-th is the one that has the place `places[n]` here."""
        assert len(places) == len(self), (len(places), len(self))
        assert self._order is None
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__ | {"_order": np.asarray(places, np.int64)}
        return other

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        n = range(len(self))[index]
        n = n if self._order is None else int(self._order[n])
        start, end = self._ends[n : n + 2]
        return pickle.loads(os.pread(self._file.fileno(), end - start, start))

    def __iter__(self) -> Iterator[T]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: Any) -> bool:
        """Whether another sequence has the same items."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # as of a list
