"""A batch of prompts is continued: rows that have ended leave it, and what a row says does not depend on the others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    Qwen3NextConfig,
)

from profuser.models.continuation import Sampling, _Drawn, continuations
from profuser.models.load import chat_format, load_model
from profuser.prepare.draws import draws_of, names_of, seed_of
from profuser.prepare.responses import generate
from profuser.recipe.generation import GenerationConfig
from profuser.recipe.places import resolve
from profuser.recipe.schema import SourceConfig

SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, **HEADS),
    "a window": MistralConfig(**SMALL, **HEADS, sliding_window=6),
    "two kinds of layer": Gemma3TextConfig(
        **SMALL, **HEADS, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    "positions as biases": MptConfig(vocab_size=60, d_model=32, n_heads=4, n_layers=2, expansion_ratio=2),
    "no attention": MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=8),
    "some of both": Qwen3NextConfig(
        **SMALL, **HEADS, layer_types=["linear_attention", "full_attention"], num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_key_head_dim=8, linear_value_head_dim=8,
        linear_num_key_heads=2, linear_num_value_heads=2,
    ),
}  # fmt: skip


def model_of(kind: str):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.float32).eval()
    with torch.no_grad():  # makes it say different things to different prompts
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


PROMPTS = [[5], [7, 8, 9], [11, 3, 5, 9, 2, 4, 17, 21], [30, 31], [6, 6], [44] * 5]
ROOMS = [12, 3, 20, 1, 16, 9]


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_that_leave_change_nothing_for_those_that_stay(kind):
    model = model_of(kind)
    alone = [
        continuations(model, [ids], ends=[1], pad=0, rooms=[room])[0] for ids, room in zip(PROMPTS, ROOMS, strict=True)
    ]
    assert [len(found) for found in alone] == [room if 1 not in f else f.index(1) + 1 for room, f in zip(ROOMS, alone)]
    # Ends that come up in some of the rows make these leave at different moments.
    ends = {1, alone[2][len(alone[2]) // 2], alone[4][len(alone[4]) // 4]}
    expected = []
    for found in alone:
        stop = next((t + 1 for t, token in enumerate(found) if token in ends), len(found))
        expected.append(found[:stop])
    assert len({*map(len, expected)}) > 2, expected
    assert continuations(model, PROMPTS, ends=ends, pad=0, rooms=ROOMS) == expected


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_a_sampled_row_does_not_depend_on_its_batch(top_p):
    model = model_of("llama")
    sampling = Sampling(1.3, top_p)
    draws = [draws_of(0, "s", str(n), 0, room) for n, room in enumerate(ROOMS)]
    options = {"ends": [1, 9, 12], "pad": 0, "sampling": sampling}
    together = continuations(model, PROMPTS, rooms=ROOMS, draws=draws, **options)
    alone = [
        continuations(model, [ids], rooms=[room], draws=[draw], **options)[0]
        for ids, room, draw in zip(PROMPTS, ROOMS, draws)
    ]
    assert together == alone
    other = [draws_of(1, "s", str(n), 0, room) for n, room in enumerate(ROOMS)]
    assert continuations(model, PROMPTS, rooms=ROOMS, draws=other, **options) != together


def test_what_is_drawn_has_the_probabilities_of_the_model():
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0, -3.0])
    for sampling in (Sampling(0.7, 1.0), Sampling(1.5, 0.8)):
        expected = torch.softmax(logits.double() / sampling.temperature, -1).numpy()
        if sampling.top_p < 1:
            order = np.argsort(-expected)
            kept = order[: np.searchsorted(np.cumsum(expected[order]), sampling.top_p) + 1]
            expected = np.where(np.isin(np.arange(5), kept), expected, 0) / expected[kept].sum()
        count = 20_000
        draws = (np.arange(count)[:, None] + 0.5) / count
        scores = _Drawn(sampling, list(draws), 0)(torch.zeros(count, 0), logits.expand(count, 5))
        assert (scores.isfinite().sum(1) == 1).all()
        found = np.bincount(scores.argmax(1).numpy(), minlength=5) / count
        np.testing.assert_allclose(found, expected, atol=2 / count)


@pytest.mark.parametrize("draw", [0.0, float(np.nextafter(1, 0))])
def test_the_first_and_the_last_number_draw_possible_tokens(draw):
    logits = torch.full((1, 40), -torch.inf)
    logits[0, [3, 20]] = torch.tensor([0.1, 0.2])
    scores = _Drawn(Sampling(1.0, 1.0), [np.array([draw])], 0)(torch.zeros(1, 0), logits)
    assert scores.argmax().item() == (3 if draw == 0 else 20)


def test_every_response_has_numbers_of_its_own():
    places = [
        (0, "a train", "x 0", 1),
        (1, "a train", "x 0", 1),
        (0, "b train", "x 0", 1),
        (0, "a train", "x 1", 1),
        (0, "a train", "x 0", 0),
    ]
    assert len({tuple(draws_of(*place, 4)) for place in places}) == len({seed_of(*place) for place in places}) == 5
    np.testing.assert_array_equal(draws_of(*places[0], 9)[:4], draws_of(*places[0], 4))
    assert all(0 <= seed_of(*place) < 2**31 for place in places)


def test_a_prompt_that_comes_again_has_another_name():
    one, other, again = names_of(["a", "b", "a"])
    assert len({one, other, again}) == 3
    assert names_of(["b", "a"]) == [other, one]


def test_responses_depend_neither_on_the_size_of_a_batch_nor_on_where_a_shard_begins():
    source = SourceConfig(name="guardian", model="demo:guardian")
    model, chat = load_model(source, torch.float32), chat_format(source)
    prompts = [json.loads(line)["prompt"] for line in Path(resolve("demo:heldout.jsonl")).read_text().splitlines()[:9]]
    found = []
    for temperature in (0.0, 1.2):
        for batch_size in (1, 4, 16):
            config = GenerationConfig(max_new_tokens=12, batch_size=batch_size, temperature=temperature)
            options = {"max_length": 96, "of": "guardian train", "responses": 2 if temperature else 1}
            whole = generate(model, chat, prompts, config, **options)
            parts = [
                answer
                for first, stop in ((0, 4), (4, 9))
                for answer in generate(
                    model, chat, prompts[first:stop], config, names=names_of(prompts)[first:stop], **options
                )
            ]
            assert parts == whole
            found.append(whole)
    assert found[0] == found[1] == found[2] != found[3] == found[4] == found[5]
    assert any(a != b for a, b in found[3])
