"""Run by test_deepspeed.py in several processes: the gradients and checkpoints of a target under DeepSpeed beside those of a whole one.

    ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_ZERO_STAGE=3 \
        python tests/forked.py 2 zero_steps STORE DIRECTORY MODEL PRECISION

It fails unless several processes really run, and prints what the main process has found as JSON.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch

from profuser.fusion_model import FusionModel
from profuser.models.head import head_layer
from profuser.models.load import load_model, load_without_weights
from profuser.recipe.data import DataConfig
from profuser.recipe.optim import OptimConfig
from profuser.recipe.schedule import Stage
from profuser.recipe.schema import Recipe, SourceConfig
from profuser.store.store import Store
from profuser.train.checkpoint import Checkpoint, load_newest, save_checkpoint
from profuser.train.optimizer import make_optimizer
from profuser.train.parallel import launch
from profuser.train.saver import Saver
from profuser.train.sharding import load_into_shards, whole
from profuser.train.steps import Steps
from profuser.train.target import whole_target
from profuser.train.targets import Targets
from profuser.train.updates import Updates, make_updates
from profuser.train.zero import KINDS, shape_of, stage_of

CPU = torch.device("cpu")


def main() -> None:
    store, directory, name, precision = sys.argv[1:]
    accelerator = launch(precision)
    assert accelerator.num_processes > 1
    targets = Targets(Store.open(Path(store)), "train")
    source = SourceConfig(name="guardian", model=name)
    found = {"world": accelerator.num_processes, "stage": stage_of(accelerator)}
    found |= compared(targets, Path(directory), source, accelerator)
    if accelerator.is_main_process:
        print(json.dumps(found))
    accelerator.end_training()


def vector(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def weights(fusion) -> torch.Tensor:
    return vector(map(whole, fusion.parameters()))


def compared(targets, directory, source, accelerator) -> dict[str, Any]:
    """What the main process has found."""
    world, rank = accelerator.num_processes, accelerator.process_index
    stages = [Stage(inference_weight=1.0, training_weight=0.5, beta=0.7, first=0, stop=20)]
    sizes: dict[str, Any] = {"packed": {"tokens_per_micro_batch": 256}, "padded": {"micro_batch_size": 1}}
    optims = {layout: OptimConfig(batch_size=6, lr=1e-3, grad_clip=0.5, **size) for layout, size in sizes.items()}

    def passes(step, layout, world=world, rank=rank):
        return Steps(targets, optims[layout], stages, 3, 0, world, rank, layout).batch(step).micro_batches

    def run(updates, micro_batches):
        for number, micro in enumerate(micro_batches, start=1):
            updates.run(micro.tensors(CPU) | {"reduction": "sum"}, last=number == len(micro_batches))

    def stepped(updates, numbers):
        for step in numbers:
            for group in updates.optimizer.param_groups:
                group["lr"] = 1e-3 / (step + 1)
            run(updates, passes(step, "padded"))
            updates.update()

    # The same target three times: whole in fp64 and in fp32, and divided.
    def plain(dtype):
        return FusionModel(load_model(source, dtype), source_temperature=1.0)

    def gradient(fusion, layout):
        fusion.zero_grad()
        for micro in passes(2, layout, 1, 0):
            with torch.autocast("cpu", torch.bfloat16, enabled=accelerator.mixed_precision == "bf16"):
                loss = fusion(**micro.tensors(CPU), reduction="sum")["loss"]
            loss.backward()
        return vector(p.grad for p in fusion.parameters())

    exact, loaded = plain(torch.float64), plain(torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in loaded.parameters():  # the stored weights fit into 16 bits
            p.add_(torch.randn_like(p), alpha=1e-4)
    exact.load_state_dict(loaded.state_dict())
    whole_one = loaded.model if rank == 0 else None

    def began() -> tuple[FusionModel, Updates]:
        fusion = FusionModel(load_without_weights(source, torch.float32), source_temperature=1.0)
        fusion.keeps_apart = loaded.keeps_apart
        load_into_shards(fusion, whole_one, accelerator)
        return fusion, make_updates(fusion, whole_one, optims["padded"], accelerator, sharded=True)

    fusion, updates = began()
    found: dict[str, Any] = {
        "loaded": torch.equal(weights(fusion), vector(loaded.parameters())),
        "held": sum(p.numel() for p in fusion.parameters()) / sum(p.numel() for p in loaded.parameters()),
        "shapes": [shape_of(p) for p in fusion.parameters()] == [p.shape for p in loaded.parameters()],
    }

    # The gradients of a step, and its norm, which is clipped.
    for layout in ("packed", "padded"):
        run(updates, passes(2, layout))
        ours = vector(deepspeed.utils.safe_get_full_grad(p) for p in fusion.parameters())
        truth, alone = gradient(exact, layout), gradient(loaded, layout)
        for group in updates.optimizer.param_groups:
            group["lr"] = 0.0
        found[layout] = {
            "passes": len(passes(2, layout)),
            "error": float((ours - truth).norm() / truth.norm()),
            "plain_error": float((alone - truth).norm() / truth.norm()),
            "norm": updates.update() / float(truth.norm()),
        }
    found["unmoved"] = torch.equal(weights(fusion), vector(loaded.parameters()))

    # Two optimizer steps, a checkpoint, and a third step, which is repeated from the checkpoint in every form.
    @torch.no_grad()
    def validated():  # a forward pass without a backward pass
        fusion(**passes(0, "padded")[0].tensors(CPU), reduction="sum")

    stepped(updates, (0, 1))
    validated()
    save_checkpoint(directory / "sharded", Checkpoint(2, "t", b"m"), fusion, updates.optimizer, 2)
    at_two = weights(fusion)
    saver = Saver(directory / "beside", beside_training=True, sharded=True)
    saver.save(Checkpoint(2, "t", b"m"), fusion, updates.optimizer, 2)  # it is written during the third step
    found["files"] = sorted(path.name for path in (directory / "sharded/step-000002").iterdir())
    stepped(updates, (2,))
    at_three = weights(fusion)
    saver.wait()
    saver.close()
    again, fresh = began()
    assert load_newest(directory / "sharded", again, fresh.optimizer) == Checkpoint(2, "t", b"m")
    found["restored"] = torch.equal(weights(again), at_two)
    stepped(fresh, (2,))
    found["resumed"] = torch.equal(weights(again), at_three)
    load_newest(directory / "beside", fusion, updates.optimizer)
    found["restored_beside"] = torch.equal(weights(fusion), at_two)
    stepped(updates, (2,))
    found["resumed_beside"] = torch.equal(weights(fusion), at_three)

    # A whole target goes on with the checkpoint, and a divided one with that of a whole one.
    adamw = make_optimizer(loaded, optims["padded"])
    load_newest(directory / "sharded", loaded, adamw)
    found["into_whole"] = torch.equal(vector(loaded.parameters()), at_two)
    gradient(loaded, "padded")
    torch.nn.utils.clip_grad_norm_(loaded.parameters(), optims["padded"].grad_clip)
    for group in adamw.param_groups:
        group["lr"] = 1e-3 / 3
    adamw.step()
    found["whole_step"] = float((vector(loaded.parameters()) - at_three).norm() / (at_three - at_two).norm())
    if rank == 0:
        save_checkpoint(directory / "whole", Checkpoint(3, "t", b"m"), loaded, adamw, 2)
    accelerator.wait_for_everyone()
    load_newest(directory / "whole", fusion, updates.optimizer)
    found["into_shards"] = torch.equal(weights(fusion), vector(loaded.parameters()))
    found["moments"] = all(
        torch.equal(deepspeed.utils.safe_get_full_optimizer_state(p, kind), adamw.state[q][kind])
        for p, q in zip(fusion.parameters(), loaded.parameters())
        for kind in KINDS
    )

    # A gradient that is not finite changes nothing.
    before = weights(fusion)
    micro = passes(2, "padded")[0].tensors(CPU)
    updates.run(micro | {"reduction": "sum", "ce_weight": micro["ce_weight"] * torch.inf}, last=True)
    found["refused"] = not math.isfinite(updates.update()) and torch.equal(weights(fusion), before)

    # The whole model is written at the end.
    recipe = Recipe(sources=[source], target="guardian", data=DataConfig(train="train.jsonl"))
    exported = whole_target(fusion, recipe, torch.float32, accelerator)
    assert (exported is None) == (rank != 0)
    if exported is not None:
        expected = loaded.model.state_dict()
        found["exported"] = all(torch.equal(tensor, expected[name]) for name, tensor in exported.state_dict().items())
        found["tied"] = exported.get_input_embeddings().weight is head_layer(exported).weight
    return found


if __name__ == "__main__":
    main()
