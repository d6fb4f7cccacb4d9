"""What packing saves: training steps over sequences of real lengths, padded and packed into the same token budget.

    pytest benchmarks/bench_packing.py --benchmark-only -s

The sequences are the demo's prompts with their ground truths, as the target's chat template writes them. Their sources are made
up. `demo` is the bundled guardian; `smollm2` is SmolLM2-135M, whose directory $PROFUSER_SMOLLM2 names. A step is the forward and
the backward pass of 32 sequences; padded, they are sorted by length first, as the trainer does it. Each round times
both, so that they share the load of the machine.
"""

from __future__ import annotations

import os
import statistics
import time

import numpy as np
import pytest
import torch

from benchmarks.cases import DEVICE
from benchmarks.measure import surroundings, synchronize
from benchmarks.synthetic_store import TOP_K, demo_sequences
from profuser.fusion_model import FusionModel
from profuser.models.load import chat_format, load_model
from profuser.models.packing import Layout, by_count, by_tokens, size_of
from profuser.recipe.schedule import Mode
from profuser.recipe.schema import SourceConfig
from profuser.train.collate import collate

TARGETS = {"demo": "demo:guardian", "smollm2": os.environ.get("PROFUSER_SMOLLM2", "")}
SEQUENCES, ROUNDS = 32, 3
BUDGETS = {"demo": 2048, "smollm2": 1024}
ONES = dict.fromkeys(Mode, 1.0)


@pytest.mark.parametrize("target", TARGETS)
def test_packing(benchmark, target):
    if not TARGETS[target]:
        pytest.skip("no SmolLM2: set PROFUSER_SMOLLM2 to its directory")
    source = SourceConfig(name=target, model=TARGETS[target])
    chat = chat_format(source)
    sequences = demo_sequences(chat, np.random.default_rng(0), SEQUENCES)
    model = FusionModel(load_model(source, torch.float32, DEVICE), source_temperature=1.0).train()
    budget = BUDGETS[target]
    tokens = sum(len(sequence.input_ids) for sequence in sequences)
    longest = max(len(sequence.input_ids) for sequence in sequences)
    padded = by_count(sequences, -(-len(sequences) * longest // budget))
    layouts: dict[str, tuple[list, Layout]] = {
        "padded by count": (padded, "padded"),
        "padded by tokens": (by_tokens(sequences, budget, "padded", 1), "padded"),
        "packed": (by_tokens(sequences, budget, "packed", 1), "packed"),
    }
    batches = {
        name: [collate(one, ONES, ONES, chat.end_id, TOP_K, layout) for one in passes]
        for name, (passes, layout) in layouts.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in layouts}

    def step(name: str) -> None:
        for batch in batches[name]:
            tensors = {key: torch.from_numpy(array).to(DEVICE) for key, array in batch.items()}
            model(**tensors, reduction="sum")["loss"].backward()
        model.zero_grad()
        synchronize()

    def measure() -> None:
        for name in layouts:
            begin = time.perf_counter()
            step(name)
            seconds[name].append(time.perf_counter() - begin)

    benchmark.pedantic(measure, rounds=ROUNDS, warmup_rounds=1)
    rates = {name: tokens / statistics.median(times[-ROUNDS:]) for name, times in seconds.items()}
    filled = {name: tokens / sum(map(size_of, passes)) for name, (passes, _) in layouts.items()}
    benchmark.extra_info.update(
        surroundings(), sequences=len(sequences), tokens=tokens, longest=longest, budget=budget, tokens_per_second=rates,
        filled=filled, passes={name: len(passes) for name, (passes, _) in layouts.items()},
    )  # fmt: skip
    print(f"\n{target}: {len(sequences)} sequences, {tokens / len(sequences):.0f} tokens on average, at most {longest}")
    for name in layouts:
        print(f"  {name:17} {rates[name]:6.0f} tokens/s, {len(batches[name])} passes, {filled[name]:.0%} filled")
