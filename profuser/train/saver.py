"""Saves the checkpoints of a training: at once, or in a thread of its own while the training goes on.

For that the state is copied into the machine's memory first. There is one copy: the next checkpoint waits for the one before. What
went wrong in the thread is raised at the next step.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from profuser.errors import first_line
from profuser.train.checkpoint import Checkpoint, save_checkpoint, state_of, write_checkpoint


class Saver:
    """Saves checkpoints into one directory.

    Args:
        beside_training: whether it is done in a thread, while the training goes on.
        sharded: whether the processes write together. Then all of them must make a Saver, and use it at the same steps.
    """

    def __init__(self, directory: Path, *, beside_training: bool, sharded: bool):
        self.directory = directory
        self._thread = ThreadPoolExecutor(1, "checkpoint") if beside_training else None
        self._writing: Future[Path] | None = None
        # The threads talk in between the steps, whose exchange must not be mixed up with theirs.
        self._group: dist.ProcessGroup | None = None
        if beside_training and sharded:
            self._group = dist.new_group(backend="gloo")  # pyrefly: ignore[bad-assignment]  # every process is in it

    def save(
        self,
        checkpoint: Checkpoint,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        keep: int,
        best: int | None = None,
    ) -> None:
        """Does what `save_checkpoint` does, or begins to. It raises what `wait` raises."""
        if self._thread is None:
            save_checkpoint(self.directory, checkpoint, model, optimizer, keep, best)
            return
        self.wait()
        state = state_of(model, optimizer, copied=True)
        self._writing = self._thread.submit(
            write_checkpoint, self.directory, checkpoint, state, keep, best, self._group
        )

    def check(self) -> None:
        """Raises what has gone wrong in the last checkpoint, such as DiskFull, if it has ended. It does not wait."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the last checkpoint is written, and raises what has gone wrong."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Waits until nothing is written any more. What has gone wrong is said in a line, because another error may be on its way."""
        if self._thread is None:
            return
        self._thread.shutdown()
        if self._writing is not None and (error := self._writing.exception()):
            print(f"the last checkpoint could not be written ({first_line(error)})", flush=True)
