"""Tokens per second of a capture, beside the forward pass that it cannot do without and beside full logits.

    PROFUSER_SMOLLM2=DIR pytest benchmarks/bench_capture.py --benchmark-only -s

A source reads conversations in batches of similar length, as `profuser.prepare` gives them to it:

- *bare forward* gives the hidden states of every token, and no logits.
- *capture* is ours: the hidden states; the head, the 10 most probable tokens and the log-sum-exp of each token of the response; and the
  prefix ranges that the alignment to the bundled guardian's tokens needs. *without ranges* is the same for a target with the same tokens.
- *full logits* is `model(**batch)`, log_softmax and topk over every token, which has no ranges.

`demo` are the demo's prompts with short ground truths, of which a fourth of the tokens is learnt, or two fifths; `texts` are answers of
1,200 characters in English, German and code, of which almost all are, so that the head takes as much time as it can. Each round times all
of them in turn. Memory is what the head of all learnt rows adds to a process of its own, with the source's own vocabulary and with one
four times as large.

`test_packing` captures responses within a budget of tokens, padded and packed in turn. `more` are more of the demo's, which nearly fill
passes even if they are padded; `mixed` are a few of them and the texts, whose lengths differ most.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.cases import DEVICE
from benchmarks.measure import process_peaks_mib, surroundings, synchronize
from profuser.alignment.ranges import ranges_needed
from profuser.alignment.vocab_map import ByteOrder
from profuser.experiments.windows import TEXTS
from profuser.kernels.head import Head
from profuser.kernels.source_topk import source_topk
from profuser.models.head import head_of, hidden_states
from profuser.models.load import chat_format, load_model
from profuser.models.packing import Layout, by_tokens, size_of
from profuser.models.padding import padded
from profuser.prepare.capture import BatchSize, CaptureRequest, Numbered, capture_responses
from profuser.recipe.places import resolve
from profuser.recipe.schema import SourceConfig
from profuser.text.chat import ChatFormat

SOURCES = {"scholar": "demo:scholar", "smollm2": os.environ.get("PROFUSER_SMOLLM2", "")}
COUNTS = {"demo": 64, "texts": 3, "more": 128}
TOP_K, BATCH_SIZE, ROUNDS = 10, {"demo": 16, "texts": 3}, 3
BUDGETS = {"more": 1024, "mixed": 2048}
"""How many tokens a pass may have, padding included."""


def conversations(kind: str) -> list[tuple[str, str]]:
    """Some prompts with their responses."""
    if kind in ("demo", "more"):
        lines = Path(resolve("demo:fusion.jsonl")).read_text(encoding="utf-8").splitlines()[: COUNTS[kind]]
        return [(row["prompt"], row["response"]) for row in map(json.loads, lines)]
    found = conversations("demo")[:32] if kind == "mixed" else []
    for language in ("en", "de", "code"):
        text = (TEXTS / f"{language}.txt").read_text(encoding="utf-8")
        found.append(("Go on.", text[:1200]))
    return found


def requests_of(chat: ChatFormat, target: ChatFormat, order: ByteOrder, kind: str) -> list[CaptureRequest]:
    """What `profuser.prepare` asks of a source for these conversations and this target, from the shortest on."""
    found = []
    for prompt, response in conversations(kind):
        own, theirs = (c.encode(prompt, response, complete=True) for c in (chat, target))
        ranges = ranges_needed(target.token_bytes, theirs, chat.token_bytes, own, order)
        found.append(CaptureRequest(own, len(response.encode()), ranges))
    return sorted(found, key=lambda request: len(request.encoded.input_ids))


@pytest.mark.parametrize("kind", ["demo", "texts"])
@pytest.mark.parametrize("name", SOURCES)
def test_capture(benchmark, name, kind):
    model, head, order, chat, target = loaded(name)
    with_ranges, without = (requests_of(chat, each, order, kind) for each in (target, chat))
    batches = [
        padded([request.encoded.input_ids for request in with_ranges[first : first + BATCH_SIZE[kind]]], 0)
        for first in range(0, len(with_ranges), BATCH_SIZE[kind])
    ]

    def capture(requests: list[CaptureRequest]) -> None:
        for _ in capture_responses(model, head, requests, order, top_k=TOP_K, batch_size=BATCH_SIZE[kind]):
            pass

    @torch.no_grad()
    def forward() -> None:
        for ids, mask in batches:
            hidden_states(model, ids.to(DEVICE), mask.to(DEVICE))

    @torch.no_grad()
    def full_logits() -> None:
        for ids, mask in batches:
            logits = model(input_ids=ids.to(DEVICE), attention_mask=mask.to(DEVICE), use_cache=False).logits
            logits.log_softmax(-1).topk(TOP_K)

    ways: dict[str, Callable[[], None]] = {
        "bare forward": forward,
        "capture": lambda: capture(with_ranges),
        "capture without ranges": lambda: capture(without),
        "full logits": full_logits,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}

    def measure() -> None:
        for way, run in ways.items():
            begin = time.perf_counter()
            run()
            synchronize()
            seconds[way].append(time.perf_counter() - begin)

    benchmark.pedantic(measure, rounds=ROUNDS, warmup_rounds=1)
    tokens = sum(len(request.encoded.input_ids) for request in with_ranges)
    learnt = sum(len(request.encoded.label_positions) for request in with_ranges)
    rates = {way: tokens / statistics.median(times[-ROUNDS:]) for way, times in seconds.items()}
    width, vocabulary = head.weight.shape[1], head.weight.shape[0]
    peaks = process_peaks_mib(head_step, [(learnt, width, vocabulary), (learnt, width, 4 * vocabulary)])
    benchmark.extra_info.update(
        surroundings(), source=name, conversations=kind, tokens=tokens, learnt=learnt, vocabulary=vocabulary,
        ranges=sum(len(request.ranges.rows) for request in with_ranges), tokens_per_second=rates, peaks_mib=peaks,
        threads=torch.get_num_threads(), load_1_min=round(os.getloadavg()[0], 2),
    )  # fmt: skip
    print(f"\n{name}, {kind}: {tokens} tokens, {learnt} of them learnt, {vocabulary:,} in the vocabulary")
    for way, rate in rates.items():
        print(f"  {way:23}{rate:8.0f} tokens/s, {rate / rates['bare forward']:.2f} of the bare forward")
    print(f"  the head of {learnt} rows adds {peaks[0]} MiB, {peaks[1]} MiB with a vocabulary four times as large")


@pytest.mark.parametrize("kind", BUDGETS)
@pytest.mark.parametrize("name", SOURCES)
def test_packing(benchmark, name, kind):
    """The CPU's time tells more than the clock's where the machine has other work, but only with one thread (OMP_NUM_THREADS=1)."""
    budget = BUDGETS[kind]
    model, head, order, chat, target = loaded(name)
    requests = requests_of(chat, target, order, kind)
    layouts: list[Layout] = ["padded", "packed"]
    sequences = [Numbered(n, request) for n, request in enumerate(requests)]
    passes = {layout: by_tokens(sequences, budget, layout) for layout in layouts}
    seconds: dict[str, list[float]] = {layout: [] for layout in layouts}
    cpu_seconds: dict[str, list[float]] = {layout: [] for layout in layouts}

    def measure() -> None:
        for layout in layouts:
            begin, cpu_begin = time.perf_counter(), time.process_time()
            size = BatchSize(budget, "tokens", layout=layout)
            for _ in capture_responses(model, head, requests, order, top_k=TOP_K, batch_size=size):
                pass
            synchronize()
            seconds[layout].append(time.perf_counter() - begin)
            cpu_seconds[layout].append(time.process_time() - cpu_begin)

    benchmark.pedantic(measure, rounds=ROUNDS)
    tokens = sum(len(request.encoded.input_ids) for request in requests)
    rates, cpu_rates = (
        {layout: tokens / statistics.median(times) for layout, times in of_clock.items()}
        for of_clock in (seconds, cpu_seconds)
    )
    filled = {layout: tokens / sum(map(size_of, of_layout)) for layout, of_layout in passes.items()}
    benchmark.extra_info.update(
        surroundings(), source=name, conversations=kind, budget=budget, tokens=tokens, tokens_per_second=rates, filled=filled,
        tokens_per_cpu_second=cpu_rates, seconds=seconds, cpu_seconds=cpu_seconds,
        threads=torch.get_num_threads(), load_1_min=round(os.getloadavg()[0], 2),
    )  # fmt: skip
    print(f"\n{name}, {kind}: {len(requests)} responses, {tokens} tokens, at most {budget} in a pass")
    for layout in layouts:
        print(
            f"  {layout:8}{rates[layout]:8.0f} tokens/s, {cpu_rates[layout]:.0f} per second of a core; {len(passes[layout])} passes, "
            f"{filled[layout]:.0%} filled"
        )


def loaded(name: str) -> tuple[PreTrainedModel, Head, ByteOrder, ChatFormat, ChatFormat]:
    """A source in memory with its head, its vocabulary in byte order, and its chat format and that of the bundled guardian."""
    if not SOURCES[name]:
        pytest.skip("no SmolLM2: set PROFUSER_SMOLLM2 to its directory")
    source = SourceConfig(name=name, model=SOURCES[name])
    chat, target = chat_format(source), chat_format(SourceConfig(name="guardian", model="demo:guardian"))
    model = load_model(source, torch.float32, DEVICE)
    head = head_of(model)
    order = ByteOrder(chat.token_bytes, head.weight.shape[0])
    return model, head, order, chat, target


def head_step(rows: int, width: int, vocabulary: int) -> Callable[[], object]:
    """The head's part of a capture without ranges, over made-up states."""
    rng = np.random.default_rng(0)
    hidden, weight = (
        torch.from_numpy(rng.standard_normal(shape, np.float32)) for shape in ((rows, width), (vocabulary, width))
    )
    labels = torch.zeros(rows, dtype=torch.long)
    return torch.no_grad()(lambda: source_topk(hidden, weight, labels, TOP_K))
