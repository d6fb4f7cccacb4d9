"""Run by test_deepspeed.py in several processes: the gradients and checkpoints of a target under DeepSpeed beside those of a whole one.

    ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_ZERO_STAGE=3 \
        python tests/forked.py 2 zero_steps STORE DIRECTORY MODEL PRECISION LAYOUT

It fails unless several processes really run, and prints what the main process has found as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch

from profuser.fusion_model import FusionModel
from profuser.models.load import load_model, load_without_weights
from profuser.recipe.data import DataConfig
from profuser.recipe.optim import OptimConfig
from profuser.recipe.schedule import Stage
from profuser.recipe.schema import Recipe, SourceConfig
from profuser.store.store import Store
from profuser.train.checkpoint import Checkpoint, load_newest, save_checkpoint
from profuser.train.parallel import launch
from profuser.train.saver import Saver
from profuser.train.sharding import agreed, load_into_shards, whole
from profuser.train.steps import Steps
from profuser.train.target import whole_target
from profuser.train.targets import Targets
from profuser.train.updates import OwnUpdates, make_updates
from profuser.train.zero import shape_of, stage_of


def main() -> None:
    store, directory, name, precision, layout = sys.argv[1:]
    accelerator = launch(precision)
    assert accelerator.num_processes > 1
    found = compared(Targets(Store.open(Path(store)), "train"), Path(directory), name, layout, accelerator)
    if accelerator.is_main_process:
        print(json.dumps(found))
    accelerator.end_training()


def compared(targets, directory, name, layout, accelerator) -> dict[str, Any]:
    world, rank = accelerator.num_processes, accelerator.process_index
    source = SourceConfig(name="guardian", model=name)
    in_bf16 = accelerator.mixed_precision == "bf16"
    stages = [Stage(inference_weight=1.0, training_weight=0.5, beta=0.7, first=0, stop=20)]
    size = {"tokens_per_micro_batch": 2048} if layout == "packed" else {"micro_batch_size": 1}
    optim = OptimConfig(batch_size=6, lr=1e-3, **size)

    def batch(step, world=1, rank=0):
        return Steps(targets, optim, stages, 3, 0, world, rank, layout).batch(step).micro_batches

    def passes(updates, micro_batches):
        for number, micro in enumerate(micro_batches, start=1):
            inputs = micro.tensors(torch.device("cpu")) | {"reduction": "sum"}
            updates.run(inputs, last=number == len(micro_batches))

    def vector(tensors):
        return torch.cat([tensor.detach().double().flatten() for tensor in tensors])

    # The same target three times: whole in fp64 and in fp32, and divided.
    def plain(dtype):
        return FusionModel(load_model(source, dtype), source_temperature=1.0)

    def gradient(fusion):
        fusion.zero_grad()
        for micro in batch(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
                loss = fusion(**micro.tensors(torch.device("cpu")), reduction="sum")["loss"]
            loss.backward()
        return vector(p.grad for p in fusion.parameters())

    exact, single = gradient(plain(torch.float64)), gradient(plain(torch.float32))
    loaded = plain(torch.float32)
    fusion = FusionModel(load_without_weights(source, torch.float32), source_temperature=1.0)
    fusion.keeps_apart = agreed(loaded.keeps_apart)
    load_into_shards(fusion, loaded.model if rank == 0 else None, accelerator)
    updates = make_updates(fusion, loaded.model if rank == 0 else None, optim, accelerator, sharded=True)
    passes(updates, batch(2, world, rank))
    ours = vector(deepspeed.utils.safe_get_full_grad(p) for p in fusion.parameters())
    found: dict[str, Any] = {
        "world": world,
        "stage": stage_of(accelerator),
        "passes": len(batch(2, world, rank)),
        "exact_weights": torch.equal(vector(map(whole, fusion.parameters())), vector(loaded.parameters())),
        "held": sum(p.numel() for p in fusion.parameters()) / sum(p.numel() for p in loaded.parameters()),
        "plain_error": float((single - exact).norm() / exact.norm()),
        "error": float((ours - exact).norm() / exact.norm()),
        "shapes": [list(shape_of(p)) for p in fusion.parameters()] == [list(p.shape) for p in loaded.parameters()],
    }
    found["norm"] = updates.update() / float(exact.norm())
    return found


if __name__ == "__main__":
    main()
