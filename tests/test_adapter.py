"""A LoRA adapter learns in place of the target's weights; checkpoints hold it alone, and the written model has it merged."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from adapter_checks import check_resumed
from conftest import ROOT
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Mamba2Config

from profuser.cli import explained
from profuser.errors import ConfigError
from profuser.models.load import load_model
from profuser.pipeline import train
from profuser.recipe.adapter import AdapterConfig
from profuser.recipe.places import resolve
from profuser.recipe.schema import SourceConfig
from profuser.train.adapter import check_adapter, merged, with_adapter
from profuser.train.loop import Trainer
from profuser.train.target import whole_target

CPU = torch.device("cpu")
ADAPTER = AdapterConfig(rank=4, alpha=8.0)


def adapted(run, directory: Path, adapter=ADAPTER, **optim):
    recipe = replace(run.recipe, adapter=adapter, output=str(directory), optim=replace(run.recipe.optim, **optim))
    return replace(run, recipe=recipe)


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory):
    run = adapted(prepared[1], tmp_path_factory.mktemp("lora") / "run", lr=2e-2)
    return run, train(run)


def test_the_written_model_is_the_target_with_the_adapter_merged(finished):
    run, scores = finished
    assert scores["fused"]
    target = AutoModelForCausalLM.from_pretrained(resolve("demo:guardian"), dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    alone = PeftModel.from_pretrained(target, run.output_dir / "adapter").merge_and_unload().state_dict()
    written = AutoModelForCausalLM.from_pretrained(run.output_dir)
    changed = [name for name, tensor in before.items() if not torch.equal(alone[name], tensor)]
    assert len(changed) == 4 * 7  # the linear layers of every block
    for name, tensor in written.state_dict().items():
        assert torch.equal(tensor, alone[name].to(tensor.dtype)), name
    config = json.loads((run.output_dir / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == resolve("demo:guardian")
    assert config["target_modules"] == sorted(config["target_modules"])  # the same bytes in every run
    card = (run.output_dir / "adapter/README.md").read_text()  # peft's own is a form to be filled in
    assert "A LoRA adapter of rank 4 over demo:guardian" in card
    assert "More Information Needed" not in card
    record = json.loads((run.output_dir / "run.json").read_text())
    assert "adapter/adapter_model.safetensors" in record["files"]


@pytest.mark.long  # bitsandbytes warns when it is imported, which needs a process of its own
def test_libraries_do_not_warn_of_an_adapter_in_a_clones_root():
    """There the folder kernels/ hides a package of this name, in which bitsandbytes looks for a product in 4 bits on some CPUs."""
    code = """if True:
        from profuser.cli import quiet_libraries
        quiet_libraries()
        import torch
        from profuser.models.load import load_without_weights
        from profuser.recipe.adapter import AdapterConfig
        from profuser.recipe.schema import SourceConfig
        from profuser.train.adapter import with_adapter
        with_adapter(load_without_weights(SourceConfig(name="target", model="demo:guardian"), torch.float32), AdapterConfig())
    """
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stderr == ""


def test_a_checkpoint_holds_the_adapter_alone(finished):
    run, _ = finished
    weights = load_file(sorted((run.output_dir / "checkpoints").iterdir())[-1] / "model.safetensors")
    assert len(weights) == 2 * 4 * 7
    assert all(".lora_A." in name or ".lora_B." in name for name in weights)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(prepared, finished, tmp_path, monkeypatch):
    run = adapted(prepared[1], tmp_path / "run", lr=2e-2, checkpoint_every=1)
    check_resumed(run, finished, monkeypatch)


def test_gradient_checkpointing_keeps_the_adapters_gradients(prepared, tmp_path):
    found = []
    for checkpointing in (False, True):
        run = adapted(prepared[1], tmp_path / str(checkpointing), gradient_checkpointing=checkpointing)
        (tmp_path / str(checkpointing)).mkdir()
        t = Trainer(run.recipe, prepared[2], tmp_path / str(checkpointing), Accelerator(cpu=True))
        assert any(getattr(m, "gradient_checkpointing", False) for m in t.fusion.modules()) == checkpointing
        (micro, *_) = t.steps.batch(0).micro_batches
        t.fusion(**micro.tensors(torch.device("cpu")), reduction="sum")["loss"].backward()
        found.append({n: p.grad for n, p in t.fusion.named_parameters() if p.grad is not None})
    assert any(bool(grad.any()) for grad in found[0].values())
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


def test_the_frozen_weights_are_in_bf16_where_it_computes_in_bf16(prepared, tmp_path):
    run = adapted(prepared[1], tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        t = Trainer(run.recipe, prepared[2], tmp_path, Accelerator(cpu=True, mixed_precision="bf16"))
        dtypes = {p.requires_grad: p.dtype for p in t.fusion.parameters()}
        assert dtypes == {True: torch.float32, False: torch.bfloat16}
        assert t._step(0, t.stages[0], t.steps.batch(0))["loss"] > 0
        without = Trainer(prepared[1].recipe, prepared[2], tmp_path, t.accelerator)
        assert {p.dtype for p in without.fusion.parameters()} == {torch.float32}
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_wrong_modules_and_a_missing_package_are_found_before_anything_is_prepared(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("profuser.pipeline.Preparation.begin", lambda *_: pytest.fail("the preparation began"))
    with pytest.raises(ConfigError, match="got q_projj"):
        train(adapted(prepared[1], tmp_path / "a", AdapterConfig(target_modules=["q_projj"])))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError) as found:
        train(adapted(prepared[1], tmp_path / "b"))
    assert "profuser[lora]" in str(explained(found.value))


def guardian():
    return load_model(SourceConfig(name="g", model="demo:guardian"), torch.float32)


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        (["q_projj"], "got q_projj; it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
        (["q_proj", "lm_head"], "must not have the head, got lm_head"),
        (["embed_tokens"], "must name layers of the target, got embed_tokens"),
    ],
)
def test_modules_that_the_target_has_not_are_refused(modules, said):
    with pytest.raises(ConfigError, match=said):
        with_adapter(guardian(), AdapterConfig(target_modules=modules))


def test_layers_that_peft_does_not_adapt_are_refused():
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "head_dim": 8,
        "num_heads": 8,
        "state_size": 4,
        "num_hidden_layers": 1,
        "vocab_size": 9,
    }
    with pytest.raises(
        ConfigError, match=r"adapter must fit the target, .*'out_proj'.*; name other layers in adapter\.target_modules"
    ):
        with_adapter(AutoModelForCausalLM.from_config(Mamba2Config(**sizes)), ADAPTER)


def test_only_the_named_layers_are_adapted_as_the_recipe_says():
    config = AdapterConfig(target_modules=["q_proj", "v_proj"], rank=2, alpha=6.0, dropout=0.25)
    model = with_adapter(guardian(), config)
    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert (layer.scaling["default"], layer.lora_dropout["default"].p) == (3.0, 0.25)
    trained = {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "adapter.rank must be > 0"),
        ({"alpha": -1.0}, "adapter.alpha must be > 0"),
        ({"dropout": 1.0}, r"adapter.dropout must be in \[0, 1\)"),
        ({"target_modules": "q_proj"}, "must be a list of names or all-linear, got 'q_proj'"),
        ({"target_modules": []}, r"must have a name, got \[\]"),
    ],
)
def test_settings_out_of_range_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        AdapterConfig(**options)


def test_a_quantised_target_is_not_sharded(prepared):
    """Neither where the recipe asks for it nor where the launcher does. An adapter alone can be."""
    recipe, quantized = prepared[1].recipe, replace(ADAPTER, quantize="nf4")
    with pytest.raises(ConfigError, match="got a launcher that asks for FSDP or DeepSpeed; launch with torchrun"):
        check_adapter(replace(recipe, adapter=quantized), CPU, sharded=True)
    check_adapter(recipe, CPU, sharded=True)
    check_adapter(replace(recipe, adapter=ADAPTER), CPU, sharded=True)
    shard = replace(recipe.optim, shard=True)
    with pytest.raises(ConfigError, match=r"optim\.shard must be false with adapter\.quantize"):
        replace(recipe, adapter=quantized, optim=shard)
    replace(recipe, adapter=ADAPTER, optim=shard)


@pytest.fixture
def group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("checkpointing", "precision"),
    [
        (True, "bf16"),
        pytest.param(False, "no", marks=pytest.mark.long),
        pytest.param(True, "no", marks=pytest.mark.long),
        pytest.param(False, "bf16", marks=pytest.mark.long),
    ],
)
def test_a_sharded_target_with_an_adapter_takes_the_steps_of_a_whole_one(
    prepared, tmp_path, group, precision, checkpointing
):
    """One process counts as several. The frozen weights are divided as well, and are in 16 bits where the passes are."""
    written = []
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        for shard in (False, True):
            run = adapted(prepared[1], tmp_path, shard=shard, lr=1e-2, gradient_checkpointing=checkpointing)
            accelerator = Accelerator(cpu=True, mixed_precision=precision)
            t = Trainer(run.recipe, prepared[2], tmp_path, accelerator)
            assert t.sharded == shard
            assert t.fusion.keeps_apart.keys() == {False, True}  # as the main process has found with its weights
            assert all(isinstance(p, DTensor) == shard for p in t.fusion.parameters())
            frozen = torch.bfloat16 if precision == "bf16" else torch.float32
            assert {(p.requires_grad, p.dtype) for p in t.fusion.parameters()} == {
                (True, torch.float32), (False, frozen),
            }  # fmt: skip
            losses = [t._step(step, t.stages[0], t.steps.batch(step))["loss"] for step in range(3)]
            target = whole_target(t.fusion, run.recipe, t.saved_dtype, accelerator)
            assert target is not None
            written.append((losses, merged(target, run.recipe, tmp_path).state_dict()))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    (losses, expected), (ours, merged_) = written
    # In 16 bits a sharded target computes everything but the loss in them, and a whole one what autocast chooses.
    assert ours == pytest.approx(losses, rel=2e-2 if precision == "bf16" else 1e-6)
    assert merged_.keys() == expected.keys()
    for name, tensor in merged_.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-2 if precision == "bf16" else 1e-6)
