"""Decides whether an answer is right: it contains the ground truth's text, or a function of the user's own says so."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from profuser.errors import DataError, first_line
from profuser.prepare.data import Row
from profuser.recipe.places import load_function

Match = Callable[[Row, str], bool]


def contains_truth(example: Row, response: str) -> bool:
    """The default match: whether the response contains the ground truth's text. Upper and lower case count as the same."""
    return example["response"].casefold() in response.casefold()


def load_match(path: str | None) -> Match:
    """Loads the match that `evaluation.match` names. Whatever goes wrong in it becomes a DataError of one line.

    Raises:
        ConfigError: the function cannot be imported.
    """
    if path is None:
        return contains_truth
    function = load_function(path, "evaluation.match")

    def match(example: Row, response: str) -> bool:
        """Calls the user's function, and checks that it returns True or False."""
        try:
            right = function(dict(example), response)
        except (Exception, SystemExit) as error:  # the function is the user's own, which may raise anything
            right = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(right, (bool, np.bool_)):
            return bool(right)
        raise DataError(
            f"evaluation.match: {path} must return True or False, on the prompt {example['prompt']!r} it gave {right!r}; fix the "
            "function and run the same command again: only the scores are missing"
        )

    return match
