"""Measures what sets of sources are worth together, by which of their held-out answers are right and which are the same.

Focal diversity (LLM-TOPLA, arXiv 2410.03953): of the prompts that one source of a set of S, the focal one, gets wrong, p_i is the
share that exactly i of the S get wrong. The generalised diversity of these prompts is

    1 - [sum_i i (i - 1) p_i / (S (S - 1))] / [sum_i i p_i / S],

which is 1 if no other source fails where the focal one does, and 0 if all fail together. The diversity of the set is the mean over
its focal sources. A source without errors is no focal one; where no source errs, and for a set of one, the diversity is 0, because
there is nothing that a second source could put right.

Accuracies are means over the skills, in which every skill counts once, as in scores.json. Diversity counts every prompt once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from profuser.report.intervals import Score, difference, mean_score, wilson

DIVERSITY_WEIGHT, PLURALITY_WEIGHT = 0.6, 0.4
"""How much diversity and the accuracy of the plurality count in the score of a set."""

MOST_EXHAUSTIVE = 12
"""Up to this many sources every set is looked at, of which there are 4095. Of more sources, sets are grown from the best pair."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of S sources' answers to n prompts.

    right: (S, n) bool, which answers are right. same: (S, S, n) bool, which two sources vote for the same answer; of a source with
    itself, whether it votes at all. skill: (n,) int, the number of each prompt's skill.
    """

    right: np.ndarray
    same: np.ndarray
    skill: np.ndarray

    @classmethod
    def of(cls, right: np.ndarray, texts: Sequence[Sequence[str]], skills: Sequence[str]) -> Outcome:
        """Finds out which answers are the same: `votes_of` says when they are. `texts` are the n answers of every source."""
        votes = [[votes_of(text, bool(is_right)) for text, is_right in zip(*row)] for row in zip(texts, right)]
        codes: dict[str | bool, int] = {}
        code = np.array([[-1 if v is None else codes.setdefault(v, len(codes)) for v in row] for row in votes])
        same = (code[:, None] == code[None]) & (code >= 0)[:, None]
        names = {name: number for number, name in enumerate(dict.fromkeys(skills))}
        return cls(np.asarray(right, bool), same, np.array([names[name] for name in skills]))

    def mean(self, values: np.ndarray) -> float:
        """Returns the mean over the skills of a value per prompt."""
        return float((np.bincount(self.skill, values) / np.bincount(self.skill)).mean())

    def share(self, holds: np.ndarray) -> Score:
        """Returns the mean over the skills of the share of prompts for which something holds, with its 95 % interval."""
        counts = np.bincount(self.skill)
        shares = np.bincount(self.skill, holds) / counts
        return mean_score(self.mean(holds), [wilson(float(s), int(n)) for s, n in zip(shares, counts)])

    def gain(self, after: np.ndarray, before: np.ndarray) -> Score:
        """Returns by how much `after` is right more often than `before`, on the same prompts, with its 95 % interval.

        What is gained and what is lost are shares of prompts themselves. If nothing is lost, only the first has an interval.
        """
        gained, lost = after & ~before, before & ~after
        return difference(self.share(gained), self.share(lost)) if lost.any() else self.share(gained)

    def plurality(self, members: Sequence[int]) -> np.ndarray:
        """Returns (n,) whether the answer with most of the members' votes is right. Of tied ones, that of the first member wins."""
        chosen = np.asarray(members)
        votes = self.same[np.ix_(chosen, chosen)].sum(1)
        return self.right[chosen[votes.argmax(0)], np.arange(self.right.shape[1])]

    def oracle(self, members: Sequence[int]) -> np.ndarray:
        """Returns (n,) whether any member is right."""
        return np.logical_or.reduce(self.right[list(members)])


def votes_of(text: str, is_right: bool) -> str | bool | None:
    """Returns what an answer votes for; two answers are the same if this is.

    All right answers are the same, whatever their words. Wrong ones are the same if their words are, in small or capital letters
    and with any whitespace between them. A wrong answer without any text does not vote.
    """
    return True if is_right else " ".join(text.casefold().split()) or None


@dataclass(frozen=True, slots=True)
class Combination:
    """A set of sources, with what it is worth.

    members: the numbers of the sources, ascending. plurality, oracle: the accuracy of the answer that most members give, and the
    share of prompts on which any member is right.
    """

    members: tuple[int, ...]
    diversity: float
    plurality: float
    oracle: float

    @property
    def score(self) -> float:
        """The score by which sets are compared."""
        return DIVERSITY_WEIGHT * self.diversity + PLURALITY_WEIGHT * self.plurality


def focal_diversity(right: np.ndarray) -> float:
    """Returns the focal diversity of S sources from (S, n) bool, which of their answers are right."""
    size = len(right)
    wrong = ~np.asarray(right, bool)
    together = wrong.sum(0)  # i, of every prompt
    focal = wrong[wrong.any(1)].astype(np.float64)
    if size < 2 or not len(focal):
        return 0.0
    pairs, single = focal @ (together * (together - 1)), focal @ together
    return float(np.mean(1 - (pairs / (size * (size - 1))) / (single / size)))


def combinations(outcome: Outcome) -> list[Combination]:
    """Returns the sets of sources with what they are worth, the best score first. Equal ones: the smaller and the earlier first.

    These are all sets of up to MOST_EXHAUSTIVE sources. Of more, they are all sets of one and two, and those that come of the best
    pair when the source that gives the best score is added again and again.
    """
    count = len(outcome.right)

    def worth(members: Iterable[int]) -> Combination:
        chosen = tuple(sorted(members))
        right, plurality = outcome.right[list(chosen)], outcome.mean(outcome.plurality(chosen))
        return Combination(chosen, focal_diversity(right), plurality, outcome.mean(outcome.oracle(chosen)))

    exhaustive = count <= MOST_EXHAUSTIVE
    found = [worth(members) for members in _sets(count, count if exhaustive else 2)]
    if not exhaustive:
        grown = min((c for c in found if len(c.members) == 2), key=_order)
        while len(grown.members) < count:
            others = set(range(count)) - set(grown.members)
            grown = min((worth((*grown.members, other)) for other in others), key=_order)
            found.append(grown)
    return sorted(found, key=_order)


def _sets(count: int, largest: int) -> Iterator[tuple[int, ...]]:
    for size in range(1, largest + 1):
        yield from itertools.combinations(range(count), size)


def _order(combination: Combination) -> tuple[float, int, tuple[int, ...]]:
    # Rounded, so that equal scores are equal however their sums were rounded.
    return -round(combination.score, 12), len(combination.members), combination.members
