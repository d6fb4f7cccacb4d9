"""How long a run should take, before it starts: work from counts and shapes, speed from three short probes of the machine.

A forward pass of n tokens costs 2 P n operations (P parameters; three times that with backward), plus an overhead a layer
and call; a generated token reads all weights once a batch. Responses are taken to be as long as they may be. Good to a factor
of two on an idle machine; judges and alignment are left out, they take seconds.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from profuser.chat import ChatFormat
from profuser.config import SourceConfig, target_config
from profuser.errors import DataError
from profuser.models import runtime_dtype, weights_of
from profuser.schedule import plan
from profuser.token_bytes import TokenBytesMismatch

if TYPE_CHECKING:
    from profuser.prepare import Preparation

OPS_A_LAYER = 300
"""Small torch operations in one layer of a Hugging Face model: its overhead, where nothing else takes time."""
OPS_A_STEP = 2000
"""The same of one round of `generate` around the model."""
SAMPLE = 16  # examples whose tokens are counted
SECONDS_A_PROBE = 0.1


@dataclass(frozen=True, slots=True)
class Machine:
    """flops: operations a second in a matrix product; bandwidth: bytes read a second; op: seconds of a small operation."""

    flops: float
    bandwidth: float
    op: float


@dataclass(frozen=True, slots=True)
class Size:
    """A model's parameters and layers."""

    parameters: int
    layers: int


def probe(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure the device for a third of a second; of each measure the fastest, since other work only ever slows one down."""

    def fastest(run: Callable[[], object]) -> float:
        run()
        best, begin = math.inf, time.perf_counter()
        while (start := time.perf_counter()) < begin + SECONDS_A_PROBE:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
        return best

    side = 4096 if device.type == "cuda" else 512
    x, w = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    row, matrix = torch.ones(1, 1024, device=device, dtype=dtype), torch.ones(16384, 1024, device=device, dtype=dtype)
    little = torch.ones(8, device=device, dtype=dtype)  # too little to be shared between threads
    return Machine(
        flops=2 * side**3 / fastest(lambda: x @ w),
        bandwidth=matrix.nbytes / fastest(lambda: row @ matrix.T),
        op=fastest(lambda: torch.add(little, little)),
    )


def size_of(source: SourceConfig) -> Size | None:
    """From the files' headers, no weight is read; None for a model that is not on this machine yet.

    Raises:
        DataError: a file is truncated or damaged.
    """
    location, options = weights_of(source)
    path = Path(location)
    if not path.exists():
        try:
            path = Path(snapshot_download(location, revision=source.revision, local_files_only=True))
        except OSError:  # not downloaded yet
            return None
    if "gguf_file" in options:
        from gguf import GGUFReader

        reader = GGUFReader(path / options["gguf_file"])
        parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
        blocks = {tensor.name.split(".")[1] for tensor in reader.tensors if tensor.name.startswith("blk.")}
        return Size(parameters, len(blocks))
    parameters = 0
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as weights:
                names = weights.keys()
                parameters += sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
        except SafetensorError as error:  # found now, not after the models before it have been run
            raise DataError(
                f"{source.name}: the weights {file} cannot be read ({error}); copy or download them again"
            ) from None
    if not parameters:
        return None
    config = AutoConfig.from_pretrained(path, trust_remote_code=source.trust_remote_code)
    return Size(parameters, config.get_text_config().num_hidden_layers)


def expected(p: Preparation, first_step: int | None = None) -> dict[str, float] | None:
    """Seconds that each phase has left; None where a model's size is not known.

    Args:
        first_step: steps that a resumed training has done; None = the store is prepared only.
    """
    recipe, dtype = p.recipe, runtime_dtype(p.recipe.capture.dtype, p.device)
    target = target_config(recipe)
    sizes = {source.name: size_of(source) for source in (*recipe.sources, target)}
    if any(size is None for size in sizes.values()):
        return None
    machine = probe(p.device, dtype)
    tokens = {name: mean_tokens(chat, p.splits["train"]) for name, chat in {**p.chats, target.name: p.target}.items()}

    def forward(name: str, examples: int, batch: int) -> float:
        size = sizes[name]
        calls = math.ceil(examples / batch)
        return (
            2 * size.parameters * examples * tokens[name] / machine.flops
            + calls * size.layers * OPS_A_LAYER * machine.op
        )

    def generation(name: str, prompts: int) -> float:
        size, config = sizes[name], recipe.generation
        batch = min(prompts, config.batch_size)
        step = (
            size.parameters * (dtype.itemsize / machine.bandwidth + 2 * batch / machine.flops)
            + (size.layers * OPS_A_LAYER + OPS_A_STEP) * machine.op
        )
        return math.ceil(prompts / config.batch_size) * config.max_new_tokens * step

    captured = answered = 0.0
    batch = recipe.capture.batch_size
    for source in recipe.sources:
        for split in p.splits:
            captured += forward(source.name, p.unmade(split, f"capture/{split}-gt-{source.name}"), batch)
            if p.answered(split):
                count = p.unmade(split, f"capture/{split}-responses-{source.name}")
                per_prompt = recipe.generation.responses_per_source if split == "train" else 1
                answered += generation(source.name, count * per_prompt)
        if recipe.judges:
            left = p.unmade("train", f"capture/train-infer-{source.name}") // len(recipe.sources)
            captured += forward(source.name, left, batch)
    seconds = {"score": captured, "answer": answered}
    if first_step is None:
        return seconds

    stages, size, optim = plan(recipe, len(p.splits["train"])), sizes[target.name], recipe.optim
    train = 0.0
    for stage in stages:
        steps = max(0, stage.stop - max(first_step, stage.first))
        modes = (stage.train_weight > 0) + (stage.infer_weight > 0)
        passes = modes * optim.batch_size
        step = 3 * forward(target.name, passes, optim.micro_batch_size * modes)
        step += 16 * size.parameters * 4 / machine.bandwidth  # AdamW reads and writes weights, gradient and two moments
        train += steps * step
    evaluations = 1 + len(stages) + (stages[-1].stop // optim.eval_every if optim.eval_every else 0)
    validated = len(p.splits.get("validation", ())) * evaluations
    seconds["fuse"] = train + forward(target.name, validated, batch)
    if heldout := len(p.splits.get("heldout", ())):
        models = 1 if recipe.target in p.chats else 2
        seconds["evaluate"] = generation(target.name, heldout) * models + 2 * forward(target.name, heldout, batch)
    return seconds


def mean_tokens(chat: ChatFormat, rows: Sequence[dict]) -> float:
    """Tokens of a conversation, by the first few."""
    counts = []
    for row in rows[:SAMPLE]:
        with contextlib.suppress(TokenBytesMismatch):
            counts.append(len(chat.encode(row["prompt"], row["response"]).input_ids))
    return float(np.mean(counts or [0]))


def in_words(seconds: float) -> str:
    """`40 s`, `6 min`, `3 h`: no more digits than the estimate is worth."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"


def sentence(expected_seconds: dict[str, float] | None) -> str:
    """For the first line of a run."""
    if expected_seconds is None:
        return "the time is unknown until every model is downloaded"
    parts = ", ".join(f"{phase} {in_words(s)}" for phase, s in expected_seconds.items() if s >= 0.5)
    return f"expected to take about {in_words(sum(expected_seconds.values()))}" + (f" ({parts})" if parts else "")
