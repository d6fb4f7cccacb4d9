"""Trains by deterministic algorithms alone where optim.deterministic asks for it, so that a GPU repeats its bits as a CPU does.

PyTorch then takes slower algorithms in some places, and refuses an operation that has none. Of what is computed here our own kernels
are deterministic anyway: they add in a fixed order, without atomics, and no timing chooses their blocks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator

import torch

from profuser.errors import ConfigError

WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
"""The variable that gives cuBLAS a workspace of its own, and its values under which cuBLAS is deterministic."""
REFUSED = "torch.use_deterministic_algorithms(True)"
"""What the errors have in common that PyTorch raises for operations which are not deterministic."""


def set_environment() -> None:
    """Sets what libraries read from the environment when they begin to work, so that it must be called before.

    Raises:
        ConfigError: the environment asks cuBLAS for something else.
    """
    given = os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    if given not in WORKSPACES and torch.cuda.is_available():
        raise ConfigError(
            f"{WORKSPACE} must be {' or '.join(WORKSPACES)} with optim.deterministic: true, got {given!r}; unset it, or leave the "
            "key out"
        )
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # which transformers reads for flash-attention's backward pass


@contextlib.contextmanager
def deterministic(asked: bool, *, say: bool = True) -> Generator[None]:
    """Allows deterministic algorithms alone in a `with` block, if `asked`, and sets everything back after it.

    Args:
        say: whether a line says what is set.
    Raises:
        ConfigError: something was computed that cannot be deterministic on this device.
    """
    if not asked:
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32
    torch.use_deterministic_algorithms(True)
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = False, True, False, False
    if say:
        print(
            "deterministic algorithms alone: cuDNN chooses none by time, TF32 is off, "
            f"{WORKSPACE}={os.environ.get(WORKSPACE, 'unset')}",
            flush=True,
        )
    try:
        yield
    except RuntimeError as error:
        if REFUSED not in str(error):
            raise
        what = str(error).partition(" does not have")[0] if " does not have" in str(error) else "a product by cuBLAS"
        raise ConfigError(
            f"optim.deterministic: true needs a deterministic algorithm for all that is computed, {what} has none here; set it to "
            "false, or train another target or on another device"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = flags
