"""A recipe, however odd, is read or refused with one line. `-m long` tries ten thousand odd ones."""

from __future__ import annotations

import copy
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_runs import RECIPE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from profuser.errors import ProfuserError
from profuser.recipe.keys import every_key
from profuser.recipe.parse import parse_run
from profuser.recipe.yaml_text import load_yaml

KEYS = sorted({part.removesuffix("[]") for key in every_key() for part in key.split(".")})

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.dates()
    | st.datetimes()
    | st.binary(max_size=4)
    | st.sampled_from(
        [
            "",
            "demo:guardian",
            "[",
            "{",
            "*a",
            "&a",
            "0x",
            "1:2",
            "=",
            "<<",
            "~",
            "\x00",
            "\n",
            "é",
            "sources.name",
            "-1",
        ]
    )
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
)
names = (
    st.sampled_from(KEYS)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    | st.integers()
    | st.none()
    | st.floats()
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=12
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The places of a value's parts, each as the way to it."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


@st.composite
def recipes(draw) -> str:
    """A good recipe in which some places hold something else, lack something or have something more."""
    content = copy.deepcopy(yaml.safe_load(RECIPE))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(content)))
        if not place:
            content = draw(values) if draw(st.integers(0, 9)) == 0 else content | {draw(names): draw(values)}
            if not isinstance(content, dict):
                break
            continue
        holder = content
        for key in place[:-1]:
            holder = holder[key]
        what = draw(st.sampled_from(["replaced", "removed", "added"]))
        if what == "removed":
            del holder[place[-1]]
        elif what == "added" and isinstance(holder[place[-1]], dict):
            holder[place[-1]][draw(names)] = draw(values)
        else:
            holder[place[-1]] = draw(values)
    return yaml.safe_dump(
        content, allow_unicode=draw(st.booleans()), default_flow_style=draw(st.sampled_from([None, True, False]))
    )


PIECES = [
    "[", "]", "{", "}", "|", ">", "#", "%", "\t", "\n", "'", '"', ": ", "- ", ", ", "&a ", "*a", "<<: ", "? ", "!!int ", "!!set ",
    "!!bool ", "---", "...", "",
]  # fmt: skip


@st.composite
def texts(draw) -> str:
    """The text of a good recipe, into which pieces of YAML are put, and from which others are taken."""
    text = RECIPE
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(PIECES)) + text[at + draw(st.integers(0, 6)) :]
    return text


def refusal(*arguments: str) -> ProfuserError | None:
    """Reads a command line. It returns the error where it is refused, and raises what is no error of ours."""
    try:
        parse_run("train", arguments)
    except ProfuserError as error:
        return error
    return None


def check(text: str, path: Path) -> None:
    """Reads a recipe. Whatever is wrong with it must be said in one line that is not too long."""
    path.write_text(text, encoding="utf-8", newline="")
    if (error := refusal("--config", str(path))) is not None:
        assert len(str(error).splitlines()) == 1, repr(str(error))
        assert len(str(error)) < 3000
        assert error.exit_code in (2, 3)


@pytest.mark.parametrize("count", [15, pytest.param(5000, marks=pytest.mark.long)])
@pytest.mark.parametrize("odd", [recipes(), texts()], ids=["structure", "text"])
def test_an_odd_recipe_is_read_or_refused_in_one_line(tmp_path, odd, count):
    @settings(
        max_examples=count,
        deadline=timedelta(seconds=30),
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(odd)
    def every(text: str) -> None:
        check(text, tmp_path / "recipe.yaml")

    every()


def doubling(levels: int, first: str, rest: str) -> str:
    """A text in which each line holds the one before it twice."""
    lines = [f"a0: &a0 {first}", *(f"a{n}: &a{n} {rest.replace('@', f'*a{n - 1}')}" for n in range(1, levels))]
    return "\n".join(lines)


HARMFUL = {
    "lists that double": (doubling(40, "[x]", "[@, @]"), "100,000 values"),
    "mappings that double": (doubling(40, "{k: v}", "{l: @, m: @}"), "100,000 values"),
    "merges that double": (doubling(40, "{k: v}", "{<<: [@, @]}"), "100,000 values"),
    "a list that holds itself": ("sources: &a [*a]", "alias *a inside"),
    "a mapping that holds itself": ("optim: &a { lr: *a }", "alias *a inside"),
    "a mapping that merges itself": ("optim: &a { <<: *a }", "alias *a inside"),
    "nested lists": ("sources: " + "[" * 5000 + "]" * 5000, "more than 64"),
    "nested lists without an end": ("sources: " + "[" * 5000, "more than 64"),
    "nested mappings": ("sources: " + "{ a: " * 5000 + "}" * 5000, "more than 64"),
    "nested blocks": ("\n".join(" " * n + "a:" for n in range(300)), "more than 64"),
    "an integer of many digits": ("seed: " + "9" * 100_000, "a number of 100,000 characters"),
    "a hexadecimal integer of many digits": ("seed: 0x" + "f" * 100_000, "a number of 100,002 characters"),
    "a sexagesimal integer of many digits": ("seed: " + "1:" * 50_000 + "1", "a number of 100,001 characters"),
    "a long text": ("target: " + "x" * 10**7, "at most 131,072"),
    "a tag that runs code": ("target: !!python/object/apply:os.system [ls]", "constructor"),
    "a truth value that is none": ("seed: !!bool perhaps", "does not fit its tag"),
    "a time that is none": ("date: !!timestamp soon", "does not fit its tag"),
    "a mapping that is a list": ("optim: !!map [1]", "does not fit its tag"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_recipe_that_means_harm_is_refused_at_once_with_the_limit(tmp_path, name):
    text, says = HARMFUL[name]
    (tmp_path / "recipe.yaml").write_text(text)
    began = time.monotonic()
    with pytest.raises(ProfuserError) as error:
        parse_run("train", ["--config", str(tmp_path / "recipe.yaml")])
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("value", ["[" * 5000, "{a: " * 5000, "9" * 5000, "&a [*a]", "!!bool perhaps", "x" * 200_000])
@pytest.mark.parametrize(
    "key",
    [
        "sources",
        "optim.lr",
        "data.train",
        *(
            pytest.param(key, marks=pytest.mark.long)
            for key in ("sources+", "optim", "seed", "schedule", "target", "evaluation.match")
        ),
    ],
)
def test_a_value_on_the_command_line_that_means_harm_is_refused_or_taken_as_it_is(key, value):
    assert "\n" not in str(refusal(f"--{key}", value))


def test_anchors_and_merges_are_of_use():
    text = RECIPE.replace("optim: {", "optim: &o {") + "capture: { <<: { top_k: 3 }, shard_size: 2 }\n"
    text = text.replace("capture: { shard_size: 4 }\n", "")
    assert yaml.safe_load(text)["capture"]["top_k"] == 3
    assert load_yaml(text) == yaml.safe_load(text)
    assert load_yaml("a: &x [1, 2]\nb: [*x, *x]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
