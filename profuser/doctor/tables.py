"""Shows a diagnosis, as JSON for programs and as a table for people."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any

from profuser.alignment.spans import ENGINE
from profuser.alignment.types import KINDS
from profuser.doctor.diagnosis import Diagnosis
from profuser.doctor.token_rows import LEGEND, example_rows, paint
from profuser.text.display import clipped

SHOWN_SKIPS = 10  # how many skips the table lists


@dataclass(frozen=True, slots=True)
class Names:
    """What the command was given: the two tokenizers, the kind of alignment and the text's file."""

    target: str
    source: str
    align: str
    file: str


def describe_diagnosis(diagnosis: Diagnosis, names: Names) -> dict[str, Any]:
    """Returns what `--json` prints. mapped_mass and reliability are null, because they need a model."""
    return {
        "target": names.target,
        "source": names.source,
        "text": names.file,
        "align": names.align,
        "engine": ENGINE,
        "positions": len(diagnosis.kind),
        "bytes": len(diagnosis.data),
        **diagnosis.shares,
        "mapped_mass": None,
        "reliability": None,
        "skips": [asdict(skip) for skip in diagnosis.skips],
    }


def table(diagnosis: Diagnosis, names: Names, *, color: bool, width: int) -> str:
    """Returns the same for a person: counts by kind, what was skipped, and a few lines of the text with their tokens."""
    # What was compared.
    facts = (
        ("target", names.target),
        ("source", names.source),
        ("text", f"{names.file} ({len(diagnosis.data)} bytes, {len(diagnosis.kind)} target tokens)"),
        ("align", names.align),
        ("engine", ENGINE),
    )
    lines = [f"{name:<8}{value}" for name, value in facts]

    # How many positions there are of every kind.
    lines += ["", f"{'kind':<16}{'positions':>10}{'share':>9}"]
    shares, counts = diagnosis.shares, diagnosis.counts
    if not len(diagnosis.kind):
        return "\n".join([*lines[:-2], "", "the text has no tokens"])
    for k, name in enumerate(KINDS):
        lines.append(f"{paint(f'{name:<16}', k, color)}{counts[name]:>10}{100 * shares[name]:>8.1f}%")
    usable = len(diagnosis.kind) - counts["skipped"]
    lines.append(f"{'usable':<16}{usable:>10}{100 * shares['usable']:>8.1f}%")

    # The first skips, with their reasons.
    if diagnosis.skips:
        lines += ["", "skipped positions"]
    for skip in diagnosis.skips[:SHOWN_SKIPS]:
        held = "" if skip.text is None else f"  {clipped(skip.text, width - 32)}"
        lines.append(f"  {skip.reason:<20}{skip.positions:>8}{held}")
    if len(diagnosis.skips) > SHOWN_SKIPS:
        lines.append(f"  and {len(diagnosis.skips) - SHOWN_SKIPS} more: --json lists them all")

    # A few lines of the text with the tokens marked under them, and what the marks mean.
    examples = example_rows(
        diagnosis.data,
        diagnosis.target,
        diagnosis.kind,
        diagnosis.source,
        color=color,
        width=width,
    )
    if examples:
        lines += ["", *itertools.chain.from_iterable((*example, "") for example in examples)]
        lines += [
            "lines with the most to see, cut to the width; · is a space, ⏎ a line end, \\xe4 one byte of a character that "
            "tokens split, ∅ a token without bytes",
            "a mark stands where a token begins, the target's in the row `target`, the source's (|) in the row `source`",
        ]
        lines += [
            f"  {paint(mark, k, color)}  {paint(KINDS[k], k, color)}: {meaning}"
            for k, (mark, meaning) in enumerate(LEGEND)
        ]
    return "\n".join(lines)
