"""How long one answer of several sources takes, beside the answers that the sources write one after the other; and how many prompts
are answered per second, one at a time and in batches.

    pytest benchmarks/bench_decode.py --benchmark-only

A source's answer is what Hugging Face's own `generate` writes greedily, with exactly as many tokens as the joint answer has in
its vocabulary. PROFUSER_SMOLLM2 may name a directory with SmolLM2, which then answers together with the demo's guardian.
"""

from __future__ import annotations

import os
import statistics
import time

import pytest
import torch

from benchmarks.measure import surroundings
from profuser.generate.cool_fusion import CoolFusion
from profuser.generate.gated import Gated
from profuser.generate.speaker import Voice
from profuser.generate.steps import Step
from profuser.generate.voices import load_voices
from profuser.models.head import head_of
from profuser.models.load import chat_format, load_model
from profuser.recipe.parse import parse_run
from profuser.recipe.schema import DecodeConfig, SourceConfig

PROMPTS = (
    "Eve has 8 eggs, loses 4, gets 5, gets 2. How many?",
    "How does a bozun taste?",
    "Tell me how you would beat the dragon.",
    "Explain in some sentences why the sky is blue.",
)
MOST_TOKENS = 96


def voices_of(name: str) -> list[Voice]:
    if name == "demo":
        return load_voices(parse_run("generate", []).recipe)
    directory = os.environ.get("PROFUSER_SMOLLM2")
    if not directory:
        pytest.skip("PROFUSER_SMOLLM2 names no directory with SmolLM2")
    voices = []
    for source in (SourceConfig(name="smollm2", model=directory), SourceConfig(name="guardian", model="demo:guardian")):
        model = load_model(source, torch.float32)
        voices.append(Voice(source.name, chat_format(source), model, head_of(model)))
    return voices


@torch.no_grad()
def alone(voice: Voice, prompt: str, tokens: int) -> None:
    """Lets one source write an answer of so many tokens."""
    ids = torch.tensor([voice.chat.prompt_ids(prompt)])
    voice.model.generate(  # pyrefly: ignore[not-callable]  # a PreTrainedModel may have it, from GenerationMixin
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )


def timed(fusion: CoolFusion, prompt: str) -> tuple[list[Step], list[float]]:
    """The segments of an answer, and the seconds that each took."""
    steps, seconds = [], []
    start = time.perf_counter()
    for step in fusion.steps(prompt):
        steps.append(step)
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    return steps, seconds


@pytest.mark.parametrize("sources", ["demo", "smollm2"])
def test_a_gate_that_never_opens(benchmark, sources):
    """How long the first source takes behind a gate, beside its own greedy answer."""
    voices = voices_of(sources)
    fusion = Gated(voices, DecodeConfig(method="gated", gate=1e9), MOST_TOKENS)
    alone(voices[0], PROMPTS[0], 4)
    ratios = []

    def measure() -> None:
        for prompt in PROMPTS:
            steps, seconds = timed(fusion, prompt)
            text = "".join(step.winner.text for step in steps)
            encoded = voices[0].chat.encode(prompt, text, complete=False)
            start = time.perf_counter()
            alone(voices[0], prompt, max(encoded.stop - encoded.start, 1))
            ratios.append((time.perf_counter() - start) / sum(seconds))

    benchmark.pedantic(measure, rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(surroundings(), speed_to_alone=round(statistics.median(ratios), 3))
    print(
        f"\n{sources}: behind a gate that never opens the first source has {statistics.median(ratios):.2f} of its speed"
    )


@pytest.mark.parametrize("segment", ["shortest", "aligned"])
@pytest.mark.parametrize("sources", ["demo", "smollm2"])
def test_one_answer_of_all_sources(benchmark, sources, segment):
    voices = voices_of(sources)
    fusion = CoolFusion(voices, DecodeConfig(segment=segment), MOST_TOKENS)
    for voice in voices:
        alone(voice, PROMPTS[0], 4)
    ratios, late, count = [], [], 0

    def measure() -> None:
        nonlocal count
        for prompt in PROMPTS:
            steps, seconds = timed(fusion, prompt)
            text = "".join(step.winner.text for step in steps)
            start = time.perf_counter()
            for voice in voices:
                encoded = voice.chat.encode(prompt, text, complete=False)
                alone(voice, prompt, max(encoded.stop - encoded.start, 1))
            ratios.append(sum(seconds) / (time.perf_counter() - start))
            count += len(steps)
            if len(steps) >= 8:
                half = len(seconds) // 2
                late.append(statistics.median(seconds[half:]) / statistics.median(seconds[:half]))

    benchmark.pedantic(measure, rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(
        surroundings(),
        sources=len(voices),
        segments=count,
        to_answers_alone=round(statistics.median(ratios), 3),
        second_half_to_first=round(statistics.median(late), 3) if late else None,
    )
    print(
        f"\n{sources}, {segment}: a joint answer takes {statistics.median(ratios):.2f} times as long as {len(voices)} answers one "
        f"after the other; a segment in its second half {statistics.median(late) if late else float('nan'):.2f} times as in its first"
    )


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("sources", ["demo", "smollm2"])
def test_prompts_per_second(benchmark, sources, batch_size):
    """Of 24 different prompts, with at most 32 tokens for each answer. The answers are those of one prompt at a time.

    The CPU's time tells more than the clock's where the machine has other work, but only with one thread (OMP_NUM_THREADS=1).
    """
    fusion = CoolFusion(voices_of(sources), DecodeConfig(), 32)
    prompts = [f"{prompt} (Question {n + 1}.)" for n, prompt in enumerate(PROMPTS * 6)]
    alone_first = [answer.text for answer in map(fusion.answer, prompts[:2])]
    found, cpu_seconds = [], []

    def measure() -> None:
        begin = time.process_time()
        found[:] = fusion.answers(prompts, batch_size)
        cpu_seconds.append(time.process_time() - begin)

    benchmark.pedantic(measure, rounds=1)
    assert [answer.text for answer in found[:2]] == alone_first
    per_second, per_cpu_second = len(prompts) / benchmark.stats.stats.median, len(prompts) / cpu_seconds[0]
    benchmark.extra_info.update(
        surroundings(),
        threads=torch.get_num_threads(),
        prompts_per_second=round(per_second, 3),
        prompts_per_cpu_second=round(per_cpu_second, 3),
    )
    print(
        f"\n{sources}, {batch_size} at a time: {per_second:.2f} prompts per second, {per_cpu_second:.2f} per second of a core"
    )
