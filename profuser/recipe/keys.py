"""Finds the first thing in a recipe that no recipe may say: a key that is unknown, or a value of the wrong type.

jsonargparse finds these as well, but its messages blame the wrong key where a group is misspelt, and no key at all inside a
list. Here every message names the key by its place, such as sources[0].name, and what was probably meant.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from profuser.recipe.schema import Recipe
from profuser.recipe.utf8 import defect
from profuser.recipe.yaml_text import load_yaml

RENAMED_KEYS = {"infer_weight": "inference_weight", "train_weight": "training_weight"}
"""Keys by their old names, each with its present name."""

SYNONYMS = {
    "learning_rate": "optim.lr", "num_epochs": "optim.epochs", "num_train_epochs": "optim.epochs", "max_steps": "optim.steps",
    "max_grad_norm": "optim.grad_clip", "kd_weight": "optim.beta", "per_device_train_batch_size": "optim.micro_batch_size",
    "max_seq_length": "data.max_length", "dataset": "data", "models": "sources", "teachers": "sources", "student": "target",
    "reward_models": "judges", "report_to": "optim.trackers", "log_with": "optim.trackers",
}  # fmt: skip
"""What other trainers call a key, or a reader might."""


class Argument(str):
    """A value from the command line: a text, or the YAML that it spells."""


def mistake(value: object, kind: Any, place: str = "", whole: bool = False) -> str | None:
    """Returns what is wrong with a value and how to mend it; None where nothing is.

    Args:
        kind: the type that the value should have, from the annotations of the recipe's dataclasses.
        place: where the value stands in the recipe; "" is the whole recipe.
        whole: whether a group of keys must have all that it needs. Elsewhere others may add to it.
    """
    kinds = alternatives(kind)
    group = next(filter(is_dataclass, kinds), None)
    entries = next((k for k in kinds if get_origin(k) is list), None)
    if isinstance(value, str) and (wrong := defect(value)):
        return f"{place} must be Unicode, it has {wrong}"
    if isinstance(value, str) and "\0" in value:
        return f"{place} must be without the character NUL, got {as_yaml(value)}; leave it out"
    if isinstance(value, Argument) and not any(fits(str(value), k) for k in kinds):
        value = parsed(value)

    # A mapping or list is looked into, where the key may have one. Elsewhere, the value must be of one of the types.
    if isinstance(value, dict) and group is not None:
        return _mistake_in_group(value, group, place, whole or len(kinds) > 1)
    if isinstance(value, list) and entries is not None:
        (entry,) = get_args(entries)
        found = (mistake(v, entry, f"{place}[{n}]", whole=True) for n, v in enumerate(value))
        return next(filter(None, found), None)
    if any(fits(value, k) for k in kinds):
        return None
    if isinstance(value, str) and kinds == (group,) and not whole:  # jsonargparse takes it for the path of a file
        return None

    # How the value can be mended.
    fix = ""
    choices = [str(choice) for k in kinds if get_origin(k) is Literal for choice in get_args(k)]
    if value is None:
        fix = "; give it a value, or leave it out if it has a default"
    elif str in kinds and not isinstance(value, (dict, list)):
        fix = "; put quotes around it"
    elif entries is not None and fits(value, get_args(entries)[0]):
        fix = "; put it in brackets"
    elif isinstance(value, str) and (near := nearest(value, choices)):
        fix = f"; did you mean {near}?"
    return f"{place} must be {' or '.join(map(in_words, kinds))}, got {as_yaml(value)}{fix}"


def completed(value: Any, kind: Any, whole: bool = False) -> Any:
    """Returns a value with all defaults written out where it stands for itself alone.

    That is so for the entries of a list, and for a mapping where the key may have a text instead. What such a value does not say
    would otherwise be taken from the value that it replaces, because jsonargparse merges the two.

    Args:
        kind: the type of the value, as for `mistake`. whole: whether the value is such an entry.
    """
    kinds = alternatives(kind)
    group = next(filter(is_dataclass, kinds), None)
    entries = next((k for k in kinds if get_origin(k) is list), None)
    if isinstance(value, list) and entries is not None:
        return [completed(entry, get_args(entries)[0], whole=True) for entry in value]
    if not isinstance(value, dict) or group is None:
        return value
    hints = get_type_hints(group)
    said = {name: completed(inner, hints.get(name, object)) for name, inner in value.items()}
    if not (whole or len(kinds) > 1):
        return said
    return {f.name: f.default for f in fields(group) if f.default is not f.default_factory} | said


def completed_argument(name: str, value: Argument) -> Argument:
    """Returns the value of an argument `--name value`, with the defaults written out as `completed` does."""
    kind: Any = Recipe
    for part in name.split("."):
        group = next(filter(is_dataclass, alternatives(kind)), None)
        kind = get_type_hints(group).get(part) if group is not None else None
    given = parsed(value)
    if kind is None or (whole := completed(given, kind)) == given:
        return value
    return as_argument(whole)


def as_argument(value: Any) -> Argument:
    """Spells a value as YAML, in one line."""
    return Argument(yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True))


def argument_mistake(name: str, value: Argument | None, others: Sequence[str]) -> str | None:
    """Returns what is wrong with an argument `--name value` of the command line; None where nothing is.

    Args:
        value: None where the argument has none.
        others: the arguments that are no keys of a recipe.
    """
    # Follow the dotted name through the groups.
    kind: Any = Recipe
    parts = name.removesuffix("+").split(".")  # jsonargparse appends to a list with --key+
    for n, part in enumerate(parts):
        group = next(filter(is_dataclass, alternatives(kind)), None)
        if group is None or part not in keys_of(group):
            place, inner = ".".join(parts[:n]), ".".join(parts[n + 1 :])
            return unknown_key(part, place, group, [] if n else others, dashes="--", inner=inner)
        kind = get_type_hints(group)[part]
    if value is None:
        return f"--{name} must have a value behind it, got none; write --{name} VALUE"
    appended = parsed(value) if name.endswith("+") else None
    if appended is not None:  # it is one entry, or a list of them
        return mistake(appended if isinstance(appended, list) else [appended], kind, ".".join(parts))
    return mistake(value, kind, ".".join(parts))


def _mistake_in_group(value: dict, group: Any, place: str, whole: bool) -> str | None:
    """Returns what is wrong with a group of keys. `whole` says whether all keys that it needs must be in it."""
    kinds = get_type_hints(group)
    for name, inner in value.items():
        head, _, rest = str(name).partition(".")  # jsonargparse reads the key `optim.lr` as lr in optim
        if head not in kinds:
            return unknown_key(head, place, group, inner=rest)
        if found := mistake({rest: inner} if rest else inner, kinds[head], f"{place}.{head}".lstrip(".")):
            return found
    needed = [field.name for field in fields(group) if field.default is field.default_factory]  # both are MISSING
    if whole and (absent := [name for name in needed if name not in value]):
        return f"{place} must have the key {absent[0]}, got {', '.join(map(str, value)) or 'none'}; add it"
    return None


def unknown_key(
    name: str, place: str, group: Any, others: Sequence[str] = (), *, dashes: str = "", inner: str = ""
) -> str:
    """Returns the message for a key that there is not.

    Args:
        name: the key. place: the group that it was found in; "" is the top level. group: the dataclass of that group, None
            where the place is no group.
        others: further names that are known there.
        dashes: what stands before a key: "--" on the command line.
        inner: the rest of a dotted key, whose first part is then `name`.
    """
    where = place or "the recipe"
    if name in RENAMED_KEYS:
        return f"{name} is now called {RENAMED_KEYS[name]}; rename it in {where}"
    known = [*others, *(keys_of(group) if group is not None else ())]
    if not known:
        return f"{place} must be a value without keys of its own, got {place}.{name}; set {dashes}{place}"

    # What was meant: a key of this name elsewhere, one that is spelt nearly like it, or the same thing by another name.
    meant = [key for key in every_key() if key.split(".")[-1] == name and not (dashes and "[" in key)]
    if near := nearest(name, known, 0.8 if meant else 0.6):
        longer = f"{place}.{near}.{inner}".strip(".")
        meant.insert(0, longer if longer in every_key() else f"{place}.{near}".lstrip("."))
    if not meant and (synonym := nearest(name, list(SYNONYMS), 0.8)):
        meant = [SYNONYMS[synonym]]
    guess = f"; did you mean {' or '.join(f'{dashes}{key}' for key in dict.fromkeys(meant))}?" if meant else ""
    return f"a key of {where} must be one of {', '.join(known)}; got {as_yaml(name)}{guess}"


def every_key(group: Any = Recipe, place: str = "") -> Iterator[str]:
    """Yields every key of a recipe by its place; sources[].name is one in a list."""
    for name, kind in get_type_hints(group).items():
        here = f"{place}.{name}".lstrip(".")
        yield here
        for part in alternatives(kind):
            if is_dataclass(part):
                yield from every_key(part, here)
            elif get_origin(part) is list and is_dataclass(get_args(part)[0]):
                yield from every_key(get_args(part)[0], f"{here}[]")


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Returns the types of a union, or the one type that a kind is."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def keys_of(group: Any) -> list[str]:
    """Returns the names of a group's keys."""
    return [field.name for field in fields(group)]


def nearest(name: str, known: Sequence[str], cutoff: float = 0.6) -> str | None:
    """Returns the known name that is spelt most like another one; None where none is like it."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), None)


def parsed(text: str) -> Any:
    """Returns what a text spells as YAML, or the text itself where it is no YAML."""
    try:
        return load_yaml(text)
    except (yaml.YAMLError, ValueError):  # PyYAML raises a ValueError for a date that there is not
        return text


def as_yaml(value: object) -> str:
    """Returns a value nearly as YAML spells it, in one line and not too long for a message."""
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    return " ".join(str(value).split()).replace("\0", r"\0")[:200]


def fits(value: object, kind: Any) -> bool:
    """Whether jsonargparse takes a value for one of a simple type. It takes a number that is spelt in quotes, too."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(get_args(kind))
            and all(map(fits, value, get_args(kind)))
        )
    if kind is bool:
        return isinstance(value, bool) or str(value).lower() in ("true", "false", "yes", "no")
    if kind in (int, float):
        try:
            return not isinstance(value, bool) and (isinstance(value, (kind, int)) or kind(str(value)) is not None)
        except ValueError:
            return False
    return isinstance(kind, type) and isinstance(value, kind)


def in_words(kind: Any) -> str:
    """Describes a type as messages name it."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is list:
        (entry,) = get_args(kind)
        if isinstance(entry, type):
            return "a list of mappings" if is_dataclass(entry) else f"a list of {in_words(entry)}"
        return f"a list, each entry {in_words(entry)}"
    if get_origin(kind) is tuple:
        return f"a list of {len(get_args(kind))} numbers"
    if is_dataclass(kind):
        return f"a mapping of its keys ({', '.join(keys_of(kind))})"
    return "null" if kind is type(None) else kind.__name__
