"""What a model writes before its answer is kept, stripped by the rule or refused: the text that is learnt is what it said."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from command_runs import rows, write_rows
from small_tokenizers import CHATML, byte_level, sentencepiece, wrap
from tokenizers import AddedToken, Tokenizer
from transformers import LlamaForCausalLM

from profuser.errors import ConfigError
from profuser.models.load import chat_format
from profuser.prepare.phases import prepare
from profuser.recipe.parse import parse_run
from profuser.recipe.schedule import Mode
from profuser.recipe.schema import SourceConfig
from profuser.store import layout
from profuser.text.chat import ChatFormat
from profuser.text.fit import Verdict
from profuser.text.said import Said, said, said_elsewhere
from profuser.train.targets import Targets

ASSISTANT = "{% elif m['role'] == 'assistant' %}"
USER = "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}"
TURN = "'<|im_start|>assistant\n'"
PROMPTED = "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ " + TURN + " }}"
SPLIT = (  # how Qwen3's template takes the reasoning out of a response
    "{% set parts = m['content'].split('</think>') %}{% set answer = parts[-1].lstrip('\n') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
)
QWEN3 = (
    USER + ASSISTANT + SPLIT + "{{ " + TURN + " + '<think>\n' + thought + '\n</think>\n\n' + answer + '<|im_end|>\n' }}"
    + PROMPTED + "{% if enable_thinking is defined %}{{ 'x' }}{% endif %}{% endif %}"
)  # fmt: skip
QWEN3_THINKING = QWEN3.replace("{% if enable_thinking is defined %}{{ 'x' }}{% endif %}", "{{ '<think>\n' }}")
R1 = (
    USER + ASSISTANT + SPLIT + "{{ " + TURN + " + answer + '<|im_end|>\n' }}" + PROMPTED + "{{ '<think>\n' }}{% endif %}"
)  # fmt: skip
NO_THINK = CHATML.replace("assistant\n' }}", "assistant\n<think>\n\n</think>\n\n' }}")
HARMONY = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|start|>user<|message|>' + m['content'] + '<|end|>' }}"
    "{% else %}{% if m['thinking'] %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m['thinking'] + '<|end|>' }}"
    "{% endif %}{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] + '<|return|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
OWN_MARKS = (
    USER + ASSISTANT + "{{ " + TURN + " }}{% if m['reasoning_content'] %}{{ '(thought) ' + m['reasoning_content'] + ' (/thought)' }}"
    "{% endif %}{{ m['content'] + '<|im_end|>\n' }}" + PROMPTED + "{% endif %}"
)  # fmt: skip
LABELLED = (
    USER + ASSISTANT + "{{ " + TURN + " + 'Answer: ' + m['content'] + '<|im_end|>\n' }}" + PROMPTED + "{% endif %}"
)

CONTROL = [
    "<|start|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|channel|>",
    "<|message|>",
    "[THINK]",
    "[/THINK]",
    "[TOOL]",
]


def reasoner(template: str, *, marks_are: str = "tokens") -> ChatFormat:
    """A format whose tokenizer has channels and tools as control tokens. `<think>` is a token of text, control, or no token."""
    tokenizer = Tokenizer.from_str(byte_level(500).to_str())
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    marks = [AddedToken(token, normalized=False) for token in ("<think>", "</think>")]
    if marks_are != "nothing":
        (tokenizer.add_special_tokens if marks_are == "control" else tokenizer.add_tokens)(marks)
    return ChatFormat(wrap(tokenizer, template))


def check(chat: ChatFormat, wrote: str, keep: Said, strip: Said) -> None:
    """Checks what a model said that wrote this, control tokens spelt out, under both rules."""
    ids = chat.token_bytes.encode(wrote)
    for rule, expected in ((False, keep), (True, strip)):
        assert said(chat, ids, strip_reasoning=rule) == expected
        if expected.verdict == Verdict.OK and expected.text:
            encoded = chat.encode("8-4=?", expected.text)
            label = chat.token_bytes.of([i for i, learnt in zip(encoded.input_ids, encoded.label_mask) if learnt])
            assert label.decode().strip() == expected.text


def check_is_what_was_seen(chat: ChatFormat, wrote: str, text: str) -> None:
    """Checks that the conversation which is learnt is, token by token, the one that the model has seen and written."""
    ids = chat.token_bytes.encode(wrote)
    assert chat.encode("8-4=?", text).input_ids[:-1] == chat.prompt_ids("8-4=?") + ids


def ok(text: str) -> Said:
    return Said(text, Verdict.OK)


THOUGHT = "<think>\nNeed 8-4.\n</think>\n\nAnswer: 4."


@pytest.mark.parametrize("marks_are", ["tokens", "nothing"])
@pytest.mark.parametrize("template", [CHATML, QWEN3, NO_THINK])
def test_a_block_of_reasoning_is_kept_or_stripped_and_no_other_block_stands_before_it(template, marks_are):
    chat = reasoner(template, marks_are=marks_are)
    check(chat, THOUGHT, ok(THOUGHT), ok("Answer: 4."))
    check(chat, "Answer: 4.", ok("Answer: 4."), ok("Answer: 4."))
    if template != NO_THINK:
        check_is_what_was_seen(chat, THOUGHT, THOUGHT)
    text = chat.token_bytes.of(chat.encode("8-4=?", THOUGHT).input_ids).decode()
    assert text.count("<think>") == text.count("</think>") == 1


@pytest.mark.parametrize("template", [QWEN3_THINKING, R1])
def test_a_block_that_the_generation_prompt_has_begun_is_whole_again(template):
    chat = reasoner(template)
    wrote = "Need 8-4.\n</think>\n\nAnswer: 4."
    check(chat, wrote, ok(THOUGHT), ok("Answer: 4."))
    check_is_what_was_seen(chat, wrote, THOUGHT)


@pytest.mark.parametrize("template", [QWEN3_THINKING, R1])
def test_a_server_may_give_a_begun_block_without_its_beginning_or_whole_or_not_at_all(template):
    chat = reasoner(template)
    whole = f"{chat.opening.begun}Need 8-4.\n</think>\n\nAnswer: 4."
    for text in (whole, whole.removeprefix(chat.opening.begun)):
        assert said_elsewhere(chat, text, strip_reasoning=True) == ok("Answer: 4.")
        assert said_elsewhere(chat, text, strip_reasoning=False) == ok(whole)
    for rule in (True, False):
        assert said_elsewhere(chat, "Answer: 4.", strip_reasoning=rule) == ok("Answer: 4.")


def test_a_ground_truth_with_reasoning_gets_no_empty_block_beside_it_either():
    chat = reasoner(QWEN3)
    assert b"<think>\n\n</think>" in chat.token_bytes.of(chat.encode("x", "Answer: 4.").input_ids)
    for response in (THOUGHT, "<think></think>4"):
        encoded = chat.encode("x", response)
        assert chat.token_bytes.of(encoded.input_ids).count(b"<think>") == 1
        assert chat.token_bytes.of(encoded.input_ids[encoded.start : encoded.stop]).decode() == response
    assert chat.token_bytes.of(chat.encode("x", "[THINK] of 4").input_ids).count(b"<think>") == 1


def test_of_channels_the_answers_is_taken():
    chat = reasoner(HARMONY)
    analysis = "<|channel|>analysis<|message|>Need 8-4.<|end|><|start|>assistant"
    final = "<|channel|>final<|message|>Answer: 4."
    check(chat, final, ok("Answer: 4."), ok("Answer: 4."))
    check_is_what_was_seen(chat, final, "Answer: 4.")
    check(chat, analysis + final, Said(analysis + final, Verdict.CONTROL), ok("Answer: 4."))
    commentary = analysis + "<|channel|>commentary<|message|>Now.<|end|><|start|>assistant"
    check(chat, commentary + final, Said(commentary + final, Verdict.CONTROL), ok("Answer: 4."))
    again = "Answer: 3.<|end|><|start|>assistant" + final
    check(chat, final[: -len("Answer: 4.")] + again, Said(again, Verdict.CONTROL), Said(again, Verdict.CONTROL))
    tool = "<|channel|>commentary to=f<|message|>{}"
    check(chat, tool, Said(tool, Verdict.CONTROL), Said(tool, Verdict.CONTROL))
    unfinished = "<|channel|>analysis<|message|>Need 8-4."
    check(chat, unfinished, Said(unfinished, Verdict.CONTROL), Said("", Verdict.REASONING))


def test_marks_that_are_control_tokens_are_dropped_by_the_rule_or_refused():
    chat = reasoner(CHATML, marks_are="control")
    check(chat, THOUGHT, Said(THOUGHT, Verdict.CONTROL), ok("Answer: 4."))
    wrote = "[THINK]Need 8-4.[/THINK]Answer: 4."
    check(chat, wrote, Said(wrote, Verdict.CONTROL), ok("Answer: 4."))


@pytest.mark.parametrize("wrote", ['[TOOL]{"name": "f"}', "4<|channel|>2", "<s>4", "Answer: <|call|>"])
def test_a_control_token_in_an_answer_is_refused_and_spelt_out(wrote):
    """Without its control tokens the text would be another one: `4<|channel|>2` would be 42."""
    chat = reasoner(CHATML)
    check(chat, wrote, Said(wrote, Verdict.CONTROL), Said(wrote, Verdict.CONTROL))


def test_a_control_string_in_plain_text_is_text():
    chat = reasoner(CHATML)
    ids = chat.token_bytes.encode_parts([("</s> and <|im_end|>", True)])[0]
    assert said(chat, ids, strip_reasoning=False) == said(chat, ids, strip_reasoning=True) == ok("</s> and <|im_end|>")


def test_a_header_that_is_only_quoted_is_not_taken_for_one():
    chat = reasoner(HARMONY)
    ids = chat.token_bytes.encode_parts(
        [
            ("<|channel|>analysis<|message|>", False),
            ("I write <|channel|>final<|message|> first.", True),
            ("<|end|><|start|>assistant<|channel|>final<|message|>4", False),
        ]
    )[0]
    assert said(chat, ids, strip_reasoning=True).verdict == Verdict.REASONING


def test_marks_that_only_a_template_shows_are_known_from_it():
    chat = reasoner(OWN_MARKS)
    wrote = "(thought) Need 8-4. (/thought)\nAnswer: 4."
    check(chat, wrote, ok(wrote), ok("Answer: 4."))
    check_is_what_was_seen(chat, wrote, wrote)


def test_a_header_of_plain_text_that_the_model_writes_itself_is_not_doubled():
    chat = reasoner(LABELLED)
    check(chat, "Answer: 4.", ok("4."), ok("4."))
    check_is_what_was_seen(chat, "Answer: 4.", "4.")
    check(chat, "8-4=4. Answer: 4.", ok("8-4=4. Answer: 4."), ok("8-4=4. Answer: 4."))


@pytest.mark.parametrize(
    ("wrote", "stripped"),
    [
        ("<think>Need", Said("", Verdict.REASONING)),
        ("<think></think>", Said("", Verdict.REASONING)),
        ("Need.</think>4", Said("Need.</think>4", Verdict.REASONING)),
        ("4, for <think>x</think> is a tag", Said("4, for <think>x</think> is a tag", Verdict.REASONING)),
        ("<think>a</think>\n<think>b</think>4", ok("4")),
        ("\n<think>a</think>4", ok("4")),
        ("", ok("")),
    ],
)
def test_an_answer_that_cannot_be_told_from_the_reasoning_is_refused(wrote, stripped):
    chat = reasoner(CHATML)
    ids = chat.token_bytes.encode(wrote)
    assert said(chat, ids, strip_reasoning=True) == stripped
    assert said(chat, ids, strip_reasoning=False) == ok(wrote.strip())


def test_bytes_that_are_no_text_are_refused_where_they_count():
    chat = reasoner(CHATML)
    half = [i for i in range(len(chat.token_bytes.pieces)) if chat.token_bytes.pieces[i] == b"\xc3"]
    four = chat.token_bytes.encode("4")
    assert said(chat, four + half, strip_reasoning=False) == Said("4\ufffd", Verdict.BROKEN)
    before = chat.token_bytes.encode("<think>") + half + chat.token_bytes.encode("</think>")
    assert said(chat, before + four, strip_reasoning=True) == ok("4")
    assert said(chat, chat.token_bytes.encode("4\ufffd"), strip_reasoning=False) == ok("4\ufffd")


def test_an_id_that_no_token_has_is_refused():
    chat = reasoner(CHATML)
    beyond = len(chat.token_bytes.pieces) + 3
    assert said(chat, [*chat.token_bytes.encode("4"), beyond], strip_reasoning=False) == Said(
        f"4<token {beyond}>", Verdict.CONTROL
    )


@pytest.mark.parametrize("scheme", ["prepend", "always", "first", "never"])
def test_a_dummy_space_is_not_said(scheme):
    chat = ChatFormat(wrap(sentencepiece(700, scheme), CHATML))
    for text in ("hello help", "42", "def f(x):\n    return x"):
        assert said(chat, chat.token_bytes.encode(text), strip_reasoning=False) == ok(text)


# From here on a whole preparation is run, in which the source writes what it is told.


def scripted(monkeypatch, texts: list[str]) -> None:
    """Makes every Llama answer its n-th prompt of a batch with the n-th text, which spells its control tokens out."""

    tokens = chat_format(SourceConfig(name="g", model="demo:guardian")).token_bytes

    def generate(self, input_ids, eos_token_id, pad_token_id, **_):
        written = [[*tokens.encode(texts[n % len(texts)]), eos_token_id[0]] for n in range(len(input_ids))]
        width = max(map(len, written))
        padded = [ids + [pad_token_id] * (width - len(ids)) for ids in written]
        return SimpleNamespace(sequences=torch.cat([input_ids, torch.tensor(padded)], 1))

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)


def reasoning_run(folder, *overrides: str, **source: str):
    """A recipe of one source that is the target, too, with Qwen3's template."""
    write_rows(str(folder / "train.jsonl"), rows("fusion", 4))
    recipe = {
        "sources": [{"name": "guardian", "model": "demo:guardian", "chat_template": QWEN3, **source}],
        "target": "guardian",
        "data": {"train": str(folder / "train.jsonl"), "max_length": 256},
        "judges": [{"name": "verifier", "function": "profuser.demo.verify:score"}],
        "store": str(folder / "store"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return parse_run("prepare", ["--config", str(folder / "recipe.yaml"), *overrides])


def learnt(run, store) -> list[str]:
    """The texts that the target learns in inference mode, each from its labels alone."""
    tokens = chat_format(run.recipe.sources[0]).token_bytes
    return [
        tokens.of(sequence.input_ids[sequence.label_mask].tolist()).decode()
        for sequences in Targets(store, "train")
        for sequence in sequences
        if sequence.mode == Mode.INFERENCE
    ]


@pytest.mark.parametrize(
    ("overrides", "source", "expected"),
    [
        ([], {}, THOUGHT),
        pytest.param(["--generation.reasoning", "strip"], {}, "Answer: 4.", marks=pytest.mark.long),
        pytest.param([], {"reasoning": "strip"}, "Answer: 4.", marks=pytest.mark.long),
        (["--generation.reasoning", "strip"], {"reasoning": "keep"}, THOUGHT),
    ],
)
def test_what_is_trained_on_is_what_the_source_said(tmp_path, monkeypatch, overrides, source, expected):
    scripted(monkeypatch, [THOUGHT])
    run = reasoning_run(tmp_path, *overrides, **source)
    store = prepare(run)
    assert learnt(run, store) == [expected] * 4
    changed = reasoning_run(tmp_path, reasoning="strip" if expected == THOUGHT else "keep")
    with pytest.raises(ConfigError, match=r"sources\.guardian\.reasoning differ"):
        prepare(changed)


def test_what_cannot_be_used_is_counted_and_announced_and_never_trained_on(tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, [THOUGHT, "4<|begin|>2", "<think>Need", "Answer: 4."])
    run = reasoning_run(tmp_path, "--generation.reasoning", "strip")
    store = prepare(run)
    assert sorted(learnt(run, store)) == ["Answer: 4."] * 2
    handled = json.loads((store.directory / "summary.json").read_text())["handled"]
    assert handled[Verdict.CONTROL.label] == handled[Verdict.REASONING.label] == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if Verdict.CONTROL.label in line)
    assert line.startswith("guardian: 1 x ")
    (answers,) = (store.get_json(layout.responses("train", "guardian"), n) for n in [0])
    assert sorted(text for ((text, *_),) in answers) == ["", "4<|begin|>2", "Answer: 4.", "Answer: 4."]


def test_a_source_that_speaks_in_control_tokens_is_told_what_helps(tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, ["4<|begin|>2"])
    prepare(reasoning_run(tmp_path))
    assert "guardian: 4 x response with control tokens, skipped; `reasoning: strip`" in capsys.readouterr().out
