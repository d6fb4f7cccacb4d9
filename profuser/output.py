"""What a run leaves behind: a Hugging Face model directory with its card, and where it came from."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from profuser.config import BUNDLED_PREFIX, Recipe
from profuser.store import write_atomic

PACKAGES = (
    "profuser",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "datasets",
    "accelerate",
    "safetensors",
    "numpy",
)


def save_fused(model: PreTrainedModel, tokenizer, directory: Path, recipe: Recipe, dtype: torch.dtype) -> None:
    """Write the fused target so that AutoModelForCausalLM and AutoTokenizer load it from the run directory.

    Weights are rounded to the dtype that the target came in; what is scored afterwards is this directory.
    """
    model.to(dtype).save_pretrained(directory)
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


def environment() -> dict[str, Any]:
    """Versions, hardware and commit, for run.json and results."""
    return {"versions": versions(), "hardware": hardware(), "commit": commit()}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu
        )
    return f"{cpu}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The checkout's commit, with + for uncommitted changes; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "-C", root, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(["git", "-C", root, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def closing_examples(evaluation: dict[str, Any], n: int) -> str:
    """The first held-out prompts of the skills in turn: what the target said before, what the fused model says now."""
    parts = []
    for example in evaluation["examples"][:n]:
        lines = [f"[{example['skill']}] {example['prompt']}"]
        for key, label in (("target_before", "before"), ("fused", "now   ")):
            mark = "right" if example["correct"][key] else "wrong"
            lines.append(f"  {label}: {example['responses'][key]}  ({mark})")
        parts.append("\n".join(lines))
    return "\n".join(["", *parts, ""])
