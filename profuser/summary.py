"""What a preparation found: wins per mode, alignment per source, and every response with its scores for audit."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from profuser.alignment.types import KINDS
from profuser.capture import NOT_WINNER, OK, REASONS
from profuser.targets import INFER, MODE_NAMES, TRAIN

if TYPE_CHECKING:
    import datasets

    from profuser.prepare import Preparation


def summarise(p: Preparation) -> tuple[dict[str, Any], datasets.Dataset]:
    """(summary.json, the audit table with one row for each training prompt)."""
    import datasets

    rows, names = p.splits["train"], [s.name for s in p.sources]
    shards = [p.store.get(name) for name in p.store.shards("targets/train")]
    min_ce = min_ce_winners(shards, len(rows))
    skills = list(dict.fromkeys(row["skill"] for row in rows))
    summary: dict[str, Any] = {
        "sources": names,
        "target": p.recipe.target,
        "skills": skills,
        "examples": len(rows),
        "min_ce_unit": p.recipe.align.min_ce_unit,
        "min_ce_wins": count_wins(rows, [names[w] if w >= 0 else "none" for w in min_ce]),
        "vote_wins": {},
        "judges": {},
        "alignment": alignment_summary(shards, names),
        "handled": handled(p),
        "seconds": dict(p.seconds),
    }
    table: dict[str, list] = {
        "prompt": [r["prompt"] for r in rows],
        "ground_truth": [r["response"] for r in rows],
        "skill": [r["skill"] for r in rows],
        "min_ce_winner": [names[w] if w >= 0 else None for w in min_ce],
    }
    if p.recipe.judges:
        winner, votes, scores = p.ballots
        per_source = p.recipe.generation.responses_per_source
        candidates = [c for _, part in p._shards("train") for c in p.candidates(part)]
        summary["vote_wins"] = count_wins(rows, [names[w // per_source] if w >= 0 else "none" for w in winner])
        for r, judge in enumerate(p.recipe.judges):
            summary["judges"][judge.name] = first_choices(scores[:, r], names, per_source)
        unusable = sum(1 for row in candidates for _, ok in row if not ok)
        if unusable:
            summary["handled"]["empty or unfinished response of a source, kept from the judges"] = unusable
        for c in range(len(names) * per_source):
            label = names[c // per_source] + (f"_{c % per_source}" if per_source > 1 else "")
            table[f"response_{label}"] = [row[c][0] for row in candidates]
            table[f"votes_{label}"] = votes[:, c].tolist()
            for r, judge in enumerate(p.recipe.judges):
                table[f"score_{judge.name}_{label}"] = [float(x) for x in scores[:, r, c]]
        table["vote_winner"] = [names[w // per_source] if w >= 0 else None for w in winner]
        table["chosen"] = [
            _messages(r["prompt"], c[w][0]) if w >= 0 else None for r, c, w in zip(rows, candidates, winner)
        ]
        loser = [_loser(c, v, w) for c, v, w in zip(candidates, votes, winner)]
        table["rejected"] = [
            _messages(r["prompt"], c[x][0]) if x is not None else None for r, c, x in zip(rows, candidates, loser)
        ]
    return summary, datasets.Dataset.from_dict(table)


def min_ce_winners(shards: list[dict[str, np.ndarray]], examples: int) -> np.ndarray:
    """The source with the lowest cross-entropy on each ground truth, lowest index on ties, -1 without any."""
    winner = np.full(examples, -1)
    for shard in shards:
        for example, mode, ce in zip(shard["example"], shard["mode"], shard["source_ce"]):
            ce = np.where(np.isnan(ce), np.inf, ce)
            if mode == TRAIN and np.isfinite(ce).any():
                winner[example] = int(ce.argmin())
    return winner


def count_wins(rows: list[dict], winners: list[str]) -> dict[str, dict[str, int]]:
    wins: dict[str, Counter] = {}
    for row, name in zip(rows, winners):
        wins.setdefault(row["skill"], Counter())[name] += 1
    return {skill: dict(counter) for skill, counter in wins.items()}


def first_choices(scores: np.ndarray, names: list[str], per_source: int) -> dict[str, float]:
    """Share of one judge's first places that went to each source; ties are split, who scores all alike abstains."""
    shown = np.where(np.isnan(scores), -np.inf, scores)
    best = shown == shown.max(1, keepdims=True)
    best &= np.isfinite(shown)
    counted = best.any(1) & (best != np.isfinite(shown)).any(1)
    share = (best[counted] / best[counted].sum(1, keepdims=True)).sum(0) / max(1, counted.sum())
    return {name: float(share[i * per_source : (i + 1) * per_source].sum()) for i, name in enumerate(names)}


def alignment_summary(shards: list[dict[str, np.ndarray]], names: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Per mode and source: positions, shares by kind, coverage, mean mapped mass, reliability histogram."""
    total = {key: sum(shard[key] for shard in shards) for key in ("kinds", "covered", "mapped_mass", "reliability")}
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for mode in (TRAIN, INFER):
        for s, name in enumerate(names):
            positions = int(total["kinds"][mode, s].sum())
            if positions:
                result.setdefault(MODE_NAMES[mode], {})[name] = {
                    "positions": positions,
                    **{kind: float(n / positions) for kind, n in zip(KINDS, total["kinds"][mode, s])},
                    "coverage": float(total["covered"][mode, s] / positions),
                    "mapped_mass": float(total["mapped_mass"][mode, s] / max(1, total["covered"][mode, s])),
                    "reliability": total["reliability"][mode, s].tolist(),
                }
    return result


def handled(p: Preparation) -> dict[str, int]:
    """What was skipped, cut or kept as text, in examples of all splits: what several sources skip counts once."""
    counts: Counter[str] = Counter()
    for split, rows in p.splits.items():
        for kind in ("gt", "infer"):
            names = [p.store.shards(f"capture/{split}-{kind}-{s.name}") for s in p.sources]
            for same_examples in zip(*names):
                shards = [p.store.get(name) for name in same_examples]
                reasons, cut = (np.stack([shard[key] for shard in shards]) for key in ("reason", "cut"))
                for reason, name in enumerate(REASONS):
                    if reason not in (OK, NOT_WINNER):
                        counts[name] += int((reasons == reason).any(0).sum())
                counts["over-long response, cut without an end of turn"] += int(cut.any(0).sum())
        counts["empty prompt, kept"] += sum(not row["prompt"].strip() for row in rows)
        held = [chat.token_bytes.has_control for chat in (p.target, *p.chats.values())]
        counts["control token spelt out in a text, kept as text"] += sum(
            any(has(row["prompt"]) or has(row["response"]) for has in held) for row in rows
        )
    return {name: n for name, n in counts.items() if n}


def handled_line(summary: dict[str, Any]) -> str:
    """`handled` in one line for the end of a run; empty where there was nothing."""
    counts = summary["handled"]
    return "handled: " + "; ".join(f"{n} x {name}" for name, n in counts.items()) if counts else ""


def _messages(prompt: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _loser(candidates: list[tuple[str, bool]], votes: np.ndarray, winner: int) -> int | None:
    """The eligible response with the fewest votes that is not the winner's text."""
    others = [c for c, (text, ok) in enumerate(candidates) if ok and winner >= 0 and text != candidates[winner][0]]
    return min(others, key=lambda c: (votes[c], c)) if others else None
