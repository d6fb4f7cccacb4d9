"""The sources' entries made ready on a CPU, by the C++ extension (`csrc/rows_entries.cpp`), row by row.

In torch this takes some 50 calls for a few numbers per row, which is what a small vocabulary's time goes to.

Dimension letters: n rows, W sources, K entries as they are given, L = W·K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import rows
from .tails import TailRule


def take(ids: Tensor, dtype: torch.dtype) -> bool:
    """Whether the extension is built and makes entries of this dtype on this device."""
    return rows.is_built() and ids.device.type == "cpu" and dtype == torch.float32


def settle(ids: Tensor, log_p: Tensor, tail: Tensor | None, labels: Tensor, rule: TailRule) -> tuple[Tensor, ...]:
    """The results of `settled` in kept.py, in fp32, from ids (n, W, K) int64, log_p (n, W, K), tail (n, W) fp64 and labels (n,)."""
    assert rows._rows is not None
    n, W, K = ids.shape
    L = W * K
    kinds = {torch.int64: [(n, L)], torch.bool: [(n, W, L)], torch.float32: [(n, W, L + 1)] * 2}
    to = [torch.empty(shape, dtype=dtype) for dtype, shapes in kinds.items() for shape in shapes]
    to += [
        torch.empty(n, L, dtype=torch.bool),
        torch.empty(n, W, dtype=torch.float64),
        torch.empty(n, W, dtype=torch.bool),
    ]
    rows._rows.keep_entries(
        ids.contiguous().numpy(),
        log_p.double().contiguous().numpy(),
        None if tail is None else tail.contiguous().numpy(),
        labels.long().contiguous().numpy(),
        *rule,
        tuple(x.numpy() for x in to),
        torch.get_num_threads(),
    )
    return tuple(to)
