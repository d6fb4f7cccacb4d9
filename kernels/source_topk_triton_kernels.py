"""The Triton kernels of `source_topk`. source_topk_triton.py launches them.

- `_reduce_kernel` reads a chunk of logits once, for the sums and the maximum of every GROUP columns.
- `_select_kernel` finds the top k by those maxima, and reads the logits of k groups again. README.md says why the k best
  groups hold the k best tokens.
- `_range_kernel` looks at single ranges of single rows.
- `_merge_kernel` adds the masses of all tokens of an id, and `_merged_reduce_kernel` does for those what `_reduce_kernel` does
  for logits. `_select_kernel` finds their top k, too.

What one launch writes is read by later launches only: there are no barriers, no atomics, and nothing waits for the device.
Dimension letters: N rows, C rows of a chunk, W >= V columns of a row in memory, V vocabulary, G groups (a multiple of GROUP),
k kept entries, K that number as the kernels round it up, R ranges. Merged: B rows or ranges of a launch, n tokens and as many
segments, which are the tokens of an id each, S >= n columns of merged masses.
"""

import triton
import triton.language as tl

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
def _asked(which_ptr, rows_ptr, first_row, at):
    """What number `at` of a launch is asked for: the place of its results, and its row in the chunk.

    Without `which_ptr` both are rows. With it they are the range which[at], and the row of that, which may be in another chunk.
    """
    if which_ptr is None:
        out = at
        row = at
    else:
        out = tl.load(which_ptr + at).to(tl.int64)
        row = tl.load(rows_ptr + out).to(tl.int64) - first_row
    return out, row


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


@triton.jit(do_not_specialize=["first_row", "chunk_rows", "V"])
def _select_kernel(
    logits_ptr,  # (C, W) raw
    width,  # W >= V, columns of a row
    bias_ptr,
    maxima_ptr,  # (C, G)
    row_max_ptr,
    log_sum_ptr,
    ids_ptr,  # (C, k) out
    logprobs_ptr,  # (C, k) out
    segment_ids_ptr,  # None for logits. For merged masses (n,) the ids of their columns, and (B, S) masses are the logits
    which_ptr,  # those of `_asked`
    rows_ptr,
    logmass_ptr,  # (R,), NaN for a range that is wrong; None for rows
    first_row,
    chunk_rows,
    V,  # columns of a row that count
    G,
    k,
    temperature,
    softcap,
    logit_scale,
    K: tl.constexpr,  # k rounded up to a power of two
    BLOCK_S: tl.constexpr,  # groups of groups, at least K, rounded up likewise
):
    at = tl.program_id(0).to(tl.int64)
    out, row = _asked(which_ptr, rows_ptr, first_row, at)
    if (row < 0) | (row >= chunk_rows):
        return
    row_ptr = logits_ptr + at * width
    maxima_ptr += at * G
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
    log_sum = tl.load(log_sum_ptr + row)
    if segment_ids_ptr is None:
        ids = _index(best)
        logprobs = (_value(best) - tl.load(row_max_ptr + row)) / temperature - log_sum
    else:
        # Merged masses are relative to the row's maximum, and at T, already.
        there = _value(best) != -float("inf")
        ids = tl.load(segment_ids_ptr + _index(best), mask=there, other=-1)
        logprobs = tl.where(there, _value(best) - log_sum, -float("inf"))
        doubt = log_sum - log_sum  # NaN where the row has NaN or an infinite maximum
        if logmass_ptr is not None:
            doubt += tl.load(logmass_ptr + out)
        sound = tl.zeros([K], tl.float32) + doubt == doubt  # the interpreter cannot broadcast a scalar truth value
        ids = tl.where(sound, ids, -1)
        logprobs = tl.where(sound, logprobs, float("nan"))
    tl.store(ids_ptr + out * k + slot, ids, mask=slot < k)
    tl.store(logprobs_ptr + out * k + slot, logprobs, mask=slot < k)


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


@triton.jit
def _member_logits(
    at, inside, row_ptr, bias_ptr, members_ptr, positions_ptr, lo, hi, label, softcap, logit_scale, V: tl.constexpr
):
    """The logits of members of segments, -inf for those that do not count. V stands for a token that does not exist: NaN."""
    tokens = tl.load(members_ptr + at, mask=inside, other=0)
    if positions_ptr is not None:
        positions = tl.load(positions_ptr + at, mask=inside, other=-1)
        inside = inside & (positions >= lo) & (positions < hi)
    known = tokens < V
    z = _load_logits(row_ptr, tokens, inside & known, inside & known, bias_ptr, softcap, logit_scale)
    z = tl.where(inside & (known == 0), float("nan"), z)
    return tl.where(tokens == label, -float("inf"), z)


@triton.jit(do_not_specialize=["first_row", "chunk_rows", "n", "blocks"])
def _merge_kernel(
    logits_ptr,  # (C, W) raw
    width,  # W >= V, columns of a row
    bias_ptr,
    row_max_ptr,
    labels_ptr,  # (C,) what is left out of each row, or None
    which_ptr,  # (B,), and
    rows_ptr,  # (R,): those of `_asked`
    lo_ptr,  # (R,) or None. A range counts the positions lo to hi of the segments' members
    hi_ptr,
    positions_ptr,  # (n,) or None
    members_ptr,  # (n,) tokens, those of a segment together
    begin_ptr,  # (n,) of each segment among the members, long segments first
    count_ptr,  # (n,) members of each segment
    column_ptr,  # (n,) of each segment's sum
    merged_ptr,  # (B, S) out: log Σ exp((z − row maximum)/T)
    first_row,
    chunk_rows,
    n,
    blocks,  # programs of a row, of which each has BLOCK segments
    S,
    temperature,
    softcap,
    logit_scale,
    V: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The programs of a row run at about the same time, so that its logits, which are read here and there, stay in the cache.
    at = tl.program_id(0).to(tl.int64) // blocks
    block = tl.program_id(0) % blocks
    out, row = _asked(which_ptr, rows_ptr, first_row, at)
    if (row < 0) | (row >= chunk_rows):
        return
    row_ptr = logits_ptr + row * width
    merged_ptr += at * S
    row_max = tl.load(row_max_ptr + row)
    inverse = 1.0 / temperature
    label = tl.full([], -1, tl.int32)
    if labels_ptr is not None:
        wide = tl.load(labels_ptr + row).to(tl.int64)
        label = tl.where((wide >= 0) & (wide < V), wide, -1).to(tl.int32)
    lo = 0
    hi = 0
    if positions_ptr is not None:  # of a range that is out of bounds, of which int32 may lose bits, nothing is kept
        lo = tl.load(lo_ptr + out).to(tl.int32)
        hi = tl.load(hi_ptr + out).to(tl.int32)
    lanes = tl.arange(0, BLOCK)

    # Long segments are dealt to the programs in turn. All lanes add one segment, each its own part, and then those sums.
    segment = block
    count = tl.load(count_ptr + segment)
    while count > LONG:
        begin = tl.load(begin_ptr + segment)
        top = tl.full([BLOCK], FLOOR, tl.float32)
        mass = tl.zeros([BLOCK], tl.float32)
        done = 0
        while done < count:
            z = _member_logits(
                begin + done + lanes, done + lanes < count, row_ptr, bias_ptr, members_ptr, positions_ptr, lo, hi, label,
                softcap, logit_scale, V,
            )  # fmt: skip
            new_top = tl.maximum(top, z)
            mass = mass * fast_exp((top - new_top) * inverse) + fast_exp((z - new_top) * inverse)
            top = new_top
            done += BLOCK
        best = tl.max(top, 0)
        mass = tl.sum(mass * fast_exp((top - best) * inverse), 0)
        tl.store(merged_ptr + tl.load(column_ptr + segment), (best - row_max) / temperature + tl.log(mass))
        segment += blocks
        count = tl.load(count_ptr + segment, mask=segment < n, other=0)

    # Each lane adds a short segment. Neighbours are of like length.
    segments = block * BLOCK + lanes
    count = tl.load(count_ptr + segments, mask=segments < n, other=0)
    short = (segments < n) & (count <= LONG)
    count = tl.where(short, count, 0)
    begin = tl.load(begin_ptr + segments, mask=short, other=0)
    column = tl.load(column_ptr + segments, mask=short, other=0)
    top = tl.full([BLOCK], FLOOR, tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    longest = tl.max(count, 0)
    done = 0
    while done < longest:
        z = _member_logits(
            begin + done, done < count, row_ptr, bias_ptr, members_ptr, positions_ptr, lo, hi, label, softcap, logit_scale,
            V,
        )  # fmt: skip
        new_top = tl.maximum(top, z)
        mass = mass * fast_exp((top - new_top) * inverse) + fast_exp((z - new_top) * inverse)
        top = new_top
        done += 1
    tl.store(merged_ptr + column, (top - row_max) / temperature + tl.log(mass), mask=short)


@triton.jit(do_not_specialize=["first_row", "chunk_rows", "n"])
def _merged_reduce_kernel(
    merged_ptr,  # (B, S) in, and out: -inf for tokens without an id
    segment_ids_ptr,  # (n,) the id of each column, -1 for none
    maxima_ptr,  # (B, G) out
    logits_ptr,  # (C, W) raw
    width,  # W >= V, columns of a row
    bias_ptr,
    row_max_ptr,
    log_sum_ptr,
    labels_ptr,  # (C,) what was left out of each row
    occurs_ptr,  # (V,) how often each token is in the slice
    which_ptr,  # (B,), and
    rows_ptr,  # (R,): those of `_asked`
    logmass_ptr,  # (R,) out: of all tokens, with or without an id, and of what was left out. None if it is not asked for
    first_row,
    chunk_rows,
    n,
    S,
    G,
    temperature,
    softcap,
    logit_scale,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    out, row = _asked(which_ptr, rows_ptr, first_row, at)
    if (row < 0) | (row >= chunk_rows):
        return
    merged_ptr += at * S
    maxima_ptr += at * G
    top = tl.full([BLOCK // GROUP], FLOOR, tl.float32)
    mass = tl.zeros([BLOCK // GROUP, GROUP], tl.float32)
    for start in range(0, n, BLOCK):
        groups = start // GROUP + tl.arange(0, BLOCK // GROUP)
        columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = columns < n
        merged = tl.load(merged_ptr + columns, mask=inside, other=-float("inf"))
        nameless = inside & (tl.load(segment_ids_ptr + columns, mask=inside, other=0) < 0)
        if logmass_ptr is not None:
            new_top = tl.maximum(top, tl.max(merged, 1))
            mass = mass * fast_exp(top - new_top)[:, None] + fast_exp(merged - new_top[:, None])
            top = new_top
        tl.store(merged_ptr + columns, float("-inf"), mask=nameless)
        tl.store(maxima_ptr + groups, tl.max(tl.where(nameless, -float("inf"), merged), 1), mask=groups < G)
    if logmass_ptr is not None:
        best = tl.max(top, 0)
        mass = tl.sum(tl.sum(mass, 1) * fast_exp(top - best), 0)
        label = tl.load(labels_ptr + row).to(tl.int64)
        valid = (label >= 0) & (label < V)
        times = tl.load(occurs_ptr + label, mask=valid, other=0).to(tl.float32)
        counted = valid & (times > 0)
        z = _load_logits(logits_ptr + row * width, label, counted, counted, bias_ptr, softcap, logit_scale)
        z = tl.where(counted, (z - tl.load(row_max_ptr + row)) / temperature, FLOOR)
        new_best = tl.maximum(best, z)
        mass = mass * fast_exp(best - new_best) + times * fast_exp(z - new_best)
        tl.store(logmass_ptr + out, new_best + tl.log(mass) - tl.load(log_sum_ptr + row))
