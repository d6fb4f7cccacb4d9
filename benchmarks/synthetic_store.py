"""A store of any size with made-up targets, written as profuser.prepare writes one, and a training run over it.

    python -m benchmarks.synthetic_store DIR INSTRUCTIONS [--steps N]

This prints as JSON what a trainer needs with such a store: the seconds until it starts, the memory of its own, and the share
of a step in which it waits for data. The target is the bundled guardian.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from profuser.models.load import chat_format
from profuser.ragged import offsets_of
from profuser.recipe.parse import parse_run
from profuser.recipe.places import resolve
from profuser.recipe.schedule import Mode
from profuser.recipe.schema import Recipe, SourceConfig
from profuser.store import layout
from profuser.store.layout import TARGET_COLUMNS, shard_arrays
from profuser.store.marks import marks_of
from profuser.store.settings import StoreSettings
from profuser.store.store import Store
from profuser.text.chat import ChatFormat
from profuser.train.targets import TargetSequence

SOURCES, TOP_K, VOCABULARY = 3, 10, 1152
PROMPT_TOKENS, RESPONSE_TOKENS = 20, 200
SHARD_SIZE = 4096
SETTINGS = StoreSettings(
    sources={
        "source_names": ["a", "b", "c"],
        "sources": {},
        "data": {},
        "target": {"name": "guardian"},
        "capture": {"top_k": TOP_K, "dtype": "float32"},
        "date": "2026-01-01",
    },
    votes={"asked": [], "judges": {}},
    targets={"mode": "bytes"},
)


def synthetic_shard(first: int, examples: int) -> dict[str, np.ndarray]:
    """Targets of `examples` instructions in training mode. Every source has a distribution for every response token."""
    rng = np.random.default_rng(first)
    tokens, rows = PROMPT_TOKENS + RESPONSE_TOKENS, SOURCES * RESPONSE_TOKENS
    labels = np.arange(tokens) >= PROMPT_TOKENS
    source, position = np.nonzero(np.tile(labels, (SOURCES, 1)))
    marks = marks_of(labels, source, position)
    entries = examples * rows * TOP_K
    arrays = {
        "example": np.arange(first, first + examples),
        "mode": np.zeros(examples),
        "response_bytes": np.full(examples, 4 * RESPONSE_TOKENS),
        "source_ce": rng.uniform(0.3, 1.0, (examples, SOURCES)),
        "source_weight": np.ones((examples, SOURCES)),
        "offsets": offsets_of(np.full(examples, tokens)),
        "row_offsets": offsets_of(np.full(examples, rows)),
        "input_ids": rng.integers(10, VOCABULARY, examples * tokens),
        "marks": np.tile(marks, examples),
        "row_tail": np.full(examples * rows, 0.05),
        "entry_offsets": offsets_of(np.full(examples, rows * TOP_K)),
        "entry_counts": np.full(examples * rows, TOP_K),
        "entry_ids": rng.integers(10, VOCABULARY, entries),
        "entry_logprobs": np.full(entries, np.log(0.95 / TOP_K)),
        **counts_of(examples, SOURCES),
    }
    return shard_arrays(TARGET_COLUMNS, arrays, VOCABULARY, TOP_K)


def demo_sequences(chat: ChatFormat, rng: np.random.Generator, count: int, sources: int = 1) -> list[TargetSequence]:
    """Some of the demo's prompts with their ground truths, as a target's chat template writes them.

    Each source has a made-up distribution of TOP_K entries for every token of the response.
    """
    found = []
    lines = Path(resolve("demo:fusion.jsonl")).read_text(encoding="utf-8").splitlines()
    for number in rng.choice(len(lines), count, replace=False).tolist():
        example = json.loads(lines[number])
        encoded = chat.encode(example["prompt"], example["response"], complete=True)
        ids = np.array(encoded.input_ids)
        labels = np.arange(encoded.start, len(ids))
        rows = sources * len(labels)
        found.append(
            TargetSequence(
                example=number,
                mode=Mode.TRAINING,
                input_ids=ids,
                label_mask=np.arange(len(ids)) >= encoded.start,
                source_ce=rng.uniform(0.3, 1.0, sources).astype(np.float32),
                response_bytes=len(example["response"].encode()),
                row_position=np.tile(labels, sources),
                row_source=np.repeat(np.arange(sources), len(labels)),
                row_tail=np.full(rows, 0.05, np.float32),
                entry_offsets=offsets_of(np.full(rows, TOP_K)),
                entry_ids=rng.integers(0, len(chat.token_bytes.pieces), rows * TOP_K),
                entry_logprobs=np.full(rows * TOP_K, np.log(0.95 / TOP_K), np.float16),
            )
        )
    return found


def shard_of(sequences: Sequence[TargetSequence], vocabulary: int) -> dict[str, np.ndarray]:
    """Targets that hold these sequences of training mode, each an instruction of its own."""
    examples, sources = len(sequences), len(sequences[0].source_ce)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(sequence, name) for sequence in sequences])

    def bounds(name: str) -> np.ndarray:
        return offsets_of(np.array([len(getattr(sequence, name)) for sequence in sequences]))

    entries = np.concatenate([np.diff(sequence.entry_offsets) for sequence in sequences])
    arrays = {
        "example": np.arange(examples),
        "mode": np.full(examples, int(Mode.TRAINING)),
        "response_bytes": np.array([sequence.response_bytes for sequence in sequences]),
        "source_weight": np.ones((examples, sources)),
        "source_ce": np.stack([sequence.source_ce for sequence in sequences]),
        "offsets": bounds("input_ids"),
        "row_offsets": bounds("row_position"),
        "entry_offsets": bounds("entry_ids"),
        "entry_counts": entries,
        "marks": np.concatenate([marks_of(s.label_mask, s.row_source, s.row_position) for s in sequences]),
        **{name: joined(name) for name in ("input_ids", "row_tail", "entry_ids")},
        "entry_logprobs": joined("entry_logprobs"),
        **counts_of(examples, sources),
    }
    return shard_arrays(TARGET_COLUMNS, arrays, vocabulary, TOP_K)


def counts_of(examples: int, sources: int) -> dict[str, np.ndarray]:
    """The columns that only the summary of a store reads, as zeros."""
    counts = {"skipped": (2, 6), "kinds": (2, sources, 4), "covered": (2, sources), "mapped_mass": (2, sources)}
    return {name: np.zeros(shape) for name, shape in counts.items()} | {"reliability": np.zeros((2, sources, 10))}


def make_store(directory: Path, instructions: int) -> Store:
    """The store with so many instructions. Shards that are there already are kept."""
    store = Store.build(directory, SETTINGS, {})
    for number, first in enumerate(range(0, instructions, SHARD_SIZE)):
        if not store.has(layout.targets("train"), number):
            examples = min(SHARD_SIZE, instructions - first)
            store.put(layout.targets("train"), number, synthetic_shard(first, examples), examples=examples)
    store.finish()
    return store


def demo_recipe(steps: int) -> Recipe:
    """The demo's recipe with its target and batch, for training mode alone."""
    recipe = parse_run("train", []).recipe
    optim = replace(recipe.optim, steps=steps, log_every=1, eval_every=0, checkpoint_every=0)
    return replace(recipe, judges=[], schedule="fusellm", optim=optim)


def demo_fusion(
    source: SourceConfig, directory: Path, *, steps: int, batch_size: int, budget: int
) -> tuple[Recipe, Store]:
    """A recipe whose target is a model, and a store with the demo's prompts in it and made-up distributions of SOURCES sources.

    Args:
        directory: where the store is written. batch_size: how many sequences a step takes. budget: optim.tokens_per_micro_batch.
    """
    chat = chat_format(source)
    sequences = demo_sequences(chat, np.random.default_rng(0), batch_size * steps, SOURCES)
    store = Store.build(directory / "store", SETTINGS, {})
    shard = shard_of(sequences, len(chat.token_bytes.pieces))
    store.put(layout.targets("train"), 0, shard, examples=len(sequences))
    store.finish()
    recipe = demo_recipe(steps)
    optim = replace(recipe.optim, batch_size=batch_size, tokens_per_micro_batch=budget, lr=1e-5)
    return replace(recipe, sources=[source], target=source.name, optim=optim), Store.open(store.directory)


def private_bytes() -> int:
    """The memory that this process and its children have for themselves: no mapped file, and no page of the parent's."""
    pids = [os.getpid(), *map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="utf-8").split())]
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        fields = {name: int(rest[0]) for name, *rest in map(str.split, lines[1:])}
        total += 1024 * (fields["Private_Dirty:"] if pid != os.getpid() else fields["Anonymous:"])
    return total


def measure(directory: Path, instructions: int, steps: int) -> dict[str, float]:
    """Trains for a few steps over the store. Its files have been read once before, as after a first verification."""
    from accelerate import Accelerator

    from profuser.recipe.schedule import Stage
    from profuser.train.loop import Trainer
    from profuser.train.steps import StepBatch

    store = make_store(directory / "store", instructions)
    verifying = time.monotonic()
    assert not store.damaged()
    begin = time.monotonic()
    trainer = Trainer(demo_recipe(steps), Store.open(store.directory), directory, Accelerator(cpu=True))
    seen: dict[str, float] = {}
    own_step = trainer._step

    def watched(step: int, stage: Stage, batch: StepBatch) -> dict[str, float]:
        seen.setdefault("start_seconds", time.monotonic() - begin)
        # The start is before the first step, because what a forward pass takes and gives back varies by more than the data do.
        seen.setdefault("private_mib_at_start", private_bytes() / 2**20)
        seen["private_mib_at_end"] = private_bytes() / 2**20
        return own_step(step, stage, batch)

    trainer._step = watched
    trainer.train()
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    waits = sorted(line["data_wait"] for line in lines[1:])
    return {
        "instructions": instructions,
        "store_mib": sum(total.bytes for total in store.totals()) / 2**20,
        "verify_seconds": begin - verifying,
        **seen,
        "data_wait_median": waits[len(waits) // 2],
        "data_wait_mean": sum(waits) / len(waits),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.synthetic_store",
        description="Measures training over a large store of made-up targets.",
    )
    parser.add_argument("directory", type=Path, help="where the store and the run are written")
    parser.add_argument("instructions", type=int, help="how many instructions the store has")
    parser.add_argument("--steps", type=int, default=20, help="how many steps are trained")
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    print(json.dumps(measure(args.directory, args.instructions, args.steps)))


if __name__ == "__main__":
    main()
