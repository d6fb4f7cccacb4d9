"""Reads YAML, with limits that no recipe reaches: a short text can stand for more than any memory holds.

An alias stands for all that its anchor holds, and an anchor may hold aliases. Deep nesting exceeds the depth of Python's calls,
and an integer of many digits takes hours. All this is counted in the stream of events, before anything is built of it.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

import yaml

CHARACTERS, DEPTH, VALUES, NUMBER_CHARACTERS = 1 << 17, 64, 100_000, 1000
"""The most characters of a text, nested lists and mappings, values with all aliases spelt out, and characters of a number."""


def load_yaml(text: str) -> Any:
    """Returns what a text spells as YAML.

    Raises:
        yaml.YAMLError: it is no YAML, exceeds a limit, or has a key twice in one mapping.
        ValueError: it has a date that there is not.
    """
    if len(text) > CHARACTERS:
        raise yaml.MarkedYAMLError(problem=f"{len(text):,} characters, where at most {CHARACTERS:,} may be")
    _check(text)
    try:
        return yaml.load(text, _OnceLoader)
    except (
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
    ):  # PyYAML trusts a tag that is spelt out
        raise yaml.MarkedYAMLError(problem="a value that does not fit its tag") from None


def _check(text: str) -> None:
    """Raises yaml.YAMLError where a text exceeds a limit, or has an alias inside of what it stands for."""
    sizes: dict[str, int] = {}  # the number of values that an anchor holds; 0 while its end has not come
    opened: list[
        tuple[str | None, int]
    ] = []  # the lists and mappings around a value: the anchor, and the values before it
    values = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            size = sizes.get(str(event.anchor), 1)  # that the anchor is not there is found when the text is loaded
            if not size:
                _fail(event, f"the alias *{event.anchor} inside of what it stands for")
            values += size
        elif isinstance(event, yaml.ScalarEvent):
            if event.implicit[0] and len(event.value) > NUMBER_CHARACTERS and re.match(r"[-+]?[\d.]", event.value):
                _fail(event, f"a number of {len(event.value):,} characters, where at most {NUMBER_CHARACTERS:,} may be")
            values += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, values))
            values += 1
            if event.anchor:
                sizes[event.anchor] = 0
            if len(opened) > DEPTH:
                _fail(event, f"more than {DEPTH} lists and mappings inside each other")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor:
                sizes[anchor] = values - before
        if values > VALUES:
            _fail(event, f"more than {VALUES:,} values, with all aliases spelt out")


def _fail(event: yaml.Event, problem: str) -> NoReturn:
    """Raises the error for a limit that is exceeded at an event."""
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)  # pyrefly: ignore[bad-argument-type]


class _OnceLoader(yaml.SafeLoader):
    """Loads YAML and refuses a key that stands twice in one mapping, of which PyYAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                    problem = f"the key {key.value} a second time in one mapping"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)
