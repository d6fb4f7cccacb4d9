"""The Triton kernels compiled for real GPUs, without one: nothing spills, and what streams does so 16 bytes at a time.

Compiled to the end are the kernels of compiled_kernels.py; that every variant which the drivers launch has types that
the compiler accepts is shown by its first step alone, lowered_launches.py.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from compiled_kernels import TARGETS

# Of a multiprocessor (NVIDIA) or a compute unit (AMD), in registers of one thread.
REGISTERS = {"sm": 1 << 16, "gf": 1 << 17}
# What ptxas of Triton 3.6 gives up outside a loop to fit twice as many warps.
SPILLED_BYTES = 16 if version("triton") < "3.7" else 0


def without_interpreter(program, *arguments):
    """What a program beside this file prints, from a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_launch_has_types_that_the_compiler_accepts():
    launches = without_interpreter("lowered_launches.py")
    assert not launches["failures"], json.dumps(launches["failures"], indent=1)[:3000]
    assert all(count > 10 for count in launches["variants"].values()), launches["variants"]


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_fit_the_registers_and_stream_16_bytes_at_a_time_without_a_barrier(target):
    for name, report in without_interpreter("compiled_kernels.py", target).items():
        assert report["spills"] <= SPILLED_BYTES, f"{name}: {report}"
        assert max(report["stack"], report.get("local", 0)) <= SPILLED_BYTES, f"{name}: {report}"
        assert report["registers"] * report["threads"] <= REGISTERS[target[:2]], f"{name}: {report}"
        if not report["streams"] or "loops" not in report:  # they are read from PTX, which AMD targets do not have
            continue
        streaming = [loop for loop in report["loops"] if loop["access_bytes"]]
        assert streaming, name
        for loop in streaming:
            assert set(loop["access_bytes"]) == {16}, f"{name}: {loop}"
            assert not loop["barrier"], f"{name}: {loop}"
