"""Model FLOP utilisation: counted by hand for small models, and logged where the device's peak is known."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoConfig, GPT2Config, LlamaConfig, MambaConfig, MixtralConfig, PreTrainedModel
from transformers import AutoModelForCausalLM as Auto

from profuser.recipe.adapter import AdapterConfig
from profuser.train.adapter import with_adapter
from profuser.train.flops import Cost, cost_of, peak_flops, utilisation
from profuser.train.loop import Trainer

V, D, M, L = 50, 16, 24, 2
LLAMA = L * (4 * D * D + 3 * D * M + 2 * D) + D
"""The weights of a small Llama's blocks and of its last norm."""


def llama(**options) -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": M,
        "num_hidden_layers": L,
        "num_attention_heads": 4,
    }
    return Auto.from_config(LlamaConfig(**(sizes | options)))


def test_the_embedding_is_looked_up_and_the_head_is_a_product():
    assert cost_of(llama(tie_word_embeddings=False)) == Cost(6 * (LLAMA + V * D), 12 * L * D)


def test_an_embedding_that_is_the_head_counts_once():
    assert cost_of(llama(tie_word_embeddings=True)) == Cost(6 * (LLAMA + V * D), 12 * L * D)


def test_heads_may_be_wider_than_the_model_and_keys_fewer_than_queries():
    model = llama(head_dim=8, num_key_value_heads=2)
    attention = 2 * D * 32 + 2 * D * 16  # queries and output of four heads; keys and values of two
    blocks = L * (attention + 3 * D * M + 2 * D) + D
    assert cost_of(model) == Cost(6 * (blocks + V * D), 12 * L * 4 * 8)


def test_frozen_weights_cost_4_and_an_adapter_6():
    model = with_adapter(llama(), AdapterConfig(rank=3, target_modules=["q_proj"]))
    adapter = L * 2 * 3 * D
    assert cost_of(model) == Cost(4 * (LLAMA + V * D) + 6 * adapter, 12 * L * D)


def test_weights_in_4_bits_count_as_they_are_computed_with():
    """bitsandbytes packs two of them into a byte, and remembers the shape."""
    model = with_adapter(llama(), AdapterConfig(rank=3, target_modules=["q_proj"]))
    expected = cost_of(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad and module.out_features != V:
            packed: Any = torch.nn.Parameter(
                torch.zeros(module.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False
            )
            packed.quant_state = SimpleNamespace(shape=module.weight.shape)
            module.weight = packed
    assert cost_of(model) == expected


def test_positions_are_looked_up_too():
    model = Auto.from_config(GPT2Config(vocab_size=V, n_embd=D, n_layer=L, n_head=2, n_positions=32))
    block = 12 * D * D + 13 * D  # with biases and the two norms
    assert cost_of(model) == Cost(6 * (L * block + 2 * D + V * D), 12 * L * D)


def test_layers_without_attention_have_no_square():
    mamba = Auto.from_config(MambaConfig(vocab_size=V, hidden_size=D, num_hidden_layers=L, state_size=4))
    cost = cost_of(mamba)
    assert cost is not None
    assert cost.per_square == 0


def test_only_layers_with_attention_are_counted_where_the_configuration_names_them():
    model = llama(num_hidden_layers=4)
    model.config.layer_types = ["linear_attention", "sliding_attention", "linear_attention", "full_attention"]
    cost = cost_of(model)
    assert cost is not None
    assert cost.per_square == 12 * 2 * D


def test_layers_may_have_heads_of_their_own():
    sizes: dict[str, Any] = {"vocab_size": V, "hidden_size": D, "intermediate_size": M, "num_hidden_layers": 6}
    sizes |= {"num_attention_heads": 4, "head_dim": 8, "global_head_dim": 12, "vocab_size_per_layer_input": V}
    model = Auto.from_config(AutoConfig.for_model("gemma4_text", **sizes))
    widths = [layer.head_dim for layer in model.config.per_layer_config]
    assert {*widths} == {8, 12}
    cost = cost_of(model)
    assert cost is not None
    assert cost.per_square == 12 * 4 * sum(widths)


def test_a_mixture_of_experts_is_not_counted():
    sizes: dict[str, Any] = {"vocab_size": V, "hidden_size": D, "intermediate_size": M, "num_hidden_layers": 1}
    assert cost_of(Auto.from_config(MixtralConfig(**sizes, num_attention_heads=2, num_local_experts=4))) is None


def test_sequences_pay_for_themselves_however_they_are_packed():
    cost = Cost(per_token=10, per_square=3)
    assert cost.flops(5 + 7, 5**2 + 7**2) == cost.flops(5, 25) + cost.flops(7, 49) == 120 + 222


def test_the_utilisation_of_a_known_case():
    """A model of 7e9 weights without attention at 10,000 tokens per second on two A100: 4.2e14 of 6.24e14 operations."""
    flops = Cost(6 * 7_000_000_000, 0).flops(20_000, 0)
    assert utilisation(flops, 2.0, 2, 312e12) == pytest.approx(0.673, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a seventh of one
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GH200 480GB", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_peak_is_that_of_the_very_device(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    device = torch.device("cuda", 0)
    assert peak_flops(device, bf16=True) == (None if tflops is None else pytest.approx(tflops * 1e12))
    assert peak_flops(device, bf16=False) is None  # the peaks are those of bf16
    assert peak_flops(torch.device("cpu"), bf16=True) is None


def test_a_step_logs_what_it_used_of_the_peak(prepared, tmp_path, monkeypatch):
    _, run, store = prepared
    recipe = replace(run.recipe, optim=replace(run.recipe.optim, eval_every=0, data_workers=0))

    def lines(name: str) -> list[dict[str, float]]:
        (tmp_path / name).mkdir()
        t = Trainer(recipe, store, tmp_path / name, Accelerator(cpu=True))
        t.train()
        found = [json.loads(line) for line in t.metrics.read_text().splitlines()]
        return [line for line in found if "eval" not in line]

    t = Trainer(recipe, store, tmp_path, Accelerator(cpu=True))
    assert t._utilisation(t.steps.batch(0), 1.0) == {}  # of a CPU no peak is known
    monkeypatch.setattr("profuser.train.loop.peak_flops", lambda *_, **__: 1e9)
    for step, line in enumerate(lines("known")):
        stage = t.stages[0 if step < t.stages[0].stop else 1]
        lengths = [
            len(s.input_ids) for i in t.steps.instructions(step) for s in t.targets[i] if stage.weight(s.mode) > 0
        ]
        # The demo's target has 951,424 weights, of which an embedding of 1,152 x 128 is only looked up; 4 layers of 4 heads x 32.
        flops = 6 * (951_424 - 1_152 * 128) * sum(lengths) + 12 * 4 * 4 * 32 * sum(n * n for n in lengths)
        seconds = line["tokens"] / line["tokens_per_second"]
        assert line["mfu"] == pytest.approx(flops / seconds / 1e9, rel=1e-9)
