"""The vote of the inference mode: R judges score the responses of all sources, and each has one vote (ProFuser, section 3).

A judge votes for the response that it scores highest; if several are equal, it divides its vote among them. It abstains where
one of its scores is NaN, or where it prefers no response to any other because all of its scores are equal. A response that a
judge scores below its floor is not admitted: it cannot win, and the judges vote for the others. The response with most votes
wins. Of several, the one with the highest mean z-score wins, where each judge's scores are standardised over the whole data
set; then the one with the lowest index.

Where no judge votes, nobody wins: the prompt has no signal. Only a response that is the one eligible one, so that there is
nothing to prefer it to, wins without a vote, if it is admitted.

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
from profuser.recipe.schedule import Mode
from profuser.recipe.schema import Recipe, Split
from profuser.store import layout
from profuser.store.store import Store

NOBODY = -1
"""The number that stands in place of a candidate's or source's where none has won."""


class Candidate(NamedTuple):
    """A response in the vote. It is not eligible if it is empty, was not finished or cannot be used; then no judge sees it.

    left_out: why it cannot be used, if that is the reason.
    """

    text: str
    eligible: bool
    left_out: str = ""


class Tally(NamedTuple):
    """The outcome of the vote.

    winner: (E,) int, the candidate that won, or NOBODY where there is no signal. votes: (E, C) float, summed over the judges.
    """

    winner: np.ndarray
    votes: np.ndarray


def admitted(scores: np.ndarray, eligible: np.ndarray, floors: np.ndarray) -> np.ndarray:
    """Returns which candidates can win, (E, C) bool: those that are eligible and that no judge scores below its floor.

    Args:
        scores: (E, R, C) float. eligible: (E, C) bool. floors: (R,) float, -inf for a judge without a floor.
    """
    # In the precision of the scores, so that a score of 0.7 reaches a floor of 0.7.
    return eligible & ~(scores < floors.astype(scores.dtype)[:, None]).any(1)


def choices_of(scores: np.ndarray, eligible: np.ndarray, floors: np.ndarray) -> np.ndarray:
    """Returns how every judge divides its vote among the candidates, (E, R, C) float. A judge that abstains gives nothing.

    The arguments are those of `admitted`.
    """
    shown, can_win = eligible[:, None, :], admitted(scores, eligible, floors)[:, None, :]
    best = np.where(can_win, scores, -np.inf).max(-1, keepdims=True)
    worst = np.where(shown, scores, np.inf).min(-1, keepdims=True)
    # What a judge votes for, it must prefer to some other response. A NaN makes this false as well.
    votes = can_win & (scores == best) & (best > worst)
    return votes / np.maximum(votes.sum(-1, keepdims=True), 1)


def vote(scores: np.ndarray, eligible: np.ndarray, floors: np.ndarray | None = None) -> Tally:
    """Counts the votes of all examples.

    Args:
        scores: (E, R, C) float, one score per example, judge and candidate. Scores of candidates that are not eligible are
            ignored.
        eligible: (E, C) bool, the candidates that take part.
        floors: (R,) float, each judge's floor; without it there are none.
    """
    floors = np.full(scores.shape[1], -np.inf) if floors is None else floors
    can_win = admitted(scores, eligible, floors)
    votes = choices_of(scores, eligible, floors).sum(1)

    # The z-scores, (E, R, C). They are standardised per judge over all scores of examples in which it gave no NaN.
    scores = np.where(eligible[:, None, :], scores.astype(np.float64), -np.inf)
    broken = np.any(np.isnan(scores), axis=-1)  # (E, R): the judge gave NaN to a candidate of the example
    counted = eligible[:, None, :] & ~broken[..., None] & np.isfinite(scores)
    safe = np.where(counted, scores, 0.0)
    count = np.maximum(counted.sum((0, 2)), 1)
    mean = safe.sum((0, 2)) / count
    std = np.sqrt(np.where(counted, (safe - mean[:, None]) ** 2, 0.0).sum((0, 2)) / count)
    z = np.where(counted, (safe - mean[:, None]) / np.where(std > 0, std, 1.0)[:, None], 0.0)

    # The winners. Rounding makes sums equal that differ only by the order in which they were added up.
    judging = np.maximum((~broken).sum(1), 1)
    mean_z = z.sum(1) / judging[:, None]
    winner = np.full(len(scores), NOBODY)
    for e in range(len(scores)):
        open_to: list[int] = np.flatnonzero(can_win[e]).tolist()
        if open_to and (votes[e].any() or eligible[e].sum() == 1):
            winner[e] = min(open_to, key=lambda c: (-round(votes[e, c], 9), -round(mean_z[e, c], 9), c))
    return Tally(winner, votes)


@dataclass(frozen=True, slots=True)
class Ballots:
    """The vote over the whole training split.

    candidates: the C candidates of every example. winner (E,), votes (E, C): the outcome, as in Tally.
    scores, choices: (E, R, C), the judges' scores, and how each of them divided its vote.
    eligible, admitted: (E, C), the candidates that the judges saw, and those that could win.
    responses_per_source: how many responses each source gave to a prompt. The first so many candidates are the first
        source's, the next are the second's, and so on.
    """

    candidates: list[list[Candidate]]
    winner: np.ndarray
    votes: np.ndarray
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
        """Whether some judge voted for the response that won, which is not so where it was the only one, or where nobody won."""
        winner = int(self.winner[example])
        return winner != NOBODY and bool(self.votes[example, winner] > 0)

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
            return "no response was finished"
        if not self.admitted[example].any():
            return "every response is below a judge's floor"
        return "all responses are the same text" if len(set(texts)) == 1 else "the judges scored all alike or abstained"

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

    # A judge that never gives a score is a mistake rather than an abstention.
    for r, judge in enumerate(recipe.judges):
        if eligible.any() and np.isnan(scores[:, r][eligible]).all():
            raise DataError(
                f"judge {judge.name} must score at least one response, it gave NaN to all {eligible.sum()}; fix the judge or "
                "take it out"
            )
    floors = np.array([-np.inf if judge.floor is None else judge.floor for judge in recipe.judges])
    tally = vote(scores, eligible, floors)
    return Ballots(
        candidates,
        tally.winner,
        tally.votes,
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
    names, size = [source.name for source in recipe.sources], recipe.capture.shard_size
    ballots = count_votes(store, recipe) if recipe.judges else None
    found = []
    for example in examples:
        # The sources' cross-entropies on the ground truth. An example that was left out has no such row.
        shard = store.get(layout.targets("train"), example // size)
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
    return [
        {
            "text": ballots.candidates[example][c].text,
            "eligible": ballots.candidates[example][c].eligible,
            "left_out": ballots.candidates[example][c].left_out,
            "votes": float(ballots.votes[example, c]),
            "wins_vote": bool(c == ballots.winner[example]),
        }
        for c in ballots.places_of(source)
    ]
