"""vLLM itself beside transformers: greedy answers are the same, but for near ties, and sampled ones can be made again.

`make test-vllm` installs vllm into an environment of its own and runs these tests with it. They are skipped where the environment variable
PROFUSER_VLLM_PYTHON names no Python that has it, and with a larger model where PROFUSER_SMOLLM2 does not name its directory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import small_run

from profuser.models.continuation import continuations
from profuser.models.load import chat_format, load_model, weights_of
from profuser.prepare.engines import Asked, Source, answering
from profuser.prepare.phases import prepare
from profuser.prepare.vllm_engine import VllmProcess, engine_arguments, has_vllm
from profuser.recipe.generation import GenerationConfig
from profuser.recipe.places import resolve
from profuser.recipe.schema import SourceConfig
from profuser.store import layout

PYTHON = os.environ.get("PROFUSER_VLLM_PYTHON", sys.executable)
SMOLLM2 = os.environ.get("PROFUSER_SMOLLM2", "")
PROMPTS = 200

pytestmark = pytest.mark.skipif(
    "PROFUSER_VLLM_PYTHON" not in os.environ and not has_vllm(None), reason="PROFUSER_VLLM_PYTHON is not set"
)

MODELS = [
    pytest.param("demo:guardian", 64, id="guardian"),
    pytest.param(
        SMOLLM2, 24, id="SmolLM2", marks=pytest.mark.skipif(not SMOLLM2, reason="PROFUSER_SMOLLM2 is not set")
    ),
]


@pytest.mark.parametrize(("location", "length"), MODELS)
def test_greedy_answers_are_those_of_transformers_but_for_near_ties(location, length, capsys):
    source = SourceConfig(name="m", model=location)
    chat, model = chat_format(source), load_model(source, torch.float32)
    rows = [json.loads(line) for line in Path(resolve("demo:heldout.jsonl")).read_text().splitlines()]
    prompts = [chat.prompt_ids(row["prompt"]) for row in rows[:: len(rows) // PROMPTS][:PROMPTS]]
    assert len(prompts) == PROMPTS

    place, options = weights_of(source)
    sampling = {"temperature": 0.0, "max_tokens": length, "stop_token_ids": list(chat.end_ids), "detokenize": False}
    with VllmProcess(PYTHON, engine_arguments(place, options, torch.float32, 512)) as process:
        requests = [{"id": str(n), "prompt": ids, "sampling": sampling} for n, ids in enumerate(prompts)]
        begin = time.monotonic()
        by_vllm = {int(answer["id"]): answer["tokens"] for answer in process.answers(requests)}
        vllm_seconds = time.monotonic() - begin

    begin = time.monotonic()
    expected = [
        of_prompt
        for n in range(0, PROMPTS, 50)
        for of_prompt in continuations(
            model, prompts[n : n + 50], ends=set(chat.end_ids), pad=chat.end_id, rooms=[length] * 50
        )
    ]
    seconds = time.monotonic() - begin

    different = [n for n in range(PROMPTS) if by_vllm[n] != expected[n]]
    gaps = [gap_of(model, prompts[n], by_vllm[n], expected[n]) for n in different]
    with capsys.disabled():
        print(
            f"\n{location}: {PROMPTS - len(different)} of {PROMPTS} greedy answers are equal; vllm {process.version} "
            f"{sum(map(len, by_vllm.values())) / vllm_seconds:.0f} tokens/s, transformers {sum(map(len, expected)) / seconds:.0f} tokens/s"
        )
    assert len(different) <= 0.05 * PROMPTS
    # Where they part, the two tokens are as probable as each other, up to the rounding of sums in another order.
    assert all(gap < 1e-2 for gap in gaps), gaps


@torch.no_grad()
def gap_of(model, prompt: list[int], one: list[int], other: list[int]) -> float:
    """How far apart the logits of two tokens are, with which answers to a prompt begin to differ."""
    first = next(t for t, (a, b) in enumerate(zip(one, other)) if a != b)
    logits = model(torch.tensor([prompt + one[:first]])).logits[0, -1]
    return float((logits[one[first]] - logits[other[first]]).abs())


def test_sampled_answers_can_be_made_again():
    source = SourceConfig(name="m", model="demo:guardian")
    generation = GenerationConfig(engine="vllm", python=PYTHON, temperature=2.0, max_new_tokens=16)
    # The model is not sure of an answer to either. To what it has learnt it gives one answer at any temperature.
    asked = Asked("train", ["How does a bozun taste?", "Write a poem about a dog."], responses=3)
    with answering("vllm", Source(source, generation, chat_format(source), 256, 0, torch.float32)) as answer:
        found = answer(asked)
        assert answer(asked) == found
    assert all(len({response.text for response in of_prompt}) > 1 for of_prompt in found)


def test_a_store_by_vllm_is_that_of_transformers(prepared, tmp_path):
    _, _, expected = prepared
    run = small_run(tmp_path, "--generation.engine=vllm", f"--generation.python={PYTHON}", "--sources=" + SOURCES)
    store = prepare(run)
    for kind in (
        layout.responses("train", "guardian"),
        layout.responses("heldout", "scholar"),
        layout.targets("train"),
    ):
        assert store.digest(kind) == expected.digest(kind)
    assert store.settings.sources["sources"]["guardian"]["engine"] == "vllm"


# vLLM has no class for the demo's third model.
SOURCES = (
    "[{name: guardian, model: 'demo:guardian'}, {name: scholar, model: 'demo:scholar'}, "
    "{name: reckoner, model: 'demo:reckoner', generation: {engine: transformers}}]"
)
