"""Run by test_sharding.py and test_deepspeed.py: goes on with a run from its newest checkpoint for some steps, in any number of processes.

    python -m torch.distributed.run --nproc-per-node 4 tests/resharded_steps.py RECIPE STORE DIRECTORY STEPS

It saves a checkpoint then, and prints as JSON how many processes there were, the steps before it, and the losses.
"""

import json
import sys
from pathlib import Path

from profuser.recipe.parse import load_recipe
from profuser.store.store import Store
from profuser.train.loop import Trainer
from profuser.train.parallel import launch


def main() -> None:
    recipe, store, directory = map(Path, sys.argv[1:4])
    accelerator = launch("fp32")
    trainer = Trainer(load_recipe(json.loads(recipe.read_text())), Store.open(store), directory, accelerator)
    assert trainer.sharded == (accelerator.num_processes > 1)
    start = trainer._resume()
    done = start + int(sys.argv[4])
    losses = [trainer._step(step, trainer.stages[0], trainer.steps.batch(step))["loss"] for step in range(start, done)]
    trainer._checkpoint(done)
    accelerator.print(json.dumps({"processes": accelerator.num_processes, "start": start, "losses": losses}))
    accelerator.end_training()


if __name__ == "__main__":
    main()
