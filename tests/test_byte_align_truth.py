"""Byte alignment against brute force over every continuation of a toy source, and the probability of the whole path."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from alignment_checks import TOLERANCE, chain_chat, check_mass, run, token
from small_tokenizers import VICUNA, distribution, labels

from profuser.alignment.types import ALIGNED, INSIDE, SHARED_PREFIX
from profuser.chat import ChatFormat

# A toy source whose every next-token distribution is known

STEMS = {" hel": ("lo", "p", "met"), " ca": ("t", "re", "rd"), " do": ("g", "ne")}
CLOSED = (" a", " tree", " treat", " sun", " sunny", " dot", " cab", " helium")


def toy_source(template: str) -> ChatFormat:
    """Every word is one token, or a stem and an ending."""
    endings = tuple(itertools.chain.from_iterable(STEMS.values()))
    return chain_chat(*STEMS, *CLOSED, *(e for e in endings if len(e) > 1), template=template)


def toy_rows(source: ChatFormat, response: str, rng: np.random.Generator) -> list[dict[int, float]]:
    """At each position full distributions over what can follow there; a stem only where the text goes on with it, since
    only there the next distribution is known."""
    pieces = source.token_bytes.pieces
    own = labels(source.encode("x", response))
    words = {token(source, w) for w in CLOSED}
    control = source.tokenizer.convert_tokens_to_ids("<s>")
    rows = []
    for j, i in enumerate(own):
        stem = pieces[own[j - 1]].decode() if j and pieces[own[j - 1]] else None
        support = {*words, source.end_id, control, i}
        if stem in STEMS:
            support |= {token(source, e) for e in STEMS[stem]}
        masses = rng.dirichlet(np.full(len(support), 0.4)) + 1e-6
        rows.append(dict(zip(sorted(support), (masses / masses.sum()).tolist())))
    return rows


def brute_force(
    target: ChatFormat, source: ChatFormat, response: str, rows, t: int
) -> tuple[dict[int, float], float] | None:
    """(mass per target token, dropped mass) of target position t: every continuation of the source up to the end of its
    word, spelt out and given to the target's tokenizer in the whole conversation. None where alignment is approximate: the
    target's token ends within a stem, so how the source's word ends decides, and alignment does not look."""
    encoded, own = target.encode("x", response), source.encode("x", response)
    own_ids, starts = labels(own), [b for b, _ in own.spans] + [len(response.encode())]
    begin, end = [*encoded.spans, (starts[-1], starts[-1])][t]
    if begin not in starts:
        return None
    before = encoded.input_ids[: encoded.start + t]
    gold = encoded.input_ids[encoded.start + t]
    found: dict[int, float] = {}
    dropped = 0.0
    exact = True

    def count(continuation: bytes, mass: float, within_stem: bool) -> None:
        nonlocal dropped, exact
        # Tokens of the response begin at -1 with the template's space, so do continuations there.
        text = response.encode()[: max(begin, 0)] + continuation[max(-begin, 0) :]
        ids = target.encode("x", text.decode(), complete=False).input_ids
        token = ids[len(before)] if ids[: len(before)] == before else None
        exact &= not within_stem or token == gold
        if token is None:
            dropped += mass
        else:
            found[token] = found.get(token, 0.0) + mass

    def expand(j: int, so_far: bytes, mass: float, within_stem: bool) -> None:
        for i, p in rows[j].items():
            piece = source.token_bytes.pieces[i]
            if i == source.end_id and not so_far:
                found[target.end_id] = found.get(target.end_id, 0.0) + mass * p
            elif i == source.end_id:
                count(so_far, mass * p, within_stem)
            elif piece and piece.decode() in STEMS:
                assert i == own_ids[j], "a stem only where the text goes on with it"
                expand(j + 1, so_far + piece, mass * p, within_stem or starts[j + 1] >= end)
            elif piece is None:  # another control token: tail, but the own token before it is the gold one's beginning
                found[gold] = found.get(gold, 0.0) + (mass * p if within_stem else 0.0)
            else:
                count(so_far + piece, mass * p, within_stem)

    expand(starts.index(begin), b"", 1.0, False)
    return (found, dropped) if exact else None


def test_alignment_equals_brute_force_over_every_continuation():
    rng = np.random.default_rng(0)
    source = toy_source(VICUNA)
    words = [*CLOSED, *(stem + ending for stem, endings in STEMS.items() for ending in endings)]
    compared = dropping = longer = 0
    for _ in range(25):
        # A target that cuts the words anywhere: merges towards random parts of them, in random order.
        parts = []
        for word in rng.permutation(words).tolist():
            first, last = sorted(rng.choice(len(word) + 1, 2, replace=False).tolist())
            parts.append(word[first:last] if rng.random() < 0.6 else word)
        target = chain_chat(*parts, template=VICUNA)
        response = "".join(rng.choice(words, 6).tolist()).strip()
        rows = toy_rows(source, response, rng)
        aligned = run(target, source, response, rows, min_reliability=0)
        check_mass(aligned)
        spans = target.encode("x", response).spans
        for t in np.flatnonzero(aligned.kind < INSIDE).tolist():
            truth = brute_force(target, source, response, rows, t)
            if truth is None or aligned.skip_reason[t] != ALIGNED:
                continue
            found, dropped = truth
            assert aligned.reliability[t] == pytest.approx(1 - dropped, abs=TOLERANCE)
            expected = {i: p / (1 - dropped) for i, p in found.items() if p}
            assert distribution(aligned, t) == pytest.approx(expected, abs=TOLERANCE)
            assert aligned.tail[t] == pytest.approx(1 - sum(expected.values()), abs=1e-5)
            compared += 1
            dropping += dropped > 0.01
            longer += t < len(spans) and aligned.kind[t] == SHARED_PREFIX
    assert compared > 150
    assert dropping > 10
    assert longer > 30
