"""The training loop, which minimises w_inference * L_inference + w_training * L_training, stage by stage.

Each L is a mean over the label tokens of its own mode in the whole optimizer step, over all ranks and forward passes. The
fused loss is called with reduction="sum" and the weight w / N for each of a mode's N label tokens. Then the sum over all
passes and ranks is the loss itself, however the step is divided among them. The learning rate and the order of the data
follow from the seed and the step.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from profuser.errors import ConfigError, DataError, NonFiniteError
from profuser.models.head import evaluating, head_layer
from profuser.models.load import chat_format, stored_dtype
from profuser.progress import Progress
from profuser.recipe.schedule import Mode, Stage, learning_rate, plan, stage_at
from profuser.recipe.schema import Recipe
from profuser.stopping import noted
from profuser.store import layout
from profuser.store.files import write_atomic
from profuser.store.no_signal import advice
from profuser.store.store import Store
from profuser.text.chat import ChatFormat
from profuser.train.capacity import Capacity, LeftOut, is_chosen_on, left_out_metrics
from profuser.train.checkpoint import Checkpoint, load_best, load_newest
from profuser.train.determinism import deterministic
from profuser.train.flops import cost_of, peak_flops, utilisation
from profuser.train.freed_memory import returns_freed_memory
from profuser.train.health import Health
from profuser.train.likelihood import likelihood
from profuser.train.losses import SequenceLosses, step_losses
from profuser.train.metrics_log import append_line, is_due, ranking, summary, validations
from profuser.train.parallel import agreed_stop, shards
from profuser.train.saver import Saver
from profuser.train.sharding import agreed, gathered
from profuser.train.steps import StepBatch, Steps, load_steps
from profuser.train.target import layout_for, load_target
from profuser.train.targets import Targets
from profuser.train.trackers import Trackers
from profuser.train.updates import make_updates
from profuser.train.zero import shape_of

NOTICES = "notices.jsonl"
"""The file of a run with the steps that stood out. Nothing is read from it."""

Rewards = Callable[[PreTrainedModel, ChatFormat], dict[str, float | None]]
"""A function of the target and its chat format that returns what the judges give its answers, by names that begin with `reward_`."""


class Trainer:
    """Trains the target of one run on a store's training split, through all stages of the schedule.

    Args:
        directory: the run directory, for checkpoints and metrics.
        rewards: what measures the judges' scores at each validation.
    Raises:
        ConfigError: a stage would have no step.
        DataError: a stage has no training examples; the best weights are to be written, and no validation example is left; the
            target cannot be loaded, or does not fit its tokenizer.
    """

    def __init__(
        self,
        recipe: Recipe,
        store: Store,
        directory: Path,
        accelerator: Accelerator,
        rewards: Rewards | None = None,
    ):
        self.recipe, self.optim, self.directory, self.accelerator = recipe, recipe.optim, directory, accelerator
        self.rewards = rewards

        # The data.
        self.targets = Targets(store, "train")
        self.validation = validation_truths(store)
        # The CE of every validation, by the number of steps done, on the main process.
        self.validated: dict[int, float] = {}
        self.stages = plan(recipe, len(self.targets))
        self._check_modes(store)
        if self.optim.export == "best" and self.validation is None:
            raise DataError(
                f"optim.export: best needs a validation example that can be used, none is left ({store.handled() or 'none was read'}); "
                "raise data.max_length or check data.validation"
            )
        self.targets_digest = store.digest(layout.targets("train"))
        config = recipe.target_config
        self.chat = chat_format(config, date=store.date)
        self.pad_id = self.chat.end_id  # it has a row in every model, which the tokenizer's padding need not have

        # The target and its optimizer. The weights are kept in fp32 and are rounded to `saved_dtype` at the end.
        torch.manual_seed(recipe.seed)
        self.sharded = shards(self.optim, accelerator)
        self.saved_dtype = stored_dtype(config)
        self.fusion, loaded = load_target(recipe, self.chat, accelerator, sharded=self.sharded)
        self.fusion.train()
        self.layout = layout_for(self.fusion, self.optim.tokens_per_micro_batch)
        self.steps = Steps(
            self.targets,
            self.optim,
            self.stages,
            recipe.seed,
            self.pad_id,
            accelerator.num_processes,
            accelerator.process_index,
            self.layout,
        )
        self.capacity: Capacity | None = None
        if self.optim.left_out and is_chosen_on(accelerator.device):
            self.capacity = Capacity(*shape_of(head_layer(self.fusion.model).weight))
        self.updates = make_updates(self.fusion, loaded, self.optim, accelerator, sharded=self.sharded)
        self.cost = cost_of(self.fusion.model)
        self.peak = peak_flops(accelerator.device, bf16=accelerator.mixed_precision == "bf16")
        self.saver = Saver(
            directory / "checkpoints", beside_training=self.optim.async_checkpoints, sharded=self.sharded
        )
        self.metrics = directory / "metrics.jsonl"
        self.window: list[dict[str, float]] = []  # the metrics of the steps since the last line of metrics.jsonl
        self.health = Health()
        shown = self.optim.trackers if accelerator.is_main_process else ()
        self.trackers = Trackers(shown, directory, recipe.to_dict())

    def _passes(self, steps: int) -> float:
        """How many texts of an instruction the first steps learn. A stage of both modes takes twice as long as one of a single mode."""
        return sum(len(stage.modes) * max(0, min(steps, stage.stop) - stage.first) for stage in self.stages)

    def _check_modes(self, store: Store) -> None:
        """Raises DataError unless there are training examples for at least one mode of every stage."""
        there = set(self.targets.modes.tolist())
        for i, stage in enumerate(self.stages, start=1):
            if not there.intersection(stage.modes):
                fix = "raise data.max_length or check the data"
                if Mode.INFERENCE in stage.modes and self.recipe.judging.no_signal == "skip":
                    found = store.summary.get("no_signal") or {"reasons": {}}
                    fix += f", {advice(found['reasons'], 'skip')}"
                modes = " or ".join(mode.key for mode in stage.modes)
                raise DataError(
                    f"stage {i} needs training examples of its mode, {modes}, none is left "
                    f"({store.handled() or 'nothing was skipped'}); {fix}"
                )

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What holds AdamW's moments."""
        return self.updates.optimizer

    # -- the loop --------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Trains through all stages, from the newest checkpoint on if there is one.

        Raises:
            Interrupted, Terminated: after Ctrl-C or SIGTERM, at the end of the step and with a checkpoint of it.
            NonFiniteError: a loss or gradient is not finite.
            ConfigError: the checkpoint was trained on other targets; or the training is to be deterministic, and cannot be.
            DataError: a shard is damaged.
            ProfuserError: a process that prepares batches was killed.
        """
        returned = self.optim.gradient_checkpointing and self.accelerator.device.type == "cpu"
        with (
            deterministic(self.optim.deterministic, say=self.accelerator.is_main_process),
            returns_freed_memory(returned),
        ):
            self._train()

    def _train(self) -> None:
        start, total = self._resume(), self.stages[-1].stop
        if start < total:
            self.trackers.start(start)
        if start == 0:
            self._evaluate(0, 0)  # the target before fusion
        batches = load_steps(
            self.steps,
            start,
            workers=self.optim.data_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        with (
            contextlib.closing(self.saver),  # waits for a checkpoint that is being written
            contextlib.closing(batches),  # ends the worker processes when the loop ends, for whatever reason
            Progress("fuse", total, "steps", self.accelerator.is_main_process, start, cost=self._passes) as bar,
            noted() as asked,
        ):
            for step in range(start, total):
                self.saver.check()

                # One optimizer step. The time that it waits for its batch is measured separately.
                index = stage_at(self.stages, step)
                stage = self.stages[index]
                began = time.monotonic()
                batch = next(batches)
                waited = time.monotonic() - began
                metrics = self._step(step, stage, batch)
                seconds = time.monotonic() - began

                # Say what stands out in it. Log it, validate and save where that is due. A stage always ends with a line and a
                # validation.
                self.window.append(
                    metrics
                    | {
                        "tokens": batch.tokens,
                        "tokens_per_second": batch.tokens / seconds,
                        "data_wait": waited / seconds,
                        "padding": 1 - batch.tokens / max(batch.computed, 1),
                        **self._utilisation(batch, seconds),
                    }
                )
                done = step + 1
                note = f"stage {index + 1}/{len(self.stages)}"
                if "loss" in metrics:
                    note += f", loss {metrics['loss']:.3f}"
                bar.update(1, tokens=batch.tokens, note=note)
                self._say_what_stands_out(step, index, metrics.get("loss"), seconds)
                if is_due(done, stage, self.optim.log_every):
                    self._log({"step": done, "stage": index, **summary(self.window)})
                    self.window = []
                best = False
                if (self.optim.eval_every and done % self.optim.eval_every == 0) or done == stage.stop:
                    self._evaluate(done, index)
                    best = agreed(self._best() == done)
                due = self.optim.checkpoint_every and done % self.optim.checkpoint_every == 0
                stop = agreed_stop(asked())
                if due or best or stop is not None or done == total:
                    self._checkpoint(done)
                if stop is not None or done == total:
                    self.saver.wait()

                # Ctrl-C or SIGTERM came during the step, whose state is saved now.
                if stop is not None:
                    raise stop

    def _step(self, step: int, stage: Stage, batch: StepBatch) -> dict[str, float]:
        """Does one optimizer step and returns its metrics, which are means over its label tokens.

        A step without any label token changes nothing, and has no losses.

        Raises:
            NonFiniteError: a loss or the gradient is not finite. The weights are then left as they were.
        """
        lr = learning_rate(self.optim, stage, step)
        if not any(batch.labels.values()):  # none of the step's instructions has a sequence of this stage's modes
            return {"lr": lr}
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Dropout follows from the step and the rank: a checkpoint holds the main process's random state alone.
        drawn = np.random.SeedSequence((self.recipe.seed, step, self.accelerator.process_index))
        torch.manual_seed(int(drawn.generate_state(1)[0]))

        # The forward and backward passes. What each sequence adds to the losses stays on the device until the end, because to read
        # it is to wait for the pass.
        losses = SequenceLosses()
        left_out = LeftOut(self.accelerator.device)
        for number, micro in enumerate(batch.micro_batches, start=1):
            if self.capacity is not None:
                self.fusion.loss_options |= self.capacity.options(self.optim.left_out, micro, self.accelerator.device)
            inputs = micro.tensors(self.accelerator.device)
            out = self.updates.run(
                inputs | {"reduction": "sum", "return_stats": True}, last=number == len(batch.micro_batches)
            )
            losses.add(micro, out["ce"], out["kd"])
            if self.optim.left_out:
                left_out.add(micro, out)

        # The losses over all ranks and the norm of the gradient must be finite, or the weights stay as they are. To read these, a step
        # waits for the device; besides, transformers does as it makes the mask of a forward pass.
        sums = self.accelerator.reduce(losses.by_mode(), reduction="sum")
        # Of what was left out, the largest over all ranks: they must go on with one capacity.
        largest = (
            self.accelerator.gather(left_out.largest()[None]).amax(0) if self.optim.left_out else sums.new_empty(0)
        )
        read = torch.cat([largest, sums.flatten()]).tolist()
        largest, sums = read[: len(largest)], read[len(largest) :]
        if not all(map(math.isfinite, sums)):
            raise losses.not_finite(step)
        norm = self.updates.update()
        if not math.isfinite(norm):
            raise self._gradient_not_finite(step, norm)
        if self.capacity is not None:
            self.capacity.update(int(largest[-1]))
        return {**step_losses(sums, batch, stage), "lr": lr, "grad_norm": norm, **left_out_metrics(largest)}

    def _utilisation(self, batch: StepBatch, seconds: float) -> dict[str, float]:
        """Returns the model FLOP utilisation of a step, as far as it can be known."""
        if self.cost is None or self.peak is None:
            return {}
        flops = self.cost.flops(batch.tokens, batch.squares)
        return {"mfu": utilisation(flops, seconds, self.accelerator.num_processes, self.peak)}

    def _say_what_stands_out(self, step: int, stage: int, loss: float | None, seconds: float) -> None:
        """Prints what stands out in a step with the examples in it, and adds it to notices.jsonl."""
        if not self.accelerator.is_main_process:
            return
        for what in self.health.notices(stage, loss, seconds):
            print(f"step {step + 1} stands out: {what}; {self._noted(step, what)}", flush=True)

    def _noted(self, step: int, what: str) -> str:
        """Adds what stands out in a step to notices.jsonl with the examples in it, and names the first of these in words."""
        taken = self.steps.instructions(step)
        examples = sorted({sequence.example for i in taken for sequence in self.targets[i]})
        if self.accelerator.is_main_process:
            append_line(self.directory / NOTICES, {"step": step + 1, "what": what, "examples": examples})
        return "training examples " + ", ".join(map(str, examples[:12])) + (" …" if len(examples) > 12 else "")

    def _gradient_not_finite(self, step: int, norm: float) -> NonFiniteError:
        """Returns the error for a gradient that is not finite where all losses are. It cannot be traced to one of the step's examples."""
        return NonFiniteError(
            f"gradients must be finite, got norm {norm} at step {step + 1}, {self._noted(step, f'the gradient had norm {norm}')}; lower "
            "optim.lr or raise optim.warmup_ratio"
        )

    def trial(self, index: int) -> Generator[tuple[float, int]]:
        """Takes the steps of one stage, one at a time, as `train` does, but saves, logs and validates nothing.

        Yields:
            (seconds, tokens) of a step, with the time that it waited for its batch.
        """
        stage = self.stages[index]
        pinned = self.accelerator.device.type == "cuda"
        batches = load_steps(self.steps, stage.first, workers=self.optim.data_workers, pin_memory=pinned)
        with contextlib.closing(batches), deterministic(self.optim.deterministic, say=False):
            for step in range(stage.first, stage.stop):
                began = time.monotonic()
                batch = next(batches)
                self._step(step, stage, batch)
                yield time.monotonic() - began, batch.tokens

    # -- around the loop --------------------------------------------------------------------------------------------

    def _evaluate(self, step: int, stage: int) -> None:
        """Logs CE and KD on the validation prompts, if the recipe has any, and what the judges think of the target's answers.

        The main process alone computes them, unless the model is sharded: then no process can do without the others.
        """
        if self.validation is None or not (self.accelerator.is_main_process or self.sharded):
            return
        label, size = "score the validation prompts", self.recipe.capture.batch_size
        statistics = likelihood(self.fusion, self.validation, self.pad_id, size, label, self.optim.mixing)
        measured = {"ce": statistics.ce, "kd": statistics.kd}
        if self.rewards is not None:
            with evaluating(self.fusion), gathered(self.fusion), self._as_it_is(), self._arithmetic():
                measured |= self.rewards(self.fusion.model, self.chat)
        self._log({"step": step, "stage": stage, "eval": measured})
        if step > 0 and math.isfinite(statistics.ce):  # what was there before the training is no result of it
            self.validated[step] = statistics.ce

    def _as_it_is(self) -> contextlib.AbstractContextManager[Any]:
        """In a `with` block the target is called without its graph, which would be compiled anew for an answer's every token."""
        return torch.compiler.set_stance("force_eager") if self.optim.compile else contextlib.nullcontext()

    def _arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """In a `with` block the target computes as in training. A sharded one's weights are gathered in 16 bits anyway."""
        return contextlib.nullcontext() if self.sharded else self.accelerator.autocast()

    def _best(self) -> int | None:
        """Returns the step whose checkpoint is kept beside the last ones, on the main process; None where there is none."""
        return next(iter(ranking(self.validated)), None) if self.optim.keep_best else None

    def _log(self, line: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl, on the main process, and shows it in the trackers."""
        if self.accelerator.is_main_process:
            append_line(self.metrics, line)
            self.trackers.log(line)

    def _checkpoint(self, step: int) -> None:
        """Saves a checkpoint. The main process does it, unless the model is sharded: then each writes its own shares."""
        if self.accelerator.is_main_process or self.sharded:
            metrics = self.metrics.read_bytes() if self.accelerator.is_main_process else b""
            capacity = None if self.capacity is None else self.capacity.state
            checkpoint = Checkpoint(step, self.targets_digest, metrics, tuple(self.window), capacity)
            self.saver.save(checkpoint, self.fusion, self.optimizer, self.optim.keep_checkpoints, self._best())
        self.accelerator.wait_for_everyone()

    def restore_exported(self) -> int:
        """Puts the weights that optim.export asks for into the trained model, and returns the step that they are of.

        With `best` they are those of the intact checkpoint with the lowest CE in validation, and the last ones where these were not
        worse. All processes must call it.
        """
        total = self.stages[-1].stop
        if self.optim.export == "last":
            return total
        ranks = agreed(ranking(self.validated))
        better = ranks[: ranks.index(total)] if total in ranks else ranks
        found = load_best(self.directory / "checkpoints", better, self.fusion, self.optimizer) if better else None
        step = total if found is None else found.step
        said = f"the weights after step {step} of {total} are exported"
        if found is not None:
            said += f", with the lowest CE in validation, {self.validated.get(step, math.nan):.4f}"
        elif better:
            said += f", because no intact checkpoint is left of a step with a lower CE in validation ({', '.join(map(str, better))})"
        else:
            said += ", the last ones, with the lowest CE in validation"
        self.accelerator.print(said, flush=True)
        return step

    def _resume(self) -> int:
        """Restores the newest checkpoint, if there is one, and returns the number of steps that are done."""
        found = load_newest(self.directory / "checkpoints", self.fusion, self.optimizer)
        step, metrics = (0, b"") if found is None else (found.step, found.metrics)
        self.window = [] if found is None else list(found.window)
        if self.capacity is not None:
            self.capacity.restore(None if found is None else found.capacity)
        if found is not None and found.targets != self.targets_digest:
            raise ConfigError(
                f"{self.directory} was trained on other targets than the store holds now; start over with --fresh, or restore "
                "the store"
            )
        if self.accelerator.is_main_process:
            self.validated = validations(metrics)
            if step:
                print(f"resuming at step {step} of {self.stages[-1].stop}", flush=True)
            write_atomic(self.metrics, metrics)
        return step


def validation_truths(store: Store) -> Targets | None:
    """Returns the validation split; None where it has no ground truth that can be measured."""
    if not store.numbers(layout.targets("validation")):
        return None
    targets = Targets(store, "validation")
    return targets if (targets.modes == Mode.TRAINING).any() else None
