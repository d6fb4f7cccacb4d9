"""Writes the fused model as a Hugging Face directory: weights, tokenizer and model card."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from profuser.recipe.places import BUNDLED_PREFIX
from profuser.recipe.schema import Recipe
from profuser.store.files import move_into_place, open_to_umask, temporary_beside, writing
from profuser.train.adapter import FOLDER as ADAPTER
from profuser.train.adapter import is_adapted, merged, save_adapter


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
    size = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    try:
        with writing(folder, size):
            if is_adapted(model):
                save_adapter(model, folder / ADAPTER)
            save_weights(merged(model), folder, dtype)
            tokenizer.save_pretrained(folder)
            (folder / "README.md").write_text(model_card(recipe), encoding="utf-8")
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        for name in names:
            move_into_place(folder / name, directory / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return names


def save_weights(model: PreTrainedModel, directory: Path, dtype: torch.dtype) -> None:
    """Writes a model's weights, rounded to `dtype`, and its configuration."""
    model.to(dtype).save_pretrained(directory)  # pyrefly: ignore[bad-argument-type]  # transformers wraps `to`
    open_to_umask(directory.glob("*.safetensors"))


def model_card(recipe: Recipe) -> str:
    """Returns the model card: what was fused into what, and how to load the result."""
    # The model card's `base_model` may name models on the Hub only.
    models = [source.model for source in recipe.sources]
    hub = [model for model in models if not model.startswith(BUNDLED_PREFIX) and not Path(model).exists()]
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["profuser", "model-fusion", "distillation"],
    }
    if hub:
        front["base_model"] = hub
    schedule = recipe.schedule if isinstance(recipe.schedule, str) else "its own stages (see run.json)"
    sources = "\n".join(f"- `{source.name}`: {source.model}" for source in recipe.sources)
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n"
        f"# {recipe.target}, fused with profuser\n\n"
        f"`{recipe.target}` after fusion of {len(recipe.sources)} sources by the schedule **{schedule}** "
        "(ProFuser, [arXiv 2408.04998](https://arxiv.org/abs/2408.04998)).\n\n"
        f"Sources:\n\n{sources}\n\n"
        "Held-out scores are in `scores.json`, the whole account in `report.html`, the recipe and versions in `run.json`.\n"
        "The licences of the sources and of the training data apply to this model.\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("this directory")\n'
        'tokenizer = AutoTokenizer.from_pretrained("this directory")\n'
        'messages = [{"role": "user", "content": "..."}]\n'
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)\n'
        "output = model.generate(**inputs, max_new_tokens=64)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))\n```\n'
    )
