"""What the sources answered and how the judges voted, read back from the captures of a store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from profuser.config import Recipe
from profuser.errors import DataError
from profuser.reward import vote
from profuser.store import Store
from profuser.targets import TRAIN


def candidates(store: Store, sources: Sequence[str], number: int, split: str = "train") -> list[list[tuple[str, bool]]]:
    """(text, eligible) of all responses to the prompts of shard `number`, source by source."""
    per_source = [store.get_json(f"capture/{split}-responses-{source}-{number:05d}") for source in sources]
    return [
        [(text, bool(text) and finished) for answers in row for text, finished in answers] for row in zip(*per_source)
    ]


def count_votes(
    store: Store, sources: Sequence[str], judges: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(winner (E,) candidate index or -1, votes (E, C), scores (E, R, C)) over the whole training split.

    Raises:
        DataError: a judge gave NaN to every eligible response.
    """
    numbers = range(len(store.shards(f"capture/train-responses-{sources[0]}")))
    eligible = np.array([[ok for _, ok in row] for number in numbers for row in candidates(store, sources, number)])
    scores = np.stack(
        [
            np.concatenate([store.get(f"capture/train-scores-{judge}-{number:05d}")["scores"] for number in numbers])
            for judge in judges
        ],
        axis=1,
    )
    for r, judge in enumerate(judges):
        if eligible.any() and np.isnan(scores[:, r][eligible]).all():
            raise DataError(
                f"judge {judge} must score some response, it gave NaN to all {eligible.sum()}; fix the judge or take it out"
            )
    return *vote(scores, eligible), scores


def judged_examples(
    store: Store, recipe: Recipe, rows: Sequence[dict], examples: Sequence[int]
) -> list[dict[str, Any]]:
    """Some of the training prompts with what preparation found out about them.

    Returns:
        For each of `examples` its skill, prompt, ground_truth and sources: a list of name, ce (nats per recipe's unit on
        the ground truth; None where the source was not scored), wins_min_ce, and responses with text, eligible, votes
        and wins_vote (none of them without judges).
    """
    names, size = [s.name for s in recipe.sources], recipe.capture.shard_size
    per_source = recipe.generation.responses_per_source
    winner, votes, _ = count_votes(store, names, [j.name for j in recipe.judges]) if recipe.judges else (None,) * 3
    found = []
    for i in examples:
        shard = store.get(f"targets/train-{i // size:05d}")
        ce = shard["source_ce"][(shard["example"] == i) & (shard["mode"] == TRAIN)].ravel()
        ce = np.where(np.isfinite(ce), ce, np.inf) if len(ce) else np.full(len(names), np.inf)
        answers = candidates(store, names, i // size)[i % size] if recipe.judges else []
        sources = []
        for s, name in enumerate(names):
            responses = [
                {
                    "text": answers[c][0],
                    "eligible": answers[c][1],
                    "votes": float(votes[i, c]),
                    "wins_vote": bool(c == winner[i]),
                }
                for c in range(s * per_source, (s + 1) * per_source)
                if recipe.judges
            ]
            value = float(ce[s]) if np.isfinite(ce[s]) else None
            lowest = value is not None and s == int(ce.argmin())
            sources.append({"name": name, "ce": value, "wins_min_ce": lowest, "responses": responses})
        row = rows[i]
        found.append(
            {"skill": row["skill"], "prompt": row["prompt"], "ground_truth": row["response"], "sources": sources}
        )
    return found
