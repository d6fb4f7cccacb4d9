"""What a column of the data says of an example's sources: the name of one, or how much each counts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from profuser.errors import DataError, in_short
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

    def check(self, value: object, column: str) -> None:
        """Raises DataError unless a cell says what it should."""
        if self.choice == "weights":
            weights_of(value, self.names, column)
        elif value not in self.names:
            raise DataError(
                f"the column {column!r} must name a source ({', '.join(self.names)}), got {in_short(value)}; correct it, or set "
                "capture.choice: min_ce"
            )


BY_CROSS_ENTROPY = SourceChoice()
"""No column says anything: Min-CE chooses."""


def weights_of(value: Any, names: Sequence[str], column: str) -> list[float]:
    """Returns how much each source counts, by a cell with a mapping from their names to numbers, or with its JSON text.

    A source that is not named counts nothing.

    Raises:
        DataError: it is anything else, names something else, or not all numbers are finite and >= 0, or all are 0.
    """
    try:
        weights = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        weights = None
    # A table has one type for a whole column, in which a source that a row does not name is null.
    named = {name: x for name, x in weights.items() if x is not None} if isinstance(weights, Mapping) else {}
    found = [named.get(name, 0.0) for name in names]
    numbers = all(
        isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) and x >= 0 for x in found
    )
    if not named or set(named) - set(names) or not numbers or not any(found):
        raise DataError(
            f"the column {column!r} must map sources ({', '.join(names)}) to weights >= 0 of which one is > 0, got {in_short(value)}; "
            "correct it, or set capture.choice: min_ce"
        )
    return [float(x) for x in found]
