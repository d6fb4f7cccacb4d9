"""FuseLLM's alignment of two token sequences in plain Python, with which bench_align.py compares ours.

It is dynamic time warping over token strings at Levenshtein cost, where each pair of strings is compared only once. It was
written from the description of FuseLLM's behaviour in profuser/alignment/fusellm.py, and not from that module's code.
"""

from __future__ import annotations

import functools

DIAGONAL, UP, LEFT = range(3)


def plain_dtw(source: list[str], target: list[str]) -> list[tuple[int, int]]:
    """The cheapest path of (source, target) positions.

    Of equally cheap steps back, the diagonal one is preferred to the one up, and that to the one left.
    """
    distance = functools.cache(levenshtein)
    above = [0, *len(target) * [float("inf")]]
    steps = []
    for left_string in source:
        row, taken = [float("inf")], []
        for j, right_string in enumerate(target):
            best, step = above[j], DIAGONAL
            if above[j + 1] < best:
                best, step = above[j + 1], UP
            if row[j] < best:
                best, step = row[j], LEFT
            row.append(best + distance(left_string, right_string))
            taken.append(step)
        above = row
        steps.append(taken)
    i, j, path = len(source) - 1, len(target) - 1, []
    while i >= 0 and j >= 0:
        path.append((i, j))
        step = steps[i][j]
        i, j = i - (step != LEFT), j - (step != UP)
    return path[::-1]


def levenshtein(left: str, right: str) -> int:
    row = list(range(len(right) + 1))
    for i, x in enumerate(left, 1):
        above, row = row, [i]
        for j, y in enumerate(right, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]
