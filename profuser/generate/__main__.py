"""`python -m profuser.generate` lets the sources of a recipe answer prompts together, without any training."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from profuser.cli import main_of
from profuser.errors import ConfigError, DataError, Stopped

DESCRIPTION = "Let the sources of a recipe answer prompts together, without training."


def arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own arguments, and those that override the recipe.

    Raises:
        ConfigError: they contradict each other.
    """
    parser = argparse.ArgumentParser(
        prog="python -m profuser.generate",
        description=DESCRIPTION,
        usage="%(prog)s [--config RECIPE] [--prompt TEXT | --input FILE --output FILE [--batch-size N] | --chat] [--trace FILE] "
        "[recipe overrides]",
        epilog="Without a prompt or a file it asks for prompts in the terminal, each of which is answered by itself. "
        "The options of decoding are the recipe's `decode`.",
    )
    parser.add_argument("--config", metavar="RECIPE", help="the recipe whose sources answer; default: the bundled demo")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this")
    parser.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="answer the `prompt`, or the conversation `messages`, of every row of this JSONL file",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="what is asked for in the terminal is one conversation; an empty line begins another",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the answers to --input into this JSONL file")
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="answer N prompts of --input at a time; the recipe's key is decode.batch_size",
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write an HTML page that shows who wrote what")
    args, overrides = parser.parse_known_args(argv)
    if args.prompt is not None and args.input is not None:
        raise ConfigError("give either --prompt or --input, got both")
    if args.chat and (args.prompt is not None or args.input is not None):
        raise ConfigError(
            "--chat must be given without --prompt and --input, because it asks in the terminal; take it out"
        )
    if (args.input is None) != (args.output is None):
        raise ConfigError(
            "--input and --output must be given together, got one of them; --output is the file of the answers"
        )
    if args.batch_size is not None:
        if args.input is None:
            raise ConfigError("--batch-size must go with --input, got no file of prompts; leave it out, or give one")
        if any(override.startswith("--decode.batch_size") for override in overrides):
            raise ConfigError("give either --batch-size or --decode.batch_size, got both")
        overrides.append(f"--decode.batch_size={args.batch_size}")
    if args.prompt is not None and not args.prompt.strip():
        raise ConfigError("--prompt must be a text, got an empty one")

    from profuser.store.files import in_the_way

    for name, path in (("output", args.output), ("trace", args.trace)):
        if path is not None and path.exists() and not path.is_file():
            raise ConfigError(f"--{name} must be a file, got {path}, which is none; name another")
        if path is not None and (other := in_the_way(path.parent)) is not None:
            raise ConfigError(
                f"--{name} must be in a directory, got {path}, for which {other} is in the way; name another"
            )
    # Each is read or written, and none may take the place of another.
    given = {path.resolve(): path for path in (args.input, args.output, args.trace) if path is not None}
    if len(given) < sum(path is not None for path in (args.input, args.output, args.trace)):
        raise ConfigError(
            f"--input, --output and --trace must be different files, got {next(iter(given.values()))} twice"
        )
    return args, overrides


def main(argv: list[str]) -> None:
    args, overrides = arguments(argv)

    from profuser.generate.prompts import prompts_of
    from profuser.recipe.parse import parse_run
    from profuser.recipe.places import check_model

    # What can be wrong with the command line is said before torch and transformers are imported, which takes seconds.
    run = parse_run("generate", [*(["--config", args.config] if args.config else []), *overrides], {}, DESCRIPTION)
    for source in run.recipe.sources:
        check_model(source.name, source.model)
    if args.prompt is not None:
        check_unicode("--prompt", args.prompt)
    prompts = [] if args.input is None else prompts_of(args.input)

    from profuser.generate.answers import answer_file, finished_rows, settings_key
    from profuser.generate.methods import open_decoder
    from profuser.generate.steps import Answer
    from profuser.generate.trace import page
    from profuser.stopping import working
    from profuser.store.files import write_atomic
    from profuser.text.conversation import Conversation, Prompt, Turn

    settings = ""
    if args.input is not None:
        settings = settings_key(run.recipe)
        finished_rows(args.output, prompts, settings)  # what is wrong with it is said before a model is loaded
    fusion = open_decoder(run.recipe)
    for note in fusion.notes():
        print(note, file=sys.stderr, flush=True)
    sources = [voice.name for voice in fusion.voices]
    answered: list[tuple[Prompt, Answer]] = []
    with working():  # so that the page is written of what there is, and no row by half
        try:
            if args.input is not None:
                answered += answer_file(fusion, prompts, args.output, settings, run.recipe.decode.batch_size)
            elif args.prompt is not None:
                answered.append((args.prompt, streamed(fusion, args.prompt)))
            else:
                earlier: tuple[Turn, ...] = ()  # of this conversation
                for line in piped() if not sys.stdin.isatty() else terminal():
                    if not line.strip():
                        earlier = ()
                        continue
                    check_unicode("a prompt", line)
                    text = line.rstrip("\n")
                    prompt = Conversation((*earlier, Turn("user", text))) if earlier else text
                    answer = streamed(fusion, prompt)
                    answered.append((prompt, answer))
                    if args.chat:
                        earlier = (*earlier, Turn("user", text), Turn("assistant", answer.text))
        except Stopped as stop:
            if args.output is not None:
                raise
            raise type(stop)("answers in the terminal are not kept") from None
        finally:
            if args.trace is not None and answered:
                write_atomic(args.trace, page(sources, answered).encode())
    if args.output is not None:
        print(f"{len(prompts)} answers: {args.output}")


def check_unicode(what: str, text: str) -> None:
    """Raises DataError for a prompt that is no Unicode."""
    from profuser.recipe.utf8 import defect

    if wrong := defect(text):
        raise DataError(f"{what} must be Unicode, it has {wrong}")


def piped():
    """The lines of standard input, which are UTF-8 whatever the locale."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    yield from sys.stdin


def terminal():
    """The lines that a user types."""
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def streamed(fusion, prompt):
    """Answers a prompt and prints its segments as they come. With `rerank` the answer is printed when it is settled."""
    from profuser.generate.steps import Answer

    if fusion.config.rerank:
        answer = fusion.answer(prompt)
        print(answer.text, flush=True)
        return answer
    steps = []
    for step in fusion.steps(prompt):
        print(step.winner.text, end="", flush=True)
        steps.append(step)
    print(flush=True)
    return Answer.of(tuple(steps))


if __name__ == "__main__":
    main_of(main)
