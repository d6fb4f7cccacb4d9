"""The Triton kernels, compiled for real GPUs without having one: nothing spills, streaming loops move 16 bytes at a time, and what
comes out computes what it should.

Only the kernels of compiled_kernels.py are compiled to the end. For every variant that the drivers launch, lowered_launches.py
runs the compiler's first step, which shows that the compiler accepts its types. emulated_gpu.py executes the PTX.
"""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from compiled_kernels import TARGETS

# How many registers (of one thread) a multiprocessor of NVIDIA or a compute unit of AMD has.
REGISTERS = {"sm": 1 << 16, "gf": 1 << 17}
# So many bytes does the ptxas of Triton 3.6 spill outside a loop, in order to fit twice as many warps.
SPILLED_BYTES = 16 if version("triton") < "3.7" else 0


HERE = Path(__file__).parent


def run_without_interpreter(command, **variables):
    """Runs Python with some arguments in a process of its own, in which kernels are compiled, and returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def without_interpreter(program, *arguments):
    """Runs a program beside this file, and returns the JSON that it prints."""
    return json.loads(run_without_interpreter([str(HERE / program), *arguments]))


@pytest.mark.parametrize("every", [36, pytest.param(1, marks=pytest.mark.long)])
def test_launches_have_types_that_the_compiler_accepts(every):
    launches = without_interpreter("lowered_launches.py", str(every))
    assert not launches["failures"], json.dumps(launches["failures"], indent=1)[:3000]
    assert all(count > 10 for count in launches["variants"].values()), launches["variants"]


@pytest.mark.parametrize(
    ("target", "every"), [("sm_90", 3), *(pytest.param(target, 1, marks=pytest.mark.long) for target in TARGETS)]
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


EVERY_KERNEL = "test_values_and_gradients or 1000-64 or 83-4 or by_hand"
"""Tests, by parts of their names, that launch each kernel."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the tests of the kernels run on the GPU itself")
@pytest.mark.parametrize(
    ("capability", "chosen"),
    [("90", ["-k", EVERY_KERNEL]), *(pytest.param(of, [], marks=pytest.mark.long) for of in ("80", "90", "100"))],
)
def test_compiled_kernels_pass_the_tests_that_the_interpreted_ones_pass(capability, chosen):
    """An instruction that only another version of Triton gives is an error, too, and has to be added to ptx_arithmetic.py."""
    names = [
        "fused_loss_triton",
        "fused_loss_triton_autograd",
        "source_topk_triton",
        "source_topk_triton_merge",
        "left_out_capped",
    ]
    files = [str(HERE / f"test_{name}.py") for name in names]
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not long", *chosen, *files]
    printed = run_without_interpreter(arguments, PROFUSER_EMULATED_GPU=capability)
    passed = re.search(r"(\d+) passed", printed)
    assert passed is not None
    assert int(passed[1]) >= 10
