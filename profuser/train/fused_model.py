"""The fused model as a Hugging Face directory: weights, tokenizer and model card."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from profuser.recipe.places import BUNDLED_PREFIX
from profuser.recipe.schema import Recipe
from profuser.store.files import write_atomic


def save_fused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, recipe: Recipe, dtype: torch.dtype
) -> None:
    """Write the fused target so that AutoModelForCausalLM and AutoTokenizer load it from the run directory.

    Weights are rounded to the dtype that the target came in; what is scored afterwards is this directory.
    """
    model.to(dtype).save_pretrained(directory)  # pyrefly: ignore[bad-argument-type]  # transformers wraps `to`
    tokenizer.save_pretrained(directory)
    write_atomic(directory / "README.md", model_card(recipe).encode())


def model_card(recipe: Recipe) -> str:
    models = [s.model for s in recipe.sources]
    hub = [m for m in models if not m.startswith(BUNDLED_PREFIX) and not Path(m).exists()]
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["profuser", "model-fusion", "distillation"],
    }
    if hub:
        front["base_model"] = hub
    schedule = recipe.schedule if isinstance(recipe.schedule, str) else "its own stages (see run.json)"
    sources = "\n".join(f"- `{s.name}`: {s.model}" for s in recipe.sources)
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
