"""AdamW with its moments in 8 bits: what is kept in them, that it learns, resumes bit for bit, and is refused where it cannot work."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from profuser.cli import explained
from profuser.errors import ConfigError
from profuser.pipeline import train
from profuser.plan.architecture import Architecture
from profuser.plan.memory import checkpoint_bytes, moment_bytes
from profuser.recipe.adapter import AdapterConfig
from profuser.recipe.optim import OptimConfig
from profuser.recipe.schema import Recipe
from profuser.train.checkpoint import Checkpoint, load_newest, save_checkpoint
from profuser.train.loop import Trainer
from profuser.train.optimizer import check_optimizer, in_eight_bits, make_optimizer

CPU = torch.device("cpu")
EIGHT = OptimConfig(name="adamw_8bit", lr=1e-2)


class Small(nn.Module):
    """An embedding of 8192 numbers, matrices of 8192, 4096 and 4095, and biases."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(128, 64)
        self.wide, self.least, self.less = nn.Linear(64, 128), nn.Linear(128, 32), nn.Linear(91, 45)

    def forward(self, ids):
        return self.least(self.wide(self.embedding(ids))).sum() + self.less(torch.ones(91)).sum()


def trained(model, optimizer, steps):
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randint(128, (4, 5))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_of_a_models_tensors_the_large_ones_that_are_no_embeddings_have_moments_in_8_bits():
    model = Small()
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in in_eight_bits(model)] == ["wide.weight", "least.weight"]
    model.least.weight.requires_grad_(False)
    assert [names[id(p)] for p in in_eight_bits(model)] == ["wide.weight"]


def test_the_optimizer_takes_the_recipes_numbers_and_only_matrices_decay():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    optimizer = make_optimizer(model, OptimConfig(lr=0.5, betas=(0.7, 0.8), weight_decay=0.3))
    group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        group = group_of[parameter]
        assert (group["lr"], tuple(group["betas"])) == (0.5, (0.7, 0.8))
        assert group["weight_decay"] == (0.3 if name == "0.weight" else 0.0)


class TestWithBitsandbytes:
    @pytest.fixture(autouse=True)
    def package(self):
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

    def test_the_optimizer_keeps_in_8_bits_what_is_said_and_nearly_takes_the_steps_of_fp32(self):
        model, other, untrained = Small(), Small(), Small()
        optimizer, in_fp32 = make_optimizer(model, EIGHT), make_optimizer(other, replace(EIGHT, name="adamw"))
        trained(model, optimizer, 5)
        trained(other, in_fp32, 5)
        held = [p for p, state in optimizer.state.items() if state["state1"].dtype == torch.uint8]
        assert held == in_eight_bits(model)
        distance, way = (vector(model) - vector(other)).norm(), (vector(other) - vector(untrained)).norm()
        assert 0 < distance < 0.1 * way

    def test_what_another_optimizer_was_told_does_not_matter_and_is_left_alone(self):
        """bitsandbytes keeps such settings by a parameter's address, which a later parameter may have, or by its place in a group."""
        from bitsandbytes.optim import GlobalOptimManager

        model, manager = Small(), GlobalOptimManager.get_instance()
        matrices = [p for p in model.parameters() if p.ndim == 2]
        manager.register_parameters(matrices)
        manager.override_config(matrices, "optim_bits", 32)
        before = {key: dict(value) for key, value in manager.pid2config.items()}
        try:
            optimizer = make_optimizer(model, EIGHT)
            trained(model, optimizer, 1)
            held = [p for p, state in optimizer.state.items() if state["state1"].dtype == torch.uint8]
            assert held == in_eight_bits(model)
            assert manager.pid2config == before
        finally:
            manager.initialize()

    def test_a_checkpoint_brings_back_every_bit(self, tmp_path):
        model = Small()
        optimizer = make_optimizer(model, EIGHT)
        trained(model, optimizer, 3)
        saved = save_checkpoint(tmp_path, Checkpoint(3, "t", b""), model, optimizer, 1)
        kept = load_file(saved / "optimizer.safetensors")
        assert kept["wide.weight/state1"].dtype == torch.uint8
        assert kept["wide.weight/absmax2"].shape == (32,)
        assert kept["embedding.weight/state2"].dtype == torch.float32
        again = Small()
        its = make_optimizer(again, EIGHT)
        load_newest(tmp_path, again, its)
        for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
            mine, expected = its.state[ours], optimizer.state[theirs]
            assert mine.keys() == expected.keys()
            for key, value in expected.items():
                assert torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(value)), key
        for one, its_optimizer in ((model, optimizer), (again, its)):
            trained(one, its_optimizer, 4)
        assert torch.equal(vector(model), vector(again))

    @pytest.mark.parametrize("adapter", [None, AdapterConfig(rank=32)])
    def test_a_training_goes_on_bit_for_bit_and_the_plan_counts_its_moments(self, prepared, tmp_path, adapter):
        run = prepared[1]
        recipe: Recipe = replace(run.recipe, adapter=adapter, optim=replace(run.recipe.optim, name="adamw_8bit"))
        (tmp_path / "metrics.jsonl").touch()

        def opened() -> Trainer:
            return Trainer(recipe, prepared[2], tmp_path, Accelerator(cpu=True))

        def stepped(t: Trainer, steps):
            return [t._step(step, t.stages[0], t.steps.batch(step))["loss"] for step in steps]

        t = opened()
        stepped(t, (0, 1))
        t._checkpoint(2)
        expected = stepped(t, (2, 3))
        again = opened()
        assert again._resume() == 2
        assert stepped(again, (2, 3)) == expected
        assert torch.equal(vector(again.fusion), vector(t.fusion))

        target = Architecture("guardian", t.fusion.config, "generates", True, True, adapter=adapter)
        states = [value for state in t.optimizer.state.values() for key, value in state.items() if "qmap" not in key]
        held = sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
        assert moment_bytes(target, recipe.optim) == pytest.approx(held, rel=1e-4)
        assert target.eight_bit > target.trained / 2
        assert held < moment_bytes(target, OptimConfig()) / 1.5
        assert checkpoint_bytes(target, recipe.optim, cuda=True) == pytest.approx(8 * target.trained + 3 * held, 1e-4)

    def test_a_device_that_bitsandbytes_does_not_know_is_refused_in_one_line(self):
        with pytest.raises(ConfigError, match="a device on which bitsandbytes works, xla is none") as found:
            check_optimizer(EIGHT, torch.device("xla"), sharded=False)
        assert "\n" not in str(found.value)
        check_optimizer(EIGHT, CPU, sharded=False)


def test_moments_in_8_bits_are_not_sharded(prepared):
    """Neither where the recipe asks for it nor where the launcher does."""
    with pytest.raises(ConfigError, match="got a launcher that asks for FSDP or DeepSpeed; launch with torchrun"):
        check_optimizer(EIGHT, CPU, sharded=True)
    check_optimizer(OptimConfig(), CPU, sharded=True)
    with pytest.raises(ConfigError, match=r"optim\.shard must be false with optim\.name: adamw_8bit"):
        replace(prepared[1].recipe, optim=replace(EIGHT, shard=True))


def test_a_missing_package_is_found_before_anything_is_prepared(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("profuser.pipeline.Preparation.begin", lambda *_: pytest.fail("the preparation began"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    recipe = replace(
        prepared[1].recipe, output=str(tmp_path), optim=replace(prepared[1].recipe.optim, name="adamw_8bit")
    )
    with pytest.raises(ModuleNotFoundError) as found:
        train(replace(prepared[1], recipe=recipe))
    error = explained(found.value)
    assert "profuser[qlora]" in str(error)
    assert error.exit_code == 2
