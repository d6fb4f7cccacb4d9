"""Memory that is freed returns to the system where a recipe trades time for memory."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from profuser.train.freed_memory import MMAP_THRESHOLD, RETURNED, USUAL, VARIABLE, returns_freed_memory

GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
MEASURE = """
import sys
import torch
from profuser.train.freed_memory import returns_freed_memory

def owned():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024

torch.ones(31 << 18)  # of 31 MiB: once it is freed, glibc keeps smaller blocks
before = owned()
with returns_freed_memory(sys.argv[1] == "asked"):
    pairs = [(torch.ones(1 << 20), torch.ones(1 << 12)) for _ in range(60)]
    held = owned()
    small = [second for _, second in pairs]
    del pairs
    print(int(held - before), int(owned() - before))
"""


def held_and_left(*arguments: str, **environment: str) -> tuple[int, int]:
    """Returns the MiB of sixty tensors of 4 MiB with small ones between them, and what is left when only the small ones are held."""
    command = [sys.executable, "-c", MEASURE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    held, left = map(int, done.stdout.split())
    return held, left


@GLIBC
def test_what_is_freed_between_tensors_that_stay_returns_to_the_system():
    held, left = held_and_left("asked")
    assert held >= 240 > 24 >= left


@GLIBC
@pytest.mark.parametrize("environment", [{}, pytest.param({VARIABLE: str(16 << 20)}, marks=pytest.mark.long)])
def test_it_is_kept_where_nobody_asks_or_the_environment_says_so(environment):
    held, left = held_and_left("asked" if environment else "not asked", **environment)
    assert min(held, left) >= 200


def test_the_usual_setting_comes_back_whatever_happens_meanwhile(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    calls = []
    library = SimpleNamespace(mallopt=lambda *setting: calls.append(setting))
    monkeypatch.setattr("ctypes.CDLL", lambda name: library)
    with pytest.raises(KeyboardInterrupt), returns_freed_memory(True):
        raise KeyboardInterrupt
    assert calls == [(MMAP_THRESHOLD, RETURNED), (MMAP_THRESHOLD, USUAL)]
