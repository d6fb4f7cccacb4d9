"""Responses that lie end to end in a forward pass are captured as if each were read alone, on any budget of tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from alignment_checks import chain_chat
from transformers import MptConfig, MptForCausalLM, PreTrainedModel

from profuser.alignment.follow_numbers import NumberFollower, number_rows
from profuser.alignment.ranges import ranges_needed
from profuser.alignment.types import NUMBERS
from profuser.alignment.vocab_map import ByteOrder
from profuser.errors import ConfigError
from profuser.kernels.head import Head
from profuser.models.head import head_of
from profuser.models.load import chat_format, load_model
from profuser.models.packing import Layout, size_of
from profuser.prepare import capture, capture_shards
from profuser.prepare.capture import BatchSize, CaptureRequest, Numbered, ScoredResponse, capture_responses
from profuser.prepare.capture_shards import captured, load_source
from profuser.prepare.inputs import Inputs
from profuser.progress import Progress
from profuser.recipe.schema import CaptureConfig, SourceConfig
from profuser.store.layout import truth
from profuser.text.chat import ChatFormat

TEXTS = [f"8-{n}=3. " * (1 + n % 4) + f"Answer: {n}." for n in range(9)] + ["A bozun is a stone. Answer: bitter."]
BUDGET = 128


class Asked(NamedTuple):
    """A source, its byte order, and what is asked of it for guardian as the target."""

    model: PreTrainedModel
    head: Head
    chat: ChatFormat
    order: ByteOrder
    requests: list[CaptureRequest]

    def scored(self, size: int | BatchSize, requests: list[CaptureRequest] | None = None) -> list[ScoredResponse]:
        """What the source says, in the order of the requests."""
        found = capture_responses(
            self.model, self.head, requests or self.requests, self.order, top_k=5, batch_size=size
        )
        return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def packed(budget: int, layout: Layout = "packed") -> BatchSize:
    return BatchSize(budget, "tokens", lambda line: None, layout)


def asked_of(name: str) -> Asked:
    config = SourceConfig(name=name, model=f"demo:{name}")
    model, chat = load_model(config, torch.float32), chat_format(config)
    target = chat_format(SourceConfig(name="guardian", model="demo:guardian"))
    order, requests = ByteOrder(chat.token_bytes), []
    for text in TEXTS:
        own, theirs = chat.encode("How many?", text), target.encode("How many?", text)
        ranges = ranges_needed(target.token_bytes, theirs, chat.token_bytes, own, order)
        requests.append(CaptureRequest(own, len(text.encode()), ranges))
    return Asked(model, head_of(model), chat, order, requests)


@pytest.fixture(scope="module", params=["guardian", "scholar"])
def asked(request) -> Asked:
    return asked_of(request.param)


@pytest.fixture(scope="module")
def scholar() -> Asked:
    return asked_of("scholar")


def numbers_in(one: ScoredResponse) -> np.ndarray:
    """All log-probabilities and log-sum-exps of a capture."""
    found = one.capture
    return np.concatenate([one.lse, found.own_logprobs, found.top_logprobs.ravel(), found.ranges.logmass])


def expected_of(asked: Asked, request: CaptureRequest, one: ScoredResponse) -> np.ndarray:
    """What `numbers_in` should be: by the logits in fp64 of the text alone, at the tokens that the capture has."""
    with torch.no_grad():
        logits = asked.model.double()(torch.tensor([request.encoded.input_ids])).logits[0]
    asked.model.float()
    rows = logits[[t - 1 for t in request.encoded.label_positions]]
    logprobs = rows.log_softmax(-1)
    of_ranges = [
        logprobs[row, torch.from_numpy(asked.order.ids[lo:hi].astype(np.int64))].logsumexp(0)
        for row, lo, hi in zip(request.ranges.rows.tolist(), request.ranges.lo.tolist(), request.ranges.hi.tolist())
    ]
    return np.concatenate(
        [
            rows.logsumexp(-1),
            logprobs[range(len(rows)), one.capture.ids.tolist()],
            logprobs.gather(1, torch.from_numpy(one.capture.top_ids).long()).ravel(),
            np.array(of_ranges),
        ]
    )


@pytest.mark.parametrize("way", ["packed", "flat"])
def test_a_packed_capture_is_as_near_to_fp64_as_a_padded_one(asked, way: Layout):
    distances = {}
    for each in ("padded", way):
        scored = asked.scored(packed(BUDGET, each))
        expected = [expected_of(asked, request, one) for request, one in zip(asked.requests, scored, strict=True)]
        differences = [numbers_in(one) - reference for one, reference in zip(scored, expected, strict=True)]
        distances[each] = np.linalg.norm(np.concatenate(differences)) / np.linalg.norm(np.concatenate(expected))
    assert 0 < distances["padded"] < 1e-5
    assert distances[way] <= 2 * distances["padded"]


def test_a_budget_is_filled_by_several_responses_to_a_row(scholar, monkeypatch):
    seen, hidden = [], capture.hidden_states

    def states(model, ids, mask, position_ids, **inputs):
        assert mask is None
        seen.append((ids.shape, int((position_ids == 0).sum())))
        return hidden(model, ids, mask, position_ids=position_ids, **inputs)

    monkeypatch.setattr(capture, "hidden_states", states)
    scholar.scored(packed(BUDGET))
    tokens = sum(len(request.encoded.input_ids) for request in scholar.requests)
    assert all(rows * length <= BUDGET for (rows, length), _ in seen)
    assert tokens > 0.9 * sum(rows * length for (rows, length), _ in seen)
    assert max(firsts / rows for (rows, _), firsts in seen) >= 2
    seen.clear()
    scholar.scored(packed(BUDGET, "flat"))
    assert [rows for (rows, _), _ in seen] == [1] * len(seen)


def without_positions(forward):
    """A model that takes what packing gives it, and makes nothing of it."""
    return lambda position_ids=None, **inputs: forward(
        **{k: x for k, x in inputs.items() if not k.startswith(("cu_", "max_"))}
    )


def changed(request: CaptureRequest) -> CaptureRequest:
    """A text of other tokens, but as many."""
    ids = [(31 * n + 7 * i) % 256 for n, i in enumerate(request.encoded.input_ids)]
    return replace(request, encoded=replace(request.encoded, input_ids=ids))


@pytest.mark.parametrize("way", ["packed", "flat"])
def test_no_response_sees_another_one_of_its_row(asked, way: Layout):
    before = asked.scored(packed(10_000, way))
    for n in range(0, len(TEXTS), 3):
        requests = [changed(request) if i == n else request for i, request in enumerate(asked.requests)]
        after = asked.scored(packed(10_000, way), requests)
        for i, (one, other) in enumerate(zip(before, after, strict=True)):
            assert np.array_equal(numbers_in(one), numbers_in(other)) == (i != n)
            np.testing.assert_array_equal(one.capture.top_ids if i != n else 0, other.capture.top_ids if i != n else 0)


def test_a_source_that_lets_one_see_another_is_padded_and_says_so_once(scholar, capsys, monkeypatch):
    sizes = {"d_model": 32, "n_heads": 2, "n_layers": 2, "vocab_size": len(scholar.head.weight), "init_device": "cpu"}
    model = MptForCausalLM(MptConfig(**sizes, initializer_range=0.3)).eval()
    leaky = scholar._replace(model=model, head=head_of(model))
    # Were it packed, a response would see those before it. So the test above can fail.
    monkeypatch.setattr(leaky.model.transformer, "forward", without_positions(leaky.model.transformer.forward))
    requests = [changed(request) if n == 5 else request for n, request in enumerate(leaky.requests)]
    pairs = zip(*(leaky.scored(packed(10_000, "flat"), of) for of in (leaky.requests, requests)), strict=True)
    assert sum(not np.array_equal(numbers_in(one), numbers_in(other)) for one, other in pairs) > 1
    monkeypatch.undo()

    capture_shards.say_once.cache_clear()
    config = CaptureConfig(tokens_per_batch=BUDGET, layout="packed")
    assert {capture_shards.batch_size("r", leaky.model, config).layout for _ in range(3)} == {"padded"}
    assert capsys.readouterr().out == (
        "r: responses are padded and not packed: MptForCausalLM would let each see the one before it\n"
    )


def test_auto_packs_where_flash_attention_is_used_and_nowhere_else(scholar, monkeypatch, capsys):
    capture_shards.say_once.cache_clear()

    def layout_of(**options) -> Layout:
        return capture_shards.batch_size("s", scholar.model, CaptureConfig(**options)).layout

    of_tokens = {"tokens_per_batch": BUDGET}
    assert (layout_of(), layout_of(**of_tokens), layout_of(**of_tokens, layout="padded")) == ("padded",) * 3
    assert capsys.readouterr().out == ""
    assert layout_of(**of_tokens, layout="packed") == "packed"
    monkeypatch.setattr(capture_shards, "uses_flash_attention", lambda model: True)
    monkeypatch.setattr("profuser.models.attention.uses_flash_attention", lambda model: True)
    assert (layout_of(), layout_of(**of_tokens), layout_of(**of_tokens, layout="padded")) == (
        "padded",
        "flat",
        "padded",
    )
    said = capsys.readouterr().out.splitlines()
    assert [line.rpartition(", ")[2] for line in said] == [
        "attention with a mask of blocks",
        "flash-attention over the bounds of the sequences",
    ]
    with pytest.raises(ConfigError, match=r"capture\.tokens_per_batch is null; set it"):
        CaptureConfig(layout="packed")


@pytest.mark.parametrize("way", ["packed", "flat"])
def test_too_many_packed_tokens_are_halved_until_they_fit(scholar, monkeypatch, way: Layout):
    expected = scholar.scored(1)
    lengths = [len(request.encoded.input_ids) for request in scholar.requests]
    # The longest is above what the budget becomes, and is tried alone all the same.
    most, tried, hidden = max(lengths), [], capture.hidden_states

    def states(model, ids, mask, **inputs):
        tried.append(ids.numel())
        if ids.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(model, ids, mask, **inputs)

    monkeypatch.setattr(capture, "hidden_states", states)
    size = packed(10_000, way)
    found = scholar.scored(size)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(numbers_in(one), numbers_in(other), atol=1e-4)
    failed = [tokens for tokens in tried if tokens > most]
    assert failed[0] == size_of(packed(10_000, way).passes(numbered(scholar))[0])
    assert failed == sorted(set(failed), reverse=True)  # none is tried twice
    assert size.now == failed[-1] // 2
    # A response that does not fit alone ends the command.
    most = min(lengths) - 1
    tried.clear()
    with pytest.raises(torch.OutOfMemoryError):
        scholar.scored(size)
    assert len(tried) < 10


def numbered(asked: Asked) -> list[Numbered]:
    return [Numbered(n, request) for n, request in enumerate(asked.requests)]


@pytest.mark.parametrize("budget", [1, 20, 40, 41, BUDGET])
@pytest.mark.parametrize("way", ["padded", "packed", "flat"])
def test_a_pass_of_several_responses_is_within_the_budget(scholar, budget, way: Layout):
    """Else a budget that was halved could leave a pass as it is, which would be tried for ever."""
    passes = packed(budget, way).passes(numbered(scholar))
    assert sorted(one.number for rows in passes for row in rows for one in row) == list(range(len(TEXTS)))
    assert all(size_of(rows) <= budget for rows in passes if sum(map(len, rows)) > 1)


def test_numbers_are_followed_in_packed_responses_as_in_others(scholar):
    target = chain_chat(*[f"{n:0{length}}" for length in (2, 3) for n in range(10**length)])
    tokens, its = target.token_bytes, scholar.chat.token_bytes
    requests = []
    for text in TEXTS[:4]:
        theirs, own = target.encode("x", text), scholar.chat.encode("How many?", text)
        ranges = ranges_needed(tokens, theirs, its, own, scholar.order)
        requests.append(CaptureRequest(own, len(text), ranges, number_rows(tokens, theirs, its, own)))
    follower = NumberFollower(tokens, its, scholar.model, scholar.head, 5)
    found = {}
    for name, size in {"padded": BatchSize(1), "packed": packed(BUDGET)}.items():
        scored = dict(
            capture_responses(
                scholar.model, scholar.head, requests, scholar.order, top_k=5, batch_size=size, follower=follower
            )
        )
        found[name] = [scored[n].capture.ranges for n in range(4)]
    for one, other in zip(*found.values(), strict=True):
        assert (one.strip == NUMBERS).any()
        for name in ("rows", "strip", "ids"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        np.testing.assert_allclose(one.logmass, other.logmass, atol=1e-4)


def test_a_shard_is_the_same_bytes_whatever_was_captured_before_it(prepared, capsys):
    """So it does not depend on which worker makes it. And it is what the store has, up to rounding."""
    capture_shards.say_once.cache_clear()
    _, run, store = prepared
    inputs = Inputs.open(run)
    config = replace(inputs.recipe.capture, tokens_per_batch=200, layout="packed")
    inputs = replace(inputs, recipe=replace(inputs.recipe, capture=config))
    source, parts, fitted = inputs.recipe.sources[0], inputs.parts("train"), inputs.fitted["train"]
    assert len(parts) > 1
    found = []
    for order in (parts, parts[::-1]):
        loaded = load_source(inputs, source)
        assert loaded.batch_size.layout == "packed"
        with Progress("score", 1, "examples", show=False) as bar:
            arrays = {part.number: captured(inputs, "train", part, loaded, part.of(fitted), bar) for part in order}
        found.append(arrays)
    for part in parts:
        one, other = (arrays[part.number] for arrays in found)
        assert {name: x.tobytes() for name, x in one.items()} == {name: x.tobytes() for name, x in other.items()}
        stored = store.get(truth("train", source.name), part.number)
        assert one["ids"].tolist() == stored["ids"].tolist()
        np.testing.assert_allclose(one["own_logprobs"], stored["own_logprobs"], atol=1e-4)
    said = f"{source.name}: responses are packed into passes of 200 tokens, attention with a mask of blocks"
    assert capsys.readouterr().out.count(said) == 1
