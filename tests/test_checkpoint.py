"""Checkpoints: training goes on from them bit for bit, and a damaged or unfinished one is passed over."""

import errno

import pytest
import torch
from torch import nn

from profuser.train import checkpoint
from profuser.train.checkpoint import load_newest, save_checkpoint


def trained(steps=3, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, steps)
    return model, optimizer


def train(model, optimizer, steps):
    for _ in range(steps):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def loaded_step(directory, model, optimizer) -> int:
    state = load_newest(directory, model, optimizer)
    assert state is not None
    return state["step"]


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    model, optimizer = trained()
    save_checkpoint(tmp_path, 3, model, optimizer, {"note": "x"}, keep=2)
    train(model, optimizer, 4)
    resumed, its_optimizer = trained(steps=0, seed=1)
    state = load_newest(tmp_path, resumed, its_optimizer)
    assert state is not None
    assert (state["step"], state["note"]) == (3, "x")
    train(resumed, its_optimizer, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters()))


def test_without_a_checkpoint_nothing_is_loaded(tmp_path):
    assert load_newest(tmp_path, *trained()) is None


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, capsys):
    model, optimizer = trained()
    save_checkpoint(tmp_path, 1, model, optimizer, {}, keep=5)
    for step, name in (
        (2, "model.safetensors"),
        (3, "optimizer.safetensors"),
        (4, "state.json"),
        (5, "random.safetensors"),
    ):
        path = save_checkpoint(tmp_path, step, model, optimizer, {}, keep=5) / name
        path.write_bytes(path.read_bytes()[:-3])
    assert loaded_step(tmp_path, model, optimizer) == 1
    assert capsys.readouterr().out.count("trying the one before") == 4


def test_only_the_newest_are_kept(tmp_path):
    model, optimizer = trained()
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000004", "step-000005"]


def test_an_unfinished_checkpoint_is_not_seen(tmp_path):
    model, optimizer = trained()
    (tmp_path / ".step-000009.123.tmp").mkdir()
    save_checkpoint(tmp_path, 1, model, optimizer, {}, keep=2)
    assert loaded_step(tmp_path, model, optimizer) == 1


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    model, optimizer = trained()
    save_checkpoint(tmp_path, 1, model, optimizer, {}, keep=2)

    def full(path, data):
        path.write_bytes(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_atomic", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, model, optimizer, {}, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert loaded_step(tmp_path, model, optimizer) == 1
