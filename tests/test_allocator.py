"""What a process frees while it trains an adapter goes back to the system; elsewhere the C library does as it does."""

import subprocess
import sys

import pytest

HELD = """
import ctypes, re
from pathlib import Path
import numpy as np
from profuser.train.allocator import freed_blocks_returned

def owned():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

for asked in (False, True):
    np.ones(31 << 20, np.uint8)  # freed: glibc's threshold rises to its size
    with freed_blocks_returned(asked):
        blocks = [np.ones(2 << 20, np.uint8) for _ in range(100)]
        full = owned()
        del blocks[:-1]  # the last one keeps what lies before it in the heap
        print(round(full - owned()))
blocks = [np.ones(2 << 20, np.uint8) for _ in range(100)]
full = owned()
del blocks[:-1]
print(round(full - owned()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone is told")
@pytest.mark.parametrize("chosen", [False, True])
def test_blocks_go_back_to_the_system_only_where_it_is_asked_for_and_nobody_has_chosen(chosen):
    environment = {"MALLOC_ARENA_MAX": "1"} if chosen else {}
    done = subprocess.run([sys.executable, "-c", HELD], env=environment, capture_output=True, text=True, check=True)
    before, inside, after = map(int, done.stdout.split())
    assert before < 20
    assert (inside < 20) if chosen else (inside > 150)
    assert after < 20
