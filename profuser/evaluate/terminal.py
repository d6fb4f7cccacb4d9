"""Formats scores and examples for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from profuser.text.display import visible


def score_table(scores: Mapping[str, Any]) -> str:
    """Formats the content of scores.json as a table in percent, one line per model. Further models come last.

    Of a single skill there is no mean.
    """
    rows = [*scores["sources"].items(), ("target before", scores["target_before"]), ("fused", scores["fused"])]
    rows += scores.get("models", {}).items()
    skills = list(scores["fused"])
    if len(skills) == 2:
        skills = [skill for skill in skills if skill != "mean"]
    width, column = max(len(name) for name, _ in rows), max(10, *map(len, skills)) + 2
    head = " " * width + "".join(f"{skill:>{column}}" for skill in skills)
    lines = (
        f"{name:<{width}}" + "".join(f"{100 * values[skill]:{column}.1f}" for skill in skills) for name, values in rows
    )
    return visible("\n".join([head, *lines]))


def worse_line(scores: Mapping[str, Any]) -> str:
    """Returns the line that says where the fused model is worse than the target was; it is empty where it is not."""
    before, fused = scores["target_before"]["mean"], scores["fused"]["mean"]
    if fused >= before:
        return ""
    return (
        f'the fused model is worse than the target was ({100 * fused:.1f} after {100 * before:.1f}); docs/models.md, "If the fused model '
        'is worse", says what to look at'
    )


def closing_examples(evaluation: dict[str, Any], n: int) -> str:
    """Formats the first n examples of evaluation.json: what the target answered before, and what the fused model answers."""
    parts = []
    for example in evaluation.get("examples", [])[:n]:
        lines = [f"[{example['skill']}] {example['prompt']}"]
        for key, label in (("target_before", "before"), ("fused", "now   ")):
            mark = {None: "not scored", True: "right"}.get(example["correct"].get(key), "wrong")
            lines.append(f"  {label}: {example['responses'][key]}  ({mark})")
        parts.append("\n".join(lines))
    return visible("\n".join(["", *parts, ""]))
