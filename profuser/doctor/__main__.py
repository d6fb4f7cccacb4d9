"""`python -m profuser.doctor` shows how well a source's tokens cover a target's, on a text of yours and without any model.

With a recipe it shows instead how every model's own chat template renders one training example: what is context, what is
learnt, and where the turn ends.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from profuser.cli import main_of

DESCRIPTION = "How well a source's tokens cover a target's, on a text of yours and without any model."


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m profuser.doctor",
        description=DESCRIPTION,
        usage="%(prog)s --tokenizers TARGET SOURCE --text FILE [--align fusellm] [--json]\n"
        "       %(prog)s --config RECIPE [--example N] [--json] [recipe overrides]",
    )
    parser.add_argument(
        "--tokenizers",
        nargs=2,
        metavar=("TARGET", "SOURCE"),
        help="each a directory, a Hub id, or demo:NAME for a bundled model",
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 text, which is taken as one response")
    parser.add_argument("--config", metavar="RECIPE", help="show a training example in every model's chat template")
    parser.add_argument("--example", type=int, default=0, metavar="N", help="the number of the example, counted from 0")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument(
        "--align",
        choices=("bytes", "fusellm"),
        default="bytes",
        help="bytes: our own alignment; fusellm: only those positions that FuseLLM's dynamic time warping accepts",
    )
    args, overrides = parser.parse_known_args(argv)
    if args.config is not None:
        if args.tokenizers or args.text:
            parser.error("give --config, or --tokenizers and --text")
        from profuser.doctor.templates import show_templates
        from profuser.recipe.parse import parse_run

        run = parse_run("doctor", ["--config", args.config, *overrides], {}, DESCRIPTION)
        return show_templates(run, args.example, args.json)
    if overrides or not (args.tokenizers and args.text):
        parser.error(
            f"give --tokenizers and --text, or --config{'; unknown: ' + ' '.join(overrides) if overrides else ''}"
        )

    from profuser.alignment.align import PlainText
    from profuser.doctor.diagnosis import diagnose, read_text
    from profuser.doctor.tables import Names, describe_diagnosis, table
    from profuser.models.load import load_tokenizer
    from profuser.recipe.schema import SourceConfig
    from profuser.text.display import terminal_width, use_color

    text = read_text(args.text)
    target, source = (
        PlainText(load_tokenizer(SourceConfig(name=f"--tokenizers {role}", model=model)))
        for role, model in zip(("TARGET", "SOURCE"), args.tokenizers)
    )
    diagnosis = diagnose(target, source, text, args.align)
    target_name, source_name = args.tokenizers
    names = Names(target_name, source_name, args.align, str(args.text))
    if args.json:
        print(json.dumps(describe_diagnosis(diagnosis, names)))
    else:
        print(table(diagnosis, names, color=use_color(), width=terminal_width()))


if __name__ == "__main__":
    main_of(main)
