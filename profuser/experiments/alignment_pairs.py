"""`python -m profuser.experiments.alignment_pairs`: what alignment makes of pairs of real tokenizers in five languages.

Every text in `profuser/experiments/texts` is taken as one response and diagnosed as `python -m profuser.doctor` would do.
Every position that gets no distribution is listed with its text. `--align fusellm` adds what FuseLLM's rule accepts on the
same tokens.
"""

from __future__ import annotations

import argparse
import functools
import re
from pathlib import Path

from profuser.alignment.align import PlainText
from profuser.alignment.spans import ENGINE
from profuser.alignment.types import KINDS
from profuser.cli import main_of
from profuser.doctor.diagnosis import Diagnosis, diagnose
from profuser.doctor.text_file import read_text
from profuser.environment import commit, versions
from profuser.experiments.page import write_section
from profuser.experiments.windows import LANGUAGES, TEXTS
from profuser.models.load import load_tokenizer
from profuser.recipe.schema import SourceConfig

PAIRS = (
    ("llama2", "gpt_neox"),
    ("llama2", "qwen2"),
    ("llama2", "mistral_v1"),
    ("gpt2", "deepseek_v3"),
    ("qwen2", "llama2"),
    ("gpt_neox", "llama2"),
)
"""Pairs (target, source) of tokenizers."""

SECTION = "alignment_pairs"

Results = dict[tuple[str, str, str], dict[str, Diagnosis]]
"""The diagnosis of every (target, source, language) for every mode of alignment."""


def measure(tokenizers: Path, modes: tuple[str, ...]) -> Results:
    @functools.cache
    def side(name: str) -> PlainText:
        return PlainText(load_tokenizer(SourceConfig(name=name, model=str(tokenizers.resolve() / name))))

    texts = {language: read_text(TEXTS / f"{language}.txt") for language in LANGUAGES}
    return {
        (target, source, language): {mode: diagnose(side(target), side(source), text, mode) for mode in modes}
        for target, source in PAIRS
        for language, text in texts.items()
    }


def markdown(results: Results, command: str) -> str:
    """A table of the kinds for every pair and language, and a list of every position that gets no distribution."""
    compared = any("fusellm" in by_mode for by_mode in results.values())
    head = ["target ← source", "text", "positions", *(name.replace("_", " ") for name in KINDS), "usable"]
    head += ["FuseLLM accepts"] * compared
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    skips = []
    for (target, source, language), by_mode in results.items():
        pair, diagnosis = f"{target} ← {source}", by_mode["bytes"]
        cells = [f"{100 * share:.1f}" for share in diagnosis.shares.values()]
        cells += [f"{100 * by_mode['fusellm'].shares['usable']:.1f}"] if compared else []
        lines.append(f"| {pair} | {language} | " + " | ".join([str(len(diagnosis.kind)), *cells]) + " |")
        for skip in diagnosis.skips:
            assert skip.text is not None  # only FuseLLM's rule skips positions without giving their text
            plural = "s" if skip.positions > 1 else ""
            skips.append(f"- {pair}, {language}: {skip.positions} position{plural}, {skip.reason}: {code(skip.text)}")
    least = min(by_mode["bytes"].shares["usable"] for by_mode in results.values())
    return "\n".join(
        [
            "The share of the target's tokens of each kind, in %. Each text is one response.",
            f"Command: `{command}`; {ENGINE}; tokenizers {versions()['tokenizers']}; commit {commit()}.",
            "",
            *lines,
            "",
            f"Usable in the worst case: {100 * least:.2f} %. These positions are skipped:"
            if skips
            else "No position is skipped.",
            *([""] if skips else []),
            *skips,
        ]
    )


def code(text: str) -> str:
    """A text as Markdown code, on one line."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    fence = "`" * (1 + max(map(len, re.findall("`+", escaped)), default=0))
    return f"{fence} {escaped} {fence}"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m profuser.experiments.{SECTION}", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--tokenizers",
        type=Path,
        required=True,
        metavar="DIR",
        help=f"the folder that has the tokenizers {', '.join(sorted({name for pair in PAIRS for name in pair}))}",
    )
    parser.add_argument(
        "--align",
        choices=("fusellm",),
        help="also show what FuseLLM's rule accepts; its vocabulary maps take minutes the first time",
    )
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help=f"replace the {SECTION} section of this Markdown file"
    )
    args = parser.parse_args(argv)
    results = measure(args.tokenizers, ("bytes", *([args.align] if args.align else [])))
    flag = f" --align {args.align}" if args.align else ""
    text = markdown(results, f"python -m profuser.experiments.{SECTION} --tokenizers DIR{flag}")
    print(text)
    if args.write:
        write_section(args.write, SECTION, text)


if __name__ == "__main__":
    main_of(main)
