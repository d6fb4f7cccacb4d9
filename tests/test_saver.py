"""Checkpoints that are written while the training goes on are those of the step at which they were begun, and follow all rules."""

from __future__ import annotations

import errno
import threading
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from test_checkpoint import loaded_step, train, trained

from profuser.plan.memory import checkpoint_bytes
from profuser.store.files import DiskFull, writing
from profuser.train import checkpoint
from profuser.train.checkpoint import Checkpoint, load_newest, newest_step
from profuser.train.loop import Trainer
from profuser.train.saver import Saver


@pytest.fixture
def slow(monkeypatch):
    """An event without which no file of a checkpoint is written."""
    write, go = checkpoint.write_atomic, threading.Event()

    def waiting(path, data):
        assert go.wait(60)
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_atomic", waiting)
    yield go
    go.set()


@pytest.fixture
def full(monkeypatch):
    """Steps whose checkpoints find no room on the disk, after some bytes."""
    write, steps = checkpoint.write_atomic, set[int]()

    def limited(path, data):
        if any(f"step-{step:06d}" in str(path) for step in steps):
            path.write_bytes(data[:10])
            with writing(path, len(data)):
                raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_atomic", limited)
    return steps


def saver(directory) -> Saver:
    return Saver(directory, beside_training=True, sharded=False)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_written_is_the_state_of_the_step_although_training_goes_on(tmp_path, slow, fused):
    model, optimizer = trained()
    if fused:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        train(model, optimizer, 2)
    its, before = saver(tmp_path), weights(model)
    generator = torch.get_rng_state()
    its.save(Checkpoint(3, "targets", b"metrics"), model, optimizer, 2)
    train(model, optimizer, 4)
    its.check()
    assert newest_step(tmp_path) == 0
    slow.set()
    its.wait()
    its.close()
    after = weights(model)
    resumed, its_optimizer = trained(steps=0, seed=1)
    if fused:
        its_optimizer = torch.optim.AdamW(resumed.parameters(), lr=0.1, fused=True)
    assert load_newest(tmp_path, resumed, its_optimizer) == Checkpoint(3, "targets", b"metrics")
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(map(torch.equal, weights(resumed), before))
    train(resumed, its_optimizer, 4)
    assert all(map(torch.equal, weights(resumed), after))


def test_a_checkpoint_waits_for_the_one_before(tmp_path, slow):
    model, optimizer = trained()
    its, done = saver(tmp_path), threading.Event()
    its.save(Checkpoint(1, "targets", b""), model, optimizer, 2)

    def second():
        its.save(Checkpoint(2, "targets", b""), model, optimizer, 2)
        done.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert not done.wait(0.3)
    slow.set()
    thread.join()
    its.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def test_a_full_disk_is_reported_by_the_next_check_and_leaves_the_checkpoint_before(tmp_path, full):
    model, optimizer = trained()
    its = saver(tmp_path)
    its.save(Checkpoint(1, "targets", b""), model, optimizer, 2)
    its.wait()
    full.add(2)
    its.save(Checkpoint(2, "targets", b""), model, optimizer, 2)
    assert its._writing is not None
    its._writing.exception(60)
    with pytest.raises(DiskFull, match="step-000002"):
        its.check()
    its.check()  # it is said once
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert loaded_step(tmp_path, model, optimizer) == 1


def test_an_error_that_nobody_has_heard_of_is_said_at_the_end(tmp_path, full, capsys):
    model, optimizer = trained()
    its = saver(tmp_path)
    full.add(1)
    its.save(Checkpoint(1, "targets", b""), model, optimizer, 2)
    its.close()
    assert "the last checkpoint could not be written" in capsys.readouterr().out


def opened(prepared, directory, **optim) -> Trainer:
    recipe = prepared[1].recipe
    settings = {"checkpoint_every": 1, "eval_every": 0, "async_checkpoints": True} | optim
    directory.mkdir(exist_ok=True)
    recipe = replace(recipe, optim=replace(recipe.optim, **settings))
    return Trainer(recipe, prepared[2], directory, Accelerator(cpu=True))


def test_a_training_ends_when_its_last_checkpoint_is_written_and_has_the_bits_of_one_that_waits(prepared, tmp_path):
    runs = [opened(prepared, tmp_path / str(beside), async_checkpoints=beside) for beside in (True, False)]
    for t in runs:
        t.train()
        assert newest_step(t.directory / "checkpoints") == 4
    names = [sorted(path.name for path in (t.directory / "checkpoints").iterdir()) for t in runs]
    assert names[0] == names[1]
    for name in ("model.safetensors", "optimizer.safetensors", "random.safetensors"):
        ours, expected = (t.directory / "checkpoints/step-000004" / name for t in runs)
        assert ours.read_bytes() == expected.read_bytes()


def test_a_full_disk_ends_a_training_and_the_same_command_goes_on(prepared, tmp_path, full):
    full.add(3)
    t = opened(prepared, tmp_path / "run")
    with pytest.raises(DiskFull, match="step-000003"):
        t.train()
    assert newest_step(t.directory / "checkpoints") == 2
    assert not list((t.directory / "checkpoints").glob(".*"))
    full.clear()
    again = opened(prepared, tmp_path / "run")
    assert again._resume() == 2


def test_the_plan_counts_the_copy(prepared, tmp_path):
    from profuser.plan.architecture import Architecture

    t = opened(prepared, tmp_path / "run")
    target = Architecture("guardian", t.fusion.config, "generates", True, True)
    state = checkpoint.state_of(t.fusion, t.optimizer, copied=True)
    copied = 3 * sum(tensor.nbytes for tensor in state.weights.values())  # the moments are twice the weights
    waits = replace(t.optim, async_checkpoints=False)
    assert checkpoint_bytes(target, t.optim, cuda=False) - checkpoint_bytes(target, waits, cuda=False) == copied
