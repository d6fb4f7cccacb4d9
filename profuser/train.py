"""`python -m profuser.train`: prepare what is missing, fuse, score, report. Without arguments: the bundled demo.

The loop: L = w_infer * L_infer + w_train * L_train, each a mean over its own mode's label tokens of the whole optimizer
step, over all ranks and micro-batches. The fused loss is called with reduction="sum" and per-token weights w / N, so
accumulation and data parallelism are exact by construction. Learning rate and data order are functions of (seed, step).
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch.nn.utils import clip_grad_norm_

from profuser.checkpoint import load_newest, newest_step, save_checkpoint
from profuser.cli import main_of
from profuser.config import BUNDLED_PREFIX, Recipe, Run, deciding_keys, parse_run, resolve, target_config
from profuser.errors import ConfigError, DataError, NonFiniteError, Terminated
from profuser.estimate import in_words
from profuser.evaluate import evaluate, likelihood, score_table
from profuser.fusion_model import FusionModel
from profuser.models import chat_format, check_vocabulary, load_model, stored_dtype
from profuser.output import closing_examples, environment, save_fused
from profuser.prepare import announce, open_preparation
from profuser.progress import Progress
from profuser.report import write_report
from profuser.schedule import Stage, learning_rate, plan, stage_at
from profuser.store import Store, read_json, set_aside, write_json
from profuser.summary import handled_line
from profuser.targets import INFER, MODE_NAMES, TRAIN, Targets, TargetSequence


class Trainer:
    """One fusion run: the target, its optimizer and the schedule, over a store's training split."""

    def __init__(self, recipe: Recipe, store: Store, directory: Path, accelerator: Accelerator):
        self.recipe, self.optim, self.directory, self.accelerator = recipe, recipe.optim, directory, accelerator
        self.targets = Targets(store, "train")
        self.validation = Targets(store, "validation") if store.shards("targets/validation") else None
        self.stages = plan(recipe, len(self.targets.instructions))
        self._check_modes(store)
        self.targets_digest = store.digest("targets/train")
        self.total_steps = self.stages[-1].stop
        config = target_config(recipe)
        self.chat = chat_format(config)
        self.pad_id = self.chat.tokenizer.pad_token_id or 0
        torch.manual_seed(recipe.seed)
        target = load_model(config, torch.float32, accelerator.device)
        check_vocabulary(config.name, self.chat, target.get_output_embeddings().weight)
        self.saved_dtype = stored_dtype(config)
        if self.optim.gradient_checkpointing:
            target.gradient_checkpointing_enable()
        self.fusion = FusionModel(target, temperature=self.optim.temperature, tail=self.optim.tail).train()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.fusion, self.optim.weight_decay), lr=self.optim.lr, betas=self.optim.betas
        )
        self.model, self.optimizer = accelerator.prepare(self.fusion, self.optimizer)
        self.metrics = directory / "metrics.jsonl"
        self._order: dict[int, np.ndarray] = {}  # of the current epoch
        self._stop: BaseException | None = None

    def _check_modes(self, store: Store) -> None:
        """Every stage must find examples of a mode that it weighs."""
        there = {s.mode for s in self.targets.sequences}
        for i, stage in enumerate(self.stages, start=1):
            if not {m for m, w in ((TRAIN, stage.train_weight), (INFER, stage.infer_weight)) if w > 0} & there:
                handled = handled_line(read_json(store.directory / "summary.json"))
                raise DataError(
                    f"stage {i} needs training examples of its mode, none is left ({handled or 'nothing was skipped'}); raise "
                    "data.max_length or check the data"
                )

    # -- the loop --------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run (or go on with) all stages; checkpoints and raises on Ctrl-C or SIGTERM at the end of a step."""
        start = self._resume()
        if start == 0:
            self._evaluate(0, 0)
        with (
            Progress("fuse", self.total_steps, "steps", self.accelerator.is_main_process, start) as bar,
            self._catch_signals(),
        ):
            window: list[dict[str, float]] = []
            for step in range(start, self.total_steps):
                index = stage_at(self.stages, step)
                stage = self.stages[index]
                window.append(self._step(step, stage))
                done = step + 1
                note = f"stage {index + 1}/{len(self.stages)}, loss {window[-1]['loss']:.3f}"
                bar.update(1, tokens=window[-1]["tokens"], note=note)
                if done % self.optim.log_every == 0 or done == stage.stop:
                    self._log({"step": done, "stage": index, **means(window)})
                    window = []
                if (self.optim.eval_every and done % self.optim.eval_every == 0) or done == stage.stop:
                    self._evaluate(done, index)
                due = self.optim.checkpoint_every and done % self.optim.checkpoint_every == 0
                if due or self._stop is not None or done == self.total_steps:
                    self._checkpoint(done)
                if self._stop is not None:
                    raise self._stop

    def _step(self, step: int, stage: Stage) -> dict[str, float]:
        """One optimizer step; the metrics of all its tokens."""
        start = time.monotonic()
        weights = (stage.train_weight, stage.infer_weight)  # by mode
        batch = [[s for s in self._instruction(step, i) if weights[s.mode] > 0] for i in range(self.optim.batch_size)]
        count = [sum(s.labels for group in batch for s in group if s.mode == mode) for mode in (TRAIN, INFER)]
        world = self.accelerator.num_processes  # DDP averages gradients, so each rank's sum counts `world` times
        ce_weight = [w * world / n if n else 0.0 for w, n in zip(weights, count)]
        kd_weight = [stage.beta * w for w in ce_weight]
        lr = learning_rate(self.optim, stage, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        totals = torch.zeros(2, 2, dtype=torch.float64, device=self.accelerator.device)  # [CE | KD, mode]
        micro_batches = self._micro_batches(batch)
        for i, sequences in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                out = self.model(**self._tensors(sequences, ce_weight, kd_weight), reduction="sum", return_stats=True)
                self.accelerator.backward(out["loss"])
            for s, (name, stat) in enumerate((("ce", out["ce"]), ("kd", out["kd"]))):
                per_sequence = stat.view(len(sequences), -1).double().sum(1)
                self._check_finite(name, per_sequence, sequences, step)
                modes = torch.tensor([q.mode for q in sequences], device=per_sequence.device)
                totals[s].index_add_(0, modes, per_sequence)
        norm = clip_grad_norm_(self.fusion.parameters(), self.optim.grad_clip)
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"gradients must be finite, got norm {float(norm)} at step {step + 1}; lower optim.lr or raise optim.warmup_ratio"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        totals = self.accelerator.reduce(totals, reduction="sum").tolist()
        metrics = {}
        for mode, name in enumerate(MODE_NAMES):
            if count[mode]:
                ce, kd = totals[0][mode] / count[mode], totals[1][mode] / count[mode]
                metrics |= {f"ce_{name}": ce, f"kd_{name}": kd, f"loss_{name}": ce + stage.beta * kd}
        loss = sum(w * metrics.get(f"loss_{name}", 0.0) for w, name in zip(weights, MODE_NAMES))
        tokens = sum(len(s.input_ids) for group in batch for s in group)
        speed = {"tokens": tokens, "tokens_per_second": tokens / (time.monotonic() - start)}
        return {"loss": loss, **metrics, "lr": lr, "grad_norm": float(norm), **speed}

    def _instruction(self, step: int, i: int) -> list[TargetSequence]:
        """The i-th instruction of an optimizer step: epochs are permutations drawn from (seed, epoch)."""
        n = len(self.targets.instructions)
        epoch, place = divmod(step * self.optim.batch_size + i, n)
        if epoch not in self._order:
            self._order = {epoch: np.random.default_rng((self.recipe.seed, epoch)).permutation(n)}
        return self.targets.instructions[self._order[epoch][place]]

    def _micro_batches(self, batch: list[list[TargetSequence]]) -> list[list[TargetSequence]]:
        """This rank's share of a step in forward passes, by length, so that little is padded; every rank has as many passes."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        passes = math.ceil(len(batch) / (world * self.optim.micro_batch_size))
        mine = sorted((s for group in batch[rank::world] for s in group), key=lambda s: len(s.input_ids))
        bounds = [round(len(mine) * i / passes) for i in range(passes + 1)]
        return [mine[first:stop] or [self.nothing] for first, stop in pairwise(bounds)]

    @property
    def nothing(self) -> TargetSequence:
        """A sequence without labels: it keeps a rank in step that has nothing left."""
        some = self.targets.sequences[0]
        return replace(some, label_mask=np.zeros_like(some.label_mask))

    def _tensors(self, sequences, ce_weight, kd_weight) -> dict[str, torch.Tensor]:
        batch = self.targets.batch(sequences, ce_weight, kd_weight, self.pad_id, self.optim)
        if not any(kd_weight):
            batch = {k: v for k, v in batch.items() if not k.startswith("source_")}
        return {k: v.to(self.accelerator.device) for k, v in batch.items()}

    def _check_finite(self, name: str, per_sequence: torch.Tensor, sequences: list[TargetSequence], step: int) -> None:
        finite = torch.isfinite(per_sequence)
        if bool(finite.all()):
            return
        bad = sequences[int((~finite).nonzero()[0])]
        source = self.targets.sources[int(np.argmin(bad.source_ce))] if np.isfinite(bad.source_ce).any() else "none"
        raise NonFiniteError(
            f"the loss must be finite, {name} is not at step {step + 1}: training example {bad.example}, {MODE_NAMES[bad.mode]} "
            f"mode, source {source}; lower optim.lr, or look at that example in the store's samples.parquet"
        )

    # -- around the loop --------------------------------------------------------------------------------------------

    def _evaluate(self, step: int, stage: int) -> None:
        if self.validation is None or not self.accelerator.is_main_process:
            return
        s = likelihood(self.fusion, self.validation, self.pad_id, self.recipe, "score the validation prompts")
        self._log({"step": step, "stage": stage, "eval": {"ce": s["ce"], "kd": s["kd"]}})

    def _log(self, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with open(self.metrics, "a") as file:
                file.write(json.dumps(line) + "\n")

    def _checkpoint(self, step: int) -> None:
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.directory / "checkpoints",
                step,
                self.fusion,
                self.optimizer,
                {"targets": self.targets_digest},
                self.optim.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def _resume(self) -> int:
        state = load_newest(self.directory / "checkpoints", self.fusion, self.optimizer)
        step = 0 if state is None else state["step"]
        if state is not None and state["targets"] != self.targets_digest:
            raise ConfigError(
                f"{self.directory} was trained on other targets than the store holds now; start over with --fresh, or restore the store"
            )
        if step and self.accelerator.is_main_process:
            print(f"resuming at step {step} of {self.total_steps}", flush=True)
        if (
            self.accelerator.is_main_process and self.metrics.exists()
        ):  # lines after the checkpoint will be written again
            kept = [line for line in self.metrics.read_text().splitlines() if step and step_of(line) <= step]
            self.metrics.write_text("".join(f"{line}\n" for line in kept))
        return step

    @contextlib.contextmanager
    def _catch_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM wait for the end of the step, where the state can be saved; a second one does not wait."""

        def catch(error: BaseException):
            def handler(*_):
                if self._stop is not None:
                    raise error
                self._stop = error

            return handler

        stopped = Terminated("stopped by SIGTERM; a checkpoint was saved, the same command resumes")
        old = {
            signal.SIGINT: signal.signal(signal.SIGINT, catch(KeyboardInterrupt())),
            signal.SIGTERM: signal.signal(signal.SIGTERM, catch(stopped)),
        }
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; +inf for one that a crash tore."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for norms and biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def means(window: list[dict[str, float]]) -> dict[str, float]:
    keys = dict.fromkeys(k for line in window for k in line)
    return {k: float(np.mean([line[k] for line in window if k in line])) for k in keys}


def launch(recipe: Recipe) -> Accelerator:
    """The processes of this run: one, or DDP ranks under torchrun or accelerate launch.

    Raises:
        ConfigError: a launcher asked for FSDP or DeepSpeed.
    """
    cuda = torch.cuda.is_available()
    precision = recipe.optim.precision if recipe.optim.precision != "auto" else ("bf16" if cuda else "fp32")
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))  # the other ranks wait while the first one prepares
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no", cpu=not cuda, kwargs_handlers=[patience]
    )
    if accelerator.distributed_type.value not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise ConfigError(
            f"training runs on one process or under DDP, got {accelerator.distributed_type.value}; launch with torchrun or --multi_gpu"
        )
    return accelerator


def open_run(run: Run) -> bool:
    """Check the run directory against the recipe; True when the run is already complete.

    Raises:
        ConfigError: the directory holds a run of another recipe.
        DataError: it holds something else.
    """
    path = run.output_dir / "run.json"
    if run.options.get("fresh") and (aside := set_aside(run.output_dir)):
        print(f"renamed {run.output_dir} to {aside}", flush=True)
    if not path.exists():
        if run.output_dir.exists() and any(run.output_dir.iterdir()):
            raise DataError(
                f"output must be a run directory or empty, got {run.output_dir} without run.json; give another --output"
            )
        _write_record(run)
        return False
    old = read_json(path, "status", "recipe", "store")
    complete = old["status"] == "complete"
    started = complete or any((run.output_dir / "checkpoints").glob("step-*"))
    keys = [key for key in deciding_keys(old["recipe"], run.recipe.to_dict()) if key not in ("output", "store")]
    if Path(old["store"]).resolve() != run.store_dir.resolve():
        keys.append("store")
    if started and keys:
        raise ConfigError(
            f"{run.output_dir} holds a run of another recipe ({', '.join(keys)} differ); give another --output, undo the "
            "change, or start over with --fresh"
        )
    if complete and not any(run.output_dir.glob("*.safetensors")):
        print(f"{run.output_dir} was complete, its model is gone: made again", flush=True)
        complete = False
    if not complete:
        _write_record(run)
    return complete


def score_again(run: Run) -> None:
    """Score a complete run that lacks scores, or has them by another evaluation than the recipe's now."""
    record, now = read_json(run.output_dir / "run.json"), run.recipe.to_dict()
    names = ("scores.json", "evaluation.json") if run.recipe.data.heldout is not None else ()
    if record["recipe"].get("evaluation") == now["evaluation"] and all((run.output_dir / n).exists() for n in names):
        return
    if names:
        print("evaluation changed or scores missing: scoring again", flush=True)
        evaluate(run, Store.load(run.store_dir))
    write_json(run.output_dir / "run.json", record | {"recipe": now})


def _write_record(run: Run) -> None:
    path = run.output_dir / "run.json"
    before = {"seconds": read_json(path).get("seconds") or {}} if path.exists() else {}
    record = {"status": "running", "recipe": run.recipe.to_dict(), "store": str(run.store_dir), **environment()}
    write_json(path, record | before)


def train(run: Run, accelerator: Accelerator | None = None) -> dict[str, Any]:
    """Prepare, fuse, save and score one recipe; returns scores.json's content (empty without held-out data)."""
    recipe, directory = run.recipe, run.output_dir
    accelerator = accelerator or launch(recipe)
    if accelerator.is_main_process and not (directory / "run.json").exists():
        _write_record(run)
    accelerator.wait_for_everyone()
    seconds: Counter[str] = Counter(read_json(directory / "run.json").get("seconds"))  # of interrupted sessions, too

    @contextlib.contextmanager
    def timed(phase: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            seconds[phase] = round(seconds[phase] + time.monotonic() - start, 1)
            if accelerator.is_main_process:
                write_json(directory / "run.json", read_json(directory / "run.json") | {"seconds": dict(seconds)})

    with timed("prepare"):
        if accelerator.is_main_process:
            preparation = open_preparation(run)
            announce("train", preparation, accelerator.num_processes, newest_step(directory / "checkpoints"))
            preparation.run()
            del preparation
        accelerator.wait_for_everyone()
        store = Store.load(run.store_dir)
    with timed("train"):
        trainer = Trainer(recipe, store, directory, accelerator)
        trainer.train()
    scores: dict[str, Any] = {}
    if accelerator.is_main_process:
        with timed("evaluate"):
            save_fused(trainer.fusion.model, trainer.chat.tokenizer, directory, recipe, trainer.saved_dtype)
            del trainer
            if recipe.data.heldout is not None:
                scores = evaluate(run, store)
        write_json(
            directory / "run.json",
            {
                "status": "complete",
                "recipe": recipe.to_dict(),
                "store": str(run.store_dir),
                **environment(),
                "seconds": dict(seconds),
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "demo_data": demo_data(recipe),
            },
        )
    accelerator.wait_for_everyone()
    return scores


def demo_data(recipe: Recipe) -> dict[str, Any] | None:
    """How the bundled demo's data were made imperfect; None for other data."""
    if not recipe.data.train.startswith(BUNDLED_PREFIX):
        return None
    return read_json(Path(resolve("demo:demo_data.json")))


def run_command(argv: list[str]) -> None:
    flags = {"fresh": "rename an existing run aside and start over (the store stays)"}
    run = parse_run("train", argv, flags, __doc__.split("\n")[0])
    accelerator = launch(run.recipe)
    complete = False
    if accelerator.is_main_process:
        if run.options["fresh"]:
            open_preparation(run)  # says what is wrong before anything is moved
        complete = open_run(run)
    if broadcast_object_list([complete])[0]:
        accelerator.print(f"{run.output_dir} is complete already; --fresh starts over")
        if accelerator.is_main_process:
            if (run.store_dir / "manifest.json").exists():
                open_preparation(run)  # says so where models or data are no longer those of the run
            score_again(run)
    else:
        train(run, accelerator)
    if accelerator.is_main_process:
        report = write_report(run.output_dir, run.store_dir)
        if run.recipe.data.heldout is not None:
            print(score_table(read_json(run.output_dir / "scores.json")))
            print(closing_examples(read_json(run.output_dir / "evaluation.json"), 3))
        if line := handled_line(read_json(run.store_dir / "summary.json")):
            print(line)
        seconds = read_json(run.output_dir / "run.json")["seconds"]
        print(f"took {', '.join(f'{phase} {in_words(s)}' for phase, s in seconds.items())}")
        print(f"fused model: {run.output_dir}\nreport: {report}")
    accelerator.free_memory()  # DDP before its process group: as the last user it could wait for gloo's thread forever
    accelerator.end_training()


if __name__ == "__main__":
    main_of(run_command)
