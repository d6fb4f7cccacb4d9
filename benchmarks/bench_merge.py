"""How long merging models takes and how much memory, beside mergekit in the same run.

    PROFUSER_MERGE_LAYERS=26 PROFUSER_MERGEKIT=/path/to/mergekits/bin/python pytest benchmarks/bench_merge.py --benchmark-only

The models are random, of Llama's architecture, in bf16; with 26 layers they have 1 GB each, with the 2 of the default 0.2 GB. Both
programs are started as commands, so their imports count. Memory is the most that is the process's own (RssAnon): pages of the input
files, which the system may drop at any time, do not count. What a process owns after its imports alone is printed beside it.
Both run PROFUSER_MERGE_ROUNDS times by turns (once by default). Without PROFUSER_MERGEKIT only our own merge is measured.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import surroundings
from profuser.recipe.places import resolve

LAYERS = int(os.environ.get("PROFUSER_MERGE_LAYERS", "2"))
ROUNDS = int(os.environ.get("PROFUSER_MERGE_ROUNDS", "1"))
HIDDEN, INNER, VOCABULARY = 1024, 4096, 32000
MODELS = ("base", "a", "b")
HALF = {"weight": 0.5, "density": 0.5}
METHODS: dict[str, tuple[str | None, dict[str, dict[str, float]], dict[str, float]]] = {
    "linear": (None, {"a": {"weight": 0.5}, "b": {"weight": 0.5}}, {}),
    "slerp": ("a", {"a": {}, "b": {}}, {"t": 0.3}),
    "ties": ("base", {"a": HALF, "b": HALF}, {}),
}
"""For each method the base, the models with their parameters, and the parameters of all."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A directory with three models, whose weights lie near to each other. Parameters of one shape are alike in one model."""
    root = tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=16, tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    noise = {shape: torch.randn(shape, generator=generator) for shape in sorted(set(shapes.values()))}
    base = {shape: (0.02 * values).to(torch.bfloat16) for shape, values in noise.items()}
    for model in MODELS:
        place = root / model
        place.mkdir()
        weights = base
        if model != "base":
            noise = {shape: torch.randn(shape, generator=generator) for shape in noise}
            weights = {shape: base[shape] + (0.002 * noise[shape]).to(torch.bfloat16) for shape in base}
        tensors = {name: weights[shape].clone() for name, shape in shapes.items()}
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(place)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(resolve("demo:guardian")) / name, place)
    return root


def own_memory(process: int) -> int:
    """The bytes that are a process's own now, and 0 if it has ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon")), 0)


def run(command: Sequence[str]) -> tuple[float, int]:
    """The seconds that a command takes, and the most memory that was its own. Python may keep what it has compiled, as it does."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    begin, most = time.perf_counter(), 0
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        most = max(most, own_memory(process.pid))
        time.sleep(0.005)
    seconds = time.perf_counter() - begin
    assert process.returncode == 0, process.stderr.read().decode()[-2000:] if process.stderr else ""
    return seconds, most


def version_of_mergekit(python: str) -> str:
    command = [python, "-c", "from importlib.metadata import version; print(version('mergekit'))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def recipe(method: str, root: Path) -> Path:
    """mergekit's YAML for a method."""
    base, models, parameters = METHODS[method]
    content = {
        "merge_method": method,
        "models": [{"model": str(root / name), "parameters": values} for name, values in models.items()],
        "parameters": parameters,
        "dtype": "bfloat16",
    }
    path = root / f"{method}.yaml"
    path.write_text(yaml.safe_dump(content | ({"base_model": str(root / base)} if base else {})), encoding="utf-8")
    return path


@pytest.mark.parametrize("method", METHODS)
def test_merging(benchmark, models, method):
    config = str(recipe(method, models))
    ours = [sys.executable, "-m", "profuser.merge", "--config", config, "--output"]
    imports = run(
        [sys.executable, "-c", "import torch, transformers, profuser.merge.run; import time; time.sleep(0.1)"]
    )[1]
    theirs = os.environ.get("PROFUSER_MERGEKIT")
    found: dict[str, list[tuple[float, int]]] = {"ours": [], "mergekit": []}

    def measure() -> None:
        out = str(models / "out")
        found["ours"].append(run([*ours, out]))
        shutil.rmtree(out)
        if theirs:
            found["mergekit"].append(run([theirs, "-m", "mergekit.scripts.run_yaml", config, out]))
            shutil.rmtree(out)

    benchmark.pedantic(measure, rounds=ROUNDS)
    size = (models / "a/model.safetensors").stat().st_size
    largest = 2 * VOCABULARY * HIDDEN
    median = {name: statistics.median(s for s, _ in runs) for name, runs in found.items() if runs}
    most = {name: max(m for _, m in runs) for name, runs in found.items() if runs}
    benchmark.extra_info.update(
        surroundings(),
        layers=LAYERS,
        mergekit=version_of_mergekit(theirs) if theirs else None,
        load_1_min=round(os.getloadavg()[0], 2),
        model_bytes=size,
        largest_tensor_bytes=largest,
        memory_of_imports=imports,
        runs=found,
        seconds=median,
        memory=most,
    )
    print(
        f"\n{method}, models of {size / 1e9:.2f} GB, the largest tensor {largest / 1e6:.0f} MB, imports alone {imports / 1e6:.0f} MB: "
        + "; ".join(f"{name} {median[name]:.1f} s, {most[name] / 1e6:.0f} MB" for name in median)
    )
