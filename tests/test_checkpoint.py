"""Checkpoints: training goes on from them bit for bit, and one that is not what was written is passed over, with the reason."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from profuser.errors import DataError
from profuser.store.sealed import digest_of_file, write_sealed
from profuser.train import checkpoint
from profuser.train.checkpoint import RANDOM, WHOLE, Checkpoint, load_newest, newest_step, save_checkpoint


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


def saved(directory, step, model, optimizer, keep=2, best=None):
    return save_checkpoint(directory, Checkpoint(step, "targets", b"metrics"), model, optimizer, keep, best)


def loaded_step(directory, model, optimizer) -> int:
    found = load_newest(directory, model, optimizer)
    assert found is not None
    return found.step


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    model, optimizer = trained()
    saved(tmp_path, 3, model, optimizer)
    train(model, optimizer, 4)
    resumed, its_optimizer = trained(steps=0, seed=1)
    assert load_newest(tmp_path, resumed, its_optimizer) == Checkpoint(3, "targets", b"metrics")
    train(resumed, its_optimizer, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters()))


def test_a_weight_whose_first_gradient_came_later_has_no_moments_again(tmp_path):
    model, optimizer = trained(steps=0)
    first, *_, last = model.parameters()
    train(model[:2], optimizer, 1)
    saved(tmp_path, 1, model, optimizer)
    train(model, optimizer, 1)
    assert last in optimizer.state
    assert loaded_step(tmp_path, model, optimizer) == 1
    assert last not in optimizer.state
    assert optimizer.state[first]["step"] == 1


def test_without_a_checkpoint_nothing_is_loaded_and_nothing_said(tmp_path, capsys):
    assert load_newest(tmp_path, *trained()) is None
    assert capsys.readouterr().out == ""


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, capsys):
    model, optimizer = trained()
    saved(tmp_path, 1, model, optimizer, keep=9)
    for step, name in (
        (2, "model.safetensors"),
        (3, "optimizer.safetensors"),
        (4, "state.json"),
        (5, "random.safetensors"),
        (6, "metrics.jsonl"),
    ):
        path = saved(tmp_path, step, model, optimizer, keep=9) / name
        path.write_bytes(path.read_bytes()[:-3])
    assert loaded_step(tmp_path, model, optimizer) == 1
    assert capsys.readouterr().out.count("trying the one before") == 5


def test_where_there_is_none_before_it_none_is_said_to_be_tried(tmp_path, capsys):
    model, optimizer = trained()
    (saved(tmp_path, 1, model, optimizer) / "model.safetensors").unlink()
    assert load_newest(tmp_path, model, optimizer) is None
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"checkpoint {tmp_path / 'step-000001'} is damaged (")
    assert "trying" not in first
    assert second == f"no intact checkpoint is left in {tmp_path}: beginning at step 0"


def test_only_the_newest_are_kept(tmp_path):
    model, optimizer = trained()
    for step in range(1, 6):
        saved(tmp_path, step, model, optimizer, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000004", "step-000005"]


def test_the_newest_is_the_one_with_the_highest_step(tmp_path):
    model, optimizer = trained()
    for step in (999_999, 1_000_000, 1_000_001):
        saved(tmp_path, step, model, optimizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1000000", "step-1000001"]
    assert loaded_step(tmp_path, model, optimizer) == 1_000_001


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_one_that_is_saved_after_it(tmp_path):
    model, optimizer = trained()
    (saved(tmp_path, 4, model, optimizer, keep=1) / "state.json").unlink()
    assert newest_step(tmp_path) == 0
    assert load_newest(tmp_path, model, optimizer) is None
    saved(tmp_path, 2, model, optimizer, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


def test_a_checkpoint_under_another_steps_name_is_passed_over(tmp_path, capsys):
    model, optimizer = trained()
    for step in (3, 5):
        saved(tmp_path, step, model, optimizer)
    shutil.move(tmp_path / "step-000005", tmp_path / "step-000007")
    assert loaded_step(tmp_path, model, optimizer) == 3
    assert "its name must say its step, state.json says 5" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["state.json", *WHOLE, RANDOM, "metrics.jsonl"])
def test_a_file_of_another_run_is_noticed(tmp_path, name):
    model, optimizer = trained()
    saved(tmp_path / "one", 1, model, optimizer)
    own = saved(tmp_path / "one", 2, model, optimizer)
    other_model, other_optimizer = trained(seed=5)
    theirs = save_checkpoint(tmp_path / "two", Checkpoint(2, "targets", b"other"), other_model, other_optimizer, 2)
    shutil.copy(theirs / name, own / name)
    assert loaded_step(tmp_path / "one", model, optimizer) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"step": "2"},
        {"step": 2.0},
        {"step": True},
        {"step": -2},
        {"targets": None},
        {"files": []},
        {"files": {}},
        {"capacity": {"columns": 128}},
    ],
)
def test_wrong_types_are_passed_over_even_under_a_right_seal(tmp_path, capsys, change):
    model, optimizer = trained()
    saved(tmp_path, 1, model, optimizer)
    path = saved(tmp_path, 2, model, optimizer) / "state.json"
    write_sealed(path, json.loads(path.read_text()) | change)
    assert loaded_step(tmp_path, model, optimizer) == 1
    assert "state.json must hold" in capsys.readouterr().out


def test_a_state_of_an_earlier_version_is_passed_over(tmp_path, capsys):
    model, optimizer = trained()
    path = saved(tmp_path, 1, model, optimizer) / "state.json"
    path.write_text(json.dumps({"step": 1, "sha256": {"model.safetensors": "0" * 64}, "targets": "targets"}))
    assert load_newest(tmp_path, model, optimizer) is None
    assert "beginning at step 0" in capsys.readouterr().out


def bits_of(data: bytes):
    for at in range(len(data)):
        for bit in range(8):
            yield data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


@pytest.mark.parametrize("stride", [37, pytest.param(1, marks=pytest.mark.long)])
def test_no_flipped_bit_of_the_state_changes_what_is_resumed(tmp_path, capsys, stride):
    model, optimizer = trained()
    saved(tmp_path, 1, model, optimizer)
    path = saved(tmp_path, 2, model, optimizer) / "state.json"
    expected = load_newest(tmp_path, model, optimizer)
    passed_over = 0
    for data in list(bits_of(path.read_bytes()))[::stride]:
        path.write_bytes(data)
        found = load_newest(tmp_path, model, optimizer)
        assert found == expected or found == Checkpoint(1, "targets", b"metrics")
        out = capsys.readouterr().out
        assert out.count("\n") == out.count("state.json must hold") == (found != expected)
        passed_over += found != expected
    assert passed_over > 0


def test_weights_of_another_model_are_refused(tmp_path):
    model, optimizer = trained()
    saved(tmp_path, 1, model, optimizer)
    with pytest.raises(DataError, match=r"must hold the weights of the target and their moments, .* differs"):
        load_newest(tmp_path, nn.Linear(4, 8), optimizer)


@pytest.mark.parametrize(
    "other", [lambda tensor: None, lambda tensor: tensor[:1].clone()], ids=["missing", "of another shape"]
)
def test_moments_of_another_kind_are_refused_in_one_line(tmp_path, other):
    """An optimizer of another version may keep other moments. One number must not be spread over a whole tensor in silence."""
    model, optimizer = trained()
    path = saved(tmp_path, 1, model, optimizer)
    kept = load_file(path / "optimizer.safetensors")
    name = next(key for key in kept if key.endswith("weight/exp_avg"))
    changed = other(kept.pop(name))
    save_file(kept if changed is None else kept | {name: changed}, path / "optimizer.safetensors")
    state = json.loads((path / "state.json").read_text())
    state["files"]["optimizer.safetensors"] = digest_of_file(path / "optimizer.safetensors")
    write_sealed(path / "state.json", state)
    with pytest.raises(DataError, match=rf"the target and their moments, {name} differs \(1 in all\)"):
        load_newest(tmp_path, model, optimizer)


def test_an_unfinished_checkpoint_is_not_seen(tmp_path):
    model, optimizer = trained()
    (tmp_path / ".step-000009.123.tmp").mkdir()
    saved(tmp_path, 1, model, optimizer, keep=2)
    assert loaded_step(tmp_path, model, optimizer) == 1


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    model, optimizer = trained()
    saved(tmp_path, 1, model, optimizer, keep=2)

    def full(path, data):
        path.write_bytes(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_atomic", full)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, 2, model, optimizer, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert loaded_step(tmp_path, model, optimizer) == 1
