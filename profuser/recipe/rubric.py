"""The rubric of a judge that is a model on a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from profuser.errors import ConfigError
from profuser.recipe.checks import LARGEST, check_positive


@dataclass(kw_only=True)
class RubricConfig:
    """What a judge on a server is asked, and what becomes of its reply."""

    text: str | None = None
    """The rubric, or the path of a .txt or .md file with it. {prompt}, {response} and {ground_truth} in it are filled in. It must ask for a
    last line `Score: N`. null takes one of our own."""
    lowest: float = 1.0
    """The lowest score that there is. {lowest} in the rubric stands for it."""
    highest: float = 10.0
    """The highest score that there is. {highest} in the rubric stands for it."""
    no_score: Literal["error", "abstain"] = "error"
    """What a reply without a score, or with one that there is not, leads to: error ends the command, with abstain the judge abstains."""
    max_new_tokens: int = 1024
    """The longest reply in tokens."""

    def check(self, place: str) -> None:
        """Raises ConfigError for scores that there cannot be. `place` is the rubric's in the recipe."""
        check_positive(place, self, "max_new_tokens")
        if not -LARGEST < self.lowest < self.highest < LARGEST:
            raise ConfigError(
                f"{place}.lowest must be below {place}.highest, got {self.lowest:g} and {self.highest:g}; correct them"
            )
