"""A source whose memory does not suffice for a batch goes on with half of it, and says so; one that is spread must be on GPUs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from profuser.alignment.ranges import ranges_needed
from profuser.alignment.vocab_map import ByteOrder
from profuser.errors import DataError
from profuser.models.head import head_of
from profuser.models.load import chat_format, check_spread, load_model, load_without_weights
from profuser.prepare import capture
from profuser.prepare.capture import BatchSize, CaptureRequest, capture_responses
from profuser.recipe.schema import CaptureConfig, SourceConfig

SOURCE = SourceConfig(name="guardian", model="demo:guardian")


@pytest.fixture(scope="module")
def asked():
    """A model with its head and byte order, and eleven requests of different lengths."""
    model, chat = load_model(SOURCE, torch.float32), chat_format(SOURCE)
    order, requests = ByteOrder(chat.token_bytes), []
    for n in range(11):
        text = f"8-{n}=3. " * (1 + n % 4) + f"Answer: {n}."
        own = chat.encode("How many?", text)
        requests.append(
            CaptureRequest(own, len(text), ranges_needed(chat.token_bytes, own, chat.token_bytes, own, order))
        )
    return model, head_of(model), requests, order


def limited(monkeypatch, most: int, error: Exception) -> list[int]:
    """Lets batches of more than `most` rows run out of memory. Returns the sizes of all batches that are tried."""
    tried, hidden_states = [], capture.hidden_states

    def hidden(model, input_ids, mask):
        tried.append(len(input_ids))
        if len(input_ids) > most:
            raise error
        return hidden_states(model, input_ids, mask)

    monkeypatch.setattr(capture, "hidden_states", hidden)
    return tried


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_batch_that_is_too_large_is_halved_until_it_fits(asked, monkeypatch, error):
    model, head, requests, order = asked
    expected = dict(capture_responses(model, head, requests, order, top_k=5, batch_size=2))
    tried, said = limited(monkeypatch, 2, error), []
    size = BatchSize(8, say=said.append)
    found = dict(capture_responses(model, head, requests, order, top_k=5, batch_size=size))
    assert tried == [8, 4, 2, 2, 2, 2, 2, 1]
    assert size.now == 2
    assert [line.partition(":")[0] for line in said] == [
        f"for {n} responses at a time the memory does not suffice" for n in (8, 4)
    ]
    assert said[-1].endswith("from now on 2 at a time")
    assert sorted(found) == sorted(expected) == list(range(11))
    for i, one in found.items():
        assert one.nll == expected[i].nll
        np.testing.assert_array_equal(one.capture.top_ids, expected[i].capture.top_ids)
    # The next shard begins with what is known to fit.
    tried.clear()
    list(capture_responses(model, head, requests[:3], order, top_k=5, batch_size=size))
    assert tried == [2, 1]


def test_a_single_response_that_is_too_large_ends_the_command(asked, monkeypatch):
    model, head, requests, order = asked
    tried = limited(monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        list(capture_responses(model, head, requests, order, top_k=5, batch_size=BatchSize(3, say=lambda line: None)))
    assert tried == [3, 1]


def test_another_error_is_not_taken_for_a_lack_of_memory(asked, monkeypatch):
    model, head, requests, order = asked
    tried = limited(monkeypatch, 2, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        list(capture_responses(model, head, requests, order, top_k=5, batch_size=4))
    assert tried == [4]


def test_a_source_that_is_spread_changes_nothing_on_a_cpu(asked):
    model, *_ = asked
    spread = load_model(
        SourceConfig(name="g", model="demo:guardian", device_map="auto"), torch.float32, "cpu", spreads=True
    )
    assert not hasattr(spread, "hf_device_map")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), spread.parameters()))


def test_a_source_that_does_not_fit_on_the_gpus_is_refused():
    with pytest.raises(DataError, match="must fit on the GPUs together, a part of its weights is on the disk"):
        check_spread("g", load_without_weights(SOURCE, torch.float32))
    with pytest.raises(DataError, match="a part of its weights is on cpu"):
        check_spread("g", load_model(SOURCE, torch.float32))


def test_a_batch_of_so_many_tokens_has_many_short_responses_or_one_long(asked, monkeypatch):
    model, head, requests, order = asked
    expected = dict(capture_responses(model, head, requests, order, top_k=5, batch_size=1))
    lengths = sorted(len(request.encoded.input_ids) for request in requests if request.encoded.label_positions)
    budget = 3 * lengths[-1] - 1
    shapes, hidden = [], capture.hidden_states
    monkeypatch.setattr(capture, "hidden_states", lambda m, ids, mask: shapes.append(ids.shape) or hidden(m, ids, mask))
    found = dict(capture_responses(model, head, requests, order, top_k=5, batch_size=BatchSize(budget, "tokens")))
    assert sorted(found) == sorted(expected)
    for i, one in found.items():
        np.testing.assert_allclose(one.nll, expected[i].nll, rtol=1e-5)
    assert sum(rows for rows, _ in shapes) == len(lengths)
    assert all(rows * longest <= budget for rows, longest in shapes)
    # One more response would not have fitted: those of a pass are no longer than its first.
    assert all((rows + 1) * longest > budget for rows, longest in shapes[:-1])
    # Of a response that is longer than the budget there is one at a time.
    shapes.clear()
    list(capture_responses(model, head, requests, order, top_k=5, batch_size=BatchSize(1, "tokens")))
    assert all(rows == 1 for rows, _ in shapes)


def test_too_many_tokens_are_halved(asked, monkeypatch):
    model, head, requests, order = asked
    said: list[str] = []
    tried = limited(monkeypatch, 2, torch.OutOfMemoryError("CUDA out of memory"))
    size = BatchSize(100_000, "tokens", said.append)
    assert len(dict(capture_responses(model, head, requests, order, top_k=5, batch_size=size))) == 11
    tokens = 11 * max(len(request.encoded.input_ids) for request in requests)
    assert said[0] == f"for {tokens} tokens at a time the memory does not suffice: from now on {tokens // 2} at a time"
    # None is tried twice.
    failed = [rows for rows in tried if rows > 2]
    assert failed == sorted(set(failed), reverse=True)


def test_a_last_batch_of_few_responses_is_halved(asked, monkeypatch):
    model, head, requests, order = asked
    tried = limited(monkeypatch, 1, torch.OutOfMemoryError("CUDA out of memory"))
    list(capture_responses(model, head, requests[:3], order, top_k=5, batch_size=BatchSize(64, say=lambda line: None)))
    assert tried == [3, 1, 1, 1]


def test_the_plan_counts_the_responses_of_a_batch_and_no_more_than_a_shard_has():
    def of(length: float, **options: Any) -> int:
        return CaptureConfig(**options).responses_at_once(length)

    assert of(49, batch_size=8) == 8
    assert of(49, batch_size=8, tokens_per_batch=500) == 10
    assert of(501, tokens_per_batch=500) == 1
    assert of(0, tokens_per_batch=500, shard_size=200) == of(1, batch_size=300, shard_size=200) == 200
