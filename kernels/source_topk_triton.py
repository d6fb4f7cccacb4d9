"""The Triton path of `source_topk`: exact top-k, log-sum-exp and cross-entropy of chunks of logits, one program per row.

- `_reduce_kernel` reads a chunk of logits once, for the sums and the maximum of every GROUP columns.
- `_select_kernel` finds the top k by those maxima, and reads the logits of k groups again. README.md says why the k best
  groups hold the k best tokens.
- `_range_kernel` looks at single ranges of single rows.

What one launch writes is read by later launches only: there are no barriers, no atomics, and nothing waits for the device.
This file is imported only when it is used, because Triton exists on Linux alone.
Dimension letters: N rows, C rows of a chunk, W >= V columns of a row in memory, V vocabulary, G groups (a multiple of GROUP),
k kept entries, K that number as the kernels round it up, R ranges.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import IGNORE_INDEX
from .triton_math import fast_exp, log1p, tanh

GROUP = tl.constexpr(16)
FLOOR = tl.constexpr(-1e30)  # finite, because a maximum that starts at -inf makes NaN of a column of -inf
MAX_INDEX = tl.constexpr(0x7FFFFFFF)
IGNORE = tl.constexpr(IGNORE_INDEX)
LEAST_KEY = tl.constexpr(-(1 << 63))


@triton.jit
def _load_logits(row_ptr, columns, inside, readable, bias_ptr, softcap, logit_scale):
    """The fp32 logits of one row, -inf for columns that are not `inside`. None means all columns.

    Only `readable` columns are loaded. They may be more than those inside, where that allows wider loads.
    """
    z = tl.load(row_ptr + columns, mask=readable).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, mask=inside).to(tl.float32)
    if logit_scale is not None:
        z = z * logit_scale
    if softcap is not None:
        z = softcap * tanh(z / softcap)
    if inside is not None:
        z = tl.where(inside, z, -float("inf"))
    return z


@triton.jit
def _key(value, index):
    """An int64 that ranks by value, and equal values by ascending index. -0 equals +0, and NaN ranks as -inf."""
    value = tl.where(value == 0, 0.0, tl.where(value == value, value, -float("inf")))
    bits = value.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & MAX_INDEX)
    return (ordered.to(tl.int64) << 32) | (index ^ MAX_INDEX).to(tl.int64)


@triton.jit
def _index(key):
    return (key & MAX_INDEX).to(tl.int32) ^ MAX_INDEX


@triton.jit
def _value(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & MAX_INDEX)).to(tl.float32, bitcast=True)


@triton.jit
def _add_block(
    top,
    others,
    total,
    start,
    row_ptr,
    width,
    bias_ptr,
    maxima_ptr,
    gold,
    inverse,
    softcap,
    logit_scale,
    V: tl.constexpr,
    G: tl.constexpr,
    AT_ONE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The running maxima and sums of a row, with BLOCK_V more columns. WHOLE says that all of those are below V."""
    groups = tl.arange(0, BLOCK_V // GROUP)
    columns = start + groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if WHOLE:
        z = _load_logits(row_ptr, columns, None, None, bias_ptr, softcap, logit_scale)
    else:
        z = _load_logits(row_ptr, columns, columns < V, columns < width, bias_ptr, softcap, logit_scale)
    best = tl.max(z, 1)
    groups += start // GROUP
    tl.store(maxima_ptr + groups, best, mask=groups < G)
    new_top = tl.maximum(top, best)
    below = z - new_top[:, None]
    fade = fast_exp(top - new_top)
    e = fast_exp(below)
    rest = e
    if (gold >= start) & (
        gold < start + BLOCK_V
    ):  # the same for all threads; spares all other blocks a comparison per column
        rest = tl.where(columns == gold, 0.0, e)
    others = others * fade[:, None] + rest
    if AT_ONE:
        total = total * fade[:, None] + e
    else:
        total = total * fast_exp((top - new_top) * inverse)[:, None] + fast_exp(below * inverse)
    return new_top, others, total


@triton.jit
def _reduce_kernel(
    logits_ptr,  # (C, W) raw
    width,  # W >= V, columns of a row
    bias_ptr,  # (V,) or None
    labels_ptr,  # (C,)
    maxima_ptr,  # (C, G) out
    row_max_ptr,  # (C,) out
    log_sum_ptr,  # (C,) out: log Σ exp((z − row maximum)/T)
    lse_ptr,  # (C,) out, at T
    ce_ptr,  # (C,) out, at 1
    temperature,
    softcap,
    logit_scale,
    V: tl.constexpr,
    G: tl.constexpr,
    AT_ONE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # int64: C*V overflows int32 above 14k rows at V=152k
    row_ptr = logits_ptr + row * width
    maxima_ptr += row * G
    label = tl.load(labels_ptr + row).to(tl.int64)
    valid = (label >= 0) & (label < V)
    gold = tl.where(valid, label, -1).to(tl.int32)
    inverse = 1.0 / temperature

    # There is one running maximum per group of lanes, and one sum per lane: in the loop only the stored maxima cross a warp.
    # `others` are the sums at 1 without the gold id: a small CE is no difference. `total` are those at T, with it: no
    # log-probability depends on the label.
    top = tl.full([BLOCK_V // GROUP], FLOOR, tl.float32)
    others = tl.zeros([BLOCK_V // GROUP, GROUP], tl.float32)
    total = tl.zeros([BLOCK_V // GROUP, GROUP], tl.float32)
    for start in range(0, V // BLOCK_V * BLOCK_V, BLOCK_V):
        top, others, total = _add_block(
            top, others, total, start, row_ptr, width, bias_ptr, maxima_ptr, gold, inverse, softcap, logit_scale,
            V, G, AT_ONE, BLOCK_V, True,
        )  # fmt: skip
    if V % BLOCK_V != 0:
        top, others, total = _add_block(
            top, others, total, V // BLOCK_V * BLOCK_V, row_ptr, width, bias_ptr, maxima_ptr, gold, inverse, softcap,
            logit_scale, V, G, AT_ONE, BLOCK_V, False,
        )  # fmt: skip

    row_max = tl.max(top, 0)
    rest = tl.sum(tl.sum(others, 1) * fast_exp(top - row_max), 0)
    log_sum = tl.log(tl.sum(tl.sum(total, 1) * fast_exp((top - row_max) * inverse), 0))
    tl.store(row_max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(lse_ptr + row, row_max / temperature + log_sum)

    gold_below = _load_logits(row_ptr, gold, valid, valid, bias_ptr, softcap, logit_scale) - row_max
    gold_mass = fast_exp(gold_below)
    small = rest < gold_mass
    ce = tl.where(small, log1p(rest / tl.where(small, gold_mass, 1.0)), tl.log(rest + gold_mass) - gold_below)
    tl.store(ce_ptr + row, tl.where(label == IGNORE, 0.0, tl.where(valid, ce, float("nan"))))


@triton.jit
def _select_kernel(
    logits_ptr,  # (C, W) raw
    width,  # W >= V, columns of a row
    bias_ptr,
    maxima_ptr,  # (C, G)
    row_max_ptr,
    log_sum_ptr,
    ids_ptr,  # (C, k) out
    logprobs_ptr,  # (C, k) out
    k,
    temperature,
    softcap,
    logit_scale,
    V: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,  # k rounded up to a power of two
    BLOCK_S: tl.constexpr,  # groups of groups, at least K, rounded up likewise
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * width
    maxima_ptr += row * G
    within = tl.arange(0, GROUP)[None, :]

    # What lies beyond V is -inf with an index above every column's. So it ranks behind all columns and needs no care.
    supers = tl.arange(0, BLOCK_S)
    groups = supers[:, None] * GROUP + within
    maxima = tl.load(maxima_ptr + groups, mask=groups < G, other=-float("inf"))
    supers = _index(tl.topk(_key(tl.max(maxima, 1), supers), K))

    groups = supers[:, None] * GROUP + within
    maxima = tl.load(maxima_ptr + groups, mask=groups < G, other=-float("inf"))
    groups = _index(tl.topk(tl.reshape(_key(maxima, groups), [K * GROUP]), K))

    columns = groups[:, None] * GROUP + within
    inside = columns < V
    z = _load_logits(row_ptr, columns, inside, inside, bias_ptr, softcap, logit_scale)
    best = tl.topk(tl.reshape(_key(z, columns), [K * GROUP]), K)

    slot = tl.arange(0, K)
    logprobs = (_value(best) - tl.load(row_max_ptr + row)) / temperature - tl.load(log_sum_ptr + row)
    tl.store(ids_ptr + row * k + slot, _index(best), mask=slot < k)
    tl.store(logprobs_ptr + row * k + slot, logprobs, mask=slot < k)


@triton.jit(do_not_specialize=["first_row", "chunk_rows", "order_size"])
def _range_kernel(
    logits_ptr,  # (C, W) raw
    width,  # W >= V, columns of a row
    bias_ptr,
    row_max_ptr,
    log_sum_ptr,
    rows_ptr,  # (R,) of all N rows
    lo_ptr,  # (R,)
    hi_ptr,  # (R,)
    order_ptr,  # (order_size,)
    ids_ptr,  # (R, k) out
    logprobs_ptr,  # (R, k) out
    logmass_ptr,  # (R,) out
    first_row,
    chunk_rows,
    order_size,
    k,
    temperature,
    softcap,
    logit_scale,
    V: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + r).to(tl.int64) - first_row
    if (row < 0) | (row >= chunk_rows):
        return
    lo = tl.load(lo_ptr + r).to(tl.int64)
    hi = tl.load(hi_ptr + r).to(tl.int64)
    row_ptr = logits_ptr + row * width
    row_max = tl.load(row_max_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    inverse = 1.0 / temperature

    wrong = (lo < 0) | (lo > hi) | (hi > order_size)
    position = tl.where(wrong, hi, lo)  # a wrong range is an empty one, its mass NaN
    top = tl.full([BLOCK], FLOOR, tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    kept = tl.full([K], LEAST_KEY, tl.int64)
    while position < hi:
        at = position + tl.arange(0, BLOCK)
        inside = at < hi
        ids = tl.load(order_ptr + at, mask=inside, other=0).to(tl.int64)
        known = (ids >= 0) & (ids < V)
        z = _load_logits(row_ptr, ids, inside & known, inside & known, bias_ptr, softcap, logit_scale)
        z = tl.where(inside & (known == 0), float("nan"), z)
        new_top = tl.maximum(top, z)
        mass = mass * fast_exp((top - new_top) * inverse) + fast_exp((z - new_top) * inverse)
        top = new_top
        keys = tl.where(inside, _key(z, at.to(tl.int32)), LEAST_KEY)
        if tl.max(keys, 0) > tl.min(kept, 0):  # else a block of a wide range need not be sorted
            kept = tl.topk(tl.reshape(tl.join(kept, tl.topk(keys, K)), [2 * K]), K)
        position += BLOCK

    # Relative to the row's maximum, as the row's own sum is: so mass and lse share their rounding.
    best = tl.max(top, 0)
    mass = tl.sum(mass * fast_exp((top - best) * inverse), 0)
    logmass = tl.where(wrong, float("nan"), (best - row_max) / temperature + tl.log(mass) - log_sum)
    z = _value(kept)
    there = (kept != LEAST_KEY) & (z != -float("inf"))
    logprobs = tl.where(there, (z - row_max) / temperature - log_sum, -float("inf"))
    ids = tl.load(order_ptr + _index(kept), mask=there, other=0).to(tl.int32)
    sound = tl.zeros([K], tl.float32) + logmass == logmass  # the interpreter cannot broadcast a scalar truth value
    slot = tl.arange(0, K)
    tl.store(ids_ptr + r * k + slot, tl.where(there & sound, ids, -1), mask=slot < k)
    tl.store(logprobs_ptr + r * k + slot, tl.where(sound, logprobs, float("nan")), mask=slot < k)
    tl.store(logmass_ptr + r, logmass)


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
    R, asked_for = 0, []
    if ranges is not None:
        # A range whose row is in no chunk is never written by a kernel, and keeps these values.
        R = len(ranges[0])
        found += [labels.new_full((R, k), -1, dtype=torch.int32)]
        found += [labels.new_full(shape, torch.nan, dtype=torch.float32) for shape in ((R, k), (R,))]
        asked_for = [x.contiguous() for x in ranges]
    elementwise = {
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": None if logit_scale == 1 else logit_scale,
    }
    with torch.cuda.device_of(labels):
        for begin in range(0, N, chunk):
            rows = slice(begin, min(begin + chunk, N))
            z = logits(rows)
            raw = (z, z.shape[1], bias)
            _reduce_kernel[(len(z),)](
                *raw, labels[rows], maxima, row_max, log_sum, lse[rows], ce[rows],
                **elementwise, V=vocabulary, G=groups, AT_ONE=temperature == 1, BLOCK_V=2048, num_warps=4,
            )  # fmt: skip
            _select_kernel[(len(z),)](
                *raw, maxima, row_max, log_sum, ids[rows], logprobs[rows], k,
                **elementwise, V=vocabulary, G=groups, K=K, BLOCK_S=max(K, triton.next_power_of_2(supers)), num_warps=4,
            )  # fmt: skip
            if R:
                # Every chunk launches one program per range, and most return at once. To find a chunk's own ranges, the host
                # would have to wait for the device.
                _range_kernel[(R,)](
                    *raw, row_max, log_sum, *asked_for, *found[4:], begin, len(z), len(asked_for[3]), k,
                    **elementwise, V=vocabulary, K=K, BLOCK=1024, num_warps=4,
                )  # fmt: skip
    return tuple(found)
