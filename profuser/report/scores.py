"""What a run's scores say: every model's with its intervals, and how the fused model compares with the best single one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from profuser.recipe.places import is_path
from profuser.report.figures import Model
from profuser.report.intervals import difference, mean_score, wilson
from profuser.train.run_record import EVALUATION, SCORES, read_measured


def read_scores(run_dir: Path, record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads scores.json and evaluation.json of a complete run. Without held-out prompts there are none, and both say nothing.

    Raises:
        DataError: a file is missing, or is not what was written.
    """
    if not has_heldout(record):
        return {"sources": {}, "target_before": {}, "fused": {}}, {"counts": {}}
    return read_measured(run_dir, record, SCORES), read_measured(run_dir, record, EVALUATION)


def has_heldout(record: dict[str, Any]) -> bool:
    """Whether a run has held-out prompts: in a file of their own, or as a share of its training data."""
    data = record["recipe"].get("data", {})
    return data.get("heldout", "") is not None or bool(data.get("heldout_share"))


def models_of(scores: Mapping[str, Any], counts: Mapping[str, int], target: str) -> list[Model]:
    """Returns the models in the order in which the page shows them: fused, target before, sources.

    A target that is also a source, with the same scores, appears only once.
    """
    before = scores["target_before"]
    rows = [("fused", "fused", scores["fused"])] + ([(called(target), "target", before)] if before else [])
    for name, values in scores["sources"].items():
        if name != target or values != before:
            rows.append((name, "source", values))
    models = []
    for name, role, values in rows:
        per_skill = {
            skill: wilson(_number(value), counts.get(skill)) for skill, value in values.items() if skill != "mean"
        }
        mean = mean_score(_number(values["mean"]), list(per_skill.values())) if "mean" in values else None
        models.append(Model(name, role, per_skill | ({"mean": mean} if mean else {})))
    return models


def called(target: str) -> str:
    """Returns what the page calls a target. One that the recipe gives by its place on the disk has the name of its directory."""
    return Path(target).resolve().name if is_path(target) else target


def in_order(found: Iterable[str], skills: Sequence[str]) -> list[str]:
    """Returns skills in the order of those that a run was scored on; behind them all others, and "mean", as they were."""
    return sorted(found, key=lambda skill: skills.index(skill) if skill in skills else len(skills))


def _number(value: float | None) -> float:
    """Returns a value of a JSON file as a number, NaN for null."""
    return math.nan if value is None else float(value)


def answer_of(models: Sequence[Model], skills: Sequence[str]) -> dict[str, Any] | None:
    """Returns what the page begins with: how the fused model compares with the best single one, and what the target forgot.

    It is None where nothing was scored.
    """
    # The fused model against the best of the others.
    fused, others = models[0], [model for model in models[1:] if "mean" in model.scores]
    if "mean" not in fused.scores or not others:
        return None
    best = max(others, key=lambda model: (not math.isnan(model.scores["mean"].value), model.scores["mean"].value))
    before = next((model for model in models if model.role == "target"), None)
    answer: dict[str, Any] = {
        "fused": fused.scores["mean"],
        "best": best.scores["mean"],
        "best_name": best.name,
    }
    answer["gain"] = difference(answer["fused"], answer["best"])
    points = abs(100 * answer["gain"].value)
    answer["verdict"] = (
        f"{points:.1f} points {'above' if answer['gain'].value > 0 else 'below'}" if round(points, 1) else "level with"
    )
    answer["certain"] = answer["gain"].low > 0 or answer["gain"].high < 0

    # The target before and after: its change in the skill that was its best, and the others in which it got worse.
    if before:
        pairs = {skill: (before.scores[skill], fused.scores[skill]) for skill in skills if skill in before.scores}
        changes = {skill: (*pair, difference(pair[1], pair[0])) for skill, pair in pairs.items()}
        strongest = max(changes, key=lambda skill: changes[skill][0].value, default=None)
        fell = [(skill, change[2]) for skill, change in changes.items() if skill != strongest and change[2].value < 0]
        answer["strongest"] = strongest and (strongest, *changes[strongest])
        answer["fell"] = sorted(fell, key=lambda item: item[1].value)
    return answer
