"""optim.deterministic: deterministic algorithms alone in training, and one line for what has none."""

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from profuser.errors import ConfigError
from profuser.recipe.compare import deciding_keys
from profuser.train.determinism import WORKSPACE, deterministic, set_environment
from profuser.train.loop import Trainer
from profuser.train.parallel import launch


def flags() -> tuple[Any, ...]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.benchmark,
        cudnn.deterministic,
        cudnn.allow_tf32,
        matmul.allow_tf32,
    )


def without_a_deterministic_algorithm(*_) -> None:
    torch.ones(3).put_(torch.tensor([0]), torch.tensor([1.0]))


@pytest.fixture
def environment(monkeypatch):
    """The environment of the test alone, without the variables that are to be set."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in (WORKSPACE, "FLASH_ATTENTION_DETERMINISTIC"):
        os.environ.pop(name, None)
    return os.environ


def test_everything_is_set_in_the_block_and_set_back_after_it(capsys):
    before = flags()
    with deterministic(True):
        assert flags() == (True, False, False, True, False, False)
    assert flags() == before
    with pytest.raises(KeyError), deterministic(True, say=False):
        raise KeyError
    assert flags() == before
    assert capsys.readouterr().out.count("deterministic algorithms alone") == 1


def test_what_was_deterministic_before_stays_so():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic(True, say=False):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert flags()[:2] == (True, True)
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_the_key_nothing_is_set(capsys):
    before = flags()
    with deterministic(False):
        assert flags() == before
        without_a_deterministic_algorithm()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, "put_ has none here"),
        (
            RuntimeError(
                "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
                "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic because it uses CuBLAS"
            ),
            "a product by cuBLAS has none here",
        ),
    ],
)
def test_what_cannot_be_deterministic_is_one_line(error, said):
    def computed() -> None:
        if error is not None:
            raise error
        without_a_deterministic_algorithm()

    with pytest.raises(ConfigError) as found, deterministic(True, say=False):
        computed()
    assert said in str(found.value)
    assert str(found.value).startswith("optim.deterministic: true needs a deterministic algorithm")
    assert "\n" not in str(found.value)
    assert found.value.exit_code == 2


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="size mismatch"), deterministic(True, say=False):
        raise RuntimeError("size mismatch")


def test_the_trainer_trains_so_and_gives_the_same_bits_twice(prepared, tmp_path, capsys):
    _, run, store = prepared
    recipe = replace(run.recipe, optim=replace(run.recipe.optim, deterministic=True, steps=2, eval_every=0))

    def trainer(name: str) -> Trainer:
        (tmp_path / name).mkdir()
        return Trainer(recipe, store, tmp_path / name, Accelerator(cpu=True))

    weights = []
    for number in range(2):
        t = trainer(str(number))
        seen: list[bool] = []
        t.fusion.register_forward_pre_hook(lambda *_, seen=seen: seen.append(flags()[0]))
        t.train()
        assert seen
        assert all(seen)
        weights.append(torch.cat([p.detach().flatten() for p in t.fusion.parameters()]))
    assert torch.equal(*weights)
    assert not flags()[0]

    t = trainer("refused")
    t.fusion.register_forward_pre_hook(without_a_deterministic_algorithm)
    with pytest.raises(ConfigError, match="put_ has none here"):
        t.train()
    assert capsys.readouterr().out.count("deterministic algorithms alone") == 3


def test_the_environment_is_set_before_anything_is_launched(environment, monkeypatch):
    seen: dict[str, str] = {}

    def accelerator(**_):
        seen.update(environment)
        return SimpleNamespace(distributed_type=SimpleNamespace(value="NO"))

    monkeypatch.setattr("profuser.train.parallel.Accelerator", accelerator)
    launch("fp32", deterministic=True)
    assert seen[WORKSPACE] == ":4096:8"
    assert seen["FLASH_ATTENTION_DETERMINISTIC"] == "1"


def test_without_the_key_the_environment_stays(environment):
    launch("fp32")
    assert WORKSPACE not in environment


@pytest.mark.parametrize(("given", "fits"), [(":16:8", True), (":4096:8", True), (":0:0", False), ("", False)])
def test_an_environment_that_rules_it_out_is_named(environment, monkeypatch, given, fits):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    environment[WORKSPACE] = given
    if fits:
        set_environment()
        assert environment[WORKSPACE] == given
    else:
        with pytest.raises(ConfigError, match=f"{WORKSPACE} must be :4096:8 or :16:8 .* got '{given}'; unset it"):
            set_environment()


def test_it_may_change_before_a_run_is_resumed(prepared):
    _, run, _ = prepared
    other = replace(run.recipe, optim=replace(run.recipe.optim, deterministic=True))
    assert deciding_keys(run.recipe.to_dict(), other.to_dict()) == []
