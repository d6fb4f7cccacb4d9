"""Parses JSON so that every number can be written again as it was spelt."""

from __future__ import annotations

import json
from typing import Any

from profuser.errors import in_short


class SpeltNumber(float):
    """A number from JSON that is no whole number. As a text it is what stands in the file: 2.50, 1e5 or NaN."""

    spelling: str

    def __new__(cls, spelling: str) -> SpeltNumber:
        number = super().__new__(cls, spelling)
        number.spelling = spelling
        return number

    def __str__(self) -> str:
        return self.spelling


def from_json(text: str) -> Any:
    """Parses JSON, so that every number can be written again as it was spelt. A key that stands twice is an error."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            key = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {key!r} stands in an object twice, {in_short(found)}")
        return found

    return json.loads(text, parse_float=SpeltNumber, parse_constant=SpeltNumber, object_pairs_hook=once)
