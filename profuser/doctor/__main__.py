"""`python -m profuser.doctor` shows how well a source's tokens cover a target's, on a text of yours and without any model.

With a recipe it shows instead how every model's own chat template renders one training example: what is context, what is
learnt, and where the turn ends. With `--sources` it says which of the recipe's sources are worth combining, and how; for this
the sources answer the held-out prompts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from profuser.cli import main_of
from profuser.doctor.text_file import read_text

DESCRIPTION = (
    "How well a source's tokens cover a target's, on a text of yours and without any model; how a training example looks in every "
    "model's chat template; or which sources are worth combining, and how."
)


def arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own arguments, and those that override the recipe. It ends the process where they contradict each other."""
    parser = argparse.ArgumentParser(
        prog="python -m profuser.doctor",
        description=DESCRIPTION,
        usage="%(prog)s --tokenizers TARGET SOURCE --text FILE [--align fusellm] [--json]\n"
        "       %(prog)s --config RECIPE [--example N] [--json] [recipe overrides]\n"
        "       %(prog)s --sources [--config RECIPE] [--base MODEL] [--json] [recipe overrides]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--tokenizers",
        nargs=2,
        metavar=("TARGET", "SOURCE"),
        help="each a directory, a Hub id, or demo:NAME for a bundled model",
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 text, which is taken as one response")
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        help="show a training example in every model's chat template; or compare its sources",
    )
    parser.add_argument("--example", type=int, metavar="N", help="the number of the example, counted from 0; default 0")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument(
        "--align",
        choices=("bytes", "fusellm"),
        help="bytes (the default): our own alignment; fusellm: only those positions that FuseLLM's dynamic time warping accepts",
    )
    # With a value it is the recipe's key of that name.
    parser.add_argument(
        "--sources",
        nargs="?",
        action="append",
        metavar="",
        help="say which sources of a recipe are worth combining, and how; without --config those of the bundled demo",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the model that the sources were trained from: a directory, a Hub id, or demo:NAME",
    )
    args, overrides = parser.parse_known_args(argv)
    given = args.sources or []
    args.sources = None in given
    overrides += [f"--sources={value}" for value in given if value is not None]

    recipe = args.config is not None or args.sources
    if recipe and (args.tokenizers or args.text or args.align):
        parser.error(f"give {'--sources' if args.sources else '--config'}, or --tokenizers and --text")
    if args.sources and args.example is not None:
        parser.error("give --sources or --example")
    if args.base is not None and not args.sources:
        parser.error("give --base together with --sources")
    if not recipe and (overrides or not (args.tokenizers and args.text)):
        unknown = f"; unknown: {' '.join(overrides)}" if overrides else ""
        parser.error(f"give --tokenizers and --text, or --config, or --sources{unknown}")
    return args, overrides


def main(argv: list[str]) -> None:
    args, overrides = arguments(argv)
    if args.config is not None or args.sources:
        from profuser.recipe.parse import parse_run

        config = [] if args.config is None else ["--config", args.config]
        run = parse_run("doctor", [*config, *overrides], {}, DESCRIPTION)
        if args.sources:
            from profuser.doctor.sources import show_sources

            return show_sources(run, args.base, args.json)
        from profuser.doctor.templates import show_templates

        return show_templates(run, args.example or 0, args.json)

    text, align = read_text(args.text), args.align or "bytes"

    from profuser.alignment.align import PlainText
    from profuser.doctor.diagnosis import diagnose
    from profuser.doctor.tables import Names, describe_diagnosis, table
    from profuser.models.load import load_tokenizer
    from profuser.recipe.schema import SourceConfig
    from profuser.text.display import terminal_width, use_color

    target, source = (
        PlainText(load_tokenizer(SourceConfig(name=f"--tokenizers {role}", model=model)))
        for role, model in zip(("TARGET", "SOURCE"), args.tokenizers)
    )
    diagnosis = diagnose(target, source, text, align)
    target_name, source_name = args.tokenizers
    names = Names(target_name, source_name, align, str(args.text))
    if args.json:
        print(json.dumps(describe_diagnosis(diagnosis, names)))
    else:
        print(table(diagnosis, names, color=use_color(), width=terminal_width()))


if __name__ == "__main__":
    main_of(main)
