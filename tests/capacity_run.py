"""Run by test_capacity.py in several processes: what each chooses as the loss's capacity, in a whole run and in a resumed one.

    python -m torch.distributed.run --nproc-per-node 2 tests/capacity_run.py RECIPE STORE DIRECTORY ddp|fsdp

Each process writes rank{n}.json into the directory.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from test_capacity import SHARE, few_rows_on_any_device

from profuser.recipe.parse import load_recipe
from profuser.store.store import Store
from profuser.train.loop import Trainer
from profuser.train.sharding import whole


def main() -> None:
    config, place, directory, way = sys.argv[1:]
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes > 1
    few_rows_on_any_device(pytest.MonkeyPatch())
    recipe = load_recipe(json.loads(Path(config).read_text()))
    optim = replace(recipe.optim, left_out=SHARE, micro_batch_size=1, eval_every=0, shard=way == "fsdp")

    def trainer(name: str) -> Trainer:
        run = Path(directory) / name
        run.mkdir(exist_ok=True)
        return Trainer(replace(recipe, optim=optim), Store.open(Path(place)), run, accelerator)

    def found(t: Trainer) -> dict:
        assert t.capacity is not None
        assert t.sharded == (way == "fsdp")
        weights = torch.cat([whole(p.detach()).flatten() for p in t.fusion.parameters()])
        return {"capacity": t.capacity.state, "weights": weights.double().sum().item(), "first": weights[:50].tolist()}

    uninterrupted = trainer("whole")
    uninterrupted.train()
    part = trainer("part")
    part._resume()
    for step in (0, 1):
        part._step(step, part.stages[0], part.steps.batch(step))
    part._checkpoint(2)
    resumed = trainer("part")
    resumed.train()
    said = {"whole": found(uninterrupted), "resumed": found(resumed)}
    (Path(directory) / f"rank{accelerator.process_index}.json").write_text(json.dumps(said))
    accelerator.end_training()


if __name__ == "__main__":
    main()
