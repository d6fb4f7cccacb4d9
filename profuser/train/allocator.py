"""Lets a process on a CPU return blocks of memory to the system as soon as they are freed, while it trains an adapter.

The C library (glibc) asks the system for a block of its own where a block is larger than a threshold, and returns it when it is freed.
Left to itself it raises that threshold, up to 32 MiB, whenever such a block is freed. What is smaller then stays with the process, in
pieces that the next tensors do not always fit into. A step of an adapter frees a tensor in each layer between two that it keeps: that of
SmolLM2-135M held 2.9 GiB, of which it used 1.2. Where blocks are returned it takes about 7 % longer, because the system clears a block
each time, and other work of many small tensors far longer; so it is done for an adapter alone, which is chosen to save memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Generator

RETURNED, KEPT = 1 << 20, 32 << 20
"""The bytes from which on a block is returned: in the `with` block, and after it, which is as far as glibc raises it by itself."""

M_MMAP_THRESHOLD = -3
"""The number by which mallopt(3) calls the threshold."""


@contextlib.contextmanager
def freed_blocks_returned(asked: bool) -> Generator[None]:
    """Returns freed blocks of RETURNED bytes and more to the system in a `with` block, if `asked`.

    Nothing is set where the environment says how the C library allocates, nor where that is another than glibc.
    """
    chosen = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or chosen or not asked:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, RETURNED)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, KEPT)
