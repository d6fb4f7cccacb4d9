# The C++ extension, csrc/: what it takes and gives is described at its callers, spans.py, engine.py and fusellm.py.
from typing import Any

import numpy as np
from numpy.typing import NDArray

def match_spans(
    target_begin: NDArray[np.int32],
    target_end: NDArray[np.int32],
    source_begin: NDArray[np.int32],
    source_end: NDArray[np.int32],
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]: ...
def dtw(
    source_codes: NDArray[np.uint32],
    source_offsets: NDArray[np.int64],
    target_codes: NDArray[np.uint32],
    target_offsets: NDArray[np.int64],
) -> tuple[NDArray[np.int32], NDArray[np.int32]]: ...

class ByteAligner:
    def __init__(self, target: dict[str, Any], source: dict[str, Any], settings: dict[str, Any]) -> None: ...
    def align(self, batch: dict[str, Any], threads: int) -> dict[str, NDArray[Any]]: ...
    def wanted(self) -> list[str]: ...
    def learn(self, ids: NDArray[np.int32], offsets: NDArray[np.int64]) -> None: ...
    def clear(self) -> None: ...
    @property
    def cached(self) -> int: ...
