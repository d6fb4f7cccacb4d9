"""What a capture says about a response agrees with the model's own full logits."""

import collections
import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig

from profuser.alignment.ranges import ranges_needed
from profuser.alignment.types import DIGITS, WHOLE
from profuser.alignment.vocab_map import ByteOrder
from profuser.models.head import head_of
from profuser.models.load import chat_format, load_model
from profuser.prepare import capture_shards
from profuser.prepare.capture import CaptureRequest, ScoredResponse, capture_responses, pack_captures, unpack_captures
from profuser.prepare.responses import generate
from profuser.recipe.generation import GenerationConfig as RecipeGeneration
from profuser.recipe.schema import SourceConfig
from profuser.store.division import Part
from profuser.text.fit import Fitted, Verdict
from profuser.text.token_bytes import TokenBytesMismatch

PAIRS = [
    ("How does a bozun taste?", "A bozun is a stone. Answer: bitter."),
    ("Eve has 8 eggs, loses 4, gets 5, gets 2. How many?", "8-4=4. 4+5=9. 9+2=11. Answer: 11."),
    ("How do I beat the dragon?", "Answer: ünïcode 日本 🙂."),
]


@pytest.fixture(scope="module", params=["guardian", "scholar", "reckoner"])
def source(request):
    config = SourceConfig(name=request.param, model=f"demo:{request.param}")
    return load_model(config, torch.float32), chat_format(config)


def captured(source) -> tuple[list[CaptureRequest], dict]:
    """The requests for PAIRS, with the prefix ranges that guardian needs as target, and what the source says."""
    model, chat = source
    target = chat_format(SourceConfig(name="guardian", model="demo:guardian"))
    order = ByteOrder(chat.token_bytes)
    requests = []
    for prompt, response in PAIRS:
        own, theirs = chat.encode(prompt, response), target.encode(prompt, response)
        ranges = ranges_needed(target.token_bytes, theirs, chat.token_bytes, own, order)
        requests.append(CaptureRequest(own, len(response.encode()), ranges))
    return requests, dict(capture_responses(model, head_of(model), requests, order, top_k=5, batch_size=2))


def test_cross_entropy_is_the_models_own_loss_on_the_response_and_its_end_of_turn(source):
    model, chat = source
    requests, results = captured(source)
    order = ByteOrder(chat.token_bytes)
    ranges = 0
    for i, request in enumerate(requests):
        e = request.encoded
        ids = torch.tensor([e.input_ids])
        labels = torch.full_like(ids, -100)
        places = e.label_positions
        labels[0, places] = ids[0, places]
        with torch.no_grad():
            logits = model(ids).logits[0]
        expected = cross_entropy(logits[:-1], labels[0, 1:], reduction="sum").item()
        assert results[i].nll == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert results[i].cross_entropy("token") == pytest.approx(expected / len(places), rel=1e-4, abs=1e-4)
        assert results[i].cross_entropy("byte") == pytest.approx(expected / request.response_bytes, rel=1e-4, abs=1e-4)
        logprobs = logits.log_softmax(-1)
        for row, t in enumerate(places):
            top = logprobs[t - 1].topk(5)
            assert results[i].capture.top_ids[row].tolist() == top.indices.tolist()
            np.testing.assert_allclose(results[i].capture.top_logprobs[row], top.values, atol=1e-4)
            assert results[i].capture.own_logprobs[row] == pytest.approx(logprobs[t - 1, ids[0, t]].item(), abs=1e-4)
        kept = results[i].capture.ranges
        for r, (row, strip) in enumerate(zip(kept.rows.tolist(), kept.strip.tolist())):
            pieces, t = chat.token_bytes.pieces, places[row]
            prefix = {WHOLE: (b"",), DIGITS: tuple(b"%d" % d for d in range(10))}.get(
                strip, (pieces[e.input_ids[t]][:strip],)
            )
            among = [v for v in order.ids.tolist() if pieces[v].startswith(prefix)]
            own = dict(zip(among, logprobs[t - 1, among].exp().tolist(), strict=True))
            assert kept.logmass[r] == pytest.approx(math.log(sum(own.values())), abs=1e-4)
            # The masses of the tokens that count for the same are added.
            map_of, masses = int(request.ranges.map_of[r]), collections.Counter()
            merged = None if map_of < 0 else request.ranges.maps[map_of]
            for place, (v, p) in enumerate(own.items()):
                masses[v + request.ranges.target_size if merged is None else int(merged[place])] += p * (
                    merged is None or v != e.input_ids[t]
                )
            top = [(i, p) for i, p in masses.most_common() if i >= 0 and p > 0][:5]
            assert kept.ids[r].tolist() == [i for i, _ in top] + [-1] * (5 - len(top))
            np.testing.assert_allclose(np.exp(kept.logprobs[r, : len(top)]), [p for _, p in top], atol=1e-4)
            ranges += 1
    assert bool(ranges) == (chat.tokenizer.name_or_path.split("/")[-1] != "guardian")


def test_an_empty_response_has_no_cross_entropy_although_it_has_an_end_of_turn():
    one: Any = ScoredResponse(None, None, nll=3.0, tokens=1, response_bytes=0)  # pyrefly: ignore[bad-argument-type]
    assert [one.cross_entropy(unit) for unit in ("token", "byte")] == [math.inf, math.inf]


def test_the_labels_are_the_response_and_one_end_of_turn(source):
    _, chat = source
    for prompt, response in PAIRS:
        e = chat.encode(prompt, response)
        text = chat.tokenizer.decode([e.input_ids[t] for t in range(e.start, e.stop)])
        assert text.strip() == response
        assert e.input_ids[e.end_of_turn] in chat.end_ids
        assert e.end_of_turn == len(e.input_ids) - 1


def test_captures_survive_the_shard_format(source):
    _, chat = source
    _, scored = captured(source)
    fitted = [*(Fitted(response, False, Verdict.OK) for _, response in PAIRS), Fitted.unused(Verdict.EMPTY)]
    shard = pack_captures(fitted, [f.verdict for f in fitted], scored, 5, len(chat.tokenizer))
    back = unpack_captures(shard)
    assert back[3] is None
    for i, result in enumerate(back[:3]):
        assert result is not None
        assert result.tokens == scored[i].tokens
        assert result.nll == scored[i].nll
        np.testing.assert_array_equal(result.capture.ids, scored[i].capture.ids)
        np.testing.assert_array_equal(result.capture.top_ids, scored[i].capture.top_ids)
        np.testing.assert_allclose(result.capture.top_logprobs, scored[i].capture.top_logprobs, rtol=1e-3, atol=1e-6)
        ours, theirs = result.capture.ranges, scored[i].capture.ranges
        for name in ("rows", "strip", "logmass", "ids"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=1e-3, atol=2e-3)


def test_a_batched_greedy_answer_is_the_models_own(source):
    model, chat = source
    prompts = [p for p, _ in PAIRS]
    answers = generate(model, chat, prompts, RecipeGeneration(max_new_tokens=24, batch_size=3), max_length=256)
    for prompt, ((text, finished, _),) in zip(prompts, answers):
        ids = torch.tensor([chat.prompt_ids(prompt)])
        config = GenerationConfig(
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=list(chat.end_ids),
            pad_token_id=chat.tokenizer.pad_token_id,
        )
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[
            0, ids.shape[1] :
        ].tolist()
        assert finished == (out[-1] in chat.end_ids)
        assert text == chat.tokenizer.decode(out, skip_special_tokens=True).strip()


def test_an_overlong_prompt_gets_an_empty_answer(source):
    model, chat = source
    answers = generate(model, chat, ["word " * 50, "Hi"], RecipeGeneration(max_new_tokens=2), max_length=30)
    assert answers[0] == [("", True, Verdict.OK)]


def test_the_room_for_an_answer_does_not_depend_on_the_batch(source):
    model, chat = source
    prompts = ["Eve has 8 eggs, loses 4, gets 5, gets 2. How many?", "word " * 30]
    limit = len(chat.prompt_ids(prompts[1])) + 3
    config = RecipeGeneration(max_new_tokens=24, batch_size=2)
    together = generate(model, chat, prompts, config, max_length=limit)
    alone = [generate(model, chat, [p], config, max_length=limit)[0] for p in prompts]
    assert together == alone


def test_of_a_part_the_texts_are_asked_for_as_they_were_cut_and_each_answer_is_its_own(monkeypatch):
    """One text is too long, and of another a tokenizer does not hold the bytes."""

    def encode(prompt: str, text: str, *, complete: bool) -> Any:
        if text == "ill":
            raise TokenBytesMismatch("no", "normaliser")
        return SimpleNamespace(input_ids=[0], said=(prompt, text, complete))

    requests: list[Any] = []

    def answered(model, head, asked, *arguments, **options):
        requests.extend(asked)
        return [(i, f"answer {i}") for i in reversed(range(len(asked)))]

    monkeypatch.setattr(capture_shards, "capture_responses", answered)
    monkeypatch.setattr(capture_shards, "ranges_needed", lambda target, theirs, source, own, order: theirs.said)
    monkeypatch.setattr(capture_shards, "pack_captures", lambda fitted, verdicts, scored, *sizes: (verdicts, scored))
    given, head = mock.Mock(), mock.Mock(weight=torch.ones(9, 2))
    given.scored = lambda prompt, whole, fitted, own: (whole, own.said)
    inputs: Any = mock.Mock(
        rows={"train": [{"prompt": f"p{n}"} for n in range(9)]},
        chats={"s": mock.Mock(encode=encode)},
        logprobs=lambda s: given,
    )
    inputs.target.encode = encode
    inputs.chats["s"].tokenizer = "vocabulary"
    source: Any = mock.Mock(chat=inputs.chats["s"], head=head, follower=None)
    source.name = "s"
    fitted = [
        Fitted("né", False, Verdict.OK),
        Fitted.unused(Verdict.TOO_LONG),
        Fitted("ill", False, Verdict.OK),
        Fitted("cut", True, Verdict.OK),
    ]
    part, bar = Part(0, [1, 3, 4, 8], ""), mock.Mock()
    verdicts, scored = capture_shards.captured(inputs, "train", part, source, fitted, bar)
    says = [("p1", "né", True), ("p8", "cut", False)]
    assert [(r.encoded.said, r.response_bytes, r.ranges) for r in requests] == [
        (says[0], 3, says[0]),
        (says[1], 3, says[1]),
    ]
    assert verdicts == [Verdict.OK, Verdict.TOO_LONG, Verdict.NORMALISER, Verdict.OK]
    assert scored == {0: "answer 0", 3: "answer 1"}
    assert sum(call.args[0] for call in bar.update.call_args_list) == len(part)
    verdicts, scored = capture_shards.taken(inputs, "train", part, source, fitted, lambda n: f"whole {n}", bar)
    assert verdicts == [Verdict.OK, Verdict.TOO_LONG, Verdict.NORMALISER, Verdict.OK]
    assert scored == {0: ("whole 1", says[0]), 3: ("whole 8", says[1])}
