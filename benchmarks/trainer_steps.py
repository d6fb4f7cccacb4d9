"""A few steps of the trainer on the bundled demo's prompts: losses, tokens per second, and the loss's share of a step.

    [CUDA_VISIBLE_DEVICES=] python -m benchmarks.trainer_steps [--steps N]
    torchrun --nproc-per-node 1 -m benchmarks.trainer_steps --shard

The target is the bundled guardian, in bf16 with the Triton kernels on CUDA and in fp32 on a CPU. Its sources are made up, so that nothing
has to be prepared. The same seed gives the same steps on every device: the losses can be set side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import DEVICE
from benchmarks.measure import cpu_name, synchronize
from benchmarks.synthetic_store import demo_fusion
from profuser.recipe.schema import SourceConfig
from profuser.train.loop import Trainer
from profuser.train.parallel import launch

WARM_UP = 3
OURS = "profuser::"
"""What the names of the fused loss's operations begin with."""


def share_of_loss(trainer: Trainer, number: int) -> float:
    """The share of a step's computing time that is spent in the fused loss, whose one operation computes its gradients as well."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])]
    batch = trainer.steps.batch(number)
    with profile(activities=activities) as profiled:
        trainer._step(number, trainer.stages[0], batch)
        synchronize()
    rows = profiled.key_averages()
    if DEVICE == "cuda":
        whole = sum(row.self_device_time_total for row in rows if row.device_type.name == "CUDA")
        own = sum(row.device_time_total for row in rows if row.key.startswith(OURS))
    else:
        whole = sum(row.self_cpu_time_total for row in rows)
        own = sum(row.cpu_time_total for row in rows if row.key.startswith(OURS))
    return own / whole if whole else float("nan")


def measure(steps: int, shard: bool, scratch: Path) -> None:
    """Takes so many steps, and one more for the share of the loss. What is known is printed at once."""
    source = SourceConfig(name="guardian", model="demo:guardian")
    recipe, store = demo_fusion(source, scratch, steps=steps + 1, batch_size=64, budget=8192)
    recipe = replace(recipe, optim=replace(recipe.optim, shard=shard))
    accelerator = launch("bf16" if DEVICE == "cuda" else "fp32")
    trainer = Trainer(recipe, store, scratch, accelerator)
    losses, rates = [], []
    for number in range(steps):
        batch = trainer.steps.batch(number)
        synchronize()
        begin = time.perf_counter()
        metrics = trainer._step(number, trainer.stages[0], batch)
        synchronize()
        rates.append(batch.tokens / (time.perf_counter() - begin))
        losses.append(round(metrics["loss"], 4))
    found = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else cpu_name(),
        "precision": accelerator.mixed_precision,
        "sharded": trainer.sharded,
        "tokens_per_second": round(statistics.median(rates[WARM_UP:] or rates)),
        "losses": losses,
    }
    if DEVICE == "cuda":
        found["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    print(json.dumps(found), flush=True)
    print(json.dumps({"share_of_loss": round(share_of_loss(trainer, steps), 3)}), flush=True)
    accelerator.end_training()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trainer_steps",
        description="Takes a few steps of the trainer and prints two lines of JSON.",
    )
    parser.add_argument("--steps", type=int, default=12, help="how many steps are taken (default: %(default)s)")
    parser.add_argument(
        "--shard", action="store_true", help="under torchrun: divide the target among the processes (FSDP2)"
    )
    args = parser.parse_args()
    if args.shard and "RANK" not in os.environ:
        parser.error(
            "--shard must come under a launcher; run torchrun --nproc-per-node 1 -m benchmarks.trainer_steps --shard"
        )
    with tempfile.TemporaryDirectory() as scratch:
        measure(args.steps, args.shard, Path(scratch))


if __name__ == "__main__":
    main()
