"""A template that writes the date gets one date in all of a store: it does not drift when work goes on another day."""

from __future__ import annotations

import datetime
import json
from types import SimpleNamespace

import pytest
from command_runs import rows, write_rows
from small_tokenizers import CHATML, byte_level, wrap

from profuser.errors import ConfigError, DataError
from profuser.evaluate import scores
from profuser.evaluate.contestants import Joint
from profuser.generate.answers import settings_key
from profuser.generate.voices import chats_of
from profuser.models.load import chat_format
from profuser.pipeline import train
from profuser.prepare.phases import prepare
from profuser.recipe.parse import Run, parse_run
from profuser.store.store import Store
from profuser.text.chat import ChatFormat
from profuser.text.conversation import Conversation, Turn
from profuser.text.template import ChatTemplate, conversation
from profuser.train.targets import Targets

DATED = "Today is {{ strftime_now('%Y-%m-%d %H:%M') }}.\n" + CHATML
FIRST, LATER = datetime.date(2026, 3, 1), datetime.date(2026, 3, 2)


def set_clock(monkeypatch, day: datetime.date) -> None:
    """Makes it another day, for us and for transformers."""

    class Date(datetime.date):
        @classmethod
        def today(cls):
            return cls(day.year, day.month, day.day)

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.combine(day, datetime.time(12, 34))

    ours = SimpleNamespace(date=Date, datetime=datetime.datetime, time=datetime.time)
    monkeypatch.setattr("profuser.prepare.inputs.datetime", ours)
    monkeypatch.setattr("profuser.text.template.datetime", ours)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)


@pytest.fixture
def run(tmp_path) -> Run:
    """A run of one source, whose template writes the date."""
    write_rows(str(tmp_path / "train.jsonl"), rows("fusion", 6))
    write_rows(str(tmp_path / "heldout.jsonl"), rows("heldout", 2))
    recipe = {
        "sources": [{"name": "guardian", "model": "demo:guardian", "chat_template": DATED}],
        "target": "guardian",
        "data": {"train": str(tmp_path / "train.jsonl"), "heldout": str(tmp_path / "heldout.jsonl")},
        "generation": {"max_new_tokens": 4},
        "capture": {"shard_size": 2},
        "schedule": "fusellm",
        "optim": {"steps": 1, "batch_size": 2},
        "store": str(tmp_path / "store"),
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return parse_run("train", ["--config", str(tmp_path / "recipe.yaml")])


def dates_in(run: Run, store: Store) -> set[str]:
    """The dates in the conversations that the target is trained on."""
    chat = chat_format(run.recipe.sources[0])
    found = set()
    for split in ("train", "heldout"):
        for sequences in Targets(store, split):
            for sequence in sequences:
                text = chat.token_bytes.of(sequence.input_ids.tolist()).decode()
                found.add(text.partition("Today is ")[2].partition(".")[0])
    return found


def test_a_preparation_that_goes_on_another_day_keeps_its_date(run, monkeypatch):
    put, shards = Store.put, []

    def interrupted(self, kind, number, arrays, **facts):
        if len(shards) == 2:
            raise KeyboardInterrupt
        shards.append(number)
        put(self, kind, number, arrays, **facts)

    set_clock(monkeypatch, FIRST)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(run)
    set_clock(monkeypatch, LATER)
    store = prepare(run)
    assert store.date == FIRST
    assert dates_in(run, store) == {"2026-03-01 00:00"}


def test_training_and_evaluation_on_another_day_keep_the_stores_date(run, monkeypatch):
    set_clock(monkeypatch, FIRST)
    prepare(run)
    asked = []
    generate = scores.generate

    def recorded(model, chat, prompts, *args, **options):
        asked.append(chat.token_bytes.of(chat.prompt_ids(prompts[0])).decode())
        return generate(model, chat, prompts, *args, **options)

    monkeypatch.setattr(scores, "generate", recorded)
    set_clock(monkeypatch, LATER)
    train(run)
    assert asked
    assert all(text.startswith("Today is 2026-03-01 00:00.") for text in asked)


def test_the_recipes_date_comes_first_and_must_be_the_stores(run, monkeypatch):
    set_clock(monkeypatch, LATER)
    run.recipe.date = "2025-12-31"
    store = prepare(run)
    assert dates_in(run, store) == {"2025-12-31 00:00"}
    run.recipe.date = "2026-01-01"
    with pytest.raises(ConfigError, match=r"\(date differ\)"):
        prepare(run)
    run.recipe.date = None
    assert prepare(run).date == datetime.date(2025, 12, 31)


def test_sources_that_answer_together_get_the_recipes_date(run, monkeypatch):
    turns = Conversation((Turn("user", "x"), Turn("assistant", "y"), Turn("user", "z")))

    def dates() -> set[str]:
        """The dates that a source sees, before and behind its first segment."""
        (chat,) = chats_of(run.recipe)
        ids = [chat.prompt_ids(prompt) for prompt in ("x", turns)]
        ids += [chat.encode(prompt, "w").input_ids for prompt in ("x", turns)]
        return {chat.token_bytes.of(i).decode().partition(".")[0] for i in ids}

    set_clock(monkeypatch, LATER)
    assert dates() == {"Today is 2026-03-02 00:00"}
    run.recipe.date = "2025-12-31"
    keys = set()
    for day in (FIRST, LATER):
        set_clock(monkeypatch, day)
        assert dates() == {"Today is 2025-12-31 00:00"}
        keys.add((settings_key(run.recipe), str(Joint("joint", run.recipe).identity)))
    assert len(keys) == 1
    run.recipe.date = None
    assert (settings_key(run.recipe), str(Joint("joint", run.recipe).identity)) not in keys


def test_a_chat_format_keeps_the_date_that_it_was_made_with(monkeypatch):
    set_clock(monkeypatch, FIRST)
    chat = ChatFormat(wrap(byte_level(500), DATED))
    before = chat.prompt_ids("x"), chat.encode("x", "hello").input_ids, chat.template.ids(conversation("x", "hello"))
    set_clock(monkeypatch, LATER)
    assert before == (
        chat.prompt_ids("x"), chat.encode("x", "hello").input_ids, chat.template.ids(conversation("x", "hello"))
    )  # fmt: skip
    assert before[0] != ChatFormat(wrap(byte_level(500), DATED)).prompt_ids("x")


@pytest.mark.parametrize("form", ["%d %b %Y", "%A", "%H:%M:%S", "100%% on %-d %B, %j", "", "%%d %%%d", "no date"])
def test_a_template_gets_the_date_in_every_form(form):
    template = "{{ strftime_now('" + form + "') }}" + CHATML
    chat = ChatTemplate(wrap(byte_level(500), template), date=FIRST)
    expected = datetime.datetime(2026, 3, 1).strftime(form)
    assert chat.text(conversation("x", "y")).startswith(expected + "<|im_start|>user")


@pytest.mark.parametrize(
    "template",
    [
        "\n  {% if true %}{{ strftime_now('%Y') }}{% endif %}\n",
        "   {{- strftime_now('%Y') -}}   ",
        "{%- macro head() %}On {{ strftime_now('%d %b %Y') }}{% endmacro %}{{ head() + strftime_now('%j') }}",
        "{% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}{{ date }}",
        "{% set format = '%d.%m.' %}{% for m in messages %}{{ strftime_now(format) | trim }}{% endfor %}",
    ],
)
def test_a_template_is_rendered_as_on_that_day(template, monkeypatch):
    tokenizer = wrap(byte_level(500), template + CHATML)
    set_clock(monkeypatch, FIRST)
    expected = tokenizer.apply_chat_template(conversation("x", "y"), tokenize=False)
    set_clock(monkeypatch, LATER)
    assert ChatTemplate(tokenizer, date=FIRST).text(conversation("x", "y")) == expected


def test_of_several_templates_the_default_one_is_used():
    tokenizer = wrap(byte_level(500), None)
    tokenizer.chat_template = {"default": DATED, "tool_use": "tools"}
    assert "Today is 2026-03-01" in ChatTemplate(tokenizer, date=FIRST).text(conversation("x", "y"))
    tokenizer.chat_template = {"a": CHATML, "b": CHATML}
    with pytest.raises(DataError, match="must be the default, got a, b"):
        ChatTemplate(tokenizer)


def test_the_command_line_takes_a_date():
    assert parse_run("train", ["--date", "2026-07-31"]).recipe.date == "2026-07-31"
    with pytest.raises(ConfigError, match="date must be a date such as"):
        parse_run("train", ["--date", "tomorrow"])
