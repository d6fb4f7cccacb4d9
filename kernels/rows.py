"""Rows of logits on a CPU, between the matrix products: exponentials and their sums, by the C++ extension where it can.

Dimension letters: C rows of a chunk, V vocabulary.
"""

import torch
from torch import Tensor

from .common import LOWEST

try:
    from profuser import _rows
    from profuser._rows import keep_entries as _keep_entries  # noqa: F401  (an older build lacks it)
except ImportError:  # the extension is optional
    _rows = None


def is_built() -> bool:
    """Whether there is a C++ extension."""
    return _rows is not None


def exponentials_(z: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrites z (C, V) with exponentials relative to each row's maximum, and returns the maxima and the sums, (C, 1) each.

    A maximum is LOWEST at least, so that a row of −inf gives zeros. A NaN makes its row's sum NaN.
    """
    if extension_takes(z):
        return through_extension(z, None)
    m = z.amax(1, keepdim=True).clamp_min_(LOWEST)
    return m, z.sub_(m).exp_().sum(1, keepdim=True)


def exponentials_and_spread_(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `exponentials_` does and returns, and `spread_of` the exponentials."""
    if extension_takes(z):
        spread = z.new_empty(z.shape[0])
        return *through_extension(z, spread), spread[:, None]
    m, total = exponentials_(z)
    return m, total, spread_of(z)


def extension_takes(z: Tensor) -> bool:
    return is_built() and z.device.type == "cpu" and z.dtype == torch.float32 and z.stride(1) == 1


def through_extension(z: Tensor, spread: Tensor | None) -> tuple[Tensor, Tensor]:
    """The maxima and sums, (C, 1). It reads and writes a row once, while it is in the cache; torch's four passes go to memory."""
    assert _rows is not None
    m, total = z.new_empty(z.shape[0]), z.new_empty(z.shape[0])
    to = None if spread is None else spread.numpy()
    _rows.exp_rows(z.numpy(), m.numpy(), total.numpy(), to, torch.get_num_threads())
    return m[:, None], total[:, None]


def spread_of(e: Tensor) -> Tensor:
    """Σ e·(m − z) of each row, (C, 1), from the exponentials e = exp(z − m): it is −Σ e·log e. A few rows at a time."""
    return torch.cat([torch.special.entr(part).sum(1, keepdim=True) for part in e.split(16)])
