"""Tries on a small tensor whether bitsandbytes works on a device, before anything is prepared."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch

from profuser.errors import ConfigError, first_line, is_lack_of_memory


@contextlib.contextmanager
def must_work(key: str, device: torch.device) -> Generator[None]:
    """Turns whatever fails in its `with` block into one line about the recipe's `key`, but for a lack of memory.

    Raises:
        ConfigError: bitsandbytes does not work on this device.
    """
    try:
        yield
    except Exception as error:  # every backend of bitsandbytes raises its own kinds
        if is_lack_of_memory(error):
            raise
        raise ConfigError(
            f"{key} needs a device on which bitsandbytes works, {device} is none ({first_line(error)}); leave it out"
        ) from error
