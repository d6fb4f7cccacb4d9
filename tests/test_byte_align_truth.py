"""Byte alignment agrees with brute force over every continuation of a toy source, and keeps the whole path's probability."""

from __future__ import annotations

import functools
import itertools
import os

import numpy as np
import pytest
import torch
from alignment_checks import TOLERANCE, chain_chat, check_mass, run, token
from conftest import ROOT
from small_tokenizers import VICUNA, distribution, ids_of, labels, real_tokenizer

from profuser.alignment.align import PlainText
from profuser.alignment.engine import byte_aligner
from profuser.alignment.ranges import flat_maps, ranges_needed
from profuser.alignment.types import (
    ALIGNED,
    INSIDE,
    SHARED_PREFIX,
    SKIP_NO_PREFIX_RANGE,
    PrefixRanges,
    SourceCapture,
)
from profuser.alignment.vocab_map import ByteOrder
from profuser.kernels.source_topk import source_topk_from_logits
from profuser.models.load import chat_format, load_model, load_tokenizer
from profuser.recipe.schema import SourceConfig
from profuser.text.chat import ChatFormat

# A toy source, of which every next-token distribution is known.

STEMS = {" hel": ("lo", "p", "met"), " ca": ("t", "re", "rd"), " do": ("g", "ne")}
CLOSED = (" a", " tree", " treat", " sun", " sunny", " dot", " cab", " helium")


def toy_source(template: str) -> ChatFormat:
    """A source for which every word is one token, or a stem and an ending."""
    endings = tuple(itertools.chain.from_iterable(STEMS.values()))
    return chain_chat(*STEMS, *CLOSED, *(e for e in endings if len(e) > 1), template=template)


def toy_rows(source: ChatFormat, response: str, rng: np.random.Generator) -> list[dict[int, float]]:
    """Full distributions at each position over what can follow there.

    A stem is among it only where the text goes on with this stem, because only then the next distribution is known.
    """
    pieces = source.token_bytes.pieces
    own = labels(source.encode("x", response))
    words = {token(source, w) for w in CLOSED}
    (control,) = ids_of(source.tokenizer, "<s>")
    rows = []
    for j, i in enumerate(own):
        before = pieces[own[j - 1]] if j else None
        stem = before.decode() if before else None
        support = {*words, source.end_id, control, i}
        if stem in STEMS:
            support |= {token(source, e) for e in STEMS[stem]}
        masses = rng.dirichlet(np.full(len(support), 0.4)) + 1e-6
        rows.append(dict(zip(sorted(support), (masses / masses.sum()).tolist())))
    return rows


def brute_force(
    target: ChatFormat, source: ChatFormat, response: str, rows, t: int
) -> tuple[dict[int, float], float, bool]:
    """The share of every target token at target position t, the dropped share, and whether alignment's rules are exact there.

    Every continuation of the source, up to the end of its word, is spelt out and given to the target's tokenizer in the whole
    conversation. Shares are of the continuations that begin with the bytes before t. The rules are approximate where the
    target's token ends within a stem: then the end of the source's word decides, at which alignment does not look.
    """
    encoded, own = target.encode("x", response), source.encode("x", response)
    own_ids, starts = labels(own), [b for b, _ in own.spans] + [len(response.encode())]
    begin, end = [*encoded.spans, (starts[-1], starts[-1])][t]
    holder = max(j for j, start in enumerate(starts) if start <= begin)
    entered = source.token_bytes.piece(own_ids[holder])[: begin - starts[holder]] if begin > starts[holder] else b""
    before = encoded.input_ids[: encoded.start + t]
    gold = encoded.input_ids[encoded.start + t]
    found: dict[int, float] = {}
    dropped = total = 0.0
    exact = True

    def count(continuation: bytes, mass: float, within_stem: bool) -> None:
        nonlocal dropped, exact
        # If the first token holds the template's space, it begins at -1, and so do its continuations.
        text = response.encode()[: max(begin, 0)] + continuation[max(-begin, 0) :]
        ids = target.encode("x", text.decode(), complete=False).input_ids
        token = ids[len(before)] if ids[: len(before)] == before else None
        exact &= not within_stem or token == gold
        if token is None:
            dropped += mass
        else:
            found[token] = found.get(token, 0.0) + mass

    def expand(j: int, so_far: bytes, mass: float, within_stem: bool, entered: bytes = b"") -> None:
        nonlocal total
        for i, p in rows[j].items():
            piece = source.token_bytes.pieces[i]
            if entered and not (piece and piece.startswith(entered)):
                continue
            if entered or (j == holder and not so_far):
                total += p
            if piece == entered:  # the token ends where t begins, and what follows it is not in `rows`
                continue
            if i == source.end_id and not so_far:
                found[target.end_id] = found.get(target.end_id, 0.0) + mass * p
            elif i == source.end_id:
                count(so_far, mass * p, within_stem)
            elif piece and piece.decode() in STEMS:
                assert i == own_ids[j], "a stem only where the text goes on with it"
                expand(j + 1, so_far + piece[len(entered) :], mass * p, within_stem or starts[j + 1] >= end)
            elif piece is None:
                # Another control token goes to the tail, unless the own token before it is the beginning of the gold one.
                found[gold] = found.get(gold, 0.0) + (mass * p if within_stem else 0.0)
            else:
                count(so_far + piece[len(entered) :], mass * p, within_stem)

    expand(holder, b"", 1.0, False, entered)
    return {i: p / total for i, p in found.items()}, dropped / total, exact


@pytest.mark.parametrize("count", [15, pytest.param(25, marks=pytest.mark.long)])
def test_alignment_equals_brute_force_over_every_continuation(count):
    rng = np.random.default_rng(0)
    source = toy_source(VICUNA)
    words = [*CLOSED, *(stem + ending for stem, endings in STEMS.items() for ending in endings)]
    compared = dropping = longer = inside = 0
    errors: list[float] = []
    for _ in range(count):
        # This target cuts the words anywhere, because it merges towards random parts of them in random order.
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
        assert not (aligned.skip_reason == SKIP_NO_PREFIX_RANGE).any()
        for t in np.flatnonzero(aligned.skip_reason == ALIGNED).tolist():
            found, dropped, exact = brute_force(target, source, response, rows, t)
            expected = {i: p / (1 - dropped) for i, p in found.items() if p}
            ours = distribution(aligned, t)
            if not exact:
                errors.append(sum(abs(ours.get(i, 0) - expected.get(i, 0)) for i in {*ours, *expected}) / 2)
                continue
            assert aligned.reliability[t] == pytest.approx(1 - dropped, abs=TOLERANCE)
            # A small rest of a float32 mass near 1 has the rounding of the whole.
            assert ours == pytest.approx(expected, abs=TOLERANCE / (1 - dropped))
            assert aligned.tail[t] == pytest.approx(1 - sum(expected.values()), abs=1e-5 / (1 - dropped))
            compared += 1
            dropping += dropped > 0.01
            longer += t < len(spans) and aligned.kind[t] == SHARED_PREFIX
            inside += aligned.kind[t] == INSIDE
    print(
        f"exact at {compared} positions ({inside} inside a source token); approximate at {len(errors)}, where the source's "
        f"word goes on beyond the target's token: total variation {np.mean(errors):.3f} on average, {max(errors):.3f} at most"
    )
    assert compared > 10 * count
    assert dropping > 0.4 * count
    assert longer > 1.2 * count
    assert inside > 60
    assert np.mean(errors) < 0.2


# Two invariants are checked with real models: the mass of every position, and the probability of the path.

PROMPT = "How do I beat the dragon?"
REAL_TEXTS = [
    "A bozun is a stone. Answer: bitter.",
    "8-4=4. 4+5=9. 9+2=11. Answer: 11.",
    'To beat is to  fight;\n\n    (help) program\'s "end" — ünïcode 日本 🙂.',
]


@pytest.mark.parametrize("template", [True, False], ids=["behind the templates", "plain text"])
@pytest.mark.parametrize(
    ("target_name", "source_name"), [("guardian", "scholar"), ("scholar", "guardian"), ("guardian", "reckoner")]
)
def test_the_masses_along_the_path_multiply_to_the_sources_own_probability(target_name, source_name, template):
    """The product over all target tokens is the source's probability of the response's bytes.

    A factor is the mass of those continuations of the text's own path that begin with the token's bytes, found by brute force
    over the vocabulary, divided by the stored exact mass.
    """
    configs = [SourceConfig(name=name, model=f"demo:{name}") for name in (target_name, source_name)]
    model = load_model(configs[1], torch.float32)
    target, source = (chat_format(c) if template else PlainText(load_tokenizer(c)) for c in configs)
    for text in REAL_TEXTS:
        encoded, own = (
            side.encode(PROMPT, text) if isinstance(side, ChatFormat) else side.encode(text)
            for side in (target, source)
        )
        check_path(model, target, source, text.encode(), encoded, own)


def check_path(model, target, source, response: bytes, encoded, own) -> None:
    """Checks both invariants at every position."""
    lead = [] if own.start else [source.tokenizer.bos_token_id or 0]
    with torch.no_grad():
        logits = model(torch.tensor([lead + own.input_ids])).logits[0].double()
    labels_at = [*range(own.start, own.stop), *([] if own.end_of_turn is None else [own.end_of_turn])]
    logprobs = logits.log_softmax(-1)[[len(lead) + t - 1 for t in labels_at]]
    pieces = source.token_bytes.pieces
    needed = ranges_needed(target.token_bytes, encoded, source.token_bytes, own, ByteOrder(source.token_bytes))
    order = torch.from_numpy(ByteOrder(source.token_bytes).ids).long()
    own_ids = torch.tensor([own.input_ids[t] for t in labels_at])
    rows, lo, hi, begin, mapped = (
        torch.from_numpy(x).long() for x in (needed.rows, needed.lo, needed.hi, *flat_maps([needed]))
    )
    ids, top, _, ce, range_ids, range_top, logmass = source_topk_from_logits(
        logprobs.float(), own_ids, 10, ranges=(rows, lo, hi, order, begin, mapped)
    )
    spans = np.array([*own.spans, *([] if own.end_of_turn is None else [(len(response),) * 2])], np.int32)
    capture = SourceCapture(
        own_ids.int().numpy(), spans[:, 0].copy(), spans[:, 1].copy(), ids.numpy(), top.numpy(), -ce.numpy(),
        PrefixRanges(needed.rows, needed.strip, logmass.numpy(), needed.spelt(range_ids.numpy()), range_top.numpy()),
    )  # fmt: skip
    aligned = byte_aligner(target, source, min_reliability=0).align(response, encoded, capture)
    check_mass(aligned)

    stored = {(j, s): float(m) for j, s, m in zip(needed.rows.tolist(), needed.strip.tolist(), logmass.tolist())}
    own_logprob = logprobs[torch.arange(len(own_ids)), own_ids].tolist()
    lengths = [len(pieces[i] or b"") for i in own_ids.tolist()]
    total = 0.0
    first = 0.0  # the log of the exact mass at byte 0, if the source's token was clipped there
    content = encoded.stop - encoded.start
    for t in range(content):
        begin, end = max(encoded.spans[t][0], 0), min(encoded.spans[t][1], len(response))
        j = int(aligned.source_position[t])
        clip = lengths[j] - (spans[j][1] - max(spans[j][0], 0))
        strip = clip + begin - max(spans[j][0], 0)
        ours = target.token_bytes.pieces[encoded.input_ids[encoded.start + t]]
        same_clip = strip == clip and ours[: len(ours) - (encoded.spans[t][1] - begin)] == pieces[own_ids[j]][:clip]
        exact = stored[j, strip] if strip and not same_clip else 0.0
        first += exact if t == 0 else 0.0
        path = 0.0
        while spans[j][1] < end:
            path += own_logprob[j]
            j += 1
        if spans[j][1] == end or t == content - 1:
            path += own_logprob[j]
        elif until := lengths[j] - (spans[j][1] - end):
            # The own token goes on beyond the end. All tokens that begin with the bytes up to there count, by brute force.
            prefix = pieces[own_ids[j]][:until]
            among = [v for v, p in enumerate(pieces) if p and p.startswith(prefix)]
            path += float(logprobs[j, among].logsumexp(0))
        total += path - exact
    expected = sum(own_logprob[: len(own.spans)]) - first
    assert total == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("target_name", ["llama2", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("language", ["en", "code", "de", "ru", "zh"])
def test_both_invariants_hold_with_a_pretrained_model(target_name, language):
    """Runs SmolLM2-135M on real text if PROFUSER_SMOLLM2 names its directory."""
    if "PROFUSER_SMOLLM2" not in os.environ:
        pytest.skip(
            "set PROFUSER_SMOLLM2 to a directory with SmolLM2-135M-Instruct (docs/results.md says how to get it)"
        )
    config = SourceConfig(name="smollm2", model=os.environ["PROFUSER_SMOLLM2"])
    target, source = PlainText(real_tokenizer(target_name)), PlainText(load_tokenizer(config))
    text = (ROOT / f"profuser/experiments/texts/{language}.txt").read_text()[:1200]
    check_path(pretrained(config.model), target, source, text.encode(), target.encode(text), source.encode(text))


@functools.cache
def pretrained(location: str):
    return load_model(SourceConfig(name="pretrained", model=location), torch.float32)
