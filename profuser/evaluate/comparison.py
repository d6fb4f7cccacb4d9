"""Compares the results of several models: their scores with intervals, and the differences of every two of them with p-values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from profuser.evaluate.results import Column, Result, Results
from profuser.evaluate.statistics import Sample, paired_p, score
from profuser.report.intervals import Score, wilson
from profuser.text.display import visible


@dataclass(frozen=True)
class Compared:
    """A column of the table.

    kind: the name of the value that is compared. is_share: whether it is a share, which is shown in percent. higher: whether more
        is better.
    """

    name: str
    kind: str
    is_share: bool
    higher: bool
    items: int
    scores: dict[str, Score]
    pairs: dict[tuple[str, str], tuple[float, float]]
    """For every two models the difference of the first to the second, and its p-value."""
    overall: bool = False
    """Whether it is the score of several tasks together."""


def compare(results: Results, columns: Sequence[Column]) -> list[Compared]:
    """Compares models column by column. A column whose tasks count different things has no score and is left out."""
    compared = []
    for column in columns:
        of_model = {model: [found[task] for task in column.tasks] for model, found in results.items()}
        kinds = {(result.primary, result.higher) for found in of_model.values() for result in found}
        if len(kinds) == 1:
            compared.append(_compared(column, of_model))
    return compared


def _compared(column: Column, of_model: dict[str, list[Result]]) -> Compared:
    # An item on which one of the models has no value, because a judge gave none, counts for none of them.
    samples: dict[str, list[Sample]] = {model: [] for model in of_model}
    for results in zip(*of_model.values(), strict=True):
        there = np.all([np.isfinite(result.sample.values) for result in results], axis=0)
        for parts, result in zip(samples.values(), results, strict=True):
            parts.append(result.sample.of(there))
    first, result = next(iter(samples.values())), next(iter(of_model.values()))[0]
    sizes = [len(sample) if column.weighted else min(len(sample), 1) for sample in first]
    if not sum(sizes):
        nothing = dict.fromkeys(of_model, Score(math.nan, math.nan, math.nan))
        return Compared(column.name, result.primary, False, result.higher, 0, nothing, {})
    weights = [size / sum(sizes) for size in sizes]
    values = np.concatenate([sample.values for found in samples.values() for sample in found])
    scores = {model: score(found, weights) for model, found in samples.items()}
    pairs = {
        (a, b): (scores[a].value - scores[b].value, paired_p(samples[a], samples[b], weights))
        for a, b in itertools.combinations(samples, 2)
    }
    is_share = result.is_share and bool(((values >= 0) & (values <= 1)).all())
    if is_share and len(first) == 1:
        # Where all items have the same value, every draw is the same, which does not mean that nothing is uncertain.
        for model, (sample,) in samples.items():
            if sample.values.min() == sample.values.max() and sample.values[0] in (0, 1):
                scores[model] = wilson(float(sample.values[0]), len(sample))
    overall, items = len(column.tasks) > 1, sum(map(len, first))
    return Compared(column.name, result.primary, is_share, result.higher, items, scores, pairs, overall)


def table(compared: Sequence[Compared], models: Sequence[str]) -> str:
    """Formats the scores with their intervals, and the differences of every two models, as Markdown. A task has a row."""
    names = [_title(column) for column in compared]
    lines = [["task", "items", *map(visible, models)], ["---", "---:", *("---:" for _ in models)]]
    for name, column in zip(names, compared):
        lines.append([name, f"{column.items:,}", *(_cell(column.scores[model], column) for model in models)])
    text = "\n".join(map(_row, lines))
    if len(models) < 2:
        return text
    return f"{text}\n\n{differences(compared, list(itertools.combinations(models, 2)))}"


def differences(compared: Sequence[Compared], pairs: Sequence[tuple[str, str]]) -> str:
    """Formats the differences of pairs of models, with their p-values, as Markdown."""
    names = [_title(column) for column in compared]
    lines = [["difference", *(f"{visible(a)} − {visible(b)}" for a, b in pairs)], ["---", *("---:" for _ in pairs)]]
    for name, column in zip(names, compared):
        lines.append([name, *(_difference(column.pairs.get(pair), column) for pair in pairs)])
    note = (
        "p: the exact McNemar test for right and wrong answers of one task, otherwise a paired permutation test. Not corrected for "
        "how many there are."
    )
    return "\n".join(map(_row, lines)) + f"\n\n{note}"


def _title(column: Compared) -> str:
    return f"{visible(column.name)}{'' if column.higher else ' (less is better)'}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _number(value: float, column: Compared) -> str:
    text = f"{100 * value:.1f}" if column.is_share else f"{value:.3f}"
    return text.removeprefix("-") if not float(text) else text


def _cell(found: Score, column: Compared) -> str:
    if math.isnan(found.value):
        return "–"
    return f"{_number(found.value, column)} [{_number(found.low, column)}, {_number(found.high, column)}]"


def _difference(pair: tuple[float, float] | None, column: Compared) -> str:
    if pair is None:
        return "–"
    value, p = pair
    number = _number(value, column)
    return f"{'+' if float(number) > 0 else ''}{number} (p {'< 0.001' if p < 0.001 else f'= {p:.3f}'})"


def as_json(compared: Sequence[Compared]) -> dict[str, Any]:
    """The comparison as plain values."""
    return {
        column.name: {
            "higher_is_better": column.higher,
            "items": column.items,
            "scores": {model: dict(found._asdict()) for model, found in column.scores.items()},
            "pairs": [{"a": a, "b": b, "difference": d, "p": p} for (a, b), (d, p) in column.pairs.items()],
        }
        for column in compared
    }
