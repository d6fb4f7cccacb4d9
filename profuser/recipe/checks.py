"""What a recipe's dataclasses check of their values. Each raises ConfigError with the key, the value and the fix."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from profuser.errors import ConfigError

LARGEST = 2**63


def check_positive(group: str, config: object, *names: str) -> None:
    """Raises ConfigError unless these fields of a group of keys are positive and finite. A field that is None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < LARGEST:
            raise ConfigError(f"{group}.{name} must be > 0 and < 2**63, got {value}; set a positive number")


def check_not_negative(group: str, config: object, *names: str) -> None:
    """Raises ConfigError unless these fields are finite and 0 or positive."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < LARGEST:
            key = f"{group}.{name}" if group else name
            raise ConfigError(f"{key} must be >= 0 and below 2**63, got {value}; set 0 or a positive number")


def check_names(key: str, names: Sequence[str]) -> None:
    """Raises ConfigError unless every name can be part of a file name and no two are the same."""
    for name in names:
        if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
            raise ConfigError(f"{key}: a name may hold letters, digits, - _ and . only, got {name!r}; rename it")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{key}: names must differ, got {twice[0]!r} twice; rename one")


def check_date(key: str, value: str) -> None:
    """Raises ConfigError unless the value is a date."""
    try:
        datetime.date.fromisoformat(value)
    except ValueError:
        raise ConfigError(f"{key} must be a date such as 2026-07-31, got {value!r}; fix it or take it out") from None
