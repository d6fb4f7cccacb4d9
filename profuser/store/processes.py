"""Tells processes apart, on this machine and on others that see the same files."""

from __future__ import annotations

import functools
import hashlib
import os
import socket
from pathlib import Path


@functools.cache
def boot() -> str:
    """Returns the id of this boot of the kernel, which all its containers have in common; elsewhere than on Linux the host."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


@functools.cache
def place() -> str:
    """Returns eight hexadecimal digits for where a process id is that of one process alone.

    That is a machine or, on Linux, one of its containers: two of them may both have a process 1.
    """
    try:
        numbering = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbering = ""
    return hashlib.sha256(f"{boot()} {numbering}".encode()).hexdigest()[:8]


def is_running(process: int) -> bool:
    """Whether there is a process with this id here."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True
