"""Cool-Fusion gives token for token what a slow implementation gives, which reads everything anew for every token."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from small_tokenizers import real_chat
from transformers import AutoModelForCausalLM, LlamaConfig

from profuser.errors import ConfigError, DataError, Interrupted
from profuser.generate.__main__ import main
from profuser.generate.answers import answer_file, finished_rows
from profuser.generate.asking import alone
from profuser.generate.boundaries import word_ends
from profuser.generate.cool_fusion import CoolFusion
from profuser.generate.gated import Gated
from profuser.generate.prompts import prompts_of
from profuser.generate.speaker import Speaker, Voice, Writing, segment_of
from profuser.generate.steps import Answer, Candidate, Step
from profuser.generate.trace import page
from profuser.generate.voices import load_voices
from profuser.models.head import head_of
from profuser.recipe.parse import parse_run
from profuser.recipe.schema import DecodeConfig
from profuser.text.conversation import Conversation, Prompt, Turn
from profuser.text.token_bytes import TokenBytesMismatch

PROMPTS = [
    "Eve has 8 eggs, loses 4, gets 5. How many?",
    "How does a bozun taste?",
    "How do I beat the dragon?",
    "你好，世界！",
    "def f(x):\n    return x + 1",
]
CONVERSATIONS = [
    Conversation(tuple(Turn(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)))
    for texts in (
        (PROMPTS[0], "Eve has 8-4=4 eggs, then 4+5=9. Answer: 9.", "Bob has 3 eggs, gets 2. How many?"),
        ("你好", " 好。 ", "How do I beat the dragon? ", "With a sword.", PROMPTS[4]),
    )
]
CONVERSATIONS.append(Conversation((Turn("system", "Be brief."), *CONVERSATIONS[0].turns)))


# --- the slow implementation -----------------------------------------------------------------------------------------


@dataclass
class Slow:
    """The same algorithm without any cache: every token and every judgement reads the whole conversation."""

    voices: list[Voice]
    config: DecodeConfig
    max_new_tokens: int

    def logits(self, voice: Voice, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return voice.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def encoded(self, voice: Voice, prompt: Prompt, text: str):
        try:
            if isinstance(prompt, Conversation) and text:
                return voice.chat.encode_messages(
                    [*messages_for(voice, prompt), {"role": "assistant", "content": text}], complete=False
                )
            return voice.chat.encode(prompt, text, complete=False)
        except TokenBytesMismatch:
            return None

    def opening(self, voice: Voice, prompt: Prompt) -> list[int]:
        """What the first segment is written behind."""
        if isinstance(prompt, Conversation):
            render: Any = voice.chat.tokenizer.apply_chat_template
            return render(messages_for(voice, prompt), add_generation_prompt=True, return_dict=False)
        return voice.chat.prompt_ids(prompt)

    def segment(self, voice: Voice, prompt: Prompt, response: str) -> str:
        encoded = self.encoded(voice, prompt, response) if response else None
        ids = encoded.input_ids[: encoded.stop] if encoded else self.opening(voice, prompt)
        said: list[int] = []
        text, ended = "", False
        for _ in range(self.config.max_segment_tokens):
            said.append(int(self.logits(voice, [*ids, *said])[-1].argmax()))
            ended = said[-1] in voice.chat.end_ids
            pieces = voice.chat.token_bytes.pieces
            data = b"".join(pieces[i] or b"" for i in said if i < len(pieces))
            while data and not ended:  # without a character of which a part is missing
                try:
                    data.decode()
                    break
                except UnicodeDecodeError as error:
                    if error.end < len(data) or len(data) - error.start > 3:
                        break
                    data = data[: error.start]
            text = data.decode(errors="ignore" if ended else "replace")
            text = text if response else text.lstrip()
            for place in word_ends(text):
                if self.config.segment == "shortest" or all(
                    self.cut(v, prompt, response, text, place) for v in self.voices
                ):
                    return text[:place]
            if ended:
                return text if text.strip() else ""
        return text

    def cut(self, voice: Voice, prompt: Prompt, response: str, text: str, place: int) -> bool:
        encoded = self.encoded(voice, prompt, response + text)
        byte = len((response + text[:place]).encode())
        return encoded is not None and byte in [stop for _, stop in encoded.spans]

    def nll(self, voice: Voice, prompt: Prompt, response: str, segment: str) -> float:
        if not segment:
            encoded = self.encoded(voice, prompt, response) if response else None
            ids = encoded.input_ids[: encoded.stop] if encoded else self.opening(voice, prompt)
            return -float(self.logits(voice, ids)[-1][list(voice.chat.end_ids)].logsumexp(0))
        encoded = self.encoded(voice, prompt, response + segment)
        if encoded is None:
            return math.inf
        ids = encoded.input_ids[: encoded.stop]
        logits = self.logits(voice, ids)
        done = len(response.encode())
        nlls = [
            -float(logits[encoded.start + n - 1, ids[encoded.start + n]])
            for n, (_, stop) in enumerate(encoded.spans)
            if stop > done
        ]
        return sum(nlls) / len(nlls)

    def answer(self, prompt: Prompt) -> list[str]:
        segments: list[str] = []
        response = ""
        while True:
            lengths = [
                e.stop - e.start if (e := self.encoded(v, prompt, response)) and response else 0 for v in self.voices
            ]
            if max(lengths) >= self.max_new_tokens:
                return segments
            wanted = list(dict.fromkeys(self.segment(voice, prompt, response) for voice in self.voices))
            scores = []
            for segment in wanted:
                nlls = [self.nll(voice, prompt, response, segment) for voice in self.voices]
                scores.append(sum(map(math.exp, nlls)) / len(nlls) if max(nlls) < 700 else math.inf)
            if min(scores) == math.inf:
                return segments
            best = wanted[scores.index(min(scores))]
            segments.append(best)
            if not best:
                return segments
            response += best


def messages_for(voice: Voice, prompt: Conversation) -> list[dict[str, str]]:
    """The messages as a source gets them: where its template knows no system message, in front of the user's text."""
    turns = list(prompt.turns)
    if turns[0].role == "system" and "system" not in str(voice.chat.tokenizer.chat_template).replace(
        "<|im_start|>", "system"
    ):
        turns[:2] = [Turn("user", f"{turns[0].text}\n\n{turns[1].text}")]
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def compare(voices: list[Voice], prompts: Sequence[Prompt], config: DecodeConfig, max_new_tokens: int) -> int:
    """Checks that both implementations choose the same segments, and returns how many these are."""
    chosen = 0
    for prompt in prompts:
        fast = [step.winner.text for step in CoolFusion(voices, config, max_new_tokens).steps(prompt)]
        assert fast == Slow(voices, config, max_new_tokens).answer(prompt), prompt
        chosen += len(fast)
    return chosen


@pytest.fixture(scope="module")
def demo() -> list[Voice]:
    return load_voices(parse_run("generate", []).recipe)


@pytest.mark.parametrize("segment", [pytest.param("shortest", marks=pytest.mark.long), "aligned"])
def test_the_demos_sources(demo, segment):
    assert compare(demo, PROMPTS, DecodeConfig(segment=segment), 24) > 20


@pytest.mark.parametrize("count", [1, pytest.param(3, marks=pytest.mark.long)])
def test_the_demos_sources_in_conversations(demo, count):
    for segment in ("shortest", "aligned")[:count]:
        assert compare(demo, CONVERSATIONS[-count:], DecodeConfig(segment=segment), 10) >= 3


@pytest.mark.long
@pytest.mark.parametrize("segment", ["shortest", "aligned"])
def test_the_demos_sources_on_two_hundred_prompts(demo, segment):
    from profuser.recipe.places import resolve

    with open(resolve("demo:heldout.jsonl"), encoding="utf-8") as file:
        prompts = [json.loads(line)["prompt"] for line in itertools.islice(file, 200)]
    assert compare(demo, prompts, DecodeConfig(segment=segment), 40) > 1000


def written(voice: Voice, prompt: str, tokens: int) -> Writing:
    """What a source writes alone."""
    return alone(Speaker(voice, prompt).writes(tokens))


def random_voice(name: str, seed: int) -> Voice:
    chat = real_chat(name, "vicuna")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(chat.token_bytes.pieces), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    return Voice(name, chat, model, head_of(model))


REAL = ("llama2", "mistral_v1", "gpt_neox", "gpt2", "qwen2", "deepseek_v3")


@pytest.mark.long
@pytest.mark.parametrize("pair", [*itertools.combinations(REAL, 2)], ids="-".join)
@pytest.mark.parametrize("segment", ["shortest", "aligned"])
def test_random_models_with_real_tokenizers(pair, segment):
    voices = [random_voice(name, seed) for seed, name in enumerate(pair)]
    assert compare(voices, PROMPTS, DecodeConfig(segment=segment, max_segment_tokens=6), 10) > 5


def test_what_a_source_has_written_beyond_a_segment_stays_with_its_entropies(demo):
    speaker = Speaker(demo[0], PROMPTS[0])
    segment = segment_of(alone(speaker.writes(12)))
    said, entropies = list(speaker._said), list(speaker._entropies)
    assert segment
    speaker.goes_on(segment)
    left = len(speaker._said)
    assert 0 < left < 12
    assert (speaker._said, speaker._entropies) == (said[-left:], entropies[-left:])


def test_a_segment_that_ends_inside_a_token_is_tokenised_anew(demo):
    speaker = Speaker(demo[0], PROMPTS[0])
    text = alone(speaker.writes(20)).text
    pieces = [demo[0].chat.token_bytes.pieces[token] for token in speaker._said]
    ends = {len(b"".join(pieces[:n]).decode().lstrip()) for n in range(len(pieces) + 1)}
    inside = next(n for n in range(1, len(text)) if n not in ends)
    speaker.goes_on_alone(text[:inside])
    encoded = speaker.encoded(text[:inside])
    assert encoded is not None
    assert speaker.response == text[:inside]
    assert speaker._base == encoded.input_ids[: encoded.stop]
    assert speaker.tokens == encoded.stop - encoded.start


def test_one_source_writes_what_it_would_write_alone(demo):
    for voice in demo:
        joint = CoolFusion([voice], DecodeConfig(), 40).answer(PROMPTS[0])
        alone = written(voice, PROMPTS[0], 60)
        assert alone.ended
        assert (joint.text, joint.finished) == (alone.text.strip(), True)
        copies = CoolFusion([voice] * 3, DecodeConfig(), 40).answer(PROMPTS[0])
        assert (copies.text, copies.finished) == (joint.text, True)


def test_equal_scores_go_to_the_first_source(demo, monkeypatch):
    """If all segments are judged alike, the first source writes everything."""
    monkeypatch.setattr(CoolFusion, "score", lambda *_: 1.0)
    for order in (demo, demo[::-1]):
        joint = CoolFusion(order, DecodeConfig(), 40).answer(PROMPTS[1])
        assert joint.text == written(order[0], PROMPTS[1], 60).text.strip()


def test_the_whole_answer_of_one_source_wins_if_it_is_better(demo):
    for prompt in PROMPTS[:2]:
        fusion = CoolFusion(demo, DecodeConfig(rerank=True), 24)
        best, joint = fusion.answer(prompt), CoolFusion(demo, DecodeConfig(), 24).answer(prompt)
        texts = {joint.text, *(written(voice, prompt, 24).text.strip() for voice in demo)}
        assert best.text in texts
        slow = Slow(demo, DecodeConfig(), 24)

        def score(text: str, prompt=prompt, slow=slow) -> float:
            nlls = [slow.nll(voice, prompt, "", text) for voice in demo]
            return sum(map(math.exp, nlls)) / len(nlls)

        assert score(best.text) == pytest.approx(min(map(score, texts)), rel=1e-4)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("Two words", [3]),
        (" two  words ", [4, 11]),
        ("word", []),
        ("   ", []),
        ("你好 世", [1, 2, 4]),
        ("is 東京.", [2, 4, 5]),
        ("f(x) = 1\n", [4, 6, 8]),
        ("e\u0301 x", [2]),
        ("か\u3099た", [2, 3]),
    ],
)
def test_where_words_end(text, ends):
    assert list(word_ends(text)) == ends


# --- the gate --------------------------------------------------------------------------------------------------------


def test_a_gate_that_never_opens_leaves_the_first_sources_own_answer(demo):
    for prompt in PROMPTS:
        gated = Gated(demo, DecodeConfig(method="gated", gate=1e9), 40)
        steps = list(gated.steps(prompt))
        alone = written(demo[0], prompt, 60)
        text = "".join(step.winner.text for step in steps)
        assert text
        assert alone.text.strip().startswith(text.strip())
        assert all(step.winner.sources == (0,) for step in steps)
        if alone.ended and not steps[-1].winner.text:
            assert text.strip() == alone.text.strip()


@pytest.mark.long
def test_a_gate_that_is_always_open_asks_for_every_segment(demo, monkeypatch):
    """It then is Cool-Fusion."""
    monkeypatch.setattr(Gated, "_threshold", lambda *_: -1.0)
    for prompt in PROMPTS[:2]:
        gated = [step.winner.text for step in Gated(demo, DecodeConfig(method="gated"), 24).steps(prompt)]
        assert gated == [step.winner.text for step in CoolFusion(demo, DecodeConfig(), 24).steps(prompt)]


def test_the_others_are_asked_where_the_entropy_is_above_the_threshold(demo):
    fusion = Gated(demo, DecodeConfig(method="gated", gate=0.5), 60)
    steps = [step for prompt in PROMPTS[:3] for step in fusion.steps(prompt)]
    asked = [step for step in steps if not math.isnan(step.winner.perplexities[0])]
    assert 0 < len(asked) < len(steps)


def refuse_e(monkeypatch, voice: Voice) -> None:
    """Lets a source refuse every text with an `e`, as if its tokens could not hold it."""
    encoded = Speaker.encoded

    def refusing(speaker, response, **options):
        return None if speaker.voice is voice and "e" in response else encoded(speaker, response, **options)

    monkeypatch.setattr(Speaker, "encoded", refusing)


def test_what_one_source_cannot_hold_is_never_chosen_whatever_its_weight(demo, monkeypatch):
    """The judgement of the source that refuses some texts has no weight, but it has to read the answer."""
    refuse_e(monkeypatch, demo[2])
    for prompt in PROMPTS[:3]:
        answer = CoolFusion(demo, DecodeConfig(weights=[1.0, 1.0, 0.0]), 24).answer(prompt)
        assert "e" not in answer.text
    # Behind a gate the first source goes on alone where another one could not follow.
    monkeypatch.setattr(Gated, "_threshold", lambda *_: -1.0)
    for prompt in PROMPTS[:3]:
        steps = list(Gated([demo[0], demo[2]], DecodeConfig(method="gated"), 24).steps(prompt))
        text = ""
        for step in steps:
            assert math.isnan(step.winner.perplexities[0]) == ("e" in text)
            text += step.winner.text


def test_progress_is_told_of_every_step(demo):
    """The first answers of many that are written side by side come late, and the work must not seem to stand still until then."""
    fusion, told = CoolFusion(demo, DecodeConfig(), 12), []
    fusion.on_step = told.append
    answers = list(fusion.answers(PROMPTS[:3], 2))
    assert told == [0] * sum(len(answer.steps) for answer in answers)


# --- files and the command -------------------------------------------------------------------------------------------


def test_a_file_of_prompts_is_answered_in_order_and_goes_on_where_it_stopped(demo, tmp_path):
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    rows = [{"prompt": PROMPTS[0]}, {"messages": [{"role": "user", "content": PROMPTS[1]}]}, {"prompt": PROMPTS[2]}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = prompts_of(source)
    assert [str(prompt) for prompt in prompts] == PROMPTS[:3]
    fusion = CoolFusion(demo, DecodeConfig(), 24)
    whole = list(answer_file(fusion, prompts, output))
    expected = output.read_bytes()
    found = [json.loads(line) for line in expected.splitlines()]
    assert [{key: row[key] for key in given} for row, given in zip(found, rows, strict=True)] == rows
    for row in found:
        assert "".join(segment["text"] for segment in row["segments"]).strip() == row["response"]
        assert {segment["source"] for segment in row["segments"]} <= {voice.name for voice in demo}
        assert all(segment["mean_ppl"] >= 1 for segment in row["segments"])
    # A command that was killed in the second row.
    output.write_bytes(expected[: expected.index(b"\n") + 20])
    assert finished_rows(output, prompts) == 1
    list(answer_file(fusion, prompts, output))
    assert output.read_bytes() == expected
    with pytest.raises(DataError, match="answers to the same prompts"):
        list(answer_file(fusion, prompts[::-1], output))
    assert page([voice.name for voice in demo], whole).count("<h2>") == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "JSON object"),
        ("[1]", "text as `prompt`"),
        ('{"prompt": 7}', "text as `prompt`"),
        ('{"prompt": "  "}', "text as `prompt`"),
        ('{"prompt": "\\ud83d"}', "lone surrogate"),
    ],
)
def test_a_row_without_a_prompt_is_named(tmp_path, line, message):
    (tmp_path / "prompts.jsonl").write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(DataError, match=rf"line 2.*{message}"):
        prompts_of(tmp_path / "prompts.jsonl")


def test_wrong_settings(demo):
    with pytest.raises(ConfigError, match="one weight for each of the 3 sources, got 2"):
        CoolFusion(demo, DecodeConfig(weights=[1, 2]), 10)
    for weights in ([0.0, 0.0], [], [-1.0, 1.0], [math.nan, 1.0], [1.0, math.nan], [math.inf, 1.0], [-math.inf, 1.0]):
        with pytest.raises(ConfigError, match="not all 0"):
            DecodeConfig(weights=weights)
    for gate in (math.nan, math.inf, -math.inf):
        with pytest.raises(ConfigError, match=r"decode\.gate must be a number"):
            DecodeConfig(gate=gate)


@pytest.mark.parametrize("nll", [2.0, 699.0, 701.0, 1e6])
def test_a_source_without_weight_does_not_count_however_surprised_it_is(demo, nll):
    fusion = CoolFusion(demo, DecodeConfig(weights=[1.0, 3.0, 0.0]), 8)
    assert fusion.score([1.0, 2.0, nll]) == pytest.approx((math.e + 3 * math.e**2) / 4)
    assert fusion.score([1.0, 2.0, math.inf]) == math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--input", "b"], "either --prompt or --input"),
        (["--input", "b"], "given together"),
        (["--prompt", " "], "must be a text"),
        (["--input", "nowhere.jsonl", "--output", "o.jsonl"], "must be an existing JSONL file, got nowhere.jsonl"),
        (["--decode.segment", "long", "--prompt", "a"], "segment"),
    ],
)
def test_a_command_line_that_makes_no_sense(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, DataError), match=message):
        main(arguments)


def test_the_command_prints_the_answer_and_draws_the_page(tmp_path, capsys):
    main(["--prompt", PROMPTS[1], "--trace", str(tmp_path / "trace.html"), "--generation.max_new_tokens", "24"])
    answer = capsys.readouterr().out.strip()
    assert answer
    assert "guardian" in (tmp_path / "trace.html").read_text()


def test_an_interrupted_answer_promises_nothing(monkeypatch):
    monkeypatch.setattr("profuser.generate.__main__.streamed", mock.Mock(side_effect=Interrupted))
    with pytest.raises(Interrupted, match="answers in the terminal are not kept"):
        main(["--prompt", PROMPTS[1]])


def test_the_page_shows_the_perplexities_of_those_that_were_asked():
    steps = tuple(
        Step((Candidate(text, (0,), perplexities, 0.0),), 0)
        for text, perplexities in (("One", (1.5, math.nan)), (" two", (math.nan, math.nan)))
    )
    found = page(["a", "b"], [("Count.", Answer("One two", True, steps))])
    assert 'title="One (a): a 1.5"' in found
    assert 'title="two (a): nobody else was asked"' in found


def test_a_gate_has_a_threshold_as_soon_as_eight_tokens_are_written():
    gated: Any = SimpleNamespace(config=DecodeConfig(method="gated", gate=2.0))
    assert Gated._threshold(gated, [1.0] * 7) == math.inf
    assert Gated._threshold(gated, [0.0, 2.0] * 4) == 1.0 + 2.0


def test_what_the_page_shows_is_escaped(demo):
    answer = CoolFusion(demo, DecodeConfig(), 8).answer("<script>alert(1)</script>")
    found = page(["<b>", "b", "c"], [("<script>alert(1)</script>", answer)])
    assert "<script>" not in found
    assert "<b>" not in found
