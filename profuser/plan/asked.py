"""What each source is asked while a store is made, and what a user has of it already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from profuser.prepare.inputs import Inputs
from profuser.recipe.data import Split
from profuser.recipe.schema import Recipe, SourceConfig


@dataclass(frozen=True, slots=True)
class Asked:
    """What one source is asked.

    share: the share of the training prompts that it is asked about, 1 unless a route names the source of each.
    scores: whether its model scores the ground truth, whose log-probabilities are in no file.
    answers: whether its model answers the training prompts here, and not a server or a file. answers_heldout: the same of held-out ones.
    is_run: whether its model has to be loaded for any of this, as far as that is known before the vote.
    """

    share: float
    scores: bool
    answers: bool
    answers_heldout: bool
    is_run: bool


def asked_of_each(recipe: Recipe, inputs: Inputs | None) -> Mapping[str, Asked]:
    """Returns what each source is asked, by its name.

    Args:
        inputs: the data and what the user has given, where they are here. Without them, a file is taken to have all that it can have, and
            a route to name all sources equally often.
    """
    return {source.name: _asked(recipe, source, inputs) for source in recipe.sources}


def _asked(recipe: Recipe, source: SourceConfig, inputs: Inputs | None) -> Asked:
    def answers(split: Split) -> bool:
        if source.server is not None:
            return False
        if inputs is not None:
            return inputs.answers(source, split)
        asked = bool(recipe.judges) if split == "train" else recipe.data.location(split) is not None
        return asked and source.responses is None

    share = 1.0
    if recipe.capture.choice == "route":
        share = float(inputs.routed("train", source.name).mean()) if inputs is not None else 1 / len(recipe.sources)
    scores = not inputs.scores_given(source, "train") if inputs is not None else source.logprobs is None
    answered, heldout = answers("train"), answers("heldout")
    is_run = inputs.is_run(source) if inputs is not None else scores or answered or heldout
    return Asked(share, scores, answered, heldout, is_run)


def won_share(asked: Mapping[str, Asked], source: str) -> float:
    """The share of the prompts that a source is taken to win: as many as any other that is asked about them."""
    return asked[source].share / sum(one.share for one in asked.values())
