"""Gives memory back to the system as soon as a tensor is freed, where activations are computed again in order to save memory.

The C library keeps what was freed in blocks of less than 32 MiB for later use. A tensor begins at a multiple of 64 bytes, and for such a
request glibc before 2.38 often passes over a freed block of just the right size. So each layer that is computed again takes new memory,
and a process on a CPU grows to several times of what its tensors take at any moment. Blocks that were mapped one by one return at once;
in exchange the system has to clear each new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Generator

MMAP_THRESHOLD = -3
"""The number of glibc's setting of the size from which on a block is mapped by itself (M_MMAP_THRESHOLD)."""
VARIABLE = "MALLOC_MMAP_THRESHOLD_"
"""Where a user says the same. What it says stands."""
RETURNED, USUAL = 256 << 10, 32 << 20
"""Such blocks are returned meanwhile, and after it. USUAL is what glibc itself arrives at in a process that frees large blocks."""


@contextlib.contextmanager
def returns_freed_memory(asked: bool) -> Generator[None]:
    """Lets freed tensors return to the system in a `with` block, if `asked` and if the C library is glibc."""
    mallopt = None
    if asked and os.name == "posix" and VARIABLE not in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(MMAP_THRESHOLD, RETURNED)
    try:
        yield
    finally:
        mallopt(MMAP_THRESHOLD, USUAL)
