"""The losses that are timed beside ours compute what the benchmarks say of them; those that need a GPU are left out."""

import pytest
import torch

from benchmarks import bench_fused_loss
from benchmarks.implementations import IMPLEMENTATIONS, why_not
from benchmarks.peers import PEERS

# What compiles itself takes longer than all the others together.
RUN_HERE = [name for name, peer in PEERS.items() if not peer.needs_cuda and "compiled" not in name]


@pytest.mark.parametrize("logits", ["random", "peaked"])
@pytest.mark.parametrize("name", RUN_HERE)
def test_a_peer_is_the_reference_of_what_it_computes(name, logits):
    if (reason := why_not(name)) is not None:
        pytest.skip(reason)
    found = bench_fused_loss.errors(name, min(bench_fused_loss.SHAPES), logits)
    assert max(found.values()) < bench_fused_loss.TOLERANCE, found


@pytest.mark.parametrize("name", ["veomni-style", "veomni-style-topk"])
def test_several_chunks_are_one(name, monkeypatch):
    shape = min(bench_fused_loss.SHAPES)
    whole = bench_fused_loss.make_step(name, shape, "random", "forward_backward")()
    monkeypatch.setattr("benchmarks.peers.VEOMNI_CHUNK", 3)
    for a, b in zip(bench_fused_loss.make_step(name, shape, "random", "forward_backward")(), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_what_cannot_run_is_said(monkeypatch):
    monkeypatch.setattr("benchmarks.implementations.INTERPRETED", False)
    monkeypatch.setattr("benchmarks.implementations.DEVICE", "cpu")
    assert why_not("quack") == "quack needs CUDA"
    monkeypatch.setattr("benchmarks.implementations.package_version", {"torch": "2.11.0+cu130"}.get)
    assert why_not("torch-linear-ce") == "torch-linear-ce needs torch >= 2.13, 2.11.0+cu130 is installed"
    assert why_not("trl-kl") == "trl-kl needs trl, which is not installed"
    assert why_not("profuser") is None
    assert set(PEERS) < set(IMPLEMENTATIONS)
