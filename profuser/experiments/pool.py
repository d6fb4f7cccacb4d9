"""Processes that work on several runs of an experiment side by side."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from profuser.stopping import working


@contextlib.contextmanager
def stoppable_pool(workers: int, **options: Any) -> Generator[ProcessPoolExecutor]:
    """A pool of new processes. When the command is stopped or fails, those at work are told to stop, and no further run is begun.

    Args:
        options: what ProcessPoolExecutor takes.
    """
    with (
        working(),
        ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), **options) as pool,
    ):
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
