"""Writes the fused model as a Hugging Face directory: weights, configuration, tokenizer and model card."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from profuser.recipe.schema import Recipe
from profuser.store.files import move_into_place, open_to_umask, temporary_beside, writing
from profuser.train.adapter import FOLDER as ADAPTER
from profuser.train.adapter import merged, save_adapter
from profuser.train.model_card import CARD, adapter_card, model_card

MAX_SHARD = "5GB"
"""Larger models are written as several files."""


def save_fused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, recipe: Recipe, dtype: torch.dtype
) -> list[str]:
    """Writes the fused target into the run directory, from which AutoModelForCausalLM and AutoTokenizer can load it.

    The weights are rounded to `dtype`, in which the target was stored before. The scores are those of the written model. An adapter
    is merged into it, and also written alone. The names of the files are returned. They are written into a folder of their own, from
    which they are moved when all are there.
    """
    folder = temporary_beside(directory / "model")
    shutil.rmtree(folder, ignore_errors=True)
    size = model.num_parameters() * dtype.itemsize  # which counts quantised weights one by one
    try:
        with writing(folder, size):
            if recipe.adapter is not None:
                save_adapter(model, folder / ADAPTER)
                (folder / ADAPTER / CARD).write_text(adapter_card(recipe, recipe.adapter.rank), encoding="utf-8")
            save_weights(merged(model, recipe, folder / ADAPTER), folder, dtype)
            tokenizer.save_pretrained(folder)
            (folder / CARD).write_text(model_card(recipe), encoding="utf-8")
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        for name in names:
            move_into_place(folder / name, directory / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return names


def save_weights(model: PreTrainedModel, directory: Path, dtype: torch.dtype) -> None:
    """Writes a model's weights, rounded to `dtype`, and its configuration."""
    model.to(dtype).save_pretrained(directory, max_shard_size=MAX_SHARD)  # pyrefly: ignore[bad-argument-type]  # transformers wraps `to`
    open_to_umask(directory.glob("*.safetensors"))
