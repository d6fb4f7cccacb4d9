"""The optimizer steps of a run as a Dataset. An item says which instructions a step takes, in which forward passes, with which
weights.

The order follows from the seed and the step, so that a resumed run sees what the uninterrupted one would have seen. A
DataLoader prepares the next steps in worker processes while the trainer works on one.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from profuser.errors import ProfuserError, first_line
from profuser.kernels.common import IGNORE_INDEX
from profuser.models.batch import on_device
from profuser.models.packing import Layout, Pass, by_count, by_tokens, shares, size_of
from profuser.recipe.optim import OptimConfig
from profuser.recipe.schedule import Mode, Stage, stage_at
from profuser.train.collate import collate
from profuser.train.targets import Targets, TargetSequence

STEPS_IN_FLIGHT = 2
"""How many steps each worker process prepares ahead."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a sequence of a batch comes from, for error messages. `source` is the name of its winner, or "none"."""

    example: int
    mode: Mode
    source: str


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass of one rank: the arrays that `collate` returns, and where each sequence comes from.

    The arrays are NumPy's until they are used, because every tensor that comes from another process holds a file descriptor.

    origins: of the sequences, row by row. lengths: the tokens of each sequence, by row.
    """

    arrays: Mapping[str, np.ndarray | Tensor]
    origins: list[Origin]
    lengths: list[list[int]]

    def pin_memory(self) -> MicroBatch:
        """Returns the same in pinned memory, from which the GPU can copy while it computes."""
        return replace(self, arrays={name: torch.as_tensor(array).pin_memory() for name, array in self.arrays.items()})

    def tensors(self, device: torch.device) -> dict[str, Tensor | int]:
        """Returns what FusionModel takes, on its device. Single numbers stay numbers, and so does that of the labels."""
        return on_device(self.arrays, device) | {"valid_rows": self.label_rows}

    @property
    def label_rows(self) -> int:
        """The number of tokens that are predicted and learnt."""
        return int((self.arrays["labels"][:, 1:] != IGNORE_INDEX).sum())

    @property
    def entries(self) -> int:
        """How many ids the sources of a token have kept, at most, all that it learns from together."""
        kept = self.arrays.get("source_ids")
        return 0 if kept is None else kept.shape[0] * kept.shape[-1]

    def sequence_of_token(self) -> np.ndarray:
        """Returns (B * (T - 1),) int64, to which of `origins` each token belongs that is predicted, and -1 for padding."""
        found = np.full((len(self.lengths), max(map(sum, self.lengths))), -1)
        first = 0
        for b, lengths in enumerate(self.lengths):
            found[b, : sum(lengths)] = np.repeat(np.arange(first, first + len(lengths)), lengths)
            first += len(lengths)
        return found[:, 1:].reshape(-1)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One optimizer step, as one rank takes it.

    micro_batches: the forward passes of this rank. The rest is about the whole step, over all ranks:
    labels: the number of label tokens by mode. tokens: the number of all tokens. computed: that number with the padding.
    squares: the sum of the sequences' squared lengths, with which attention grows.
    """

    micro_batches: list[MicroBatch]
    labels: dict[Mode, int]
    tokens: int
    computed: int
    squares: int

    def pin_memory(self) -> StepBatch:
        """Returns the same in pinned memory. A DataLoader calls this method by its name."""
        return replace(self, micro_batches=[micro.pin_memory() for micro in self.micro_batches])


@dataclass(eq=False)
class Steps(Dataset[StepBatch | ProfuserError]):
    """The optimizer steps of a run. Item n is step n, counted from 0, as rank `rank` of `world` takes it.

    `layout` says how the sequences are laid into passes where optim.tokens_per_micro_batch limits these.
    An error is returned as the item instead of raised, because a worker process would turn it into a traceback.
    """

    targets: Targets
    optim: OptimConfig
    stages: list[Stage]
    seed: int
    pad_id: int
    world: int = 1
    rank: int = 0
    layout: Layout = "padded"

    def __post_init__(self) -> None:
        self._orders: dict[int, np.ndarray] = {}  # the order of the instructions, by epoch

    def __len__(self) -> int:
        """The number of optimizer steps."""
        return self.stages[-1].stop

    def __getitem__(self, index: int) -> StepBatch | ProfuserError:
        try:
            return self.batch(index)
        except ProfuserError as error:
            return error

    def batch(self, step: int) -> StepBatch:
        """Returns one optimizer step, as this rank takes it."""
        # The sequences of all ranks whose mode counts in this stage, by instruction.
        stage = self.stages[stage_at(self.stages, step)]
        instructions = [
            [sequence for sequence in self.targets[i] if stage.weight(sequence.mode) > 0]
            for i in self.instructions(step)
        ]

        # A label token weighs w / N, where w is the weight of its mode and N the number of that mode's label tokens, so that
        # the sum over all forward passes and ranks is the loss. It is multiplied by `world` because DDP averages the ranks'
        # gradients.
        labels = dict.fromkeys(Mode, 0)
        for instruction in instructions:
            for sequence in instruction:
                labels[sequence.mode] += sequence.labels
        ce_weight = {mode: stage.weight(mode) * self.world / count if count else 0.0 for mode, count in labels.items()}
        kd_weight = {mode: stage.beta * weight for mode, weight in ce_weight.items()}

        # The forward passes of all ranks, and the arrays of this rank's.
        passes = self._passes(instructions)
        layout = self.layout if self.optim.tokens_per_micro_batch else "padded"
        micro_batches = [
            MicroBatch(
                collate(rows, ce_weight, kd_weight, self.pad_id, self.targets.top_k, layout, self.optim.mixing),
                [self._origin(sequence) for row in rows for sequence in row],
                [[len(sequence.input_ids) for sequence in row] for row in rows],
            )
            for one in shares(passes, self.world)[self.rank]
            for rows in [one or [[self.targets.sequence(0).unlabelled()]]]
        ]
        lengths = [len(sequence.input_ids) for instruction in instructions for sequence in instruction]
        return StepBatch(
            micro_batches, labels, sum(lengths), sum(map(size_of, passes)), sum(length**2 for length in lengths)
        )

    def instructions(self, step: int) -> list[int]:
        """Returns the instructions that a step takes. Every epoch has an order of its own, which follows from (seed, epoch)."""
        total, size = len(self.targets), self.optim.batch_size
        taken = []
        for place in range(step * size, (step + 1) * size):
            epoch, i = divmod(place, total)
            if epoch not in self._orders:
                # A step may end one epoch and begin the next, so that the order of the epoch before is still needed.
                self._orders = {old: order for old, order in self._orders.items() if old >= epoch - 1}
                self._orders[epoch] = np.random.default_rng((self.seed, epoch)).permutation(total)
            taken.append(int(self._orders[epoch][i]))
        return taken

    def _passes(self, instructions: list[list[TargetSequence]]) -> list[Pass[TargetSequence]]:
        """Divides the sequences into the forward passes of all ranks.

        Every rank must have the same number of passes, or DDP would wait for ever. An empty pass is made of a sequence without
        labels.
        """
        sequences = [sequence for instruction in instructions for sequence in instruction]
        if budget := self.optim.tokens_per_micro_batch:
            return by_tokens(sequences, budget, self.layout, self.world)
        return by_count(
            sequences, self.world * math.ceil(len(instructions) / (self.world * self.optim.micro_batch_size))
        )

    def _origin(self, sequence: TargetSequence) -> Origin:
        source = "none" if sequence.winner is None else self.targets.sources[sequence.winner]
        return Origin(sequence.example, sequence.mode, source)


def load_steps(steps: Steps, start: int, *, workers: int, pin_memory: bool) -> Generator[StepBatch]:
    """Yields the steps of a run in their order, from step `start` on.

    Args:
        workers: how many processes prepare steps ahead; with 0 this process prepares each step when it is asked for.
        pin_memory: whether the arrays are put into pinned memory, for a GPU.

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
        worker_init_fn=live_with_the_trainer,
        # Without a generator of its own it would draw its seed from torch's, and a resumed run would not repeat torch's state.
        generator=torch.Generator(),
    )
    batches = iter(loader)
    try:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:  # a DataLoader raises it when a worker process has ended
                raise ProfuserError(
                    f"a process that prepares batches must live as long as the run, it ended ({first_line(error)}); the same "
                    "command resumes, with optim.data_workers: 0 if memory is short"
                ) from error
            if isinstance(batch, ProfuserError):
                raise batch
            yield batch
    finally:
        # This ends the workers. They ignore SIGTERM, so that this process could not end as long as anything held on to them, such as
        # an error that has come through here.
        del batches


def live_with_the_trainer(worker: int) -> None:
    """Makes a worker process ignore Ctrl-C and SIGTERM, which reach all processes of a job, and end when the trainer is gone.

    The trainer finishes its step and saves its state before it stops; a worker that ended earlier would turn this into an
    error. The trainer ends its workers itself. If it was killed, a worker could otherwise wait for ever: to hand over a batch that
    is larger than the pipe between them, of which it holds both ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=end_after, args=(multiprocessing.parent_process(),), daemon=True).start()


def end_after(trainer: BaseProcess | None) -> None:
    """Ends this process at once when the one that started it has ended."""
    if trainer is not None:
        trainer.join()
        os._exit(1)
