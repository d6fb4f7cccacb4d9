"""What the tests of merging share: small models on disk, their weights, and the result of a method on tensors."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from small_tokenizers import pretrained_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from profuser.merge.blocks import Blocks
from profuser.merge.run import merge
from profuser.merge.settings import MergeSettings
from profuser.recipe.places import resolve

LAYERS = 4


def whole(method, tensors, *settings, **named):
    """What a method gives for some tensors, put together from its blocks."""
    parts = method(Blocks(tensors, [None] * len(tensors)), *settings, **named)
    return torch.cat([part.reshape(-1) for part in parts]).reshape(tensors[0].shape)


def config_of(size: int, *, tied: bool = False) -> LlamaConfig:
    """The configuration of a small model with so many tokens."""
    return LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4, tie_word_embeddings=tied
    )  # fmt: skip


def make_models(folder: Path) -> dict[str, str]:
    """A base and three models that were trained from it, all with guardian's tokenizer."""
    tokenizer = pretrained_tokenizer(resolve("demo:guardian"))
    torch.manual_seed(0)
    config = config_of(len(tokenizer))
    base = AutoModelForCausalLM.from_config(config)
    found = {"base": written(folder / "base", base, tokenizer)}
    for name in "abc":
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        found[name] = written(folder / name, model, tokenizer)
    return found


def written(folder: Path, model, tokenizer) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(path).items()}


def merged(tmp_path, settings: MergeSettings) -> dict[str, torch.Tensor]:
    merge(settings, tmp_path / "merged")
    return weights(tmp_path / "merged")


def changed(source: str, folder: Path, change) -> str:
    """Copies a model and changes its weights. It returns the copy."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)
