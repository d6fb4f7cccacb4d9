"""What a column of the data says of an example's sources: the name of one, or how much each counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from profuser.errors import DataError, in_short
from profuser.prepare.columns import is_empty
from profuser.prepare.spelt_json import from_json
from profuser.recipe.data import DataConfig
from profuser.recipe.schema import Choice


class SourceChoice(NamedTuple):
    """How an example's source is chosen, and the names of the sources."""

    choice: Choice = "min_ce"
    names: Sequence[str] = ()

    def column(self, config: DataConfig) -> tuple[str, str] | None:
        """The key of the recipe that names the column in which the choice stands, and the column; None where there is none."""
        if self.choice == "min_ce":
            return None
        key = f"{self.choice}_column"
        return f"data.{key}", getattr(config, key)

    def may_lack(self, value: object) -> bool:
        """Whether an example that is not trained on may have this cell, which says nothing: all sources count alike there."""
        return self.choice == "weights" and is_empty(value)

    def check(self, value: object, column: str) -> None:
        """Raises DataError unless a cell says what it should."""
        if self.choice == "weights":
            weights_of(value, self.names, column)
        elif value not in self.names:
            raise DataError(
                f"the column {column!r} must name a source ({', '.join(self.names)}), got {in_short(value)}; correct it, or take route "
                "out of the recipe"
            )


BY_CROSS_ENTROPY = SourceChoice()
"""No column says anything: Min-CE chooses."""


def weights_of(value: Any, names: Sequence[str], column: str) -> list[float]:
    """Returns how much each source counts, in numbers that sum to 1, by a cell that maps their names to numbers.

    It may be a mapping, the pairs of one, or its JSON text. A source that is not named counts nothing.

    Raises:
        DataError: it is anything else, names something else, or not all numbers are finite and >= 0, or all are 0.
    """
    try:
        # A table has one type for a whole column, in which a source that a row does not name is null.
        named = {name: x for name, x in _pairs(value) if x is not None}
        found = [_number(named.pop(name, 0)) for name in names]
        if named or not any(found):
            raise ValueError
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise DataError(
            f"the column {column!r} must map sources ({', '.join(names)}) to weights >= 0 of which one is > 0, got {in_short(value)}; "
            "correct it, or set capture.choice: min_ce"
        ) from None
    scaled = [x / max(found) for x in found]  # whose sum is finite
    return [x / sum(scaled) for x in scaled]


def _pairs(value: Any) -> list[tuple[str, Any]]:
    """Returns the pairs of a mapping, which may also be a list of them, as Parquet has it, or JSON text.

    Raises:
        ValueError, TypeError, RecursionError: it is none, or names something twice.
    """
    if isinstance(value, str):
        value = from_json(value)
    pairs = [*value.items()] if isinstance(value, Mapping) else [(name, x) for name, x in value]
    if len(dict(pairs)) < len(pairs):
        raise ValueError
    return pairs


def _number(value: Any) -> float:
    """Returns a number as a float. It raises ValueError or OverflowError for anything else than one that is finite and >= 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)) or not 0 <= float(value) < math.inf:
        raise ValueError
    return float(value)
