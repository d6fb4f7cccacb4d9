"""Estimates how long a run will take, before it starts.

The amount of work follows from counts and shapes, the machine's speed from three short probes. A forward pass of n tokens
through P parameters costs 2 P n operations, and three times as many with its backward pass; there is an overhead per layer
and call. Each round of generation reads all weights once for the whole batch. Responses are assumed to be as long as the
recipe allows. On an idle machine the estimate is right within a factor of two. Judges and alignment are left out, because
they take only seconds.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig

from profuser.models.gguf_header import gguf_tensors
from profuser.models.load import weights_of
from profuser.models.weights import opened_weights
from profuser.prepare.data import Row
from profuser.prepare.inputs import Inputs
from profuser.progress import in_words
from profuser.recipe.schedule import plan
from profuser.recipe.schema import SourceConfig
from profuser.store import layout
from profuser.store.layout import Kind
from profuser.text.chat import ChatFormat
from profuser.text.token_bytes import TokenBytesMismatch

OPS_PER_LAYER = 300
"""How many small torch operations one layer of a Hugging Face model costs. In a small model they are most of the time."""
OPS_PER_STEP = 2000
"""How many small operations one round of `generate` costs beside the model itself."""
SAMPLE = 16
"""How many examples are tokenised to learn how long an example is."""
SECONDS_PER_PROBE = 0.1


@dataclass(frozen=True, slots=True)
class Machine:
    """How fast this machine is.

    flops: operations per second in a matrix product. bandwidth: bytes read per second. op: seconds per small operation.
    """

    flops: float
    bandwidth: float
    op: float


@dataclass(frozen=True, slots=True)
class Size:
    """How many parameters and layers a model has."""

    parameters: int
    layers: int


@functools.cache
def probe(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measures the device, which takes a third of a second, once in a process.

    Each operation is run several times and the fastest time counts, because other work on the machine can only slow it down.
    """

    def fastest(run: Callable[[], object]) -> float:
        """Returns the shortest time of `run` in seconds. The first call is not timed: it sets things up."""
        run()
        best, begin = math.inf, time.perf_counter()
        while (start := time.perf_counter()) < begin + SECONDS_PER_PROBE:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
        return best

    side = 4096 if device.type == "cuda" else 512
    x, w = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    row, matrix = torch.ones(1, 1024, device=device, dtype=dtype), torch.ones(16384, 1024, device=device, dtype=dtype)
    little = torch.ones(8, device=device, dtype=dtype)  # so small that torch uses one thread for it
    return Machine(
        flops=2 * side**3 / fastest(lambda: x @ w),
        bandwidth=matrix.nbytes / fastest(lambda: row @ matrix.T),
        op=fastest(lambda: torch.add(little, little)),
    )


def size_of(source: SourceConfig) -> Size | None:
    """Reads a model's size from the headers of its files, without reading any weights.

    It is None where it cannot be known: the model is not on this machine yet, or is not stored as safetensors or GGUF.

    Raises:
        DataError: a file of the weights is truncated or damaged.
    """
    location, options = weights_of(source)
    path = Path(location)
    if not path.exists():
        try:
            path = Path(snapshot_download(location, revision=source.revision, local_files_only=True))
        except OSError:  # not downloaded yet
            return None
    if "gguf_file" in options:
        return gguf_size(source.name, path / options["gguf_file"])
    parameters = 0
    for weights in opened_weights(source.name, path):
        names = weights.keys()
        parameters += sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    if not parameters:
        return None
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=source.trust_remote_code)
        return Size(parameters, config.get_text_config().num_hidden_layers)
    except Exception:  # whatever is wrong with the config is reported when the model is loaded
        return None


def gguf_size(name: str, file: Path) -> Size:
    """Reads a model's size from the header of a GGUF file. `name` is the model's, for the error message."""
    tensors = gguf_tensors(name, file)
    blocks = {key.split(".")[1] for key in tensors if key.startswith("blk.")}
    return Size(sum(tensors.values()), len(blocks))


def expected(inputs: Inputs, unmade: Callable[[Kind], int], first_step: int | None = None) -> dict[str, float] | None:
    """Returns the seconds that each phase still needs, or None where a model's size is not known.

    Args:
        unmade: says how many examples of a kind of shard are still to be made.
        first_step: how many steps a training that is resumed has done, 0 for a new one; None where only the store is prepared.
    """
    # What the estimate is made of: the models' sizes, the machine's speed and the mean length of an example.
    recipe = inputs.recipe
    target = recipe.target_config
    sizes: dict[str, Size] = {}
    loaded = [source for source in recipe.sources if inputs.is_run(source)]
    for source in (*loaded, target):
        if (size := size_of(source)) is None:
            return None
        sizes[source.name] = size
    machine = probe(inputs.device, inputs.dtype)
    chats = {**inputs.chats, target.name: inputs.target}
    tokens = {name: mean_tokens(chat, inputs.rows["train"]) for name, chat in chats.items()}

    def forward(name: str, examples: float, batch: int) -> float:
        """Seconds that a model needs for forward passes over so many examples."""
        size, calls = sizes[name], math.ceil(examples / batch)
        computing = 2 * size.parameters * examples * tokens[name] / machine.flops
        return computing + calls * size.layers * OPS_PER_LAYER * machine.op

    def generation(source: SourceConfig, prompts: float) -> float:
        """Seconds that a model needs to answer so many prompts, one token of a whole batch per step."""
        size, config = sizes[source.name], recipe.generation_of(source)
        batch = min(prompts, config.batch_size)
        reading = size.parameters * (inputs.dtype.itemsize / machine.bandwidth + 2 * batch / machine.flops)
        step = reading + (size.layers * OPS_PER_LAYER + OPS_PER_STEP) * machine.op
        return math.ceil(prompts / config.batch_size) * config.max_new_tokens * step

    # The sources score the ground truth and the responses that won, and answer the prompts.
    scoring = answering = 0.0
    for source in loaded:
        batch = recipe.capture.responses_at_once(tokens[source.name])
        for split in inputs.rows:
            share = inputs.routed(split, source.name).mean()  # of the prompts that this source is asked about
            if not inputs.scores_given(source, split):
                scoring += forward(source.name, share * unmade(layout.truth(split, source.name)), batch)
            # How fast a server is, is not known.
            if source.server is None and inputs.answers(source, split):
                responses = recipe.generation.responses_per_source if split == "train" else 1
                prompts = share * unmade(layout.responses(split, source.name))
                answering += generation(source, prompts * responses)
        if recipe.judges:
            won = unmade(layout.winners(source.name)) / len(recipe.sources)
            scoring += forward(source.name, won, batch)
    seconds = {"score": scoring, "answer": answering}
    if first_step is None:
        return seconds

    # The target is trained, and evaluated on the validation prompts in between.
    stages, size, optim = plan(recipe, len(inputs.rows["train"])), sizes[target.name], recipe.optim
    fusing = 0.0
    for stage in stages:
        steps, modes = max(0, stage.stop - max(first_step, stage.first)), len(stage.modes)
        in_pass = optim.micro_batch_size * modes
        if optim.tokens_per_micro_batch is not None:
            in_pass = max(1, int(optim.tokens_per_micro_batch / tokens[target.name]))
        passes = 4 if optim.gradient_checkpointing else 3  # which computes every activation once more
        step = passes * forward(target.name, modes * optim.batch_size, in_pass)
        # AdamW reads and writes the weights, the gradients and two moments.
        step += 16 * size.parameters * 4 / machine.bandwidth
        fusing += steps * step
    evaluations = 1 + len(stages) + (stages[-1].stop // optim.eval_every if optim.eval_every else 0)
    validated = len(inputs.rows.get("validation", ())) * evaluations
    seconds["fuse"] = fusing + forward(target.name, validated, recipe.capture.batch_size)

    # The target answers the held-out prompts and is scored on them, before and after fusion. A target that is a source has
    # answered them already.
    if heldout := len(inputs.rows.get("heldout", ())):
        models = 1 if recipe.target in inputs.chats else 2
        seconds["evaluate"] = generation(target, heldout) * models + 2 * forward(
            target.name, heldout, recipe.capture.batch_size
        )
    return seconds


def mean_tokens(chat: ChatFormat, rows: Sequence[Row]) -> float:
    """Returns the mean number of tokens of the first few conversations. Texts that cannot be encoded are left out."""
    counts = []
    for row in rows[:SAMPLE]:
        with contextlib.suppress(TokenBytesMismatch):
            counts.append(len(chat.encode(row["prompt"], row["response"]).input_ids))
    return float(np.mean(counts or [0]))


def sentence(expected_seconds: dict[str, float] | None) -> str:
    """Puts an estimate into words, for the first line of a run."""
    if expected_seconds is None:
        return "how long is unknown: a model is not downloaded yet, or has no safetensors"
    parts = ", ".join(f"{phase} {in_words(s)}" for phase, s in expected_seconds.items() if s >= 0.5)
    return f"expected to take about {in_words(sum(expected_seconds.values()))}" + (f" ({parts})" if parts else "")
