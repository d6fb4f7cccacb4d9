"""The memory that a process owns, while files are mapped and blocks come and go."""

import mmap
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from profuser.environment import peak_memory
from profuser.owned_memory import EVERY_SECONDS, STATUS, OwnedMemory

MIB = 1 << 20
LINUX = pytest.mark.skipif(not STATUS.exists(), reason="/proc tells it")


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
        time.sleep(4 * EVERY_SECONDS)
        del block
        assert 90 * MIB < peak_of(memory) - begun < 120 * MIB
    found = peak_memory(memory)
    assert found["peak_owned_bytes"] == memory.peak
    assert found["peak_rss_bytes"] >= peak_of(memory)


BETWEEN = """
from profuser.owned_memory import OwnedMemory
memory = OwnedMemory()  # which nobody looks at but for its `peak`
before = memory.peak
assert len(b"x" * (300 << 20)) == 300 << 20
print((memory.peak - before) >> 20)
"""


@LINUX
def test_a_block_that_comes_and_goes_between_two_looks_counts(tmp_path):
    """A library that writes a file may keep Python waiting while it holds a copy of everything."""
    command = [sys.executable, "-c", BETWEEN]
    assert 290 <= int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) <= 310


@LINUX
def test_nothing_is_watched_after_the_block():
    with OwnedMemory() as memory:
        pass
    before = peak_of(memory)
    block = np.ones(100 * MIB, np.uint8)
    time.sleep(3 * EVERY_SECONDS)
    del block
    assert peak_of(memory) == before


def test_without_proc_it_is_all_that_the_system_remembers(monkeypatch):
    monkeypatch.setattr("profuser.owned_memory.STATUS", Path("/nowhere"))
    with OwnedMemory() as memory:
        assert memory.peak is None
    found = peak_memory(memory)
    assert found["peak_owned_bytes"] == found["peak_rss_bytes"] > 0


def test_a_process_ends_while_it_is_watched():
    watched = "from profuser.owned_memory import OwnedMemory\nOwnedMemory().__enter__()"
    assert subprocess.run([sys.executable, "-c", watched], timeout=60).returncode == 0
