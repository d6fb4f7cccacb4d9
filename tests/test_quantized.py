"""QLoRA: an adapter learns on a target whose frozen weights are held in 4 bits, and is merged into the weights as they were."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from adapter_checks import check_resumed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from profuser.cli import explained
from profuser.errors import ConfigError
from profuser.fusion_model import FusionModel
from profuser.models.load import load_model
from profuser.pipeline import train
from profuser.plan.architecture import Architecture
from profuser.recipe.adapter import AdapterConfig
from profuser.recipe.places import resolve
from profuser.recipe.schema import SourceConfig
from profuser.train import compiled
from profuser.train.adapter import with_adapter
from profuser.train.loop import Trainer
from profuser.train.quantized import check_quantize, load_quantized

CPU = torch.device("cpu")
GUARDIAN = SourceConfig(name="guardian", model="demo:guardian")
QLORA = AdapterConfig(rank=4, alpha=8.0, quantize="nf4")


def quantized(run, directory, **optim):
    recipe = replace(run.recipe, adapter=QLORA, output=str(directory), optim=replace(run.recipe.optim, **optim))
    return replace(run, recipe=recipe)


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    run = quantized(prepared[1], tmp_path_factory.mktemp("qlora") / "run", lr=2e-2)
    return run, train(run)


class TestWithBitsandbytes:
    @pytest.fixture(autouse=True)
    def package(self):
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

    @pytest.mark.long
    def test_the_written_model_has_the_adapter_merged_into_the_weights_as_they_were(self, finished):
        from peft import PeftModel

        run, scores = finished
        assert scores["fused"]
        target = AutoModelForCausalLM.from_pretrained(resolve("demo:guardian"), dtype=torch.float32)
        before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
        alone = PeftModel.from_pretrained(target, run.output_dir / "adapter").merge_and_unload().state_dict()
        assert sum(not torch.equal(alone[name], tensor) for name, tensor in before.items()) == 4 * 7
        written = AutoModelForCausalLM.from_pretrained(run.output_dir)
        assert not hasattr(written.config, "quantization_config")
        for name, tensor in written.state_dict().items():
            assert torch.equal(tensor, alone[name].to(tensor.dtype)), name

    @pytest.mark.long
    def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(self, prepared, finished, tmp_path, monkeypatch):
        run = quantized(prepared[1], tmp_path / "run", lr=2e-2, checkpoint_every=1)
        check_resumed(run, finished, monkeypatch)
        weights = load_file(sorted((run.output_dir / "checkpoints").iterdir())[-1] / "model.safetensors")
        assert all(".lora_A." in name or ".lora_B." in name for name in weights)

    def test_gradients_are_those_on_the_weights_that_the_4_bits_stand_for_also_after_an_evaluation(self):
        """An evaluation must not repack the weights for a product without gradients, as bitsandbytes does on some CPUs."""
        import bitsandbytes.functional as bnb

        held = load_quantized(GUARDIAN, torch.float32, CPU, packs=False)
        plain = load_model(GUARDIAN, torch.float32)
        weights: dict[str, Any] = {
            name: m.weight for name, m in held.named_modules() if type(m).__name__ == "Linear4bit"
        }
        assert len(weights) == 4 * 7
        assert {(w.quant_state.quant_type, w.quant_state.nested) for w in weights.values()} == {("nf4", True)}
        for name, weight in weights.items():
            in_4_bits: Any = held.get_submodule(name)
            assert in_4_bits.compute_dtype == torch.float32
            layer: Any = plain.get_submodule(name)
            layer.weight.data = bnb.dequantize_4bit(weight.data, weight.quant_state).to(torch.float32)
        ids = torch.arange(5, 45)[None]
        found = []
        for model in (held, plain):
            torch.manual_seed(0)
            adapted = with_adapter(model, AdapterConfig(rank=2))
            for name, parameter in adapted.named_parameters():
                if ".lora_B." in name:
                    torch.nn.init.normal_(parameter, std=0.05)
            fusion = FusionModel(adapted, beta=0.0)  # which computes hidden states in evaluation mode
            with torch.no_grad():
                fusion.eval()(ids, labels=ids)
            loss = fusion.train()(ids, labels=ids)["loss"]
            loss.backward()
            gradients = [p.grad.flatten() for p in fusion.parameters() if p.grad is not None]
            found.append((loss.item(), torch.cat(gradients)))
        (loss, gradients), (true_loss, true_gradients) = found
        assert loss == pytest.approx(true_loss, rel=1e-5)
        assert gradients.norm() > 0
        assert (gradients - true_gradients).norm() < 1e-4 * true_gradients.norm()

    @pytest.mark.long
    def test_compiled_it_is_one_graph_with_the_same_gradients(self, monkeypatch):
        from torch._dynamo.utils import counters

        monkeypatch.setattr(compiled, "BACKEND", "eager")
        torch._dynamo.reset()
        counters.clear()
        held = load_quantized(GUARDIAN, torch.float32, CPU, packs=False)
        fusion = FusionModel(with_adapter(held, AdapterConfig(rank=2)), beta=0.0).train()
        ids = torch.arange(5, 45)[None].repeat(2, 1)
        found = []
        for on in (False, True):
            if on:
                compiled.compile_target(fusion)
            fusion.zero_grad()
            fusion(ids, labels=ids)["loss"].backward()
            found.append(torch.cat([p.grad.flatten() for p in fusion.parameters() if p.grad is not None]))
        torch._dynamo.reset()
        assert found[0].norm() > 0
        assert torch.equal(*found)
        assert counters["stats"]["unique_graphs"] == 1

    def test_the_plan_counts_as_many_bytes_as_the_weights_have(self, prepared, tmp_path):
        run = quantized(prepared[1], tmp_path)
        t = Trainer(run.recipe, prepared[2], tmp_path, Accelerator(cpu=True))
        held = [parameter for parameter in t.fusion.parameters() if parameter.dtype == torch.uint8]
        assert len(held) == 4 * 7
        target = Architecture("guardian", t.fusion.config, "generates", True, True, adapter=QLORA)
        assert target.quantized == sum(2 * parameter.numel() for parameter in held)  # two in a byte

    def test_weights_that_are_quantised_already_or_an_adapters_are_refused(self, finished, tmp_path, monkeypatch):
        model = load_quantized(GUARDIAN, torch.float32, CPU, packs=False)
        model.config.save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=r"adapter\.quantize must go with weights that are not quantised yet"):
            check_quantize(SourceConfig(name="q", model=str(tmp_path)), CPU)
        check_quantize(GUARDIAN, CPU)
        with pytest.raises(ConfigError, match=r"must go with a whole model, the target .* is itself an adapter"):
            check_quantize(SourceConfig(name="a", model=str(finished[0].output_dir / "adapter")), CPU)
        monkeypatch.setattr("profuser.train.quantized.weights_of", lambda target: ("m", {"gguf_file": "m.gguf"}))
        with pytest.raises(ConfigError, match="those of m are"):
            check_quantize(GUARDIAN, CPU)

    def test_a_device_that_bitsandbytes_does_not_know_is_refused_in_one_line(self):
        with pytest.raises(ConfigError, match="a device on which bitsandbytes works, xla is none") as found:
            check_quantize(GUARDIAN, torch.device("xla"))
        assert "\n" not in str(found.value)


def test_a_missing_package_is_found_before_anything_is_prepared(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("profuser.pipeline.Preparation.begin", lambda *_: pytest.fail("the preparation began"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModuleNotFoundError) as found:
        train(quantized(prepared[1], tmp_path / "run"))
    error = explained(found.value)
    assert "profuser[qlora]" in str(error)
    assert error.exit_code == 2
