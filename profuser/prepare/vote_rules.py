"""How the judges' scores decide which response wins: R judges score the responses of all sources (ProFuser, section 3).

By majority, the paper's rule, each judge has one vote. It votes for the response that it scores highest; if several are equal, it
divides its vote among them. By Borda's count a judge gives a response the share of the others that it scores lower, and half of a
share for an equal one. By mean_z a response gets the mean of its z-scores, where each judge's scores are standardised over the whole
data set; it is counted from the lowest of the prompt's responses.

A judge abstains where one of its scores is NaN, or where it prefers no response to any other because all of its scores are equal. A
response that a judge scores below its floor is not admitted: it cannot win, and by majority the judges vote for the others. The
response with most points wins. Of several, the one with the highest mean z-score wins, then the one with the lowest index.

Where no response that can win has any points, nobody wins: the prompt has no signal. Only a response that is the one eligible one, so
that there is nothing to prefer it to, wins without points, if it is admitted.

Letters: E examples, R judges, C candidates. The candidates of an example are all responses to its prompt, source by source.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from profuser.recipe.schema import VoteRule

NOBODY = -1
"""The number that stands in place of a candidate's or source's where none has won."""


class Tally(NamedTuple):
    """The outcome of the vote.

    winner: (E,) int, the candidate that won, or NOBODY where there is no signal. votes: (E, C) float, the points, at least 0.
    tied: (E,) bool, where several had as many points as the winner.
    """

    winner: np.ndarray
    votes: np.ndarray
    tied: np.ndarray


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


def borda(scores: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """Returns the points by Borda's count, (E, C) float: summed over the judges, each of which gives a candidate at most 1."""
    both = eligible[:, None, :, None] & eligible[:, None, None, :] & ~np.eye(eligible.shape[1], dtype=bool)
    one, other = scores[..., :, None], scores[..., None, :]
    beaten = np.where(both, (one > other) + 0.5 * (one == other), 0.0).sum(-1)  # (E, R, C)
    shown = eligible[:, None, :]
    best, worst = np.where(shown, scores, -np.inf).max(-1), np.where(shown, scores, np.inf).min(-1)
    points = beaten / np.maximum(eligible.sum(-1) - 1, 1)[:, None, None]
    # As by majority, a judge must prefer some response to another. A NaN makes this false as well.
    return np.where((best > worst)[..., None], points, 0.0).sum(1)


def mean_z_scores(scores: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """Returns the mean of each candidate's z-scores over the judges that gave no NaN to its prompt, (E, C) float.

    A judge's scores are standardised over all prompts to which it gave no NaN. One that is infinite counts as a standard deviation
    beyond the judge's highest or lowest finite one. It is 0 for who is not eligible.
    """
    scores = np.where(eligible[:, None, :], scores.astype(np.float64), 0.0)
    broken = np.any(np.isnan(scores), axis=-1)  # (E, R): the judge gave NaN to a candidate of the example
    given = eligible[:, None, :] & ~broken[..., None]
    counted = given & np.isfinite(scores)
    safe = np.where(counted, scores, 0.0)
    count = np.maximum(counted.sum((0, 2)), 1)
    mean = safe.sum((0, 2)) / count
    std = np.sqrt(np.where(counted, (safe - mean[:, None]) ** 2, 0.0).sum((0, 2)) / count)
    z = np.where(counted, (safe - mean[:, None]) / np.where(std > 0, std, 1.0)[:, None], 0.0)
    highest, lowest = z.max((0, 2), initial=0.0) + 1, z.min((0, 2), initial=0.0) - 1
    z = np.where(given & np.isinf(scores), np.where(scores > 0, highest[:, None], lowest[:, None]), z)
    return z.sum(1) / np.maximum((~broken).sum(1), 1)[:, None]


def vote(
    scores: np.ndarray, eligible: np.ndarray, floors: np.ndarray | None = None, rule: VoteRule = "majority"
) -> Tally:
    """Counts the points of all examples and says who wins.

    Args:
        scores: (E, R, C) float, one score per example, judge and candidate. Scores of candidates that are not eligible are
            ignored.
        eligible: (E, C) bool, the candidates that take part.
        floors: (R,) float, each judge's floor; without it there are none.
        rule: how scores become points.
    """
    floors = np.full(scores.shape[1], -np.inf) if floors is None else floors
    can_win, mean_z = admitted(scores, eligible, floors), mean_z_scores(scores, eligible)
    if rule == "majority":
        votes = choices_of(scores, eligible, floors).sum(1)
    elif rule == "borda":
        votes = borda(scores, eligible)
    else:
        lowest = np.where(eligible, mean_z, np.inf).min(-1, keepdims=True)
        votes = np.where(eligible, mean_z - lowest, 0.0)

    # The winners. Rounding makes sums equal that differ only by the order in which they were added up.
    winner, tied = np.full(len(scores), NOBODY), np.zeros(len(scores), bool)
    for e in range(len(scores)):
        open_to: list[int] = np.flatnonzero(can_win[e]).tolist()
        points = {c: round(float(votes[e, c]), 9) for c in open_to}
        if open_to and (any(points.values()) or eligible[e].sum() == 1):
            winner[e] = min(open_to, key=lambda c: (-points[c], -round(float(mean_z[e, c]), 9), c))
            tied[e] = sum(of_one == points[winner[e]] for of_one in points.values()) > 1
    return Tally(winner, votes, tied)
