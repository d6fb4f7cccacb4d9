"""The optimizer steps of a run as a Dataset: which instructions a step takes, in which forward passes, with which weights.

The order is a function of (seed, step), so a resumed run sees what the uninterrupted one would have seen. A DataLoader
over it prepares the next steps in worker processes while one is trained on.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from profuser.errors import ProfuserError, first_line
from profuser.recipe.schedule import Mode, Stage, stage_at
from profuser.recipe.schema import OptimConfig
from profuser.train.collate import collate
from profuser.train.targets import Targets, TargetSequence

STEPS_IN_FLIGHT = 2
"""Steps that each worker prepares ahead."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a sequence of a batch comes from, for a message about it; source: the winner's name, or "none"."""

    example: int
    mode: Mode
    source: str


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass of one rank: the arrays of `collate`, and where each sequence comes from.

    They are NumPy's until they are used: a tensor from another process would hold a file descriptor each.
    """

    arrays: Mapping[str, np.ndarray | Tensor]
    origins: list[Origin]

    def pin_memory(self) -> MicroBatch:
        return replace(self, arrays={name: torch.as_tensor(x).pin_memory() for name, x in self.arrays.items()})

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """What FusionModel takes, on its device."""
        return {name: torch.as_tensor(x).to(device, non_blocking=True) for name, x in self.arrays.items()}


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One optimizer step on one rank.

    labels: trained tokens of the whole step by mode, over all ranks; tokens: all of its tokens.
    """

    micro_batches: list[MicroBatch]
    labels: dict[Mode, int]
    tokens: int

    def pin_memory(self) -> StepBatch:  # a DataLoader asks for it
        return replace(self, micro_batches=[micro.pin_memory() for micro in self.micro_batches])


@dataclass(eq=False)
class Steps(Dataset[StepBatch | ProfuserError]):
    """Item n: the n-th optimizer step of a run, as one of `world` ranks takes it.

    A failure is given back instead of raised: a worker process would turn it into a traceback.
    """

    targets: Targets
    optim: OptimConfig
    stages: list[Stage]
    seed: int
    pad_id: int
    world: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.stages[-1].stop

    def __getitem__(self, index: int) -> StepBatch | ProfuserError:
        try:
            return self.batch(index)
        except ProfuserError as error:
            return error

    def batch(self, step: int) -> StepBatch:
        """Weights are w / N of a mode, so that a sum over all forward passes of all ranks is L; times `world`, because DDP
        averages the ranks' gradients."""
        stage = self.stages[stage_at(self.stages, step)]
        instructions = [[s for s in self.targets[i] if stage.weight(s.mode) > 0] for i in self.instructions(step)]
        labels = dict.fromkeys(Mode, 0)
        for instruction in instructions:
            for s in instruction:
                labels[s.mode] += s.labels
        ce_weight = {mode: stage.weight(mode) * self.world / n if n else 0.0 for mode, n in labels.items()}
        kd_weight = {mode: stage.beta * weight for mode, weight in ce_weight.items()}
        micro_batches = [
            MicroBatch(
                collate(sequences, ce_weight, kd_weight, self.pad_id, self.targets.top_k),
                [self._origin(s) for s in sequences],
            )
            for sequences in self._passes(instructions)
        ]
        tokens = sum(len(s.input_ids) for instruction in instructions for s in instruction)
        return StepBatch(micro_batches, labels, tokens)

    def instructions(self, step: int) -> list[int]:
        """The instructions of a step: epochs are permutations drawn from (seed, epoch)."""
        n, size = len(self.targets), self.optim.batch_size
        taken = []
        for place in range(step * size, (step + 1) * size):
            epoch, i = divmod(place, n)
            if epoch not in self._orders:
                # A step may end one epoch and begin the next, so that the one before is still needed.
                self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
                self._orders[epoch] = np.random.default_rng((self.seed, epoch)).permutation(n)
            taken.append(int(self._orders[epoch][i]))
        return taken

    def _passes(self, instructions: list[list[TargetSequence]]) -> list[list[TargetSequence]]:
        """This rank's sequences in forward passes, by length, so that little is padded; every rank has as many passes."""
        passes = math.ceil(len(instructions) / (self.world * self.optim.micro_batch_size))
        mine = sorted(
            (s for instruction in instructions[self.rank :: self.world] for s in instruction),
            key=lambda s: len(s.input_ids),
        )
        bounds = [round(len(mine) * i / passes) for i in range(passes + 1)]
        return [mine[first:stop] or [self.targets.sequence(0).unlabelled()] for first, stop in pairwise(bounds)]

    def _origin(self, s: TargetSequence) -> Origin:
        return Origin(s.example, s.mode, "none" if s.winner is None else self.targets.sources[s.winner])


def load_steps(steps: Steps, start: int, *, workers: int, pin_memory: bool) -> Generator[StepBatch]:
    """The batches of a run from step `start` on, in order.

    Raises:
        DataError: a shard is damaged.
        ProfuserError: a worker process was killed.
    """
    loader: DataLoader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(start, len(steps)),
        num_workers=workers,
        prefetch_factor=STEPS_IN_FLIGHT if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_the_trainer,
        generator=torch.Generator(),  # or it would draw its seed from the state that a resumed run must repeat
    )
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:  # what a DataLoader raises for a worker that has gone
            raise ProfuserError(
                f"a process that prepares batches must live as long as the run, it ended ({first_line(error)}); the same "
                "command resumes, with optim.data_workers: 0 if memory is short"
            ) from error
        if isinstance(batch, ProfuserError):
            raise batch
        yield batch


def leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach all processes of a job. The trainer finishes its step and saves its state, which
    a worker that ends before would turn into an error; it ends its workers itself, and they end when it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
