"""`python -m profuser.prepare` makes a store of aligned targets from models and prompts.

Several processes may make one store, be they started by torchrun, by accelerate launch or one by one.
"""

from __future__ import annotations

import contextlib

from profuser.cli import main_of


def main(argv: list[str]) -> None:
    from profuser.recipe.parse import parse_run

    flags = {"fresh": "rename an existing store aside and start over"}
    run = parse_run("prepare", argv, flags, "From models and prompts to a store of aligned targets.")
    run.check_places()

    import torch
    from accelerate import PartialState

    from profuser.prepare.announce import announce
    from profuser.prepare.inputs import Inputs
    from profuser.prepare.phases import Preparation
    from profuser.prepare.sharing import PATIENCE, takes_part
    from profuser.progress import silenced
    from profuser.store.fresh import check_fresh, start_over

    # The first process of a launcher puts the store in order, and speaks for all.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    first = state.is_main_process
    with contextlib.ExitStack() as held:
        if not first:
            held.enter_context(silenced())
        with state.main_process_first():
            if not takes_part(run.recipe, state):
                return
            fresh = run.options["fresh"] and first
            if fresh:
                check_fresh(run, "store")
            # Whatever is wrong with the recipe is found before anything is moved.
            inputs = Inputs.open(run, fresh=fresh)
            if fresh:
                inputs.try_judges(run.recipe.judges)
                start_over(run, "store")
            preparation = Preparation.begin(inputs, held, renews=True)
            if first:
                announce("prepare", preparation, state.num_processes)
        state.destroy_process_group()  # from here on none needs the others
        store = preparation.run()
        if line := store.handled():
            print(line)
        print(f"store complete: {store.directory} ({len(store)} shards); summary in {store.directory / 'summary.json'}")


if __name__ == "__main__":
    main_of(main)
