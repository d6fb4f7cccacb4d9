"""The memory that a process owns, while files are mapped and blocks come and go."""

import mmap
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from profuser.environment import peak_memory
from profuser.owned_memory import EVERY_SECONDS, STATM, OwnedMemory, owned_memory

MIB = 1 << 20
LINUX = pytest.mark.skipif(not STATM.exists(), reason="/proc tells it")


def peak_of(memory: OwnedMemory) -> int:
    assert memory.peak is not None
    return memory.peak


@LINUX
def test_what_was_freed_counts_and_a_file_that_was_mapped_does_not(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(bytes(200 * MIB))
    with OwnedMemory() as memory:
        begun = peak_of(memory)
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert mapped[:: mmap.PAGESIZE].count(0) == 200 * MIB // mmap.PAGESIZE
        assert peak_of(memory) - begun < 20 * MIB
        block = np.ones(100 * MIB, np.uint8)
        time.sleep(5 * EVERY_SECONDS)
        del block
        assert 90 * MIB < peak_of(memory) - begun < 120 * MIB
    found = peak_memory(memory)
    assert found["peak_owned_bytes"] == memory.peak
    assert found["peak_rss_bytes"] >= peak_of(memory)


@LINUX
def test_nothing_is_watched_after_the_block():
    with OwnedMemory() as memory:
        before = peak_of(memory)
    time.sleep(3 * EVERY_SECONDS)
    block = np.ones(100 * MIB, np.uint8)
    time.sleep(3 * EVERY_SECONDS)
    del block
    assert peak_of(memory) - before < 20 * MIB
    assert abs(peak_of(memory) - (owned_memory() or 0)) < 20 * MIB


def test_without_proc_it_is_all_that_the_system_remembers(monkeypatch):
    monkeypatch.setattr("profuser.owned_memory.STATM", Path("/nowhere"))
    with OwnedMemory() as memory:
        assert memory.peak is None
    found = peak_memory(memory)
    assert found["peak_owned_bytes"] == found["peak_rss_bytes"] > 0


def test_a_process_ends_while_it_is_watched():
    watched = "from profuser.owned_memory import OwnedMemory\nOwnedMemory().__enter__()"
    assert subprocess.run([sys.executable, "-c", watched], timeout=60).returncode == 0
