"""Recommends what to do with some sources, by a rule that docs/sources.md spells out.

1. Nothing is right: `none`. One source: `keep`.
2. Sets of sources are looked at of which the oracle is surely better than the best source alone: by ENOUGH_GAIN or more at the lower
   limit of its 95 % interval. Without any: `keep` the best source.
3. Of these the set with the best score is taken. If its members have one base and all pairs a kinship of at least RELATED: `merge`.
4. If the members' plurality is surely better than the best source alone: `decode` together.
5. Otherwise `fuse`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from profuser.doctor.diversity import Combination, Outcome
from profuser.doctor.kinship import Kinship
from profuser.report.intervals import Score

Method = Literal["fuse", "decode", "merge", "keep", "none"]

ENOUGH_GAIN = 0.05
"""What a set's oracle must gain over the best source, at the lower limit of the gain's 95 % interval."""
RELATED = 0.1
"""The lowest cosine of deltas that is worth a merge. Of unrelated deltas it is about 1/sqrt(parameters), which is much less."""


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What to do with which sources, and why, in one sentence."""

    method: Method
    sources: list[str]
    sentence: str


def recommend(
    outcome: Outcome, found: Sequence[Combination], names: Sequence[str], kinship: Kinship | None
) -> Recommendation:
    """Returns what to do with the sources.

    Args:
        found: the sets of sources, the best score first. names: the sources' names. kinship: None without a base.
    """
    # The best source alone. Of equally good ones it is the first.
    prompts = outcome.right.shape[1]
    alone = [outcome.share(right) for right in outcome.right]
    best = max(range(len(names)), key=lambda n: alone[n].value)
    is_right = f"{names[best]} is right on {percent(alone[best])} of {prompts} held-out prompts"
    everyone = tuple(range(len(names)))
    if not outcome.right.any():
        return Recommendation(
            "none",
            [],
            f"None of them: no source is right on any of {prompts} held-out prompts, so check evaluation.match and the sources' answers.",
        )
    if len(names) == 1:
        return Recommendation("keep", [names[0]], f"Keep {names[0]}: {is_right}, and there is no other source.")

    # The sets that surely know more than it.
    def gain(members: Sequence[int]) -> Score:
        return outcome.gain(outcome.oracle(members), outcome.right[best])

    worth = [c for c in found if len(c.members) > 1 and gain(c.members).low >= ENOUGH_GAIN]
    if not worth:
        return Recommendation(
            "keep",
            [names[best]],
            f"Keep {names[best]}: {is_right}, and all {len(names)} sources together know only {points(gain(everyone))} more, which is "
            f"not surely {100 * ENOUGH_GAIN:g} or more.",
        )

    # How the set with the best score is best combined.
    chosen = worth[0]
    members = [names[n] for n in chosen.members]
    listed = f"{', '.join(members[:-1])} and {members[-1]}"
    knows = (
        f"one of them at least is right on {100 * chosen.oracle:.1f} % of {prompts} held-out prompts, {points(gain(chosen.members))} more "
        f"than {names[best]}, the best alone"
    )
    cosine = None if kinship is None else kinship.least(members)
    if kinship is not None and cosine is not None and cosine >= RELATED:
        return Recommendation(
            "merge",
            members,
            f"Merge {listed} with the base {kinship.base}: {knows}, and the cosine of their deltas is at least {cosine:.2f}.",
        )
    vote = outcome.gain(outcome.plurality(chosen.members), outcome.right[best])
    if vote.low > 0:
        return Recommendation(
            "decode",
            members,
            f"Let {listed} decode together: {knows}, and their plurality alone gains {points(vote)} without any training.",
        )
    return Recommendation(
        "fuse",
        members,
        f"Fuse {listed}: {knows}, and a vote does not find it ({100 * chosen.plurality:.1f} %), so it takes training to learn from "
        "the one that is right.",
    )


def percent(score: Score) -> str:
    """Returns a share in percent with its interval."""
    return f"{100 * score.value:.1f} % ({100 * score.low:.1f} to {100 * score.high:.1f})"


def points(score: Score) -> str:
    """Returns a difference of shares in percentage points with its interval."""
    return f"{100 * score.value:.1f} points ({100 * score.low:.1f} to {100 * score.high:.1f})"
