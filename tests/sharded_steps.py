"""Run by test_sharding.py in several processes: a sharded target's gradients and checkpoints beside those of a whole one.

    python tests/forked.py 2 sharded_steps STORE DIRECTORY MODEL PRECISION KIND...

It fails unless several processes really run, and prints what the main process has found as JSON: of the target whose own weights are
trained (`whole`), and of the target with an adapter (`adapter`).
"""

import json
import sys
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (once, and not in every fork when the adapter is made)
import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from profuser.fusion_model import FusionModel
from profuser.models.head import head_layer
from profuser.models.load import load_model, load_without_weights
from profuser.recipe.adapter import AdapterConfig
from profuser.recipe.data import DataConfig
from profuser.recipe.optim import OptimConfig
from profuser.recipe.schedule import Stage
from profuser.recipe.schema import Recipe, SourceConfig
from profuser.store.store import Store
from profuser.train.adapter import merged, with_adapter
from profuser.train.checkpoint import Checkpoint, load_newest, save_checkpoint, weights_of
from profuser.train.saver import Saver
from profuser.train.shard_files import sizes_in
from profuser.train.sharding import agreed, load_into_shards, whole
from profuser.train.steps import Steps
from profuser.train.target import whole_target
from profuser.train.targets import Targets


def gradients(model, steps, step, rank_averages):
    """The gradients of one step on this process's passes, whole, as one fp64 vector."""
    for p in model.parameters():
        p.grad = None
    for micro in steps.batch(step).micro_batches:
        loss = model(**micro.tensors(torch.device("cpu")), reduction="sum")["loss"]
        (loss / rank_averages).backward()
    return torch.cat([whole(p.grad).double().flatten() for p in model.parameters() if p.requires_grad])


def adapted(model, adapter):
    """A model with an adapter that has learnt something, if it is to have one."""
    if adapter is None:
        return model
    torch.manual_seed(0)
    model = with_adapter(model, adapter)
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.05)
    return model


ADAPTERS = {"whole": None, "adapter": AdapterConfig(rank=4, alpha=8.0)}


def main() -> None:
    store, directory, name, precision, *kinds = sys.argv[1:]
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes > 1
    targets = Targets(Store.open(Path(store)), "train")
    source, dtype = SourceConfig(name="guardian", model=name), getattr(torch, precision)
    found = {
        kind: compared(targets, Path(directory) / kind, source, dtype, accelerator, ADAPTERS[kind]) for kind in kinds
    }
    if accelerator.is_main_process:
        print(json.dumps(found))
    accelerator.end_training()


def compared(targets, directory, source, dtype, accelerator, adapter) -> dict[str, Any]:
    """What the main process has found of one kind of target."""
    world, rank = accelerator.num_processes, accelerator.process_index
    recipe = Recipe(sources=[source], target="guardian", data=DataConfig(train="train.jsonl"), adapter=adapter)
    stages = [Stage(inference_weight=1.0, training_weight=0.5, beta=0.7, first=0, stop=20)]
    optim = OptimConfig(batch_size=3, tokens_per_micro_batch=2048)

    def steps_of(world, rank):
        return Steps(targets, optim, stages, 3, 0, world, rank, "packed")

    loaded = adapted(load_model(source, dtype), adapter)
    plain = FusionModel(loaded, source_temperature=1.0)
    fusion = FusionModel(adapted(load_without_weights(source, dtype), adapter), source_temperature=1.0)
    fusion.keeps_apart = agreed(plain.keeps_apart)
    load_into_shards(fusion, loaded if rank == 0 else None, accelerator)
    assert all(isinstance(p, DTensor) for p in fusion.parameters())
    local = sum(p.to_local().numel() for p in fusion.parameters() if isinstance(p, DTensor))
    found: dict[str, Any] = {
        "world": world,
        "trained": len(weights_of(fusion)),
        "blocks": sum(isinstance(module, FSDPModule) for module in fusion.model.modules()),
        "share": local / sum(p.numel() for p in plain.parameters()),
        "names": [n for n, _ in fusion.named_parameters()] == [n for n, _ in plain.named_parameters()],
    }

    # The gradients of a step, in a sharded model on two processes and in a whole one on one.
    expected = gradients(plain, steps_of(1, 0), 2, 1)
    ours = gradients(fusion, steps_of(world, rank), 2, 1)
    found["gradient"] = float((ours - expected).norm() / expected.norm())

    # Two optimizer steps, a checkpoint, and a third step: from the checkpoint it gives the same weights, in every form.
    def stepped(model, steps, optimizer, numbers):
        for number in numbers:
            gradients(model, steps, number, 1)
            optimizer.step()

    @torch.no_grad()
    def validated(model, steps):  # it gathers what no backward pass divides again
        model(**steps.batch(0).micro_batches[0].tensors(torch.device("cpu")), reduction="sum")

    def adamw(model):
        return torch.optim.AdamW(model.parameters(), lr=1e-3)

    def vector(model):
        return torch.cat([whole(p).double().flatten() for p in weights_of(model).values()])

    optimizer = adamw(fusion)
    stepped(fusion, steps_of(world, rank), optimizer, (0, 1))
    validated(fusion, steps_of(world, rank))
    save_checkpoint(directory / "sharded", Checkpoint(2, "t", b"m"), fusion, optimizer, 2)
    at_two = vector(fusion)
    saver = Saver(directory / "beside", beside_training=True, sharded=True)
    saver.save(Checkpoint(2, "t", b"m"), fusion, optimizer, 2)  # it is written during the third step
    found["files"] = sorted(path.name for path in (directory / "sharded/step-000002").iterdir())
    sizes = sizes_in(directory / "sharded/step-000002").keys() - {"torch"}  # the random state, which is no weight
    found["stored"] = len([name for name in sizes if "/" not in name])
    stepped(fusion, steps_of(world, rank), optimizer, (2,))
    at_three = vector(fusion)
    saver.wait()
    saver.close()
    again = adamw(fusion)
    validated(fusion, steps_of(world, rank))
    assert load_newest(directory / "sharded", fusion, again) == Checkpoint(2, "t", b"m")
    found["restored"] = torch.equal(vector(fusion), at_two)
    stepped(fusion, steps_of(world, rank), again, (2,))
    found["resumed"] = torch.equal(vector(fusion), at_three)
    beside = adamw(fusion)
    assert load_newest(directory / "beside", fusion, beside) == Checkpoint(2, "t", b"m")
    found["restored_beside"] = torch.equal(vector(fusion), at_two)
    stepped(fusion, steps_of(world, rank), beside, (2,))
    found["resumed_beside"] = torch.equal(vector(fusion), at_three)

    # The shares are read by a whole model, and a whole model's checkpoint into shares.
    one = adamw(plain)
    load_newest(directory / "sharded", plain, one)
    found["into_whole"] = torch.equal(vector(plain), at_two)
    stepped(plain, steps_of(1, 0), one, (2,))
    found["whole_step"] = float((vector(plain) - at_three).norm() / at_three.norm())
    if rank == 0:
        save_checkpoint(directory / "whole", Checkpoint(3, "t", b"m"), plain, one, 2)
    accelerator.wait_for_everyone()
    third = adamw(fusion)
    load_newest(directory / "whole", fusion, third)
    found["into_shards"] = torch.equal(vector(fusion), vector(plain))
    found["moments"] = all(
        torch.equal(whole(third.state[p][key]), one.state[q][key])
        for p, q in zip(fusion.parameters(), plain.parameters())
        if p.requires_grad
        for key in ("exp_avg", "exp_avg_sq", "step")
    )

    # The whole model is written at the end.
    validated(fusion, steps_of(world, rank))
    exported = whole_target(fusion, recipe, dtype, accelerator)
    assert (exported is None) == (rank != 0)
    if exported is not None:
        expected = torch.nn.Module.to(plain.model, exported.dtype).state_dict()
        found["exported"] = all(torch.equal(tensor, expected[name]) for name, tensor in exported.state_dict().items())
        found["tied"] = exported.get_input_embeddings().weight is head_layer(exported).weight
        merged(exported, recipe, directory).save_pretrained(directory / "exported")
    return found


if __name__ == "__main__":
    main()
