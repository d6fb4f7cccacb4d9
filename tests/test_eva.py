"""EVA's projection equals a dense numpy reference, and its answers those of an implementation that reads everything anew."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_tokenizers import real_chat
from test_cool_fusion import PROMPTS, demo, random_voice, refuse_e, written  # noqa: F401  (demo is a fixture)

from profuser.errors import ConfigError, DataError
from profuser.generate.eva import TOP, Eva, _top, faithful
from profuser.generate.vocabulary_projection import Projection, project
from profuser.recipe.schema import DecodeConfig

# --- the projection --------------------------------------------------------------------------------------------------


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def whitening(x: np.ndarray) -> np.ndarray:
    _, s, vt = np.linalg.svd(x, full_matrices=False)
    return vt.T @ np.diag(1 / s) @ vt


def dense(source, source_head: np.ndarray, main, main_head: np.ndarray) -> np.ndarray:
    """(V_main, V_source): VecMap's supervised mapping, CSLS, the ten best, the threshold and the spread, all dense."""
    own = [i for i, piece in enumerate(source.pieces[: len(source_head)]) if piece]
    others = [i for i, piece in enumerate(main.pieces[: len(main_head)]) if piece]
    x, z = (unit(head[ids]) for head, ids in ((source_head, own), (main_head, others)))
    x, z = unit(x - x.mean(0)), unit(z - z.mean(0))
    # The anchors: tokens of equal bytes, byte tokens among themselves; where several have the same, in their order.
    places = [{}, {}]
    for known, tokens, ids in zip(places, (source, main), (own, others)):
        for place, i in enumerate(ids):
            known.setdefault((tokens.pieces[i], i in tokens.byte_tokens), []).append(place)
    pairs = [pair for key, at in places[0].items() for pair in zip(at, places[1].get(key, []))]
    a, b = (list(side) for side in zip(*pairs))
    wx, wz = whitening(x[a]), whitening(z[b])
    u, s, vt = np.linalg.svd((x[a] @ wx).T @ (z[b] @ wz))
    u, v = u[:, : len(s)], vt.T[:, : len(s)]
    x = unit(x @ wx @ u @ np.diag(np.sqrt(s)) @ u.T @ np.linalg.inv(wx) @ u)
    z = unit(z @ wz @ v @ np.diag(np.sqrt(s)) @ v.T @ np.linalg.inv(wz) @ v)
    cosine = x @ z.T
    csls = 2 * cosine - cosine.max(0)
    weights = np.zeros((len(main_head), len(source_head)))
    for row, token in zip(csls, own):
        best = [n for n in np.argsort(-row)[:10] if row[n] >= 0.1]
        if len(best) > 5 and np.std(row[best]) <= 0.01:
            best = []
        for n in best:
            weights[others[n], token] = row[n]
    return weights


def heads(main, source, rows: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random heads of 24 and 16 dimensions, in which tokens of equal bytes are near to each other in some way."""
    rng = np.random.default_rng(seed)
    main_size, source_size = (min(rows or 10**9, len(tokens.pieces)) for tokens in (main, source))
    meaning: dict[bytes, np.ndarray] = {}
    both = []
    for tokens, size, width in ((main, main_size, 24), (source, source_size, 16)):
        turn = rng.standard_normal((16, width))
        vectors = np.stack(
            [meaning.setdefault(piece or b"", rng.standard_normal(16)) for piece in tokens.pieces[:size]]
        )
        both.append(vectors @ turn + 0.3 * rng.standard_normal((size, width)))
    return both[0], both[1]


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (("llama2", "gpt2"), 1500),
        (("qwen2", "llama2"), 1500),
        (("gpt2", "gpt_neox"), 1500),
        pytest.param(("llama2", "mistral_v1"), 12_000, marks=pytest.mark.long),
    ],
)
def test_the_projection_equals_a_dense_reference(names, rows):
    main, source = (real_chat(name, "vicuna").token_bytes for name in names)
    main_head, source_head = heads(main, source, rows, seed=1)
    ends = ([7, 9], 5)
    found = project(source, torch.from_numpy(source_head), main, torch.from_numpy(main_head), ends, dtype=torch.float64)
    expected = dense(source, source_head, main, main_head)
    has_bytes = np.array([bool(piece) for piece in source.pieces[: len(source_head)]])
    assert found.projected == np.count_nonzero(expected.any(0))
    assert found.dropped == has_bytes.sum() - found.projected
    expected[5, [7, 9]] += 1.0
    np.testing.assert_allclose(found.weights.to_dense().numpy(), expected, atol=1e-6)

    # A distribution of the source, as the main model's tokens.
    probabilities = np.random.default_rng(2).dirichlet(np.full(len(source_head), 0.1)).astype(np.float32)
    np.testing.assert_allclose(found(torch.from_numpy(probabilities)), expected @ probabilities, atol=1e-6)


def test_a_vocabulary_is_projected_onto_itself_token_by_token():
    tokens = real_chat("gpt2", "vicuna").token_bytes
    head = torch.randn(1200, 24, generator=torch.Generator().manual_seed(0))
    found = project(tokens, head, tokens, head, ([0], 0)).weights.to_dense()[1:, 1:]
    torch.testing.assert_close(found.diagonal(), torch.ones(1199), atol=1e-4, rtol=0)
    assert bool((found.argmax(0) == torch.arange(1199)).all())


@pytest.mark.parametrize("rows", [400, 1000])
def test_fewer_anchors_than_dimensions(rows):
    """What the anchors say nothing about does not become noise of infinite size, and LAPACK converges."""
    main, source = real_chat("gpt2", "vicuna").token_bytes, real_chat("llama2", "vicuna").token_bytes
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(rows, 600, generator=generator), torch.randn(rows, 600, generator=generator)
    found = project(source, heads[0], main, heads[1], ([2], 0))
    assert 0 < found.anchors < 600
    assert bool(found.weights.to_dense().isfinite().all())
    assert 0 < float(found.weights.to_dense().max()) <= 1 + 1e-5


# --- decoding --------------------------------------------------------------------------------------------------------


def slow_answer(voices, config: DecodeConfig, max_new_tokens: int, prompt: str) -> tuple[list[str], int]:
    """The pieces of the answer, and how often a source was left out. Every token reads every conversation anew."""
    main = voices[0]
    projections = [
        project(v.chat.token_bytes, v.head.weight, main.chat.token_bytes, main.head.weight,
                (v.chat.end_ids, main.chat.end_id)).weights.to_dense()
        for v in voices[1:]
    ]  # fmt: skip

    def row(voice, ids):
        with torch.no_grad():
            p = voice.model(torch.tensor([ids])).logits[0, -1].float().softmax(-1)
        top = p.topk(min(320, len(p)))
        return torch.zeros_like(p).scatter(0, top.indices, top.values / top.values.sum())

    def length(voice) -> int:
        encoded = voice.chat.encode(prompt, response, complete=False)
        return encoded.stop - encoded.start

    own, response, pieces, left_out = [], "", [], 0
    while not response or max(len(own), *map(length, voices[1:])) < max_new_tokens:
        said = [row(main, [*main.chat.prompt_ids(prompt), *own])]
        for voice, projection in zip(voices[1:], projections):
            encoded = voice.chat.encode(prompt, response, complete=False) if response else None
            ids = encoded.input_ids[: encoded.stop] if encoded else voice.chat.prompt_ids(prompt)
            said.append(projection @ row(voice, ids))
        best = [int(p.argmax()) for p in said]
        tops = [set(p.argsort(descending=True)[: config.top_n].tolist()) for p in said]
        kept = [n for n in range(len(said)) if any(best[n] in tops[m] for m in range(len(said)) if m != n)]
        kept = kept or list(range(len(said)))
        left_out += len(said) - len(kept)
        token = int(torch.stack([said[n] for n in kept]).sum(0).argmax())
        if token in main.chat.end_ids:
            return [*pieces, ""], left_out
        own.append(token)
        text = main.chat.token_bytes.pieces[token].decode()  # the demo's vocabularies write ASCII here
        text = text if response else text.lstrip()
        response += text
        if text:
            pieces.append(text)
    return pieces, left_out


ORDERS = [(2, 0), (0, 1, 2), (1, 2)]


@pytest.mark.parametrize(
    ("order", "top_n"),
    [
        pytest.param(order, n, marks=[pytest.mark.long] if (order, n) != ((2, 0), 3) else [])
        for order in ORDERS
        for n in (1, 3)
    ],
)
def test_answers_equal_a_slow_implementations(demo, order, top_n):  # noqa: F811
    voices = [demo[n] for n in order]
    config = DecodeConfig(method="eva", top_n=top_n)
    left_out = 0
    for prompt in PROMPTS[:3]:
        steps = list(Eva(voices, config, 24).steps(prompt))
        expected, dropped = slow_answer(voices, config, 24, prompt)
        assert [step.winner.text for step in steps] == expected
        assert sum(len(step.left_out) for step in steps) == dropped
        assert all(math.isnan(step.winner.perplexities[n]) for step in steps for n in step.left_out)
        left_out += dropped
    assert left_out > 0 or top_n > 1 or len(voices) == 2


def test_copies_of_one_model_are_that_model(demo):  # noqa: F811
    for prompt in PROMPTS[:3]:
        answer = Eva([demo[0]] * 3, DecodeConfig(method="eva"), 40).answer(prompt)
        alone = written(demo[0], prompt, 40)
        assert (answer.text, answer.finished) == (alone.text.strip(), alone.ended)


def test_a_source_without_any_weight_changes_nothing_where_all_count(demo, monkeypatch):  # noqa: F811
    monkeypatch.setattr("profuser.generate.eva.faithful", lambda said, _: [True] * len(said))
    config = DecodeConfig(method="eva", weights=[1.0, 0.0, 0.0])
    for prompt in PROMPTS[:3]:
        answer = Eva(demo, config, 40).answer(prompt)
        alone = written(demo[0], prompt, 40).text.strip()
        assert answer.text
        assert answer.text == alone if answer.finished else alone.startswith(answer.text)


def test_a_source_that_cannot_hold_the_answer_is_not_asked(demo, monkeypatch):  # noqa: F811
    """From the first `e` on, the second source does not follow. What it would say behind its own text is of no use."""
    monkeypatch.setattr("profuser.generate.eva.faithful", lambda said, _: [row is not None for row in said])
    refuse_e(monkeypatch, demo[2])
    for prompt in PROMPTS[:3]:
        text = ""
        for step in Eva([demo[0], demo[2]], DecodeConfig(method="eva"), 24).steps(prompt):
            assert math.isnan(step.winner.perplexities[1]) == ("e" in text)
            text += step.winner.text
        assert "e" in text


@pytest.mark.parametrize("pair", list(itertools.permutations(("llama2", "qwen2"))), ids="-".join)
def test_characters_of_several_tokens_are_appended_whole(pair, monkeypatch):
    """Random models write tokens that are parts of characters. The other source reads none of these."""
    monkeypatch.setattr("profuser.generate.eva.project", nothing_projected)
    voices = [random_voice(name, seed) for seed, name in enumerate(pair)]
    eva, parts = Eva(voices, DecodeConfig(method="eva"), 30), 0
    for prompt in PROMPTS:
        answer = eva.answer(prompt)
        assert all(step.winner.text for step in answer.steps[:-1])
        assert "".join(step.winner.text for step in answer.steps).strip() == answer.text
        assert answer.finished == (not answer.steps[-1].winner.text)
        parts += any(len(step.winner.text) == 1 and not step.winner.text.isascii() for step in answer.steps)
    assert parts


def nothing_projected(source, source_head, main, main_head, ends) -> Projection:
    size = len(main_head), len(source_head)
    nothing = torch.sparse_coo_tensor(torch.zeros(2, 0, dtype=torch.long), torch.zeros(0), size, check_invariants=True)
    return Projection(nothing, 0, 0, 0)


def test_which_sources_count():
    a, b, c = torch.tensor([0.7, 0.2, 0.1, 0.0]), torch.tensor([0.3, 0.6, 0.1, 0.0]), torch.tensor([0.0, 0.1, 0.2, 0.7])
    assert faithful([a, b, c], 1) == [True, True, True]  # none agrees, so all count
    assert faithful([a, b, c], 2) == [True, True, False]
    assert faithful([a, None, c], 2) == [True, False, True]
    assert faithful([a, a, c], 1) == [True, True, False]
    assert faithful([a], 3) == [True]


def test_the_most_probable_tokens_of_a_distribution_count_with_the_sum_1():
    found = _top(torch.arange(1.0, 1001) / torch.arange(1.0, 1001).sum())
    assert found.nonzero()[:, 0].tolist() == [*range(1000 - TOP, 1000)]
    assert found.sum().item() == pytest.approx(1)


def test_wrong_settings():
    with pytest.raises(ConfigError, match=r"decode\.top_n must be > 0"):
        DecodeConfig(top_n=0)


def test_a_first_source_that_ends_no_turn_is_refused():
    voice: Any = SimpleNamespace(name="base", chat=SimpleNamespace(end_id=None))
    with pytest.raises(DataError, match="needs a first source with an end of turn, base has none; use another method"):
        Eva([voice, voice], DecodeConfig(method="eva"), 8)
