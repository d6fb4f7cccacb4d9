"""What the plan knows of an architecture is what the real model has: parameters, blocks, caches and activations."""

from __future__ import annotations

import pytest
import torch
from plan_models import PAPER, demo, small
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from profuser.models.load import load_model
from profuser.plan.architecture import CONFIGS, Architecture, open_architecture
from profuser.recipe.parse import parse_run
from profuser.recipe.schema import SourceConfig


@pytest.mark.parametrize(
    "model",
    [
        small("llama", tie_word_embeddings=False),
        small("llama", tie_word_embeddings=True, num_key_value_heads=2),
        small("qwen2", tie_word_embeddings=True),
        small("gemma2", head_dim=8, num_key_value_heads=2),
        small("gpt_neox"),
        small("gpt2", n_embd=32, n_layer=3, n_head=4),
        small("mpt", d_model=32, n_layers=3, n_heads=4, no_bias=True),
    ],
    ids=lambda model: model.name,
)
def test_parameters_are_those_of_the_real_model(model):
    real = AutoModelForCausalLM.from_config(model.config)
    assert model.parameters == sum(p.numel() for p in real.parameters())
    assert model.largest == max(p.numel() for p in real.parameters())
    assert model.block * model.layers + model.root == model.parameters
    assert 0 < model.block < model.parameters / 3


def test_a_tied_head_counts_once():
    tied, untied = (small("llama", tie_word_embeddings=t).parameters for t in (True, False))
    assert untied - tied == 101 * 32


@pytest.mark.parametrize("name", ["guardian", "scholar", "reckoner"])
def test_parameters_are_those_of_the_loaded_weights(name):
    source = SourceConfig(name=name, model=f"demo:{name}")
    assert demo(name).parameters == sum(p.numel() for p in load_model(source, torch.float32).parameters())


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("lmsys/vicuna-7b-v1.5", 6_738_415_616),
        ("meta-llama/Llama-2-7b-chat-hf", 6_738_415_616),
        ("mosaicml/mpt-7b-8k-chat", 6_649_286_656),
    ],
)
def test_the_papers_models_have_their_published_sizes(model, parameters):
    found = open_architecture(SourceConfig(name="m", model=model))
    assert (found.parameters, found.bundled, found.here) == (parameters, True, False)


def test_every_hub_model_of_the_papers_recipe_is_bundled():
    recipe = parse_run("train", ["--config", PAPER]).recipe
    names = [model.model for model in (*recipe.sources, *recipe.judges)]
    assert all((CONFIGS / f"{str(name).replace('/', '--')}.json").is_file() for name in names)


def test_the_cache_of_keys_and_values():
    assert small("llama", num_key_value_heads=2).cache == 2 * 3 * 2 * 8
    assert small("llama", num_key_value_heads=2, head_dim=16).cache == 2 * 3 * 2 * 16
    assert small("mamba", num_attention_heads=None).cache == 0


def test_layers_may_differ():
    model = small("gemma4_text", num_hidden_layers=6, num_key_value_heads=2, head_dim=8, vocab_size_per_layer_input=101)
    found = {
        (layer.head_dim, layer.num_key_value_heads, layer.intermediate_size) for layer in model.config.per_layer_config
    }
    assert len(found) > 1
    layers = model.config.per_layer_config
    assert model.cache == sum(2 * layer.num_key_value_heads * layer.head_dim for layer in layers)
    assert model.inner == max(layer.intermediate_size for layer in layers)
    assert small("gemma3n_text", num_hidden_layers=5, vocab_size_per_layer_input=101).inner == 48


def test_what_is_in_no_block_is_counted_where_blocks_differ():
    model = small("jamba", num_hidden_layers=8, num_key_value_heads=2, num_experts=4, use_mamba_kernels=False)
    assert model.block * model.layers > model.parameters
    outside = [p.numel() for name, p in model.model.named_parameters() if ".layers." not in name]
    assert model.root == sum(outside) == 2 * 101 * 32 + 32


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_what_a_real_pass_keeps(checkpointing, bf16):
    model = small("llama", num_key_value_heads=2, head_dim=8)
    copies = check_saved(model, checkpointing, bf16)
    linear = 2 * (model.block - 2 * 32) * model.layers  # all of a block but its two norms
    assert copies == (linear if bf16 and not checkpointing else 0)


def test_activations_of_a_mixture_of_experts_are_what_a_real_pass_keeps():
    check_saved(small("mixtral", num_key_value_heads=2, num_local_experts=4), checkpointing=False, bf16=True)


def check_saved(model: Architecture, checkpointing: bool, bf16: bool) -> int:
    """Compares what the plan says with what a pass keeps. Returns the bytes of copies in bf16 that are in it."""
    real = AutoModelForCausalLM.from_config(model.config).train()
    if checkpointing:
        real.gradient_checkpointing_enable()
    own = {t.untyped_storage().data_ptr() for t in (*real.parameters(), *real.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.arange(3 * 40).reshape(3, 40) % 101
    with saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = real.base_model(input_ids=ids, attention_mask=(ids > 0).long(), use_cache=False)
    total = sum(storage.nbytes() for storage in kept.values())
    assert hidden is not None  # what it keeps lives as long as its graph
    activations, copies = model.saved(3, 40, bf16=bf16, checkpointing=checkpointing)
    assert activations + copies == pytest.approx(total, rel=0.05)
    return copies
