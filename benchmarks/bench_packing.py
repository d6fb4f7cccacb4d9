"""What packing saves: training steps over sequences of real lengths, padded and packed into the same token budget.

    pytest benchmarks/bench_packing.py --benchmark-only -s

The sequences are the demo's prompts with their ground truths, as the target's chat template writes them. Their sources are made
up. `demo` is the bundled guardian; `smollm2` is SmolLM2-135M, whose directory $PROFUSER_SMOLLM2 names. A step is the forward and
the backward pass of 32 sequences; padded, they are sorted by length first, as the trainer does it. Each round times
both, so that they share the load of the machine.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.cases import DEVICE
from benchmarks.measure import surroundings, synchronize
from profuser.fusion_model import FusionModel
from profuser.models.load import chat_format, load_model
from profuser.ragged import offsets_of
from profuser.recipe.places import resolve
from profuser.recipe.schedule import Mode
from profuser.recipe.schema import SourceConfig
from profuser.train.collate import collate
from profuser.train.packing import Layout, by_count, by_tokens, size_of
from profuser.train.targets import TargetSequence

TARGETS = {"demo": "demo:guardian", "smollm2": os.environ.get("PROFUSER_SMOLLM2", "")}
SEQUENCES, ROUNDS, TOP_K = 32, 3, 10
BUDGETS = {"demo": 2048, "smollm2": 1024}
ONES = dict.fromkeys(Mode, 1.0)


def sequences_of(chat, rng: np.random.Generator) -> list[TargetSequence]:
    """The first examples of the demo, each with a made-up distribution for every token of its response."""
    found = []
    lines = Path(resolve("demo:fusion.jsonl")).read_text(encoding="utf-8").splitlines()
    for number in rng.choice(len(lines), SEQUENCES, replace=False).tolist():
        example = json.loads(lines[number])
        encoded = chat.encode(example["prompt"], example["response"], complete=True)
        ids = np.array(encoded.input_ids)
        labels = np.arange(encoded.start, len(ids))
        entries = len(labels) * TOP_K
        found.append(
            TargetSequence(
                example=number,
                mode=Mode.TRAINING,
                input_ids=ids,
                label_mask=np.arange(len(ids)) >= encoded.start,
                source_ce=np.ones(1, np.float32),
                response_bytes=len(example["response"].encode()),
                row_position=labels,
                row_source=np.zeros(len(labels), int),
                row_tail=np.full(len(labels), 0.05, np.float32),
                entry_offsets=offsets_of(np.full(len(labels), TOP_K)),
                entry_ids=rng.integers(0, len(chat.token_bytes.pieces), entries),
                entry_logprobs=np.full(entries, np.log(0.95 / TOP_K), np.float16),
            )
        )
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_packing(benchmark, target):
    if not TARGETS[target]:
        pytest.skip("no SmolLM2: set PROFUSER_SMOLLM2 to its directory")
    source = SourceConfig(name=target, model=TARGETS[target])
    chat = chat_format(source)
    sequences = sequences_of(chat, np.random.default_rng(0))
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
