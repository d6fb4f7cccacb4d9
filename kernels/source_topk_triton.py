"""The Triton path of `source_topk`: exact top-k, log-sum-exp and cross-entropy of chunks of logits, one program per row.

source_topk_triton_kernels.py has the kernels. This file is imported only when it is used, because Triton exists on Linux alone.
Dimension letters: as in that file.
"""

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from .source_topk_triton_kernels import GROUP, _range_kernel, _reduce_kernel, _select_kernel
from .source_topk_triton_merge import Merger, plan_merges, without_mapped


def topk_rows(
    logits: Callable[[slice], Tensor],
    labels: Tensor,
    k: int,
    vocabulary: int,
    temperature: float,
    chunk: int,
    vocab_map: Tensor | None,
    ranges: tuple[Tensor, ...] | None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """What `source_topk` returns, from the logits of at most `chunk` rows at a time.

    `logits` gives those of a slice of rows, (C, W), contiguous, before bias, scale and softcap. What stands in the columns from
    V on does not matter.
    """
    labels, bias = labels.contiguous(), None if bias is None else bias.contiguous()
    N = labels.shape[0]
    supers = triton.cdiv(vocabulary, GROUP.value**2)
    groups = supers * GROUP.value
    K = max(2, triton.next_power_of_2(k))  # tl.topk of one element is not implemented
    ids = labels.new_empty(N, k, dtype=torch.int32)
    logprobs, lse, ce = (labels.new_empty(shape, dtype=torch.float32) for shape in ((N, k), N, N))
    row_max, log_sum = (labels.new_empty(chunk, dtype=torch.float32) for _ in range(2))
    maxima = labels.new_empty(chunk, groups, dtype=torch.float32)
    found = [ids, logprobs, lse, ce]
    unmapped = []
    if ranges is not None:
        # A range whose row is in no chunk is never written by a kernel, and keeps these values.
        R = len(ranges[0])
        found += [labels.new_full((R, k), -1, dtype=torch.int32)]
        found += [labels.new_full(shape, torch.nan, dtype=torch.float32) for shape in ((R, k), (R,))]
        ranges = tuple(x.contiguous() for x in ranges)
        unmapped = ranges if len(ranges) == 4 else without_mapped(*ranges)
    elementwise = {
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": None if logit_scale == 1 else logit_scale,
    }
    with torch.cuda.device_of(labels):
        merges = plan_merges(vocab_map, ranges, N, vocabulary)
        merger = Merger(merges, ranges, found, chunk, vocabulary, elementwise) if merges else None
        for begin in range(0, N, chunk):
            rows = slice(begin, min(begin + chunk, N))
            z = logits(rows)
            raw = (z, z.shape[1], bias)
            _reduce_kernel[(len(z),)](
                *raw, labels[rows], maxima, row_max, log_sum, lse[rows], ce[rows],
                **elementwise, V=vocabulary, G=groups, AT_ONE=temperature == 1, BLOCK_V=2048, num_warps=4,
            )  # fmt: skip
            if vocab_map is None:
                _select_kernel[(len(z),)](
                    *raw, maxima, row_max, log_sum, ids[rows], logprobs[rows], None, None, None, None, 0, len(z),
                    vocabulary, groups, k, **elementwise, K=K, BLOCK_S=max(K, triton.next_power_of_2(supers)), num_warps=4,
                )  # fmt: skip
            if len(unmapped) and len(unmapped[0]):
                # Every chunk launches one program per range, and most return at once. To find a chunk's own ranges, the host
                # would have to wait for the device.
                _range_kernel[(len(unmapped[0]),)](
                    *raw, row_max, log_sum, *unmapped, *found[4:], begin, len(z), len(unmapped[3]), k,
                    **elementwise, V=vocabulary, K=K, BLOCK=1024, num_warps=4,
                )  # fmt: skip
            if merger is not None:
                merger.run(rows, raw, labels[rows], row_max, log_sum)
    return tuple(found)
