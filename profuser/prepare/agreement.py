"""Whether a vote can be trusted: how far the judges agree, whether they reward length, and whether one of them decides alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from profuser.prepare.votes import Ballots

DECIDES = 0.95
"""The share of the prompts with a winner above which one judge is said to decide the vote."""
EXPLAINED = 0.5
"""The share of a judge's variance above which the length of the responses is said to explain it."""
FEWEST = 10
"""How many prompts there must be for a warning. A judge decides a handful of prompts by chance."""


def agreement(ballots: Ballots, judges: Sequence[str]) -> dict[str, Any]:
    """Returns what summary.json says of the judges.

    Returns:
        A mapping of `pairs`: for every two judges Kendall's tau-b over pairs of responses to the same prompt; `length`: each judge's
        correlation with the length of the responses, both less their means over a prompt; `alone`: for each judge the share of the
        prompts with a winner on which it is the only one with a preference; `ties`: the share of them on which several responses of
        different texts had the most points; `prompts`: how many prompts with a winner there are; `preferences`: on how many prompts each
        judge has a preference. What has no variance is None.
    """
    scores = np.where(ballots.eligible[:, None], ballots.scores.astype(np.float64), np.nan)
    lengths = np.array([[float(len(candidate.text)) for candidate in row] for row in ballots.candidates])
    lengths = lengths.reshape(ballots.eligible.shape)
    prefers = np.asarray(ballots.choices.any(-1))  # (E, R)
    won = np.array([ballots.preferred(e) for e in range(len(ballots.winner))], bool)
    count = max(1, int(won.sum()))
    return {
        "pairs": [
            {"judges": [judges[a], judges[b]], "tau": kendall_tau(scores[:, a], scores[:, b])}
            for a, b in combinations(range(len(judges)), 2)
        ],
        "length": {name: correlation_within(scores[:, r], lengths) for r, name in enumerate(judges)},
        "alone": {
            name: float((won & prefers[:, r] & (prefers.sum(1) == 1)).sum() / count) for r, name in enumerate(judges)
        },
        "ties": sum(map(ballots.is_tie, range(len(ballots.winner)))) / count,
        "prompts": int(won.sum()),
        "preferences": {name: int(prefers[:, r].sum()) for r, name in enumerate(judges)},
    }


def kendall_tau(one: np.ndarray, other: np.ndarray) -> float | None:
    """Returns Kendall's tau-b of two judges over all pairs of responses to the same prompt; None where one never prefers any.

    Args:
        one, other: (E, C) float scores, NaN where there is none.
    """
    signs = []
    for scores in (one, other):
        left, right = scores[:, :, None], scores[:, None, :]
        compared = (left > right).astype(float) - (left < right)  # no difference, which two infinities do not have
        signs.append(np.where(np.isnan(left) | np.isnan(right), np.nan, compared))
    both = ~np.isnan(signs[0]) & ~np.isnan(signs[1])
    a, b = (np.where(both, sign, 0.0) for sign in signs)
    product = math.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / product) if product else None


def correlation_within(scores: np.ndarray, lengths: np.ndarray) -> float | None:
    """Returns the correlation of scores with lengths, both less their means over a prompt; None where one of them never varies.

    Args:
        scores: (E, C) float, NaN or infinite where there is none that counts. lengths: (E, C) float.
    """
    counted = np.isfinite(scores)
    number = np.maximum(counted.sum(-1, keepdims=True), 1)

    def centred(x: np.ndarray) -> np.ndarray:
        x = np.where(counted, x, 0.0)
        return np.where(counted, x - x.sum(-1, keepdims=True) / number, 0.0)

    a, b = centred(scores), centred(lengths)
    spread = [math.sqrt((x * x).sum()) for x in (a, b)]
    scale = [1e-9 * max(1.0, float(np.abs(np.where(counted, x, 0.0)).max(initial=0.0))) for x in (scores, lengths)]
    if any(s <= tiny for s, tiny in zip(spread, scale)):
        return None
    return float((a * b).sum() / (spread[0] * spread[1]))


def warnings_of(summary: Mapping[str, Any]) -> list[str]:
    """Returns the lines that warn of judges whose vote says less than it seems to."""
    if not (found := summary.get("agreement")):
        return []
    # Stores of earlier versions say of no judge how often it had a preference.
    every = sum(sum(of_skill.values()) for of_skill in (summary.get("vote_wins") or {}).values())
    preferences = found.get("preferences", {})
    lines = []
    if len(found["alone"]) > 1 and found.get("prompts", every) >= FEWEST:
        lines += [
            f"warning: judge {name} alone has a preference on {share:.0%} of the prompts with a winner, so that it decides the vote; "
            "look at the other judges, or take them out"
            for name, share in found["alone"].items()
            if share > DECIDES
        ]
    lines += [
        f"warning: the length of the responses explains {r * r:.0%} of judge {name}'s variance within a prompt (correlation {r:+.2f}); it "
        f"may reward {'longer' if r > 0 else 'shorter'} responses for their length"
        for name, r in found["length"].items()
        if r is not None and r * r > EXPLAINED and preferences.get(name, every) >= FEWEST
    ]
    return lines
