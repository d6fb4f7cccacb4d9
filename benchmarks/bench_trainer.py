"""A fusion step of this project's trainer beside a plain fine-tuning step of Hugging Face's Trainer, on the same packed rows.

    pytest benchmarks/bench_trainer.py --benchmark-only -s

Both train the same model from the same weights with AdamW, weight decay and clipping, in fp32 on a CPU and in bf16 on CUDA. Ours also
learns the distributions of three sources with ten entries each, from a store: training mode, the second stage of the progressive
schedule. The sequences are the demo's prompts with their ground truths; the sources are made up. `small` is the Llama of
bench_train_step.py; `medium` is a wider and deeper one of 13 million parameters on a CPU; `smollm2` is SmolLM2-135M, whose directory
$PROFUSER_SMOLLM2 names.

The two take their steps in turn, so that they share the load of the machine. Neither's time has the collation of its batch, which
worker processes do. That both compute the same is checked: the cross-entropy of the first step must be equal. `peak_mib` is the
most memory that a process of its own has in a step, beyond what it has before it loads the model.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor

from benchmarks.bench_train_step import make_model
from benchmarks.cases import DEVICE
from benchmarks.measure import in_process, reset_peak, resident_mib, surroundings, synchronize
from benchmarks.synthetic_store import demo_fusion
from profuser.models.load import load_model
from profuser.recipe.places import resolve
from profuser.recipe.schema import Recipe, SourceConfig
from profuser.store.store import Store
from profuser.train.loop import Trainer
from profuser.train.steps import StepBatch

STEPS, WARM_UP = 12, 2
LLAMAS: dict[str, dict[str, int]] = {
    "small": {},
    "medium": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6},
}
SEQUENCES = {"small": 24, "medium": 24, "smollm2": 6}
"""How many sequences a step takes."""
BUDGET = 8192
"""More tokens than a step has, so that a step is one forward pass. First-fit-decreasing fills its rows."""


def fusion_of(model: str, scratch: Path) -> tuple[Recipe, Store]:
    """A recipe with three sources and a store for it. `scratch` is a folder for the store and a made-up model."""
    directory = os.environ["PROFUSER_SMOLLM2"] if model == "smollm2" else made_up(scratch / "model", **LLAMAS[model])
    source = SourceConfig(name="guardian", model=str(directory))
    return demo_fusion(source, scratch, steps=STEPS, batch_size=SEQUENCES[model], budget=BUDGET)


def made_up(directory: Path, **changed: int) -> Path:
    """Writes the Llama of bench_train_step.py, with `changed` sizes and the tokenizer of the bundled guardian."""
    make_model(**changed).float().save_pretrained(directory)
    for path in Path(resolve("demo:guardian")).iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, directory)
    return directory


class Fusion:
    """This project's trainer with the batches of all its steps."""

    def __init__(self, recipe: Recipe, store: Store, scratch: Path):
        accelerator = Accelerator(cpu=DEVICE == "cpu", mixed_precision="bf16" if DEVICE == "cuda" else "no")
        self.trainer = Trainer(recipe, store, scratch, accelerator)
        self.batches = [self.trainer.steps.batch(number) for number in range(STEPS)]
        self.losses: list[float] = []

    def step(self, number: int) -> None:
        metrics = self.trainer._step(number, self.trainer.stages[0], self.batches[number])
        self.losses.append(metrics["ce_training"])


class Plain(transformers.Trainer):
    """Hugging Face's Trainer on the same rows, one batch per step. It calls `before` and `after` around each step."""

    def __init__(self, recipe: Recipe, batches: list[StepBatch], scratch: Path):
        optim, self.losses = recipe.optim, list[Tensor]()
        names = ("input_ids", "labels", "position_ids")
        passes = [micro for batch in batches for micro in batch.micro_batches]
        arguments = transformers.TrainingArguments(
            output_dir=str(scratch / "plain"),
            max_steps=STEPS,
            per_device_train_batch_size=1,
            train_sampling_strategy="sequential",
            learning_rate=optim.lr,
            lr_scheduler_type="cosine",
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            max_grad_norm=optim.grad_clip,
            bf16=DEVICE == "cuda",
            use_cpu=DEVICE == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        super().__init__(
            load_model(recipe.target_config, torch.float32, DEVICE).train(),
            arguments,
            data_collator=lambda items: items[0],
            train_dataset=[{name: torch.as_tensor(micro.arrays[name]) for name in names} for micro in passes],  # pyrefly: ignore[bad-argument-type]
        )

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.losses.append(super().training_step(*args, **kwargs))
        return self.losses[-1]


class Around(transformers.TrainerCallback):
    """Calls a function with the number of each step before it, and another one after it."""

    def __init__(self, before: Callable[[int], object], after: Callable[[int], object]):
        self.before, self.after = before, after

    def on_step_begin(self, args, state, control, **kwargs):
        self.before(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.after(state.global_step - 1)


class Clock:
    """The seconds of each step, as they pass and as the threads of this process compute."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def start(self, *_: int) -> None:
        synchronize()
        self._begin = time.perf_counter(), time.process_time()

    def stop(self, *_: int) -> None:
        synchronize()
        self.wall.append(time.perf_counter() - self._begin[0])
        self.cpu.append(time.process_time() - self._begin[1])


def in_turn(model: str) -> dict[str, Any]:
    """Lets both trainers take their steps in turn, and returns the times of the steps."""
    ours, theirs = Clock(), Clock()
    with tempfile.TemporaryDirectory() as folder:
        recipe, store = fusion_of(model, Path(folder))
        fusion = Fusion(recipe, store, Path(folder))

        def our_step(number: int) -> None:
            ours.start()
            fusion.step(number)
            ours.stop()
            theirs.start()

        plain = Plain(recipe, fusion.batches, Path(folder))
        plain.add_callback(Around(our_step, theirs.stop))
        plain.train()
    passes = [micro for batch in fusion.batches for micro in batch.micro_batches]
    assert len(passes) == STEPS
    # The weights are equal before the first step, and ours have learnt from the sources as well after it.
    assert fusion.losses[0] == pytest.approx(plain.losses[0].item(), rel=1e-5 if DEVICE == "cpu" else 1e-2)
    return {
        "steps": STEPS - WARM_UP,
        "tokens": statistics.mean(batch.tokens for batch in fusion.batches),
        "filled": sum(batch.tokens for batch in fusion.batches) / sum(batch.computed for batch in fusion.batches),
        "cross_entropy_of_first_step": [fusion.losses[0], plain.losses[0].item()],
        **{
            f"{side}_{kind}_ms": [round(1e3 * seconds, 1) for seconds in getattr(clock, kind)[WARM_UP:]]
            for side, clock in (("ours", ours), ("theirs", theirs))
            for kind in ("wall", "cpu")
        },
    }


def peak_mib(model: str, side: str) -> float:
    """How many MiB this process has at most in a step, beyond what it has before it loads the model."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, store = fusion_of(model, Path(folder))
        before = resident_mib("VmRSS")

        def after(number: int) -> None:
            if number == 0:
                reset_peak()

        fusion = Fusion(recipe, store, Path(folder))
        if side == "ours":
            for number in range(3):
                fusion.step(number)
                after(number)
        else:
            batches = fusion.batches
            del fusion
            plain = Plain(recipe, batches[:3], Path(folder))
            plain.args.max_steps = 3
            plain.add_callback(Around(lambda _: None, after))
            plain.train()
    return round(resident_mib("VmHWM") - before, 1)


@pytest.mark.parametrize("model", ["small", "medium", "smollm2"] if DEVICE == "cpu" else ["small", "smollm2"])
def test_trainer_step(benchmark, model):
    if model == "smollm2" and not os.environ.get("PROFUSER_SMOLLM2"):
        pytest.skip("no SmolLM2: set PROFUSER_SMOLLM2 to its directory")
    found = benchmark.pedantic(in_turn, (model,))
    info = surroundings() | {"threads": torch.get_num_threads(), "load_1_min": round(os.getloadavg()[0], 2)} | found
    if DEVICE == "cpu":
        info["peak_mib"] = {side: in_process(peak_mib, model, side) for side in ("ours", "theirs")}
    kinds = ("wall", "cpu")
    median = {key: statistics.median(found[key]) for kind in kinds for key in (f"ours_{kind}_ms", f"theirs_{kind}_ms")}
    info["ratio"] = {kind: median[f"ours_{kind}_ms"] / median[f"theirs_{kind}_ms"] for kind in kinds}
    benchmark.extra_info.update(info, model=model, median_ms=median)
    print(f"\n{model}: {found['steps']} steps of {found['tokens']:.0f} tokens, {found['filled']:.0%} filled")
    for kind in kinds:
        ours, theirs = median[f"ours_{kind}_ms"], median[f"theirs_{kind}_ms"]
        print(f"  {kind}: ours {ours:.0f} ms, Hugging Face's {theirs:.0f} ms, ratio {ours / theirs:.3f}")
    if peak := info.get("peak_mib"):
        print(f"  peak memory: ours {peak['ours']:.0f} MiB, Hugging Face's {peak['theirs']:.0f} MiB")
