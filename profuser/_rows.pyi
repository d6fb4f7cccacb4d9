# The C++ extension of csrc/rows.cpp, which kernels/rows.py calls.
import numpy as np
from numpy.typing import NDArray

def exp_rows(
    rows: NDArray[np.float32],
    maxima: NDArray[np.float32],
    sums: NDArray[np.float32],
    spreads: NDArray[np.float32] | None,
    threads: int,
) -> None: ...
