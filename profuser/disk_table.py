"""A table whose items lie on the disk, for what a user gives beside the data: each under the texts that it belongs to."""

from __future__ import annotations

import hashlib
from array import array
from typing import Generic, TypeVar

from profuser.disk_list import DiskList

T = TypeVar("T")


def key_of(*texts: str) -> bytes:
    """What stands for some texts in a table: 16 bytes, which no two of them share in practice, however long they are."""
    return hashlib.blake2b(repr(texts).encode(), digest_size=16).digest()


class DiskTable(Generic[T]):
    """Items of any kind, several under one key. In memory a key takes about 200 bytes, and an item the 8 of its place.

    An item is read each time that it is asked for, so that changing it changes nothing in the table.
    """

    def __init__(self) -> None:
        self._items: DiskList[T] = DiskList()
        self._places: dict[bytes, array[int]] = {}

    def add(self, key: bytes, item: T) -> None:
        """Adds an item behind the others of its key. It raises what `DiskList` raises."""
        self._places.setdefault(key, array("q")).append(len(self._items))
        self._items.extend([item])

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __getitem__(self, key: bytes) -> list[T]:
        """The items of a key, in the order in which they were added; none of a key that is not there."""
        return [self._items[place] for place in self._places.get(key, ())]
