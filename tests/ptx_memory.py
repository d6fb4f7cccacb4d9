"""The memory that the threads of a launch share, which remembers who has touched what."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np
import torch
from ptx_program import Fault

NOBODY, MANY = -1, -2


@dataclass
class Block:
    """Some memory, and which warp has read and written each byte of it since the launch began, or since the last barrier."""

    what: str
    begin: int
    bytes: np.ndarray
    readers: np.ndarray = field(init=False)
    writers: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.readers, self.writers = (np.full(len(self.bytes), NOBODY, np.int64) for _ in range(2))

    def forget(self) -> None:
        """All warps have met: what was touched before no longer counts."""
        self.readers.fill(NOBODY)
        self.writers.fill(NOBODY)

    def load(self, addresses: np.ndarray, size: int, warps: np.ndarray) -> np.ndarray:
        """Returns the bytes (threads, size) at some addresses."""
        at, warps = self.places(addresses, size), warps[:, None]
        writers, readers = self.writers[at], self.readers[at]
        if ((writers != NOBODY) & (writers != warps)).any():
            raise Fault(f"{self.what} is read that another warp has written, and nothing is between them")
        self.readers[at] = np.where((readers == NOBODY) | (readers == warps), warps, MANY)
        by_several = self.readers[at] != warps  # at a time, of which the last one stands there
        self.readers[at[by_several]] = MANY
        return self.bytes[at]

    def store(self, addresses: np.ndarray, values: np.ndarray, warps: np.ndarray) -> None:
        """Writes bytes (threads, size). Several threads may write the same to one address."""
        at, warps = self.places(addresses, values.shape[1]), warps[:, None]
        writers, readers = self.writers[at], self.readers[at]
        rewritten = (writers != NOBODY) & (writers != warps) & (self.bytes[at] != values)
        read = (readers != NOBODY) & (readers != warps)
        self.bytes[at] = values
        if rewritten.any() or read.any() or (self.bytes[at] != values).any():
            raise Fault(f"{self.what} is written that another warp touches, and nothing is between them")
        self.writers[at] = warps

    def places(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """The numbers (threads, size) of the bytes that stand at some addresses."""
        return (addresses.astype(np.int64) - self.begin)[:, None] + np.arange(size)


def tensor_block(number: int, tensor: torch.Tensor) -> Block:
    """The memory of a tensor, and of all others that are views of the same."""
    storage = tensor.untyped_storage()
    size, begin = storage.nbytes(), storage.data_ptr()
    content = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(begin))
    return Block(f"tensor {number} of the launch", begin, content)
