"""The sampled truth agrees with brute force on a source that can be enumerated, and its parts do what they should."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_tokenizers import chained, wrap
from transformers import LlamaConfig, LlamaForCausalLM

from profuser.experiments import alignment_truth as truth
from profuser.experiments.byte_sampler import ByteVocab, Continuation, History, TextModel, continuations, covers
from profuser.experiments.windows import TEXTS, windows
from profuser.text.token_bytes import TokenBytes

WORDS = ("a", "b", " ", "ab", " a", "aba", "</s>")  # the tokens to which the toy source gives mass


class Toy:
    """A source whose texts can be enumerated: a bigram table over a few tokens of a byte-level vocabulary."""

    def __init__(self, seed: int = 0):
        self.tokens = TokenBytes(wrap(chained("ab", " a", "aba")))
        by_piece = {piece: i for i, piece in enumerate(self.tokens.pieces)}
        self.end = next(i for i, name in self.tokens.specials.items() if name == "</s>")
        self.support = [self.end if word == "</s>" else by_piece[word.encode()] for word in WORDS]
        table = np.random.default_rng(seed).dirichlet(np.ones(len(WORDS)), size=len(WORDS) + 1)
        size = len(self.tokens.pieces)
        self.table = np.full((size, size), -np.inf, np.float32)  # row 0 (a control token) stands for the beginning
        self.table[np.ix_([0, *self.support], self.support)] = np.log(table)

    def after(self, ids):
        return lambda histories: np.stack([self.table[([0, *ids, *history])[-1]] for history in histories])

    def texts(
        self, prefix: bytes, length: int, history: History = (), data: bytes = b"", p: float = 1.0
    ) -> Iterator[tuple[History, bytes, float]]:
        """All texts that begin with `prefix`, up to `length` bytes or their end, as (tokens, bytes, probability)."""
        if len(data) >= length:
            yield history, data, p
            return
        row = self.after(())([history])[0]
        for i in self.support:
            mass = p * float(np.exp(row[i]))
            if i == self.end:
                if data.startswith(prefix):
                    yield (*history, i), data, mass
                continue
            further = data + self.tokens.piece(i)
            if further.startswith(prefix) or prefix.startswith(further):
                yield from self.texts(prefix, length, (*history, i), further, mass)


@pytest.mark.parametrize("prefix", [b"a", b"abab a", b" ab"])
def test_covers_are_all_token_sequences_that_reach_the_cut(prefix):
    toy = Toy()
    vocab = ByteVocab(toy.tokens.pieces)
    found = covers(toy.after(()), vocab, prefix, floor=0.0)
    ours = {
        (*history, token): mass
        for history, tokens, masses in zip(found.histories, found.tokens, found.masses, strict=True)
        for token, mass in zip(tokens.tolist(), masses.tolist(), strict=True)
        if mass > 0
    }
    brute = {h: p for h, _, p in toy.texts(prefix, len(prefix)) if h[-1] != toy.end}
    assert ours == pytest.approx(brute, rel=1e-5)
    assert found.pruned == 0


def test_what_a_floor_cuts_off_is_reported():
    toy = Toy()
    vocab = ByteVocab(toy.tokens.pieces)
    whole, cut = (covers(toy.after(()), vocab, b"abab abab ab", floor=floor) for floor in (0.0, 0.05))
    mass = [sum(map(np.sum, found.masses)) for found in (whole, cut)]
    assert len(cut.histories) < len(whole.histories)
    assert 0 < 1 - mass[1] / mass[0] <= cut.pruned


@pytest.mark.parametrize("prefix", [b"", b"ab", b"ab aba"])
def test_continuations_have_the_distribution_of_the_texts_that_begin_so(prefix):
    toy = Toy()
    vocab = ByteVocab(toy.tokens.pieces)
    n, samples = 3, 6000
    brute: defaultdict[bytes, float] = defaultdict(float)
    for _, data, p in toy.texts(prefix, len(prefix) + n):
        brute[data[len(prefix) : len(prefix) + n]] += p
    total = sum(brute.values())

    logprobs = toy.after(())
    found = covers(logprobs, vocab, prefix)
    drawn = continuations(logprobs, vocab, found, samples, np.random.default_rng(1), lambda data: len(data) >= n)
    assert {sample.ended_by for sample in drawn} == {None, toy.end}
    counts = Counter(sample.data[:n] for sample in drawn)
    assert counts.keys() <= brute.keys()
    assert sum(abs(p / total - counts[data] / samples) for data, p in brute.items()) / 2 < 0.03


def test_sampled_truth_is_the_distribution_of_the_targets_next_token():
    toy = Toy(seed=3)
    target = truth.Target("toy", wrap(chained(" ab", "ba", " b")))
    text = "abab aba b"
    ids, _ = toy.tokens.encode_parts([(text, True)])
    window = truth.Window("en", 0, text, ids, toy.tokens.spans(ids, text))
    source: Any = SimpleNamespace(vocab=ByteVocab(toy.tokens.pieces))
    model: Any = SimpleNamespace(after=lambda cut: toy.after(ids[:cut]))
    target_ids, spans = target.of(window)
    assert [target.tokens.pieces[i] for i in target_ids] == [b"a", b"ba", b"b", b" ab", b"a", b" b"]
    kinds = set()
    for t in range(1, len(target_ids)):
        prefix = text.encode()[: spans[t][0]]
        brute: defaultdict[int, float] = defaultdict(float)
        for _, data, p in toy.texts(prefix, len(prefix) + 5):  # longer than the longest token and what decides it
            encoded = target.tokens.encode(data.decode())
            if encoded[:t] == target_ids[:t]:
                brute[encoded[t] if len(encoded) > t else truth.OTHER] += p
        kind = int(target.kinds(window)[0][t])
        kinds.add(truth.KINDS[kind])
        position = truth.Position("toy", "en", 0, t, kind, 1.0)
        row = truth.sample_truth(source, model, window, target, position, 1500, np.random.default_rng(t))
        total = sum(brute.values())
        exact = {i: p / total for i, p in brute.items()}
        assert truth.total_variation(truth.shares(*row["halves"]), exact) < 0.04
    assert kinds == {"inside", "target longer"}


def test_tree_attention_gives_the_models_own_log_probabilities():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    lead, ids = [1], [5, 6, 7, 8, 9, 10]
    text_model = TextModel(model, lead, ids)
    for cut in (3, 5):
        logprobs = text_model.after(cut)
        own = tuple(ids[cut:])
        for histories in (
            [(), own, (20, 21)],
            [(20, 21, 22), (20, 23), (*own, 3), (*own[:1], 4, 4)],
            [(20, 21), (30,)],
        ):
            got = logprobs(histories)
            for history, row in zip(histories, got, strict=True):
                with torch.no_grad():
                    logits = model(torch.tensor([[*lead, *ids[:cut], *history]])).logits[0, -1]
                torch.testing.assert_close(torch.from_numpy(row), logits.log_softmax(-1), atol=1e-5, rtol=1e-5)


def test_retokenising_notices_changed_prefixes_and_broken_characters():
    target = truth.Target("toy", wrap(chained("ab", "abc", " x", "é")))
    text = "ab x\nab abé b" + " x" * 24
    source_tokens = TokenBytes(wrap(chained("ab")))
    ids = source_tokens.encode(text)
    window = truth.Window("en", 0, text, ids, source_tokens.spans(ids, text))
    target_ids, spans = target.of(window)
    pieces = target.tokens.pieces

    def outcome(t, data):
        return int(truth.Retokeniser(target, window, t)([Continuation(data)])[0])

    t = next(n for n, i in enumerate(target_ids) if pieces[i] == "é".encode())
    assert outcome(t, "é x x".encode()) == target_ids[t]
    assert outcome(t, b"c x x") == truth.CHANGED  # the token before it would become `abc`
    assert outcome(t, b"") == truth.OTHER
    assert outcome(t, b"\xc3") == truth.OTHER  # the continuation ends within a character
    assert outcome(t, b"\xc3\xff x") == truth.OTHER
    assert pieces[outcome(t, b" x\xff")] == b" x"
    for t in range(len(target_ids) - 1):  # the tokens from the start of a line are those of the whole text
        assert outcome(t, text.encode()[max(spans[t][0], 0) :]) == target_ids[t]
    assert not truth.Retokeniser(target, window, len(target_ids) - 1)._whole


def test_total_variation_takes_the_tail_as_one_bucket():
    estimate = {1: 0.5, 2: 0.3}
    assert truth.total_variation(estimate, {1: 0.5, 2: 0.3, 7: 0.1, truth.OTHER: 0.1}) == pytest.approx(0)
    assert truth.total_variation(estimate, {1: 0.25, 2: 0.25, 3: 0.5}) == pytest.approx(0.3)
    assert truth.total_variation({4: 1.0}, {1: 0.75, 4: 0.25}) == pytest.approx(0.75)


def test_exact_bytes_takes_the_longest_token_that_a_candidate_begins_with():
    source: Any = SimpleNamespace(tokens=TokenBytes(wrap(chained("ab", "abx", "xy"))))
    target = truth.Target("toy", wrap(chained("xy")))
    text = "abx"
    ids = source.tokens.encode(text)
    window = truth.Window("en", 0, text, ids, source.tokens.spans(ids, text))
    source_of = {piece: i for i, piece in enumerate(source.tokens.pieces)}
    target_of = {piece: i for i, piece in enumerate(target.tokens.pieces)}
    top = [source_of[b"ab"], source_of[b"abx"], source_of[b"a"], source_of[b"xy"]]
    at_begin = truth.exact_bytes(source, target, window, 0, 0, top, [0.4, 0.3, 0.1, 0.1], 0.3)
    assert at_begin == pytest.approx({target_of[b"a"]: 0.8, target_of[b"xy"]: 0.1})
    inside = truth.exact_bytes(source, target, window, 1, 0, top, [0.4, 0.2, 0.1, 0.1], 0.2)
    assert inside == pytest.approx({target_of[b"b"]: 1.0})


def test_texts_are_fit_to_be_measured():
    tokens = TokenBytes(wrap(chained("ab")))
    for name in truth.LANGUAGES:
        text = (TEXTS / f"{name}.txt").read_text("utf-8")
        assert unicodedata.is_normalized("NFC", text)
        assert "\u2581" not in text
        assert 4900 < len(text.encode()) < 6200
        parts = windows(name, text, tokens)
        assert all(len(part.ids) <= truth.WINDOW or "\n" not in part.text for part in parts)
        assert "".join("".join(part.text for part in parts).split()) == "".join(text.split())
