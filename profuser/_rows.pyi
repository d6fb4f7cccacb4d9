# The C++ extension of csrc/rows_bindings.cpp, which kernels/rows.py, row_losses.py and row_entries.py call.
import numpy as np
from numpy.typing import NDArray

def exp_rows(
    rows: NDArray[np.float32],
    maxima: NDArray[np.float32],
    sums: NDArray[np.float32],
    spreads: NDArray[np.float32] | None,
    threads: int,
) -> None: ...
def loss_rows(
    rows: NDArray[np.float32],
    gold: NDArray[np.int64],
    entries: tuple[NDArray[np.generic], ...] | None,
    weight_ce: NDArray[np.float32],
    weight_kd: NDArray[np.float32],
    temperature: NDArray[np.float64],
    divergence: str,
    beta: float,
    conditional: bool,
    label_smoothing: float,
    z_loss: float,
    entropies: bool,
    gradient: bool,
    losses: NDArray[np.float32],
    parts: tuple[NDArray[np.generic] | None, ...] | None,
    threads: int,
) -> None: ...
def keep_entries(
    ids: NDArray[np.int64],
    log_p: NDArray[np.float64],
    tail: NDArray[np.float64] | None,
    labels: NDArray[np.int64],
    bucket: bool,
    absent_tail: float,
    tail_floor: float,
    entry_floor: float,
    vocabulary: int,
    to: tuple[NDArray[np.generic], ...],
    threads: int,
) -> None: ...
