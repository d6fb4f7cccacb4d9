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

    from profuser.errors import DataError
    from profuser.evaluate.scores import evaluate
    from profuser.evaluate.terminal import score_table
    from profuser.recipe.parse import Run, load_recipe
    from profuser.stopping import working
    from profuser.store.store import Store
    from profuser.train.run_directory import read_record

    record = read_record(directory)
    if record["status"] != "complete":
        raise DataError(
            f"RUN_DIR must hold a finished run, {directory} is not complete; run profuser.train with its recipe again"
        )
    recipe = replace(load_recipe(record["recipe"]), output=str(directory), store=record["store"])
    with working():
        print(score_table(evaluate(Run(recipe=recipe, name=directory.name), Store.open(Path(record["store"])))))


if __name__ == "__main__":
    main_of(main)
