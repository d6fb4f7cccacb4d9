"""`python -m profuser.evaluate RUN_DIR` scores a finished run again."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from profuser.cli import main_of


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m profuser.evaluate",
        description="Score the fused model of a finished run again, beside its sources.",
    )
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="directory of a finished run, for instance runs/demo"
    )
    directory = parser.parse_args(argv).run_dir

    from profuser.errors import ConfigError, DataError
    from profuser.evaluate.scores import evaluate
    from profuser.evaluate.terminal import score_table
    from profuser.pipeline import check_unchanged
    from profuser.recipe.parse import Run, load_recipe
    from profuser.stopping import working
    from profuser.store.sealed import damaged_files
    from profuser.store.store import Store
    from profuser.train.run_record import EVALUATION, SCORES, check_own, model_files, read_run, record_files

    # The run, and whether its files are its own.
    record = read_run(directory)
    if record["status"] != "complete":
        raise DataError(
            f"RUN_DIR must hold a finished run, {directory} is not complete; run `python -m profuser.train` with its recipe again"
        )
    check_own(directory, record)
    try:
        recipe = replace(load_recipe(record["recipe"]), output=str(directory), store=record["store"])
    except ConfigError as error:
        raise DataError(str(error)) from None
    run = Run(recipe=recipe, name=directory.name)
    store = Store.open(run.store_dir)

    # A model that was edited on purpose is scored as it is.
    if differing := damaged_files(directory, model_files(record)):
        print(f"{', '.join(differing)} in {directory} is not what training wrote; what is there is scored", flush=True)
    try:
        with working():
            scores = evaluate(run, store)
    except DataError:
        check_unchanged(run)  # if the store is not the run's, this says so
        raise
    record_files(directory, SCORES, EVALUATION)
    print(score_table(scores))


if __name__ == "__main__":
    main_of(main)
