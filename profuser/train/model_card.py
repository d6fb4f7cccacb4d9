"""The model card of a fused model: what was fused into what and on which data, how well it does, under which licences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.repocard import metadata_load

from profuser.recipe.places import BUNDLED_PREFIX, resolve
from profuser.recipe.schedule import stages_of
from profuser.recipe.schema import Recipe, SourceConfig
from profuser.store.files import write_atomic

CARD = "README.md"

LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this directory")
tokenizer = AutoTokenizer.from_pretrained("this directory")
messages = [{"role": "user", "content": "..."}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""

LOADING_ADAPTER = """\
```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("this directory")  # on top of the base that adapter_config.json names
```
"""


def write_card(directory: Path, recipe: Recipe, scores: Mapping[str, Any]) -> None:
    """Writes the model card of a run again, with the scores of scores.json."""
    write_atomic(directory / CARD, model_card(recipe, scores).encode())


def model_card(recipe: Recipe, scores: Mapping[str, Any] | None = None) -> str:
    """Returns the model card. `scores` is the content of scores.json, if the model has been scored."""
    # The card's `base_model` may name models on the Hub only.
    models = [source.model for source in recipe.sources]
    hub = [model for model in models if not model.startswith(BUNDLED_PREFIX) and not Path(model).exists()]
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["profuser", "model-fusion", "distillation"],
    }
    if hub:
        front["base_model"] = hub
    schedule = recipe.schedule if isinstance(recipe.schedule, str) else "its own stages"
    rows = "\n".join(f"| `{source.name}` | {source.model} | {licence(source)} |" for source in recipe.sources)
    stages = "\n".join(
        f"| {number} | {stage.inference_weight:g} | {stage.training_weight:g} | "
        f"{recipe.optim.beta if stage.beta is None else stage.beta:.4g} |"
        for number, stage in enumerate(stages_of(recipe), start=1)
    )
    details = "" if recipe.adapter is None else f" A LoRA adapter of rank {recipe.adapter.rank} was trained and merged."
    if recipe.optim.export == "best":
        details += " The weights are those with the lowest cross-entropy in validation; `run.json` names their step."
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n"
        f"# {recipe.target}, fused with profuser\n\n"
        f"`{recipe.target}` after fusion of {len(recipe.sources)} sources by the schedule **{schedule}** "
        f"(ProFuser, [arXiv 2408.04998](https://arxiv.org/abs/2408.04998)) on {recipe.data.location('train')}.{details}\n\n"
        f"| source | model | licence |\n|---|---|---|\n{rows}\n\n"
        "The licences of the sources and of the training data apply to this model.\n\n"
        "| stage | weight of the inference mode | weight of the training mode | weight of KL (beta) |\n|---|---:|---:|---:|\n"
        f"{stages}\n\n"
        f"{score_rows(scores) if scores else ''}"
        "In the directory of the run, held-out scores are in `scores.json`, the whole account is in `report.html`, and the recipe and "
        "the versions are in `run.json`.\n\n"
        f"{LOADING}"
    )


def adapter_card(recipe: Recipe, rank: int) -> str:
    """Returns the card of the adapter alone, which lies in a folder of the fused model."""
    base = recipe.target_config.model
    front = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["profuser", "lora"]}
    if not base.startswith(BUNDLED_PREFIX) and not Path(base).exists():
        front["base_model"] = base
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n"
        f"# The adapter of {recipe.target}, fused with profuser\n\n"
        f"A LoRA adapter of rank {rank} over {base}, trained on {recipe.data.location('train')}. The model in the folder above has it "
        "merged into its weights. The card there says from which sources and in which stages it learnt, how well it does, and under "
        "which licences.\n\n"
        f"{LOADING_ADAPTER}"
    )


def score_rows(scores: Mapping[str, Any]) -> str:
    """Returns the held-out scores as a table, in percent."""
    skills = list(scores["fused"])
    models = {**scores["sources"], "target before": scores["target_before"], "**fused**": scores["fused"]}
    head = f"| held-out, percent right | {' | '.join(skills)} |\n|---|{'---:|' * len(skills)}\n"
    rows = "".join(
        f"| {name} | {' | '.join(f'{100 * of_model[skill]:.1f}' for skill in skills)} |\n"
        for name, of_model in models.items()
    )
    return f"{head}{rows}\n"


def licence(source: SourceConfig) -> str:
    """Returns the licence that a source's own model card names, as far as the card is on this machine."""
    if source.model.startswith(BUNDLED_PREFIX):
        return "Apache-2.0"
    place: Any = Path(resolve(source.model)) / CARD
    if not Path(resolve(source.model)).exists():
        place = try_to_load_from_cache(source.model, CARD, revision=source.revision)
    try:
        found = metadata_load(place) or {}
    except (OSError, TypeError, ValueError, yaml.YAMLError):  # there is no card, or one that cannot be read
        found = {}
    named = found.get("license") if isinstance(found, dict) else None
    return " ".join(f"{named}".split()) if named else "not found in its model card"
