"""`python -m profuser.evaluate RUN_DIR` scores a finished run again, on its own held-out data or on a new file."""

from __future__ import annotations

import argparse
from pathlib import Path

from profuser.cli import main_of
from profuser.errors import ConfigError


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command's arguments. It raises ConfigError where they contradict each other."""
    parser = argparse.ArgumentParser(
        prog="python -m profuser.evaluate",
        description="Score the fused model of a finished run again, beside its sources.",
        usage="%(prog)s RUN_DIR [--data FILE [--models MODEL ...]]",
    )
    parser.add_argument(
        "run_dir",
        type=Path,
        nargs="?",
        metavar="RUN_DIR",
        help="directory of a finished run, for instance runs/demo",
    )
    parser.add_argument("--data", metavar="FILE", help="score on the prompts of this file instead of the held-out ones")
    parser.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="further models: a directory, a finished run, a Hub id, demo:NAME, or decode:RECIPE for its sources together",
    )
    args = parser.parse_args(argv)
    if args.run_dir is None:
        raise ConfigError(
            "evaluate must be given the directory of a finished run, got none; give for instance runs/demo"
        )
    if args.models and args.data is None:
        raise ConfigError(
            f"--models must come with --data, got {args.models[0]} without; name the file whose prompts are answered"
        )
    return args


def main(argv: list[str]) -> None:
    args = arguments(argv)
    print(on_new_data(args) if args.data is not None else on_heldout_data(args.run_dir))


def on_heldout_data(directory: Path) -> str:
    """Scores a run again on its held-out data, and returns the table."""
    from profuser.errors import DataError
    from profuser.evaluate.finished import open_run
    from profuser.evaluate.scores import evaluate
    from profuser.evaluate.terminal import score_table
    from profuser.pipeline import check_unchanged
    from profuser.stopping import working
    from profuser.store.store import Store
    from profuser.train.run_record import EVALUATION, SCORES, record_files

    run, _ = open_run(directory)
    store = Store.open(run.store_dir)
    try:
        with working():
            scores = evaluate(run, store)
    except DataError:
        check_unchanged(run)  # if the store is not the run's, this says so
        raise
    record_files(directory, SCORES, EVALUATION)
    return score_table(scores)


def on_new_data(args: argparse.Namespace) -> str:
    """Scores a run and further models on a new file, and returns the table."""
    from profuser.evaluate.new_data import score_on
    from profuser.evaluate.terminal import score_table
    from profuser.stopping import working

    with working():
        return score_table(score_on(args.run_dir, args.data, args.models))


if __name__ == "__main__":
    main_of(main)
