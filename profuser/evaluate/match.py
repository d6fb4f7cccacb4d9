"""Decides whether an answer is right: it contains the ground truth's text, or a function of the user's own says so."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from profuser.errors import DataError, in_own_function, in_short
from profuser.prepare.data import Row, for_functions
from profuser.recipe.places import load_function

Match = Callable[[Row, str], bool]


def contains_truth(example: Row, response: str) -> bool:
    """The default match: whether the response contains the ground truth's text. Upper and lower case count as the same."""
    return example["response"].casefold() in response.casefold()


AGAIN = "fix the function and run the same command again: only the scores are missing"


def load_match(path: str | None, fix: str = AGAIN) -> Match:
    """Loads the match that `evaluation.match` names. Whatever goes wrong in it becomes a DataError of one line.

    Args:
        path: `module:function`; None loads the default match.
        fix: what the line says is to be done.

    Raises:
        ConfigError: the function cannot be imported.
    """
    if path is None:
        return contains_truth
    function = load_function(path, "evaluation.match")

    def match(example: Row, response: str) -> bool:
        """Calls the user's function, and checks that it returns True or False."""
        example = for_functions(example)
        rule = (
            f"evaluation.match: {path} must return True or False, on the prompt {in_short(example['prompt'])} it gave"
        )
        try:
            right = function(example, response)
        except (Exception, SystemExit) as error:  # the function is the user's own, which may raise anything
            right = in_own_function(error)
        if isinstance(right, (bool, np.bool_)):
            return bool(right)
        raise DataError(f"{rule} {in_short(right)}; {fix}")

    return match


def try_match(path: str | None, example: Row) -> None:
    """Calls the match once, on the ground truth, so that a wrong function is found before any model has run.

    Raises:
        ConfigError: the function cannot be imported.
        DataError: it fails, or returns something else than True or False.
    """
    load_match(path, fix="fix the function")(example, example["response"] or "An answer.")
