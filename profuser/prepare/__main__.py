"""`python -m profuser.prepare` makes a store of aligned targets from models and prompts."""

from __future__ import annotations

import contextlib

from profuser.cli import main_of


def main(argv: list[str]) -> None:
    from profuser.recipe.parse import parse_run

    flags = {"fresh": "rename an existing store aside and start over"}
    run = parse_run("prepare", argv, flags, "From models and prompts to a store of aligned targets.")

    from profuser.prepare.announce import announce
    from profuser.prepare.inputs import Inputs
    from profuser.prepare.phases import Preparation
    from profuser.store.fresh import check_fresh, start_over

    fresh = run.options["fresh"]
    if fresh:
        check_fresh(run, "store")
    inputs = Inputs.open(run, fresh=fresh)  # whatever is wrong with the recipe is found before anything is moved
    if fresh:
        inputs.try_judges(run.recipe.judges)
        start_over(run, "store")
    with contextlib.ExitStack() as held:
        preparation = Preparation.begin(inputs, held)
        announce("prepare", preparation)
        store = preparation.run()
    if line := store.handled():
        print(line)
    print(f"store complete: {store.directory} ({len(store)} shards); summary in {store.directory / 'summary.json'}")


if __name__ == "__main__":
    main_of(main)
