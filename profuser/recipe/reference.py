"""Prints the reference of the recipe as a Markdown page, made from the dataclasses and the texts under their fields.

python -m profuser.recipe.reference > docs/recipe.md
"""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from profuser.recipe.schema import Recipe

UNIONS = (Union, types.UnionType)

INTRODUCTION = """\
# The recipe

A recipe is a YAML file, which a command takes with `--config`. Single keys can be set behind it, for instance
`--optim.lr 5e-6`. An unknown key is an error. "FuseLLM's value" marks a default that FuseLLM and FuseChat used.
`python -m profuser.recipe.reference` makes this page from `profuser/recipe/schema.py` and the files of its groups beside it.
"""


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a group: its name, its type in words, its default and its description."""

    name: str
    kind: str
    default: str
    text: str


@dataclass(frozen=True, slots=True)
class Group:
    """A group of keys: its place in a recipe, which is "" for the top level, and the dataclass that describes it."""

    place: str
    config: type

    @property
    def text(self) -> str:
        """The description of the group, which is the dataclass's docstring."""
        return " ".join((self.config.__doc__ or "").split())

    @property
    def keys(self) -> list[Key]:
        """The keys of the group, in the order in which the dataclass lists them."""
        kinds, texts = get_type_hints(self.config), texts_of(self.config)
        return [
            Key(field.name, in_words(kinds[field.name]), default_of(field), texts.get(field.name, ""))
            for field in fields(self.config)
        ]


def groups(place: str = "", config: type = Recipe) -> Iterator[Group]:
    """Yields a group, by default the top level of a recipe, then the groups in it.

    A group that is an entry of a list has `[]` in its place. One that stands in several places, as the location of a split
    does, is described in the first of them.
    """
    yield Group(place, config)
    described = set()
    for name, kind in get_type_hints(config).items():
        for part in get_args(kind) if get_origin(kind) in UNIONS else (kind,):
            in_list = get_origin(part) is list
            inner = get_args(part)[0] if in_list else part
            if is_dataclass(inner) and inner not in described:
                described.add(inner)
                yield from groups(f"{place}.{name}".lstrip(".") + "[]" * in_list, inner)


def texts_of(config: type) -> dict[str, str]:
    """Returns the text under each field. It is read from the source code, because Python does not keep it."""
    (node,) = ast.parse(inspect.getsource(config)).body
    assert isinstance(node, ast.ClassDef)
    texts = {}
    for statement, following in zip(node.body, node.body[1:]):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            texts[ast.unparse(statement.target)] = " ".join(str(ast.literal_eval(following.value)).split())
    return texts


def in_words(kind: Any) -> str:
    """Describes a field's type in words that fit a YAML file, for instance "text or null"."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in UNIONS:
        return " or ".join(map(in_words, inner))
    if origin in (list, tuple):
        return f"list of {'mappings' if is_dataclass(inner[0]) else in_words(inner[0])}"
    if is_dataclass(kind):
        return "mapping"
    return {type(None): "null", str: "text", bool: "true, false", float: "number", int: "whole number"}[kind]


def default_of(field: Field) -> str:
    """Returns a field's default as YAML would spell it, "required" where it has none, and nothing for a group of keys."""
    if field.default is MISSING:
        return "required" if field.default_factory is MISSING else "[]" if field.default_factory is list else ""
    if field.default is None or isinstance(field.default, bool):
        return {None: "null", True: "true", False: "false"}[field.default]
    if isinstance(field.default, tuple):
        return f"[{', '.join(map(str, field.default))}]"
    return f"{field.default:.4g}" if isinstance(field.default, float) else str(field.default)


def page() -> str:
    """Returns the whole page: a section for each group, with a table of its keys."""
    by_place = {group.place.removesuffix("[]"): group for group in groups()}
    parts = [INTRODUCTION]
    for group in groups():
        parts.append(
            f"## {group.place or 'Top level'}\n\n{group.text}\n\n| key | value | default | |\n|---|---|---|---|"
        )
        for key in group.keys:
            text = key.text
            # A key of the top level that is a group itself links to the group's section, and borrows its text.
            if not group.place and (inner := by_place.get(key.name)) is not None:
                text = f"{text or inner.text} Keys: [{inner.place}](#{key.name})."
            parts[-1] += f"\n| `{key.name}` | {key.kind} | {key.default} | {text} |"
        parts[-1] += "\n"
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
