"""Finds out what a recipe's sources know alone and together, how they are related, and what is recommended."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from profuser.doctor.diversity import Combination, Outcome, combinations
from profuser.doctor.heldout import heldout_answers
from profuser.doctor.kinship import Kinship, kinship, open_related
from profuser.doctor.recommend import Recommendation, recommend
from profuser.evaluate.match import load_match, try_match
from profuser.evaluate.scores import accuracies
from profuser.models.load import chat_format, open_model
from profuser.prepare.inputs import check_ground_truth, check_head, load_split, settled_date
from profuser.recipe.parse import Run


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found out about the sources of a recipe.

    heldout: where the held-out prompts are. accuracies: of every source its accuracy by skill, and under "mean" the mean of these.
    found: the sets of sources, the best score first. kinship: None without a base.
    """

    heldout: str
    accuracies: dict[str, dict[str, float]]
    outcome: Outcome
    found: list[Combination]
    kinship: Kinship | None
    recommendation: Recommendation

    @property
    def names(self) -> list[str]:
        """The names of the sources, in the recipe's order."""
        return list(self.accuracies)


def compare(run: Run, base: str | None) -> Comparison:
    """Lets the sources answer the held-out prompts, and finds out what they are worth together.

    Args:
        base: the directory or Hub id of the model that the sources were trained from; None where there is none.
    Raises:
        ConfigError: the recipe names no held-out data; evaluation.match cannot be imported.
        DataError: a model or the data cannot be read; there is no ground truth; evaluation.match fails.
    """
    # Whatever can be wrong is found before a model has run.
    recipe = run.recipe
    rows = load_split(recipe, "heldout")
    check_ground_truth(recipe, rows)
    try_match(recipe.evaluation.match, rows[0])
    match = load_match(recipe.evaluation.match)
    date = settled_date(recipe.date, run.store_dir)
    configs = {source.name: open_model(source) for source in recipe.sources}
    chats = {source.name: chat_format(source, date=date) for source in recipe.sources}
    for name, config in configs.items():
        check_head(name, chats[name], config)
    related = None if base is None else open_related(base, recipe.sources)

    # The answers, and which of them are right. Without a ground truth only a match of the user's own can tell.
    asked = [i for i, row in enumerate(rows) if row["response"] or recipe.evaluation.match is not None]
    answers = heldout_answers(run, rows, asked, chats)
    asked_rows = [rows[i] for i in asked]
    right = np.array([[match(row, text) for row, text in zip(asked_rows, texts)] for texts in answers.values()])

    # What sets of sources are worth, and how the sources are related.
    outcome = Outcome.of(right, list(answers.values()), [row["skill"] for row in asked_rows])
    found = combinations(outcome)
    relation = None if related is None else kinship(related)
    return Comparison(
        heldout=str(recipe.data.location("heldout")),
        accuracies={name: accuracies(asked_rows, of_source) for name, of_source in zip(answers, right.tolist())},
        outcome=outcome,
        found=found,
        kinship=relation,
        recommendation=recommend(outcome, found, list(answers), relation),
    )
