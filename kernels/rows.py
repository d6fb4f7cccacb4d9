"""Rows of logits on a CPU, between the matrix products: exponentials and their sums, by the C++ extension where it can.

Dimension letters: C rows of a chunk, V vocabulary.
"""

import torch
from torch import Tensor

from .common import LOWEST

try:
    from profuser import _rows
except ImportError:  # the extension is optional
    _rows = None


def exponentials_(z: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrites z (C, V) with exponentials relative to each row's maximum, and returns the maxima and the sums, (C, 1) each.

    A maximum is LOWEST at least, so that a row of −inf gives zeros. A NaN makes its row's sum NaN.
    """
    if _rows is None or z.device.type != "cpu" or z.dtype != torch.float32 or z.stride(1) != 1:
        m = z.amax(1, keepdim=True).clamp_min_(LOWEST)
        return m, z.sub_(m).exp_().sum(1, keepdim=True)
    m, total = z.new_empty(z.shape[0]), z.new_empty(z.shape[0])
    # The extension reads and writes a row once, while it is in the cache; the four passes of torch go to memory.
    _rows.exp_rows(z.numpy(), m.numpy(), total.numpy(), torch.get_num_threads())
    return m[:, None], total[:, None]
