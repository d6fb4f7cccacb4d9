"""What `benchmarks/gpu.sh` does on a GPU: every member of the family is right there, and the steps have no more time than the whole."""

import inspect
import os
import re
import subprocess
import sys

import pytest
import torch.distributed as dist
from conftest import ROOT

from benchmarks import bench_members
from benchmarks.cases import first_rows, make_case
from profuser.loss import fused_linear_fusion_loss

SCRIPT = ROOT / "benchmarks" / "gpu.sh"
# What is no member of its own: scales of what there is, and how it is computed.
NOT_MEASURED = {
    "ce_weight", "kd_weight", "beta", "combine_temperature", "bias", "logit_scale", "source_tail", "source_index",
    "reduction", "num_items_in_batch", "chunk_size", "max_chunk_bytes", "partial_hidden_grad", "return_stats", 
}  # fmt: skip


@pytest.fixture
def no_group():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def small_case():
    return make_case(bench_members.SHAPE, "peaked") | {"tail": "bucket"}


@pytest.mark.parametrize("name", bench_members.MEMBERS)
def test_a_member_is_the_reference(name, monkeypatch, no_group):
    """In plain torch, because the tests of the kernels interpret them."""
    monkeypatch.setattr(bench_members, "IMPL", None)
    bench_members.check(bench_members.errors(bench_members.MEMBERS[name], first_rows(small_case(), 4)))


def test_every_argument_of_the_loss_is_a_member(no_group):
    case = small_case()
    given = set(case)
    for member in bench_members.MEMBERS.values():
        given |= {*member.options, *member.tensors(case), *member.ours(case)}
    arguments = set(inspect.signature(fused_linear_fusion_loss).parameters)
    assert arguments - given == NOT_MEASURED


def test_the_steps_of_the_script_end_in_time():
    text = SCRIPT.read_text()
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    (limit,) = map(int, re.findall(r"^LIMIT=(\d+)$", text, re.MULTILINE))
    steps = re.findall(r"^(?:\S*='' |  )?(?:step|bench) (\d+) (\w+) ", text, re.MULTILINE)
    taken = {name: int(seconds) for seconds, name in steps if name != "sanitizer"}  # which takes what is left
    assert len(taken) == 12
    assert sum(taken.values()) + 35 <= limit <= 540
    order = list(taken)
    assert order.index("gpu_tests") < order.index("headline") < order.index("members") < order.index("shapes")


@pytest.mark.long
def test_a_dry_run_takes_every_step(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    out = subprocess.run([SCRIPT, "--dry"], env=environment, capture_output=True, text=True, check=True).stdout
    codes = dict(re.findall(r"^== (\w+): exit (\d+)", out, re.MULTILINE))
    assert set(codes.values()) == {"0"}, out
    assert len(codes) == 11  # no wheels
    assert "Members of the family" in (tmp_path / "bench_gpu.md").read_text()
