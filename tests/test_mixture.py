"""The mixture samples from the weighted mean of the sources' distributions, and every source reads the same text."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from test_cool_fusion import PROMPTS, demo, written  # noqa: F401  (demo is a fixture)
from transformers import AutoModelForCausalLM, LlamaConfig

from profuser.errors import ConfigError, DataError
from profuser.generate.mixture import Mixture
from profuser.generate.speaker import Speaker, Voice
from profuser.models.head import head_of
from profuser.recipe.schema import DecodeConfig
from profuser.text.chat import ChatFormat

PAIR = slice(1, 3)  # scholar and reckoner share a vocabulary


def mixture(voices, tokens: int, **options) -> Mixture:
    return Mixture(voices, DecodeConfig(method="mixture", **options), tokens)


def row(voice: Voice, ids: list[int], temperature: float = 1.0) -> np.ndarray:
    """The distribution over what is text or ends a turn."""
    with torch.no_grad():
        logits = voice.model(torch.tensor([ids])).logits[0, -1].double().numpy() / temperature
    pieces = voice.chat.token_bytes.pieces
    for i in range(len(logits)):
        if not (i < len(pieces) and pieces[i]) and i not in voice.chat.end_ids:
            logits[i] = -np.inf
    p = np.exp(logits - logits.max())
    return p / p.sum()


@pytest.fixture(scope="module")
def confused(demo) -> list[Voice]:  # noqa: F811
    """Two small random models with the vocabulary of scholar, which are unsure and differ from each other."""
    voices = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=len(demo[1].head.weight), hidden_size=16, intermediate_size=16,
                             num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5)  # fmt: skip
        model = AutoModelForCausalLM.from_config(config).eval()
        voices.append(Voice(f"confused {seed}", demo[1].chat, model, head_of(model)))
    return voices


@pytest.fixture
def said(monkeypatch) -> list[tuple[str, int, str]]:
    """Every token that a source has appended, with the source's name and the text that it completed, in their order."""
    found: list[tuple[str, int, str]] = []
    says = Speaker.says

    def recording(speaker, token):
        text = says(speaker, token)
        found.append((speaker.voice.name, token, text))
        return text

    monkeypatch.setattr(Speaker, "says", recording)
    return found


def test_every_token_is_drawn_behind_all_that_was_said(confused, said):
    """Whoever speaks has read what the others have written, at the place where it stands."""
    steps = list(mixture(confused, 60).steps("hm"))
    ids = confused[0].chat.prompt_ids("hm")
    spoken = [(token, text) for name, token, text in said if name == confused[0].name]
    assert spoken == [(token, text) for name, token, text in said if name == confused[1].name]
    waiting = iter(spoken)
    for step in steps:
        (chosen,) = step.winner.sources
        text, expected = "", math.nan
        while step.winner.text and not text:  # up to the token that completes the segment
            token, text = next(waiting)
            expected = row(confused[chosen], ids)[token]
            ids = [*ids, token]
        if text:
            assert text == step.winner.text
            assert step.winner.perplexities[chosen] == pytest.approx(1 / expected, rel=1e-3)
        assert math.isnan(step.winner.perplexities[1 - chosen])
    assert {step.winner.sources for step in steps} == {(0,), (1,)}


def test_sources_speak_as_often_as_their_weights_say(confused):
    steps = [s for p in PROMPTS for s in mixture(confused, 80, weights=[3.0, 1.0]).steps(p)]
    share = sum(step.winner.sources == (0,) for step in steps) / len(steps)
    assert share == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / len(steps)))


def test_prompts_have_random_numbers_of_their_own(confused):
    """Otherwise the same source would speak first behind every prompt."""
    assert {next(mixture(confused, 9).steps(prompt)).winner.sources for prompt in "abcdefghijkl"} == {(0,), (1,)}


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.long)])
@pytest.mark.parametrize(("weights", "temperature"), [([1.0, 1.0], 1.0), ([3.0, 1.0], 0.7)])
def test_tokens_are_distributed_as_in_the_mean(confused, said, count, weights, temperature):
    """The sample is as near to the mean of the distributions as samples that numpy draws from it, and not to either source."""
    opening = confused[0].chat.prompt_ids("hm")
    rows = [row(voice, opening, temperature) for voice in confused]
    truth = np.average(rows, axis=0, weights=weights)
    tokens, decoder = [], mixture(confused, 1, weights=weights, temperature=temperature)
    for seed in range(count):
        decoder.config = replace(decoder.config, seed=seed)
        said.clear()
        list(decoder.steps("hm"))
        tokens.append(said[0][1] if said else confused[0].chat.end_ids[0])
    found = np.bincount(tokens, minlength=len(truth)) / count

    rng = np.random.default_rng(0)
    usual = max(np.abs(rng.multinomial(count, truth) / count - truth).sum() for _ in range(300))
    assert np.abs(found - truth).sum() <= 1.02 * usual
    assert all(np.abs(found - p).sum() > usual for p in rows)


def test_an_answer_depends_on_the_seed_and_the_prompt_alone(demo):  # noqa: F811
    pair = demo[PAIR]
    alone = mixture(pair, 30, seed=1).answer(PROMPTS[0])
    decoder = mixture(pair, 30, seed=1)
    decoder.answer(PROMPTS[1])
    assert decoder.answer(PROMPTS[0]) == alone
    assert len({mixture(pair, 30, seed=seed).answer(PROMPTS[0]).text for seed in range(8)}) > 1


def test_a_cold_mixture_of_one_source_is_its_greedy_answer(demo):  # noqa: F811
    for prompt in PROMPTS[:3]:
        answer = mixture([demo[1]], 40, temperature=1e-4).answer(prompt)
        alone = written(demo[1], prompt, 40)
        assert (answer.text, answer.finished) == (alone.text.strip(), alone.ended)


def test_equal_tokens_may_have_other_ids(demo):  # noqa: F811
    """The same source with its vocabulary in another order: as cold as this, both write what the source writes."""
    order = torch.randperm(len(demo[1].head.weight), generator=torch.Generator().manual_seed(0))
    other = shuffled(demo[1], order)
    for prompt in PROMPTS[:3]:
        answer = mixture([demo[1], other], 40, temperature=1e-4).answer(prompt)
        assert answer.text == written(demo[1], prompt, 40).text.strip()
        assert {step.winner.sources for step in answer.steps} == {(0,), (1,)}


def shuffled(voice: Voice, order: torch.Tensor) -> Voice:
    """A source whose token n is token order[n] of another one."""
    model: Any = copy.deepcopy(voice.model)
    with torch.no_grad():
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
        for weight in {id(layer.weight): layer.weight for layer in layers}.values():
            weight.copy_(weight[order].clone())
    place = {int(old): new for new, old in enumerate(order)}
    chat = SimpleNamespace(
        token_bytes=SimpleNamespace(
            pieces=[voice.chat.token_bytes.pieces[int(old)] for old in order],
            spellings=[voice.chat.token_bytes.spellings[int(old)] for old in order],
        ),
        end_ids=tuple(place[i] for i in voice.chat.end_ids),
        prompt_ids=lambda prompt: [place[i] for i in voice.chat.prompt_ids(prompt)],
    )
    return Voice("shuffled", cast(ChatFormat, chat), model, head_of(model))


def test_sources_with_different_vocabularies_are_refused(demo):  # noqa: F811
    with pytest.raises(
        DataError, match=r"share a vocabulary: \w+ and \w+ differ in [\d,]+ tokens.*decode\.method cool"
    ):
        mixture(demo, 10)


def test_wrong_settings():
    with pytest.raises(ConfigError, match=r"decode\.temperature must be > 0"):
        DecodeConfig(temperature=0)
