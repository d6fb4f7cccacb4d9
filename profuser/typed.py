"""Reads JSON files whose content has a known shape, and turns whatever is wrong with one into the single line of a DataError.

A shape is plain data that looks like the JSON that it describes:

- a type stands for its values: str, bool, int, float (which an integer is, too), and Any for whatever there is;
- None stands for null, and a Rule for the values that obey it;
- [shape] stands for a list;
- {"key": shape, "other?": shape} stands for a mapping with these keys, of which `other` may be absent. What else it holds is
  looked at only if there is a key that is a type or a Rule: {str: shape} stands for all keys that are not named;
- a tuple stands for any one of its shapes.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profuser.errors import DataError, in_short


@dataclass(frozen=True)
class Rule:
    """A rule that a value must obey, with the words that a message has for it."""

    words: str
    holds: Callable[[Any], bool]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)


def _is_date(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(datetime.date.fromisoformat(value))
    except ValueError:
        return False


def _is_inside(value: Any) -> bool:
    path = Path(value) if isinstance(value, str) else Path()
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and path.as_posix() == value


DEEPEST = 40
"""How deep a file may be nested. Python and the libraries that print it again give up at several times as much."""

COUNT = Rule("a whole number of 0 or more", _is_count)
NUMBER = Rule("a number that is not infinite", lambda x: _is_number(x) and not abs(x) >= 1e30)
SECONDS = Rule("a number of 0 or more", lambda x: _is_number(x) and 0 <= x < 1e12)
SHARE = Rule("a number from 0 to 1", lambda x: _is_number(x) and (0 <= x <= 1 or math.isnan(x)))
DATE = Rule("a date as 2026-01-31", _is_date)
DIGEST = Rule("a sha256", lambda x: isinstance(x, str) and re.fullmatch("[0-9a-f]{64}", x) is not None)
FILE_NAME = Rule("the path of a file inside", _is_inside)

_TYPES = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}


def read_json(path: Path, shape: Any = Any, *, fix: str = "restore it") -> Any:
    """Reads a JSON file in UTF-8.

    Raises:
        DataError: the file is missing or cannot be read, is not JSON, or does not have the shape. The message ends with `fix`.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {fix}") from None
    except (IsADirectoryError, NotADirectoryError) as error:
        raise DataError(f"{path} must be a file, it cannot be read ({error.strerror}); {fix}") from None
    try:
        return checked(parsed(content), shape)
    except ValueError as error:
        raise DataError(f"{path} must hold {error}; {fix}") from None


def parsed(content: bytes | str) -> Any:
    """Returns the value that JSON in UTF-8 stands for.

    Raises:
        ValueError: it is not JSON, or is nested too deep. The message says so, after "must hold".
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = json.loads(text)
        if (depth := depth_of(value)) > DEEPEST:
            raise ValueError(f"nested {depth} deep, {DEEPEST} is the most")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"JSON, got {' '.join(str(error).split())[:200]}") from None
    return value


def depth_of(value: Any) -> int:
    """Returns how many lists and mappings of a JSON value stand in each other."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (list, dict))]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def checked(value: Any, shape: Any) -> Any:
    """Returns a value if it has a shape.

    Raises:
        ValueError: it does not. The message says where and why, after "must hold".
    """
    if wrong := _wrong(value, shape, ""):
        raise ValueError(wrong)
    return value


def _wrong(value: Any, shape: Any, where: str) -> str:
    """Returns what is wrong with the value that stands at a place of a file; it is empty if the value has the shape."""
    if isinstance(shape, tuple):
        found = [_wrong(value, one, where) for one in shape]
        if not all(found):
            return ""
        # The message is that of the shape which is of the value's kind, if there is one.
        return next((wrong for wrong, one in zip(found, shape) if type(one) is type(value)), _says(value, shape, where))
    if isinstance(shape, list) and isinstance(value, list):
        return next((wrong for n, item in enumerate(value) if (wrong := _wrong(item, shape[0], f"{where}[{n}]"))), "")
    if isinstance(shape, dict) and isinstance(value, dict):
        return _wrong_mapping(value, shape, where)
    return "" if _holds(value, shape) else _says(value, shape, where)


def _wrong_mapping(value: dict, shape: dict, where: str) -> str:
    """Returns what is wrong with a mapping, as `_wrong` does."""
    named = {key.removesuffix("?"): key for key in shape if isinstance(key, str)}
    for name, key in named.items():
        if name not in value:
            if not key.endswith("?"):
                return f"{_inside(where, name)}, which is missing"
        elif wrong := _wrong(value[name], shape[key], _inside(where, name)):
            return wrong
    for key in shape:
        if not isinstance(key, str):
            for name, item in value.items():
                if name in named:
                    continue
                if not _holds(name, key):
                    return _says(name, key, f"each key of {where or 'the file'}")
                if wrong := _wrong(item, shape[key], _inside(where, name)):
                    return wrong
    return ""


def _holds(value: Any, shape: Any) -> bool:
    """Whether a value is what a shape without parts stands for. A list or mapping is not, because it is of another kind."""
    if shape is Any or shape is None:
        return shape is Any or value is None
    if isinstance(shape, Rule):
        return shape.holds(value)
    if shape is float:
        return _is_number(value)
    return isinstance(shape, type) and type(value) is shape


def _says(value: Any, shape: Any, where: str) -> str:
    """Returns the message for a value that does not have a shape."""
    what = _words(shape)
    return f"{what + ' as ' + where if where else what}, got {in_short(value)}"


def _words(shape: Any) -> str:
    """Returns a shape in words."""
    if isinstance(shape, tuple):
        return " or ".join(map(_words, shape))
    if isinstance(shape, Rule):
        return shape.words
    if isinstance(shape, list):
        return "a list"
    if isinstance(shape, dict):
        return "a mapping"
    return "null" if shape is None else _TYPES.get(shape, "something else")


def _inside(where: str, key: str) -> str:
    """Returns the place of a key in the mapping that stands at a place."""
    name = key if re.fullmatch(r"[\w-]+", key) else in_short(key)
    return f"{where}.{name}" if where else name
