"""A chat template that never ends, or asks for too much, ends in one line with the limit. Others are rendered as before."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from jinja2 import TemplateError

from profuser.errors import DataError
from profuser.models.load import load_tokenizer
from profuser.recipe.schema import SourceConfig
from profuser.text import bounded
from profuser.text.chat import ChatFormat
from profuser.text.template import ChatTemplate, conversation


@pytest.fixture
def tokenizer():
    return load_tokenizer(SourceConfig(name="guardian", model="demo:guardian"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Lets a template take a second. A helper that is made from here on inherits it, and none that was made before is used."""
    bounded.renderer_of.cache_clear()
    monkeypatch.setattr(bounded, "SECONDS", 1)
    yield
    bounded.renderer_of.cache_clear()


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"

ENDLESS = {
    "a loop": LOOP,
    "a loop that writes": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a recursion that doubles": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a sort": "{% for a in range(99999) %}{% set b = range(99999) | sort %}{% endfor %}",
}
LARGE = {
    "a long text": "{{ 'x' * 10 ** 11 }}",
    "a long list": "{{ ([0] * 10 ** 10) | length }}",
    "a padded text": "{{ 'x' | center(10 ** 11) }}",
    "a format": "{{ '%099999999999d' % 1 }}",
    "a text that doubles": "{% set n = namespace(t='x') %}{% for a in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "a text above the limit of length": "{{ 'x' * 2 ** 24 }}",
}
DEEP = {
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "conditions": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "a recursion without an end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a template of an absurd size": "x" * (1 << 21),
}


@pytest.mark.parametrize(
    "template", [*ENDLESS.values(), *LARGE.values(), *DEEP.values()], ids=[*ENDLESS, *LARGE, *DEEP]
)
def test_a_template_that_asks_for_too_much_is_refused(tokenizer, template):
    tokenizer.chat_template = template
    began = time.monotonic()
    with pytest.raises(DataError) as error:
        ChatFormat(tokenizer)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    assert "chat template" in str(error.value)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(("template", "limit"), [(LOOP, "within 1 s"), (LARGE["a long text"], "MiB")])
def test_a_template_that_waits_for_its_moment_is_refused_then(tokenizer, template, limit):
    """It behaves while it is looked at, and does harm in a certain conversation only."""
    harmless = tokenizer.chat_template
    tokenizer.chat_template = "{% if 'now' in messages[0]['content'] %}" + template + "{% endif %}" + harmless
    chat = ChatTemplate(tokenizer)
    assert "later" in chat.text(conversation("later", "y"))
    with pytest.raises(DataError, match=limit):
        chat.text(conversation("now", "y"))
    with pytest.raises(DataError, match=limit):
        chat.many_ids([conversation("later", "y"), conversation("now", "y")])
    assert "later" in chat.text(conversation("later", "y")), "it is of use again"


@pytest.mark.parametrize("name", ["guardian", "scholar", "reckoner", "judge-a", "judge-b"])
def test_the_texts_and_tokens_are_those_of_the_tokenizer(name):
    tokenizer = load_tokenizer(SourceConfig(name=name, model=f"demo:{name}"))
    template = ChatTemplate(tokenizer)
    for messages in (conversation("Hi ▁ 😀", "<|im_end|> é\n\n"), conversation("", "x" * 10_000)):
        assert template.text(messages) == tokenizer.apply_chat_template(messages, tokenize=False)
        assert template.ids(messages) == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    many = [conversation(f"prompt {n}", "x" * n) for n in range(150)]
    assert template.many_ids(many) == [tokenizer.apply_chat_template(m, tokenize=True, return_dict=False) for m in many]
    halves = conversation("\ud83d", "\ud83d\ude00")
    assert template.text(halves) == tokenizer.apply_chat_template(halves, tokenize=False)


def test_what_a_template_raises_keeps_its_name(tokenizer):
    tokenizer.chat_template = "{% if messages | length > 2 %}{{ raise_exception('two are enough') }}{% endif %}x"
    template = ChatTemplate(tokenizer)
    with pytest.raises(TemplateError, match="two are enough"):
        template.text(conversation("a", "b") * 2)
    tokenizer.chat_template = "{% if messages | length > 2 %}{{ 1 / 0 }}{% endif %}x"
    template = ChatTemplate(tokenizer)
    with pytest.raises(Exception, match="division by zero") as error:
        template.text(conversation("a", "b") * 2)
    assert type(error.value).__name__ == "ZeroDivisionError"


def helpers() -> set[int | None]:
    """The process ids of all helpers."""
    return {child.pid for child in multiprocessing.active_children()}


def test_a_helper_ends_when_it_is_idle_and_another_takes_its_place(tokenizer, monkeypatch):
    monkeypatch.setattr(bounded, "IDLE_SECONDS", 0.2)
    before = helpers()
    template = ChatTemplate(tokenizer)
    text = template.text(conversation("a", "b"))
    deadline = time.monotonic() + 20
    while helpers() - before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert template.text(conversation("a", "b")) == text


def test_a_helper_that_is_killed_is_replaced(tokenizer):
    before = helpers()
    template = ChatTemplate(tokenizer)
    text = template.text(conversation("a", "b"))
    (helper,) = helpers() - before
    assert helper is not None
    os.kill(helper, signal.SIGKILL)
    assert template.text(conversation("a", "b")) == text


def test_models_with_one_template_share_a_helper(tokenizer):
    before = helpers()
    first = ChatTemplate(tokenizer)
    (helper,) = helpers() - before
    again = ChatTemplate(load_tokenizer(SourceConfig(name="again", model="demo:guardian")), name="again")
    assert again.text(conversation("a", "b")) == first.text(conversation("a", "b"))
    assert helpers() - before == {helper}


@pytest.mark.parametrize(
    "change", ["the template", "a special token", "the class", "the object", "the choice of a template"]
)
def test_models_that_render_otherwise_share_none(tokenizer, change):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    first = ChatTemplate(tokenizer)
    other = load_tokenizer(SourceConfig(name="other", model="demo:guardian"))
    other.chat_template = tokenizer.chat_template
    if change == "the template":
        other.chat_template += "!"
    elif change == "a special token":
        other.eos_token = "<other>"
    elif change == "the class":
        own = {"apply_chat_template": lambda self, *args, **options: ["another way"]}
        other.__class__ = type("Own", (type(other),), own)
    elif change == "the object":
        other.apply_chat_template = lambda *args, **options: ["another way"]
    else:
        own = {"get_chat_template": lambda self, *args: "another way"}
        other.__class__ = type("Own", (type(other),), own)
    expected = {"the template": "a<e>b<e>!", "a special token": "a<other>b<other>"}.get(change, "another way")
    messages = conversation("a", "b")
    assert ChatTemplate(other).text(messages) == expected.replace("<e>", tokenizer.eos_token)
    assert first.text(messages) == "a<e>b<e>".replace("<e>", tokenizer.eos_token)


def test_a_tokenizer_that_is_changed_later_changes_nothing(tokenizer, monkeypatch):
    monkeypatch.setattr(bounded, "IDLE_SECONDS", 0.1)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    template, end, before = ChatTemplate(tokenizer), tokenizer.eos_token, helpers()
    tokenizer.eos_token = "<changed>"
    deadline = time.monotonic() + 20
    while helpers() & before:  # another helper is made of the changed one
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert template.text(conversation("a", "b")) == f"a{end}b{end}"


def test_helpers_that_have_ended_leave_nothing_behind(tokenizer, monkeypatch):
    monkeypatch.setattr(bounded, "IDLE_SECONDS", 0.1)
    before = len(os.listdir("/proc/self/fd"))
    kept = []
    for n in range(6):
        time.sleep(0.3)
        tokenizer.chat_template = f"{n}" + "{{ messages[0].content }}"
        kept.append(ChatTemplate(tokenizer))
    assert len(os.listdir("/proc/self/fd")) <= before + 4  # a helper has two
    assert len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()) <= 2


def test_an_error_names_the_model_that_was_asked(tokenizer):
    tokenizer.chat_template = "{% if messages[0]['content'] == 'now' %}" + LARGE["a long text"] + "{% endif %}x"
    for name in ("the first", "the second"):
        with pytest.raises(DataError, match=f"^{name}'s chat template"):
            ChatTemplate(tokenizer, name=name).text(conversation("now", "y"))


def test_a_fork_has_a_helper_of_its_own(tokenizer):
    """Else the replies to two processes would be mixed up."""
    before = helpers()
    template = ChatTemplate(tokenizer)
    (helper,) = helpers() - before
    fork = multiprocessing.get_context("fork")
    there = fork.Queue()
    child = fork.Process(target=lambda: there.put([template.text(conversation("there", str(n))) for n in range(99)]))
    child.start()
    here = [template.text(conversation("here", str(n))) for n in range(99)]
    assert [text.replace("there", "here") for text in there.get(timeout=60)] == here
    child.join()
    assert helper in helpers()


def test_a_reply_that_nobody_waited_for_is_not_taken_for_the_next(tokenizer, monkeypatch):
    template = ChatTemplate(tokenizer)
    text = template.text(conversation("a", "b"))
    with monkeypatch.context() as interrupted:
        interrupted.setattr(Connection, "poll", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            template.text(conversation("another", "prompt"))
    assert template.text(conversation("a", "b")) == text


def test_a_helper_ends_when_its_renderer_is_no_longer_kept(tokenizer):
    before = helpers()
    template = ChatTemplate(tokenizer)
    (helper,) = helpers() - before
    del template
    bounded.renderer_of.cache_clear()
    gc.collect()
    assert helper not in helpers()
