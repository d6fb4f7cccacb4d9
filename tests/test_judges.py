"""A reward model's score is that of the whole conversation in its own template, alone and without padding."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_tokenizers import CHATML, TEMPLATES, byte_level, pretrained_tokenizer, wrap
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
)

from profuser.errors import DataError
from profuser.evaluate.match import load_match
from profuser.prepare.judges import load_judge, open_judge
from profuser.recipe.schema import JudgeConfig
from profuser.text.template import ChatTemplate, conversation

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
ARCHITECTURES: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": lambda **more: LlamaConfig(**SIZES, max_position_embeddings=128, **more),
    "gpt_neox": lambda **more: GPTNeoXConfig(**SIZES, max_position_embeddings=128, **more),
    "gpt2": lambda **more: GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, **more),
}
ROWS = [{"prompt": prompt} for prompt in ("What is 6*7?", "hello", "Who said the cat?\n\nThings.", "x")]
RESPONSES = [
    ["42", "The answer is 42, because 6*7=42."],
    ["hello world", "hello help.\n    def f(x):\n        return 1"],
    ["Things like these don't happen.", "I said </s> and <|im_end|> and that is it"],
    ["42", ""],
]


def reward_model(
    folder: Path,
    *,
    template: str = CHATML,
    pad: str | int | None = "<s>",
    tokenizer_pad: str | None = None,
    architecture: str = "llama",
) -> str:
    """Saves a small random reward model. `pad` is the padding that its configuration names, a token or an id."""
    torch.manual_seed(0)
    tokenizer = wrap(byte_level(500), template)
    if tokenizer_pad is not None:
        tokenizer.pad_token = tokenizer_pad
    pad_id = tokenizer.get_vocab()[pad] if isinstance(pad, str) else pad
    config = ARCHITECTURES[architecture](vocab_size=len(tokenizer), num_labels=1, pad_token_id=None)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so large that every token matters
    model.config.pad_token_id = pad_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def alone(location: str, prompt: str, response: str) -> float:
    """The reference: transformers' score of one conversation as `apply_chat_template` tokenises it."""
    model = AutoModelForSequenceClassification.from_pretrained(location, dtype=torch.float32).eval()
    render: Any = pretrained_tokenizer(location).apply_chat_template
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    ids = render(turns, tokenize=True, return_dict=False)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, 0].item()


def check_scores_are_those_of_each_alone(location: str, batch_size: int = 3) -> np.ndarray:
    judge = load_judge(JudgeConfig(name="rm", model=location, batch_size=batch_size))
    scores = judge(ROWS, RESPONSES)
    for e, responses in enumerate(RESPONSES):
        for c, response in enumerate(responses):
            if response:
                assert scores[e, c] == pytest.approx(alone(location, ROWS[e]["prompt"], response), abs=1e-4)
            else:
                assert np.isnan(scores[e, c])
    return scores


PADDINGS: dict[str, dict[str, Any]] = {
    "a token of its own": {"pad": "<s>", "tokenizer_pad": "<s>"},
    "none at all": {"pad": None},
    "the tokenizer's only": {"pad": None, "tokenizer_pad": "<|im_end|>"},
    "the end of turn": {"pad": "<|im_end|>", "tokenizer_pad": "<|im_end|>"},
    "the eos": {"pad": "</s>", "tokenizer_pad": "</s>"},
    "an id that no token has": {"pad": -1},
    "an id without an embedding": {"pad": 500, "architecture": "gpt2"},
}


# Every template and every padding in `make test`, and every pair of them in test-long.
PAIRS = [
    pytest.param(template, padding, marks=[] if i % len(PADDINGS) == j % len(TEMPLATES) else [pytest.mark.long])
    for (i, template), (j, padding) in itertools.product(enumerate(TEMPLATES), enumerate(PADDINGS))
]


@pytest.mark.parametrize(("template", "padding"), PAIRS)
def test_a_judge_scores_what_apply_chat_template_gives(tmp_path, template, padding):
    check_scores_are_those_of_each_alone(reward_model(tmp_path, template=TEMPLATES[template], **PADDINGS[padding]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("rows", "opens"), [(0, True), (-1, False), (-100, False)])
def test_a_judge_without_a_row_for_a_token_is_found_when_it_is_opened(tmp_path, architecture, rows, opens):
    """Its tokens are those of text and of its template; a control token that it never reads may have no row."""
    tokenizer = wrap(byte_level(500), CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|unused|>"]})
    used = len(tokenizer) - 1
    config = ARCHITECTURES[architecture](vocab_size=used + rows, num_labels=1, pad_token_id=None)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if opens:
        open_judge(JudgeConfig(name="rm", model=str(tmp_path)))
        check_scores_are_those_of_each_alone(str(tmp_path))
    else:
        with pytest.raises(
            DataError, match=f"^judge rm: .* its tokenizer has the id {used - 1} and its head only {used + rows} rows"
        ):
            open_judge(JudgeConfig(name="rm", model=str(tmp_path)))


@pytest.mark.parametrize("pad", [500, 2**31, -(10**6)])
def test_a_padding_that_a_judge_cannot_be_made_with_names_the_key(tmp_path, pad):
    location = reward_model(tmp_path, pad=pad)
    with pytest.raises(
        DataError, match=r"^judge rm: .* set pad_token_id in its config.json to the id of a token, or to null$"
    ):
        open_judge(JudgeConfig(name="rm", model=location))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pad", [None, "</s>"])
def test_every_architecture_reads_its_score_at_the_same_token(tmp_path, architecture, pad):
    check_scores_are_those_of_each_alone(reward_model(tmp_path, architecture=architecture, pad=pad))


def test_a_template_that_rewrites_the_response_is_followed(tmp_path):
    """A reward model whose template strips responses, or drops their reasoning, never sees what its template leaves out."""
    template = CHATML.replace("m['content'] +", "m['content'].split('</think>')[-1].strip() +")
    location = reward_model(tmp_path, template=template)
    judge = load_judge(JudgeConfig(name="rm", model=location))
    scores = judge([{"prompt": "x"}], [["<think>hm</think>\n42", "42 ", "41"]])[0]
    assert scores[0] == scores[1] == pytest.approx(alone(location, "x", "<think>hm</think>\n42"), abs=1e-4)
    assert scores[2] != scores[0]


@pytest.mark.parametrize(
    ("template", "renders"),
    [
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "userassistant"),
        ("{{ messages[0]['content'] }}", "x"),  # the prompt alone
        ("./rm", "./rm"),  # a path or a name is no template
    ],
)
def test_a_template_that_does_not_show_the_response_is_refused_before_any_model_runs(tmp_path, template, renders):
    """Such a judge would score all responses alike, and its votes would be called without a signal."""
    own, given = reward_model(tmp_path / "own", template=template), reward_model(tmp_path / "given")
    for location, chat_template, fix in (
        (own, None, "set `chat_template`"),
        (given, template, "correct the `chat_template`"),
    ):
        judge = JudgeConfig(name="rm", model=location, chat_template=chat_template)
        with pytest.raises(DataError, match=rf"must show the response, judge rm's .*'{renders}'.*{fix}"):
            open_judge(judge)


def test_equal_responses_get_equal_scores_whatever_stands_beside_them_in_a_batch(tmp_path):
    location = reward_model(tmp_path)
    judge = load_judge(JudgeConfig(name="rm", model=location, batch_size=2))
    long = "Things like these don't happen, said the cat. " * 2
    scores = judge([{"prompt": "x"}], [["hello", "hello", long, "hello", long, "world"]])[0]
    assert scores[0] == scores[1] == scores[3]
    assert scores[2] == scores[4] != scores[0]


def test_a_judges_template_gets_the_date_that_it_is_loaded_with(tmp_path):
    location = reward_model(tmp_path, template="{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    scores = [
        load_judge(JudgeConfig(name="rm", model=location), date=datetime.date(2026, 3, day))(ROWS, RESPONSES)[0, 0]
        for day in (1, 1, 2)
    ]
    assert scores[0] == scores[1] != scores[2]


def test_a_template_that_refuses_a_conversation_is_one_line(tmp_path):
    template = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not that') }}{% endif %}" + CHATML
    judge = load_judge(JudgeConfig(name="rm", model=reward_model(tmp_path, template=template)))
    with pytest.raises(DataError, match="on the prompt 'no' it raised TemplateError: not that"):
        judge([{"prompt": "no"}], [["42"]])


def test_a_line_that_names_a_long_prompt_stays_short():
    example = {"prompt": "word " * 20_000, "response": "x", "skill": "all"}
    refusing = "{% if messages[0]['content']|length > 99 %}{{ raise_exception('too long') }}{% endif %}" + CHATML
    template = ChatTemplate(wrap(byte_level(500), refusing), name="rm")
    for call in (
        lambda: load_judge(JudgeConfig(name="j", function="test_judges:nothing"))([example], [["a"]]),
        lambda: load_match("test_judges:nothing", fix="fix it")(example, "a"),
        lambda: template.ids(conversation(example["prompt"], "x")),
    ):
        with pytest.raises(DataError, match="on the prompt 'word word") as error:
            call()
        assert len(str(error.value)) < 1000


def nothing(*_): ...
