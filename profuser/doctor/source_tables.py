"""Shows how a recipe's sources compare, as JSON for programs and as tables for people."""

from __future__ import annotations

from typing import Any

from profuser.doctor.comparison import Comparison
from profuser.doctor.diversity import MOST_EXHAUSTIVE, Combination
from profuser.doctor.kinship import AS_LARGE, Kinship
from profuser.doctor.recommend import RELATED
from profuser.report.intervals import Score
from profuser.text.display import column_width, visible

LEGEND = (
    "diversity: focal diversity, 1 where no two fail together; score: 0.6 diversity + 0.4 plurality",
    "plurality: accuracy of the answer that most of them give, of tied ones the first's; oracle: share with a right answer among theirs",
)
SHOWN_SETS = 10  # how many sets of sources the table lists
FEW = 50
"""Below this number of held-out prompts a line says that they are few."""


def describe_sources(comparison: Comparison) -> dict[str, Any]:
    """Returns what `--json` prints. Accuracies are shares; intervals are of 95 %; an unknown kinship is null."""
    names, outcome = comparison.names, comparison.outcome
    relation, advice = comparison.kinship, comparison.recommendation
    return {
        "heldout": comparison.heldout,
        "prompts": outcome.right.shape[1],
        "sources": {
            name: {"accuracy": of_source, "interval": [*outcome.share(right)[1:]]}
            for (name, of_source), right in zip(comparison.accuracies.items(), outcome.right)
        },
        "exhaustive": len(names) <= MOST_EXHAUSTIVE,
        "sets": [
            {
                "sources": [names[n] for n in found.members],
                "diversity": found.diversity,
                "plurality": found.plurality,
                "score": found.score,
                "oracle": found.oracle,
                "oracle_interval": [*outcome.share(outcome.oracle(found.members))[1:]],
            }
            for found in comparison.found
        ],
        "kinship": relation
        and {
            "base": relation.base,
            "pairs": [
                {"sources": [pair.first, pair.second], "pearson": pair.pearson, "cosine": pair.cosine}
                for pair in relation.pairs
            ],
            "change": relation.change,
            "not_comparable": relation.apart,
            "notes": notes_of(relation),
        },
        "recommendation": {"method": advice.method, "sources": advice.sources, "sentence": advice.sentence},
    }


def source_tables(comparison: Comparison) -> str:
    """Returns the same for a person: the sources alone, sets of them, their kinship, and the recommendation."""
    parts = [_alone(comparison), _together(comparison)]
    if comparison.kinship is not None:
        parts.append(_kinship(comparison.kinship))
    if (prompts := comparison.outcome.right.shape[1]) < FEW:
        parts.append(
            [f"{prompts} held-out prompts are few: the intervals are wide, and so is what the recommendation rests on"]
        )
    parts.append([comparison.recommendation.sentence])
    return visible("\n\n".join("\n".join(part) for part in parts))


def notes_of(relation: Kinship) -> list[str]:
    """Returns what has to be said about a base that does not seem to be one."""
    notes = [
        f"{relation.base} is not what {name} was trained from: they differ by {relation.change[name]:.2f} times the size of its "
        f"weights, {AS_LARGE:g} or more is another model"
        for name in relation.strangers
    ]
    notes += [
        f"{name} has the weights of {relation.base} itself" for name, size in relation.change.items() if size == 0
    ]
    cosines = [pair.cosine for pair in relation.pairs if pair.cosine is not None]
    if cosines and not notes and max(map(abs, cosines)) < RELATED:
        notes.append(
            f"all kinships are near 0: the sources have learnt nothing in common since {relation.base}, or it is not their base"
        )
    return notes


def _alone(comparison: Comparison) -> list[str]:
    """The accuracy of every source, by skill and as a mean with its interval."""
    names, outcome = comparison.names, comparison.outcome
    skills = list(comparison.accuracies[names[0]])
    skills = skills if len(skills) > 2 else ["mean"]  # a single skill is the mean
    alone = [outcome.share(right) for right in outcome.right]
    rows = [
        [name, *(f"{100 * comparison.accuracies[name][skill]:.1f}" for skill in skills), _interval(score)]
        for name, score in zip(names, alone)
    ]
    title = (
        f"{outcome.right.shape[1]} held-out prompts of {comparison.heldout}; accuracy in percent, with a 95 % interval"
    )
    return [title, "", *_aligned([["source", *skills, ""], *rows])]


def _together(comparison: Comparison) -> list[str]:
    """The sets of several sources with the best scores."""
    names, outcome = comparison.names, comparison.outcome
    sets = [found for found in comparison.found if len(found.members) > 1]
    if not sets:
        return ["one source has nothing to be combined with"]

    def row(found: Combination) -> list[str]:
        oracle = outcome.share(outcome.oracle(found.members))
        return [
            " + ".join(names[n] for n in found.members),
            f"{found.diversity:.3f}",
            f"{100 * found.plurality:.1f}",
            f"{found.score:.3f}",
            f"{100 * found.oracle:.1f}",
            _interval(oracle),
        ]

    lines = _aligned([["together", "diversity", "plurality", "score", "oracle", ""], *map(row, sets[:SHOWN_SETS])])
    if len(sets) > SHOWN_SETS:
        lines.append(f"and {len(sets) - SHOWN_SETS} more: --json lists them all")
    lines += ["", *LEGEND]
    if len(names) > MOST_EXHAUSTIVE:
        lines.append(
            f"of {len(names)} sources not all sets were looked at ({MOST_EXHAUSTIVE} is the most for that): all pairs, and the best "
            "of them with one more source at a time"
        )
    return lines


def _kinship(relation: Kinship) -> list[str]:
    """The kinship of all pairs, how far the sources are from the base, and what cannot be compared."""
    lines = [f"kinship from the base {relation.base}"]
    if relation.pairs:
        rows = [
            [f"{pair.first}, {pair.second}", *("-" if x is None else f"{x:.4f}" for x in (pair.pearson, pair.cosine))]
            for pair in relation.pairs
        ]
        lines += ["", *_aligned([["pair", "pearson", "cosine"], *rows])]
    if relation.change:
        sizes = ", ".join(f"{name} {size:.3f}" for name, size in relation.change.items())
        lines += ["", f"size of what was learnt, in sizes of the base's weights: {sizes}"]
    lines += [f"{name} cannot be compared: {reason}" for name, reason in relation.apart.items()]
    return lines + notes_of(relation)


def _interval(score: Score) -> str:
    return f"({100 * score.low:.1f} to {100 * score.high:.1f})"


def _aligned(rows: list[list[str]]) -> list[str]:
    """The rows of a table, whose first column stands at the left and all others at the right."""
    widths = [max(column_width(cell) for cell in column) for column in zip(*rows)]

    def padded(cell: str, width: int, at_left: bool) -> str:
        space = " " * (width - column_width(cell))
        return cell + space if at_left else space + cell

    return [
        "  ".join(padded(cell, width, n == 0) for n, (cell, width) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]
