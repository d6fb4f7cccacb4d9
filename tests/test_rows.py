"""Exponentials of rows by the C++ extension are those of torch: any width, any stride, any number of threads, and no value lost."""

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from profuser.kernels import rows
from profuser.kernels.common import LOWEST

needs_extension = pytest.mark.skipif(rows._rows is None, reason="the C++ extension is not built")


def truth(z):
    m = z.double().amax(1, keepdim=True).clamp_min(LOWEST)
    e = (z.double() - m).exp()
    return m, e, e.sum(1, keepdim=True), torch.special.entr(e).sum(1, keepdim=True)


@pytest.fixture(params=["extension", "torch"])
def implementation(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(rows, "_rows", None)
    elif rows._rows is None:
        pytest.skip("the C++ extension is not built")


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 15), (2, 16), (5, 17), (4, 1023), (3, 1024), (2, 1041), (64, 5000), (0, 7)]
)
@pytest.mark.parametrize("spread", [0.1, 3.0, 60.0])
def test_exponentials_are_those_of_fp64(shape, spread):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * spread
    m, e, total, of_spread = truth(z)
    alone = rows.exponentials_(z.clone())
    got_m, got_total, got_spread = rows.exponentials_and_spread_(z)
    assert torch.equal(alone[1], got_total)
    assert_close(got_m, m.float(), rtol=0, atol=0)
    # The difference from the maximum is rounded in fp32, which its exponential multiplies by its size.
    assert_close(z.double(), e, rtol=2e-7 * (1 + 12 * spread), atol=1e-37)
    assert_close(got_total.double(), total, rtol=1e-6 * (1 + spread), atol=0)
    assert_close(got_spread.double(), of_spread, rtol=1e-6 * (1 + spread), atol=1e-6)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("at", [0, 7, 16, 19])
def test_no_value_is_lost(at):
    for value, sums in ((math.nan, math.nan), (math.inf, math.nan), (-math.inf, None)):
        z = torch.randn(3, 20)
        z[1, at] = value
        expected, of_spread = truth(z)[2:]
        _, total, spread = rows.exponentials_and_spread_(z)
        assert spread[1].isnan() if sums is not None else torch.isfinite(spread[1])
        assert_close(spread[[0, 2]].double(), of_spread[[0, 2]], rtol=1e-6, atol=1e-6)
        assert total[1].isnan() if sums is not None else z[1, at] == 0
        assert_close(total[[0, 2]].double(), expected[[0, 2]], rtol=1e-6, atol=0)


@pytest.mark.usefixtures("implementation")
def test_a_row_of_nothing_gives_zeros():
    z = torch.full((2, 33), -math.inf)
    m, total, spread = rows.exponentials_and_spread_(z)
    assert (z == 0).all()
    assert (total == 0).all()
    assert (spread == 0).all()
    assert_close(m, torch.full((2, 1), LOWEST))


@needs_extension
@pytest.mark.parametrize("threads", [1, 2, 5, 100])
def test_threads_and_strides_change_nothing(monkeypatch, threads):
    wide = torch.randn(37, 20_001)
    whole = wide.clone()
    expected = [x.clone() for x in rows.exponentials_and_spread_(whole)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    part = torch.randn(37, 20_050)
    part[:, :20_001] = wide
    beside = part[:, 20_001:].clone()
    got = rows.exponentials_and_spread_(part[:, :20_001])
    assert torch.equal(part[:, :20_001], whole)
    assert torch.equal(part[:, 20_001:], beside)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


FEW_THREADS = """
import resource
import numpy as np
from profuser import _rows

z = np.random.default_rng(0).normal(size=(200, 20_001)).astype(np.float32)
maxima, sums, same = np.empty(200, np.float32), np.empty(200, np.float32), np.empty(200, np.float32)
_rows.exp_rows(z.copy(), maxima, sums, None, 1)
mapped = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
# A thread's stack takes 2**23.
resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**24, resource.getrlimit(resource.RLIMIT_AS)[1]))
_rows.exp_rows(z, maxima, same, None, 64)
assert np.array_equal(sums, same)
"""


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_where_no_more_threads_can_be_started_fewer_do_the_work():
    subprocess.run([sys.executable, "-c", FEW_THREADS], check=True, timeout=60)


# torch's own threads are gone in a process that was forked, and whoever calls them waits for ever.
FORKED = """
import os

import torch

from profuser.kernels import rows

torch.set_num_threads(2)
z = torch.randn(200, 20_001)
_, expected = rows.exponentials_(z.clone())
assert (z @ z.t()).exp().isfinite().any()
if (child := os.fork()) == 0:
    _, total = rows.exponentials_(z)
    os._exit(0 if total.numpy().tobytes() == expected.numpy().tobytes() else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="forks a process with threads")
def test_a_forked_process_computes():
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=60)


@needs_extension
def test_what_does_not_fit_is_refused():
    extension: Any = rows._rows
    z, one = torch.randn(3, 5).numpy(), torch.empty(3).numpy()
    for arguments in (
        (z.T, one, one, None),
        (z.astype("float64"), one, one, None),
        (z[0], one, one, None),
        (z, one[:2], one, None),
        (z, one, one[:2], None),
        (z, one, one, one[:2]),
    ):
        with pytest.raises((ValueError, TypeError)):
            extension.exp_rows(*arguments, 1)
