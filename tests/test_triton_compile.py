"""The Triton kernels, compiled for real GPUs without having one: nothing spills, and streaming loops move 16 bytes at a time.

Only the kernels of compiled_kernels.py are compiled to the end. For every variant that the drivers launch, lowered_launches.py
runs the compiler's first step, which shows that the compiler accepts its types.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from compiled_kernels import TARGETS

# How many registers (of one thread) a multiprocessor of NVIDIA or a compute unit of AMD has.
REGISTERS = {"sm": 1 << 16, "gf": 1 << 17}
# So many bytes does the ptxas of Triton 3.6 spill outside a loop, in order to fit twice as many warps.
SPILLED_BYTES = 16 if version("triton") < "3.7" else 0


def without_interpreter(program, *arguments):
    """Runs a program beside this file in a process of its own, and returns the JSON that it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("every", [24, pytest.param(1, marks=pytest.mark.long)])
def test_launches_have_types_that_the_compiler_accepts(every):
    launches = without_interpreter("lowered_launches.py", str(every))
    assert not launches["failures"], json.dumps(launches["failures"], indent=1)[:3000]
    assert all(count > 10 for count in launches["variants"].values()), launches["variants"]


@pytest.mark.parametrize(
    ("target", "every"), [("sm_90", 2), *(pytest.param(target, 1, marks=pytest.mark.long) for target in TARGETS)]
)
def test_kernels_fit_the_registers_and_stream_16_bytes_at_a_time_without_a_barrier(target, every):
    for name, report in without_interpreter("compiled_kernels.py", target, str(every)).items():
        assert report["spills"] <= SPILLED_BYTES, f"{name}: {report}"
        assert max(report["stack"], report.get("local", 0)) <= SPILLED_BYTES, f"{name}: {report}"
        assert report["registers"] * report["threads"] <= REGISTERS[target[:2]], f"{name}: {report}"
        if not report["streams"] or "loops" not in report:  # loops are read from PTX, which AMD targets do not have
            continue
        loops = [loop for loop in report["loops"] if loop["access_bytes"]]
        streaming = [loop for loop in loops if set(loop["access_bytes"]) == {16}]
        assert streaming, name
        assert (len(streaming) < len(loops)) == report["loops_over_sources"], f"{name}: {loops}"
        assert not any(loop["barrier"] for loop in streaming), f"{name}: {streaming}"
