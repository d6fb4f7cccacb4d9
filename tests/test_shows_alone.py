"""What a chat template makes of a user's text: where its code may look into the text, every prompt is rendered, and elsewhere none."""

from typing import Any

import pytest
from model_templates import IM, MODELS, tokenizer_of
from small_tokenizers import ids_of

from profuser.errors import DataError
from profuser.text.chat import ChatFormat
from profuser.text.conversation import Conversation, Turn
from profuser.text.shows_alone import shows_texts_alone

EACH = "{{% for m in messages %}}{}{{% endfor %}}"
"""Code that is run for each message."""
ALONE = {
    "shown": "{{ m.content }}",
    "by key": "{{ m['content'] + eos_token }}",
    "by get": "{{ '<' ~ m.get('content') ~ '>' }}",
    "trimmed": "{{ m.content | trim }}{{ m.content.strip() }}{{ m.content.rstrip() ~ '\n' }}",
    "kept": "{% set text = m.content | trim %}{% set line = m.role + text %}{{ line }}",
    "of a kind": "{% if m.content is string and m.role == 'user' %}{{ m.content if loop.first else m.content.strip() }}{% endif %}",
    "marked": "{% generation %}{{ m.content }}{%- endgeneration -%}",
    "other fields": "{% if 'x' in m.name %}{{ m.role[:3] | trim }}{{ messages | length }}{{ messages[-1].content }}{% endif %}",
}
LOOKS = {
    "searched": "{% if '/no_think' in m.content %}x{% endif %}{{ m.content }}",
    "compared": "{{ m.content if m.content != 'x' else '' }}",
    "whether there is any": "{% if m.content %}{{ m.content }}{% endif %}",
    "or another": "{{ m.content or '-' }}",
    "cut": "{{ m.content[:9] }}",
    "a part of it": "{{ m.content[0] }}",
    "spelt": "{{ m.content | tojson }}",
    "replaced": "{{ m.content.replace('a', 'b') }}",
    "split": "{{ m['content'].split('\n')[0] }}",
    "stripped of something": "{{ m.content.lstrip('\n') }}",
    "trimmed of something": "{{ m.content | trim('x') }}",
    "put into another": "{{ '<x>' | replace('x', m.content) }}",
    "called by a method": "{{ m.content.upper() }}",
    "counted": "{{ m.content | length }}",
    "repeated": "{{ m.content * 2 }}",
    "kept first": "{% set text = m.content %}{% set more = text ~ '' %}{{ more | upper }}",
    "kept in a namespace": "{% set ns = namespace(x='') %}{% set ns.x = m.content %}{% if ns.x == 'x' %}y{% endif %}",
    "kept in a namespace and read by its key": "{% set ns.u = m.content %}{% if 'x' in ns['u'] %}y{% endif %}",
    "escaped by what stands before it": "{{ '<x>' | safe + m.content }}",
    "kept beside another of all fields": "{% set r, t = m.values() %}{{ 'Q' if t == 'hello' }}",
    "in the text of all messages": "{% if '/no_think' in messages | string %}x{% endif %}",
    "kept beside another": "{% set a, b = m.content, 1 %}{{ a | upper }}",
    "gone through": "{% for c in m.content %}{{ c }}.{% endfor %}",
    "all fields": "{% for k, v in m.items() %}{{ v }}{% endfor %}",
    "the whole message": "{{ m | tojson }}",
    "by a name that is not spelt out": "{{ m['con' ~ 'tent'] | upper }}",
    "by a filter": "{{ m | attr('content') | upper }}",
    "given to a macro": "{% macro shown(x) %}{{ x[:3] }}{% endmacro %}{{ shown(m.content) }}",
    "in a block": "{% set x %}{{ m.content }}{% endset %}{{ x[:3] }}",
    "in a filter's block": "{% filter upper %}{{ m.content }}{% endfilter %}",
    "no template": "{% if %}",
    "a text that goes a long way": "".join(f"{{% set a{n} = a{n + 1} %}}" for n in range(500))
    + "{% set a500 = m.content %}",
    "a deep expression": "{{ " + "(" * 5000 + "m.role" + ")" * 5000 + " }}",
}


@pytest.mark.parametrize("code", ALONE.values(), ids=ALONE)
def test_code_that_shows_texts_is_known(code):
    assert shows_texts_alone(EACH.format(code))


@pytest.mark.parametrize("code", LOOKS.values(), ids=LOOKS)
def test_code_that_may_do_more_is_known(code):
    assert not shows_texts_alone(EACH.format(code))


@pytest.mark.parametrize("name", MODELS)
def test_the_usual_templates_show_texts_alone(name):
    assert shows_texts_alone(MODELS[name].text)


NO_THINK = (
    "{% set ns = namespace(on=true) %}{% for m in messages %}{% if m.role == 'user' and '/no_think' in m.content %}"
    "{% set ns.on = false %}{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.replace('/no_think', '').strip() if m.role == 'user' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '<think>\n' if ns.on else '<think></think>' }}{% endif %}"
)
"""A template that turns reasoning off where the user says so, and leaves out that it was said."""


def showing(user: str) -> str:
    """A template that shows what the user says by this code, and what others say as it is."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'user' %}"
        + user
        + "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def chat_of(template: str) -> tuple[Any, ChatFormat]:
    """A small tokenizer with a template, and its chat format."""
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = template
    return tokenizer, ChatFormat(tokenizer)


PROMPT = 'What is "2+2"?\n\nSay <b>why</b>. /no_think'
USERS = (
    "{{ m.content | tojson }}", "{{ m.content | escape }}", "{{ m.content.replace('2', 'two') }}",
    "{{ m.content[:30] }}", "{{ m.content if loop.last else m.content.strip() }}",
    "{{ m.content.lstrip('W') }}", "{{ m.content | length }} {{ m.content }}",
)  # fmt: skip


@pytest.mark.parametrize("template", [*map(showing, USERS)], ids=USERS)
@pytest.mark.parametrize("prompt", [PROMPT, "Who said hello?", " padded \n"])
def test_a_prompt_is_seen_as_the_template_shows_it(template, prompt):
    tokenizer, chat = chat_of(template)
    asked = [{"role": "user", "content": prompt}]
    expected = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat.prompt_ids(prompt) == expected
    assert chat.prompt_ids(Conversation((Turn("user", prompt),))) == expected
    encoded = chat.encode(prompt, "Because.")
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": "Because."}], return_dict=True)
    assert encoded.input_ids == whole["input_ids"][: len(encoded.input_ids)]
    learnt = [i for i, label in zip(encoded.input_ids, encoded.label_mask, strict=True) if label]
    assert chat.token_bytes.of(learnt[:-1]) == b"Because."
    assert learnt[-1:] == ids_of(tokenizer, IM[1])


def test_the_assistants_turn_is_opened_alike_whatever_a_prompt_says():
    """The template would open it with an empty block here. What is written then could not be read by the one known opening."""
    _, chat = chat_of(NO_THINK)
    opened = chat.token_bytes.encode("<|im_start|>assistant\n<think>\n")
    for prompt in ("Why?", "Why? /no_think"):
        assert chat.prompt_ids(prompt)[-len(opened) :] == opened


def test_a_text_that_is_altered_must_hold_no_control_token():
    _, chat = chat_of(showing("{{ m.content.replace('Is', 'is') }}"))
    with pytest.raises(DataError, match=r"must show messages as they are where they hold strings of control tokens"):
        chat.encode("Is <|im_end|> an end?", "Yes.")
    _, chat = chat_of(showing("{{ m.content.replace('2', 'two') }}"))
    encoded = chat.encode("Is <|im_end|> an end?", "Yes.")  # nothing is replaced here
    (end,) = ids_of(chat.tokenizer, IM[1])
    assert encoded.input_ids.count(end) == 2


def test_a_template_that_refuses_a_prompt_is_named():
    _, chat = chat_of(showing("{% if 'zzz' in m.content %}{{ raise_exception('no sleep') }}{% endif %}{{ m.content }}"))
    assert chat.prompt_ids("Why?")
    with pytest.raises(DataError, match=r"must render the roles user, it raised TemplateError: no sleep"):
        chat.prompt_ids("zzz?")


def test_prompts_are_rendered_only_where_the_template_may_look_into_them(monkeypatch):
    for shown, expected in (("{{ m.content }}", 0), ("{{ m.content.replace('2', 'two') }}", 1)):
        _, chat = chat_of(showing(shown))
        asked = []
        text = chat.template.text
        monkeypatch.setattr(
            chat.template, "text", lambda *a, text=text, asked=asked, **k: asked.append(a) or text(*a, **k)
        )
        chat.prompt_ids("A")
        chat.encode("A", "B")
        assert len(asked) == expected
