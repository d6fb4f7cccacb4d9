"""The vote of the inference mode over a whole store: who took part, who won, and what the report and the tables show of it.

Letters: E examples, R judges, C candidates. The candidates of an example are all responses to its prompt, source by source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from profuser.errors import DataError
from profuser.prepare.data import Row
from profuser.prepare.responses import read_responses
from profuser.prepare.vote_rules import NOBODY, admitted, choices_of, vote
from profuser.recipe.data import Split
from profuser.recipe.schedule import Mode
from profuser.recipe.schema import Recipe
from profuser.store import layout
from profuser.store.no_signal import ALIKE, BELOW, SAME, UNFINISHED
from profuser.store.store import Store


class Candidate(NamedTuple):
    """A response in the vote. It is not eligible if it is empty, was not finished or cannot be used; then no judge sees it.

    left_out: why it cannot be used, if that is the reason.
    """

    text: str
    eligible: bool
    left_out: str = ""


@dataclass(frozen=True, slots=True)
class Ballots:
    """The vote over the whole training split.

    candidates: the C candidates of every example. winner (E,), votes (E, C), tied (E,): the outcome, as in Tally.
    scores, choices: (E, R, C), the judges' scores, and how each of them divided its vote.
    eligible, admitted: (E, C), the candidates that the judges saw, and those that could win.
    responses_per_source: how many responses each source gave to a prompt. The first so many candidates are the first
        source's, the next are the second's, and so on.
    """

    candidates: Sequence[list[Candidate]]
    winner: np.ndarray
    votes: np.ndarray
    tied: np.ndarray
    scores: np.ndarray
    choices: np.ndarray
    eligible: np.ndarray
    admitted: np.ndarray
    responses_per_source: int

    def winning_source(self, example: int) -> int:
        """Returns the source whose response won, or NOBODY."""
        winner = int(self.winner[example])
        return NOBODY if winner == NOBODY else winner // self.responses_per_source

    def preferred(self, example: int) -> bool:
        """Whether the response that won has points, which is not so where it was the only one, or where nobody won."""
        winner = int(self.winner[example])
        return winner != NOBODY and bool(self.votes[example, winner] > 0)

    def is_tie(self, example: int) -> bool:
        """Whether the response that won had no more points than one with another text."""
        if not (self.tied[example] and self.preferred(example)):
            return False
        winner, votes = int(self.winner[example]), self.votes[example]
        texts = {
            candidate.text
            for c, candidate in enumerate(self.candidates[example])
            if self.admitted[example, c] and round(float(votes[c] - votes[winner]), 9) == 0
        }
        return len(texts) > 1

    def winning_text(self, example: int) -> str:
        """Returns the response that won. There must be one."""
        return self.candidates[example][self.winner[example]].text

    def no_signal(self) -> dict[str, int]:
        """Counts the examples that nobody won, by the reason why no judge preferred a response."""
        reasons = Counter(self._reason(example) for example in np.flatnonzero(self.winner == NOBODY).tolist())
        return dict(reasons.most_common())

    def _reason(self, example: int) -> str:
        """Says why nobody won an example."""
        texts = [candidate.text for candidate in self.candidates[example] if candidate.eligible]
        if not texts:
            return UNFINISHED
        if not self.admitted[example].any():
            return BELOW
        return SAME if len(set(texts)) == 1 else ALIKE

    def places_of(self, source: int) -> range:
        """Returns the indices of one source's candidates."""
        first = source * self.responses_per_source
        return range(first, first + self.responses_per_source)


def candidates_of(store: Store, sources: Sequence[str], number: int, split: Split = "train") -> list[list[Candidate]]:
    """Reads the candidates of the examples of one shard: all responses to each prompt, source by source."""
    by_source = [read_responses(store, split, name, number) for name in sources]
    return [
        [Candidate(r.text, r.eligible, r.left_out) for answers in of_prompt for r in answers]
        for of_prompt in zip(*by_source)
    ]


def count_votes(store: Store, recipe: Recipe) -> Ballots:
    """Counts the vote from the responses and scores of a store.

    Raises:
        DataError: a judge gave NaN to every eligible response.
    """
    # Read all shards.
    sources = [source.name for source in recipe.sources]
    candidates = store.by_example(layout.responses("train", sources[0]), lambda n: candidates_of(store, sources, n))
    eligible = np.array([[candidate.eligible for candidate in row] for row in candidates])
    kinds = [layout.scores(judge.name) for judge in recipe.judges]
    scores = np.stack([store.array_by_example(kind, "scores") for kind in kinds], axis=1)

    # A judge that never gives a score is a mistake rather than an abstention.
    for r, judge in enumerate(recipe.judges):
        if eligible.any() and np.isnan(scores[:, r][eligible]).all():
            raise DataError(
                f"judge {judge.name} must score at least one response, it gave NaN to all {eligible.sum()}; fix the judge or "
                "take it out"
            )
    floors = np.array([-np.inf if judge.floor is None else judge.floor for judge in recipe.judges])
    tally = vote(scores, eligible, floors, recipe.judging.rule)
    return Ballots(
        candidates,
        tally.winner,
        tally.votes,
        tally.tied,
        scores,
        choices_of(scores, eligible, floors),
        eligible,
        admitted(scores, eligible, floors),
        recipe.generation.responses_per_source,
    )


def judged_examples(store: Store, recipe: Recipe, rows: Sequence[Row], examples: Sequence[int]) -> list[dict[str, Any]]:
    """Describes some of the training prompts, for the report, with what the preparation found out about them.

    Args:
        examples: their numbers in the training split, whose rows are `rows`.

    Returns:
        For each of `examples` a mapping with its skill, prompt, ground_truth and sources. `sources` is a list with, for each
        source, its name, ce, wins_min_ce and responses. `ce` is the source's cross-entropy on the ground truth in nats per
        unit of align.min_ce_unit, or None where it has none. `responses` is empty without judges; otherwise each
        response has its text, eligible, left_out, votes and wins_vote.
    """
    names, shard_of = [source.name for source in recipe.sources], store.shard_of("train")
    ballots = count_votes(store, recipe) if recipe.judges else None
    found = []
    for example in examples:
        # The sources' cross-entropies on the ground truth. An example that was left out has no such row.
        shard = store.get(layout.targets("train"), int(shard_of[example]))
        ce = shard["source_ce"][(shard["example"] == example) & (shard["mode"] == Mode.TRAINING)].ravel()
        ce = np.where(np.isfinite(ce), ce, np.inf) if len(ce) else np.full(len(names), np.inf)
        sources = []
        for source, name in enumerate(names):
            value = float(ce[source]) if np.isfinite(ce[source]) else None
            sources.append(
                {
                    "name": name,
                    "ce": value,
                    "wins_min_ce": value is not None and source == int(ce.argmin()),
                    "responses": [] if ballots is None else _judged_responses(ballots, example, source),
                }
            )
        row = rows[example]
        found.append(
            {"skill": row["skill"], "prompt": row["prompt"], "ground_truth": row["response"], "sources": sources}
        )
    return found


def _judged_responses(ballots: Ballots, example: int, source: int) -> list[dict[str, Any]]:
    """Describes a source's responses to one prompt, with the votes that they got."""
    candidates = ballots.candidates[example]
    return [
        {
            "text": candidates[c].text,
            "eligible": candidates[c].eligible,
            "left_out": candidates[c].left_out,
            "votes": float(ballots.votes[example, c]),
            "wins_vote": bool(c == ballots.winner[example]),
        }
        for c in ballots.places_of(source)
    ]
