"""Inference mode's vote: R judges score every source's responses and each gives one vote (ProFuser, section 3).

A judge splits its vote equally among its tied best; one with a NaN or with all scores equal abstains. Most votes win;
ties go to the higher mean z-score (standardised per judge over the whole data set), then to the lowest index.

Letters: E examples, R judges, C candidates, which are all responses to one prompt, source by source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from profuser.errors import DataError
from profuser.prepare.data import Row
from profuser.prepare.responses import Response
from profuser.recipe.schedule import Mode
from profuser.recipe.schema import Recipe, Split
from profuser.store import layout
from profuser.store.store import Store

NOBODY = -1
"""In place of a candidate or source: none won."""


class Candidate(NamedTuple):
    """A response in the vote. One that is empty or was not finished is not eligible: no judge sees it."""

    text: str
    eligible: bool


class Tally(NamedTuple):
    """winner: (E,) int, the candidate, or NOBODY where none is eligible. votes: (E, C) float, summed over the judges."""

    winner: np.ndarray
    votes: np.ndarray


def vote(scores: np.ndarray, eligible: np.ndarray) -> Tally:
    """Count the votes of all examples.

    Args:
        scores: (E, R, C) float, one score per example, judge and candidate; those of ineligible candidates are ignored.
        eligible: (E, C) bool, the candidates that take part.
    """
    scores = np.where(eligible[:, None, :], scores.astype(np.float64), -np.inf)
    broken = np.any(np.isnan(scores), axis=-1)  # (E, R)
    counted = eligible[:, None, :] & ~broken[..., None] & np.isfinite(scores)
    safe = np.where(counted, scores, 0.0)
    n = np.maximum(counted.sum((0, 2)), 1)
    mean = safe.sum((0, 2)) / n
    std = np.sqrt(np.where(counted, (safe - mean[:, None]) ** 2, 0.0).sum((0, 2)) / n)
    z = np.where(counted, (safe - mean[:, None]) / np.where(std > 0, std, 1.0)[:, None], 0.0)
    best = scores.max(-1, keepdims=True)
    worst = np.where(eligible[:, None, :], scores, np.inf).min(-1, keepdims=True)
    # A lone candidate makes "all scores equal" true and every judge abstain; it wins by the index rule anyway.
    abstains = broken | (best == worst)[..., 0]
    top = (scores == best) & eligible[:, None, :] & ~abstains[..., None]
    votes = (top / np.maximum(top.sum(-1, keepdims=True), 1)).sum(1)
    judging = np.maximum((~broken).sum(1), 1)
    mean_z = z.sum(1) / judging[:, None]
    winner = np.full(len(scores), NOBODY)
    for e in range(len(scores)):
        open_to: list[int] = np.flatnonzero(eligible[e]).tolist()
        if open_to:
            winner[e] = min(open_to, key=lambda c: (-round(votes[e, c], 9), -round(mean_z[e, c], 9), c))
    return Tally(winner, votes)


@dataclass(frozen=True, slots=True)
class Ballots:
    """The vote over the whole training split.

    candidates: of every example. winner (E,), votes (E, C): as in Tally. scores: (E, R, C).
    responses_per_source: of one prompt; the candidates of source s are the s-th so many.
    """

    candidates: list[list[Candidate]]
    winner: np.ndarray
    votes: np.ndarray
    scores: np.ndarray
    responses_per_source: int

    def winning_source(self, example: int) -> int:
        """The source whose response won, or NOBODY."""
        winner = int(self.winner[example])
        return NOBODY if winner == NOBODY else winner // self.responses_per_source

    def winning_text(self, example: int) -> str:
        return self.candidates[example][self.winner[example]].text

    def places_of(self, source: int) -> range:
        """The candidates that are one source's."""
        first = source * self.responses_per_source
        return range(first, first + self.responses_per_source)


def candidates_of(store: Store, sources: Sequence[str], number: int, split: Split = "train") -> list[list[Candidate]]:
    """All responses to the prompts of one shard, source by source."""
    by_source = [
        [[Response(*answer) for answer in answers] for answers in store.get_json(layout.responses(split, name), number)]
        for name in sources
    ]
    return [
        [Candidate(r.text, bool(r.text) and r.finished) for answers in of_prompt for r in answers]
        for of_prompt in zip(*by_source)
    ]


def count_votes(store: Store, recipe: Recipe) -> Ballots:
    """The vote, from the responses and scores of a store.

    Raises:
        DataError: a judge gave NaN to every eligible response.
    """
    sources = [source.name for source in recipe.sources]
    numbers = store.numbers(layout.responses("train", sources[0]))
    candidates = [row for number in numbers for row in candidates_of(store, sources, number)]
    eligible = np.array([[candidate.eligible for candidate in row] for row in candidates])
    scores = np.stack(
        [
            np.concatenate([store.get(layout.scores(judge.name), number)["scores"] for number in numbers])
            for judge in recipe.judges
        ],
        axis=1,
    )
    for r, judge in enumerate(recipe.judges):
        if eligible.any() and np.isnan(scores[:, r][eligible]).all():
            raise DataError(
                f"judge {judge.name} must score some response, it gave NaN to all {eligible.sum()}; fix the judge or take it out"
            )
    tally = vote(scores, eligible)
    return Ballots(candidates, tally.winner, tally.votes, scores, recipe.generation.responses_per_source)


def judged_examples(store: Store, recipe: Recipe, rows: Sequence[Row], examples: Sequence[int]) -> list[dict[str, Any]]:
    """Some of the training prompts with what preparation found out about them.

    Returns:
        For each of `examples` its skill, prompt, ground_truth and sources: a list of name, ce (nats per recipe's unit on
        the ground truth; None where the source was not scored), wins_min_ce, and responses with text, eligible, votes
        and wins_vote (none of them without judges).
    """
    names, size = [source.name for source in recipe.sources], recipe.capture.shard_size
    ballots = count_votes(store, recipe) if recipe.judges else None
    found = []
    for example in examples:
        shard = store.get(layout.targets("train"), example // size)
        ce = shard["source_ce"][(shard["example"] == example) & (shard["mode"] == Mode.TRAINING)].ravel()
        ce = np.where(np.isfinite(ce), ce, np.inf) if len(ce) else np.full(len(names), np.inf)
        sources = []
        for s, name in enumerate(names):
            value = float(ce[s]) if np.isfinite(ce[s]) else None
            sources.append(
                {
                    "name": name,
                    "ce": value,
                    "wins_min_ce": value is not None and s == int(ce.argmin()),
                    "responses": [] if ballots is None else _judged_responses(ballots, example, s),
                }
            )
        row = rows[example]
        found.append(
            {"skill": row["skill"], "prompt": row["prompt"], "ground_truth": row["response"], "sources": sources}
        )
    return found


def _judged_responses(ballots: Ballots, example: int, source: int) -> list[dict[str, Any]]:
    return [
        {
            "text": ballots.candidates[example][c].text,
            "eligible": ballots.candidates[example][c].eligible,
            "votes": float(ballots.votes[example, c]),
            "wins_vote": bool(c == ballots.winner[example]),
        }
        for c in ballots.places_of(source)
    ]
