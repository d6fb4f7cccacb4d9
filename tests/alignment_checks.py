"""Helpers of the alignment tests: both engines run on full distributions, and checks of what always holds."""

from __future__ import annotations

import numpy as np
import pytest
from small_tokenizers import capture_of, chained, distribution, labels, order_of, wrap

from profuser.alignment.engine import byte_aligner
from profuser.alignment.numbers import numbers
from profuser.alignment.ranges import ranges_needed
from profuser.alignment.reference import PythonByteAligner
from profuser.alignment.types import ALIGNED, NUMBERS, Aligned, PrefixRanges, SourceCapture
from profuser.text.chat import ChatFormat
from profuser.text.encoded import Encoded

TOLERANCE = 2e-6  # what float32 log-probabilities allow

BARE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '</s>' }}{% endfor %}"
"""A template in which a control token, and no text, stands right before a response."""

TEXTS = [
    "Things like these don't happen, hello help 12345.",
    "def f(x):\n    if x > 10:\n        return  x + 1\n\n\n    else:\treturn",
    "你好，世界！我们 Straße café 👩‍👩‍👧 🙂🦜",
    "3.14  and <s> or </s>, it's I'LL  'x'",
    "",
    "a",
]


def run(
    target: ChatFormat,
    source: ChatFormat,
    response: str,
    rows: list[dict[int, float]],
    k: int | None = None,
    **settings,
) -> Aligned:
    """Aligns full distributions, one per label of the source. Of each, `k` entries are captured, or all unless given."""
    encoded, own = target.encode("x", response), source.encode("x", response)
    capture = capture_of(source, own, len(response.encode()), rows, k or max(map(len, rows)), (target, encoded))
    settings = {"top_k": 1000, **settings}
    aligned, oracle = (
        engine(target, source, **settings).align(response.encode(), encoded, capture)
        for engine in (byte_aligner, PythonByteAligner)
    )
    assert_same(aligned, oracle)
    return aligned


def check_mass(aligned: Aligned) -> None:
    """Checks that every position's probabilities and tail sum to one, and that a skipped position holds no entry."""
    for t in range(len(aligned.kind)):
        entries = distribution(aligned, t)
        assert all(p > 0 for p in entries.values())
        assert list(entries.values()) == sorted(entries.values(), reverse=True)
        assert 0 <= aligned.tail[t] <= 1
        assert sum(entries.values()) + aligned.tail[t] == pytest.approx(1, abs=1e-5)
        assert bool(entries) == (aligned.skip_reason[t] == ALIGNED)
    assert aligned.offsets[-1] == len(aligned.ids) == len(aligned.logprobs)
    assert len(aligned.offsets) == len(aligned.kind) + 1


def token(chat: ChatFormat, text: str) -> int:
    ids = chat.token_bytes.fragment.encode(text, add_special_tokens=False).ids
    assert len(ids) == 1, (text, ids)
    return ids[0]


def chain_chat(*words: str, template: str = BARE, split: bool = True, **settings) -> ChatFormat:
    return ChatFormat(wrap(chained(*words, split=split), template), **settings)


def certain(chat: ChatFormat, response: str) -> list[dict[int, float]]:
    """A source that is sure of its own tokens."""
    return [{i: 1.0} for i in labels(chat.encode("x", response))]


def assert_same(aligned: Aligned, oracle: Aligned) -> None:
    """Checks that both are equal up to rounding.

    Entries of equal mass may come in any order, and any of them may be the last that is kept.
    """
    for field in ("kind", "source_position", "offsets", "skip_reason"):
        assert getattr(aligned, field).tolist() == getattr(oracle, field).tolist(), field
    np.testing.assert_allclose(aligned.tail, oracle.tail, atol=1e-6)
    np.testing.assert_allclose(aligned.reliability, oracle.reliability, atol=1e-6)
    np.testing.assert_allclose(np.exp(aligned.logprobs), np.exp(oracle.logprobs), atol=1e-6)
    for t in np.flatnonzero(np.diff(aligned.offsets)).tolist():
        left, right = distribution(aligned, t), distribution(oracle, t)
        least = min(left.values())
        assert {i for i, p in left.items() if p > least + 1e-6} == {i for i, p in right.items() if p > least + 1e-6}


def random_capture(
    source: ChatFormat, own: Encoded, response: bytes, target: ChatFormat, encoded: Encoded, pool, rng, k: int = 8
) -> SourceCapture:
    """A capture of random log-probabilities. Half of its candidates are from `pool`, half from the whole vocabulary."""
    ids = np.array(labels(own), np.int32)
    m, vocabulary, n = len(ids), len(source.token_bytes.pieces), len(response)
    spans = np.array([*own.spans, *([(n, n)] if own.end_of_turn is not None else [])], np.int32).reshape(-1, 2)
    needed = ranges_needed(target.token_bytes, encoded, source.token_bytes, own, order_of(source))
    r = len(needed.rows)
    order = order_of(source).ids
    width = needed.hi - needed.lo
    among = needed.lo[:, None] + np.arange(k) * np.maximum(width[:, None] // k, 1)
    range_ids = needed.spelt(np.where(among < needed.hi[:, None], order[np.minimum(among, len(order) - 1)], -1))
    for row, map_of in enumerate(needed.map_of.tolist()):
        if map_of >= 0:
            merged = needed.maps[map_of]
            within = among[row] < needed.hi[row]
            range_ids[row, within] = merged[among[row, within] - needed.lo[row]]
            range_ids[row, np.setdiff1d(np.arange(k), np.unique(range_ids[row], return_index=True)[1])] = -1
    logmass = np.log(rng.uniform(0.01, 1, r))

    def logprobs(rows: int) -> np.ndarray:
        return np.log(rng.dirichlet(np.full(k + 1, 0.5), rows)[:, :k] + 1e-9)

    top = np.where(rng.random((m, k)) < 0.5, rng.choice(pool, (m, k)), rng.integers(0, vocabulary + 2, (m, k)))
    top.sort(axis=1)
    top[:, 1:][top[:, 1:] == top[:, :-1]] = -1  # no candidate may occur twice
    # Numbers that were followed, at about half of the rows.
    asked = np.flatnonzero(rng.random(m) < 0.5)
    number_ids = len(target.token_bytes.pieces) + vocabulary + np.sort(rng.integers(0, len(numbers()), (len(asked), k)))
    number_ids[:, 1:][number_ids[:, 1:] == number_ids[:, :-1]] = -1
    number_mass = np.log(rng.uniform(0.01, 1, len(asked)))
    followed = PrefixRanges(
        rows=asked.astype(np.int32),
        strip=np.full(len(asked), NUMBERS, np.int32),
        logmass=number_mass.astype(np.float32),
        ids=number_ids.astype(np.int32),
        logprobs=(logprobs(len(asked)) + number_mass[:, None]).astype(np.float32),
    )
    return SourceCapture(
        ids=ids,
        begin=spans[:, 0].copy(),
        stop=spans[:, 1].copy(),
        top_ids=top.astype(np.int32),
        top_logprobs=logprobs(m).astype(np.float32),
        own_logprobs=np.log(rng.uniform(0.01, 1, m)).astype(np.float32),
        ranges=PrefixRanges(
            rows=needed.rows,
            strip=needed.strip,
            logmass=logmass.astype(np.float32),
            ids=range_ids.astype(np.int32),
            logprobs=(logprobs(r) + logmass[:, None]).astype(np.float32),
        ).with_others(followed),
    )
