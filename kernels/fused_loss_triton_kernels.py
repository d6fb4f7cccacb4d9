"""The Triton kernels of the fused loss: prep, gather, dense and scatter.

fused_loss_triton.py launches them, and README.md derives what they compute. Whatever the dtype in memory, everything is fp32
after it is loaded: the interpreter computes wrongly in bf16, without a word.
Dimension letters: N rows, C rows of a chunk, V vocabulary, V_PADDED the stride of its rows, S sources, K kept entries, W
sources that a row learns from. A row has W·K + 1 slots, the last one for a gold id that is not among the entries.
"""

import triton
import triton.language as tl

from .common import IGNORE_INDEX, LOGPROB_SLACK, LOWEST, MASS_SLACK, NO_TAIL, TAIL_SLACK
from .divergences import ENTRY_FLOOR, TAIL_FLOOR
from .divergences_triton import divergence_parts
from .triton_math import exact_exp, log1p, tanh

_IGNORE_INDEX = tl.constexpr(IGNORE_INDEX)
_LOGPROB_SLACK = tl.constexpr(LOGPROB_SLACK)
_TAIL_SLACK = tl.constexpr(TAIL_SLACK)
_MASS_SLACK = tl.constexpr(MASS_SLACK)
_LOWEST = tl.constexpr(LOWEST)
_NO_TAIL = tl.constexpr(NO_TAIL)
_TAIL_FLOOR = tl.constexpr(TAIL_FLOOR)
_ENTRY_FLOOR = tl.constexpr(ENTRY_FLOOR)
_TINY = tl.constexpr(1e-37)  # a normal number, because hardware may flush subnormal ones to 0
# gold_slot of an ignored row, and of a row with a value out of range.
IGNORED, INVALID = -1, -2
_IGNORED, _INVALID = tl.constexpr(IGNORED), tl.constexpr(INVALID)
# How many neighbouring columns a thread has: two 16-byte loads of fp32, one 16-byte store of bf16.
_LANE = tl.constexpr(8)


# prep: one program per row, no logits


@triton.jit
def _entries(ids_ptr, logprobs_ptr, slot, stride_ids, stride_logprobs, has_source, V, K: tl.constexpr):
    """Ids (-1 for no entry), log-probabilities (-inf for no entry), and whether a slot holds a value out of range."""
    inside = (slot < K) & has_source
    slot = slot.to(tl.int64)
    ids = tl.load(ids_ptr + slot * stride_ids, mask=inside, other=-1).to(tl.int64)
    logprobs = tl.load(logprobs_ptr + slot * stride_logprobs, mask=inside, other=0).to(tl.float32)
    invalid = (ids < -1) | (ids >= V) | ((ids >= 0) & (logprobs > _LOGPROB_SLACK))
    ids = tl.where(invalid, -1, ids).to(tl.int32)
    return ids, tl.where(ids >= 0, logprobs, float("-inf")), invalid


# The strides change with N, and the kernel is too short to gain from one variant per alignment.
@triton.jit(do_not_specialize=[
    "stride_ids_s", "stride_ids_n", "stride_ids_k", "stride_logprobs_s", "stride_logprobs_n", "stride_logprobs_k",
    "stride_tail_s", "stride_tail_n", "S", "V",
])  # fmt: skip
def _prep_kernel(
    labels_ptr,
    winner_ptr,
    ids_ptr,
    stride_ids_s,
    stride_ids_n,
    stride_ids_k,
    logprobs_ptr,
    stride_logprobs_s,
    stride_logprobs_n,
    stride_logprobs_k,
    tail_ptr,
    stride_tail_s,
    stride_tail_n,
    gold_slot_ptr,
    lifted_ids_ptr,
    p_ptr,
    t_ptr,
    source_mass_ptr,
    S,
    V,
    K: tl.constexpr,
    BUCKET: tl.constexpr,
    ENDLESS: tl.constexpr,
    ABSENT_TAIL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_COMPARE: tl.constexpr,
):
    """Finds each row's unique ids and p, the bucket's t, the mass of the entries as given, and the slot of the gold id.

    p is -1 where a slot has no entry. ENDLESS says that the divergence is infinite where a source has no mass. ABSENT_TAIL is
    the t of a row without an entry.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    active = label != _IGNORE_INDEX
    invalid = active & ((label < 0) | (label >= V))
    gold_slot = K
    mass = 0.0
    if ids_ptr is not None:
        winner = tl.load(winner_ptr + row)
        invalid = invalid | (active & ((winner < -1) | (winner >= S)))
        has_source = active & (winner >= 0) & (winner < S)
        source = tl.where(has_source, winner, 0).to(tl.int64)
        ids_ptr += source * stride_ids_s + row * stride_ids_n
        logprobs_ptr += source * stride_logprobs_s + row * stride_logprobs_n
        slot = tl.arange(0, BLOCK_K)
        ids, logprobs, wrong = _entries(ids_ptr, logprobs_ptr, slot, stride_ids_k, stride_logprobs_k, has_source, V, K)
        # p relative to the largest: where it is renormalised, entries of e^-200 count as well.
        top = tl.maximum(tl.max(logprobs, 0), _LOWEST)

        # Every slot is compared with every slot: of equal ids, the first takes the mass of all.
        merged = tl.zeros([BLOCK_K], tl.float32)
        earlier = tl.zeros([BLOCK_K], tl.int32)
        for start in range(0, K, BLOCK_COMPARE):
            other = start + tl.arange(0, BLOCK_COMPARE)
            other_ids, other_logprobs, _ = _entries(
                ids_ptr, logprobs_ptr, other, stride_ids_k, stride_logprobs_k, has_source, V, K
            )
            same = (ids[:, None] == other_ids[None, :]) & (ids >= 0)[:, None]
            merged += tl.sum(tl.where(same, tl.exp(other_logprobs - top)[None, :], 0.0), 1)
            earlier += tl.sum((same & (other[None, :] < slot[:, None])).to(tl.int32), 1)
        first = (ids >= 0) & (earlier == 0)
        p = tl.where(first, merged, 0.0)
        relative = tl.sum(p, 0)
        mass = relative * tl.exp(top)
        # Also true for NaN: a source that is NaN must show in the loss.
        present = tl.max((p != 0).to(tl.int32), 0) > 0

        t = 0.0
        share = 1.0  # what the tail leaves to the entries
        if BUCKET:
            if tail_ptr is None:
                invalid = invalid | (mass > 1 + _MASS_SLACK)
                t = tl.maximum(1 - mass, 0.0, propagate_nan=tl.PropagateNan.ALL)
                share = tl.minimum(mass, 1.0, propagate_nan=tl.PropagateNan.ALL)
            else:
                t = tl.load(tail_ptr + source * stride_tail_s + row * stride_tail_n, mask=has_source, other=0.0)
                t = t.to(tl.float32)
                in_range = (t >= -_TAIL_SLACK) & (t <= 1 + _TAIL_SLACK)  # false for NaN, which min and max would drop
                invalid = invalid | ((in_range == 0) & present)
                t = tl.minimum(tl.maximum(t, 0.0), 1.0)
                share = 1 - t
            if ENDLESS:
                t = tl.minimum(tl.maximum(t, _TAIL_FLOOR, tl.PropagateNan.ALL), 1 - _TAIL_FLOOR, tl.PropagateNan.ALL)
                share = tl.maximum(share, _TAIL_FLOOR, tl.PropagateNan.ALL)
                share = tl.minimum(share, 1 - _TAIL_FLOOR, tl.PropagateNan.ALL)
        p = p / tl.where(present, relative, 1.0)
        if ENDLESS:
            first = first & ((p * share < _ENTRY_FLOOR) == 0)
        # Where the ids are the whole vocabulary, no column is left that could hold a tail: it is rounding, and is divided out.
        outside = tl.sum(first.to(tl.int32), 0) < V
        p = p * tl.where(outside, share, 1.0)
        t = tl.where(present, tl.where(outside, t, 0.0), ABSENT_TAIL)

        invalid = invalid | (tl.max(wrong.to(tl.int32), 0) > 0)
        first = first & present & (invalid == 0)
        is_gold = first & (ids == label)
        gold_slot = tl.where(tl.max(is_gold.to(tl.int32), 0) > 0, tl.sum(tl.where(is_gold, slot, 0), 0), K)
        tl.store(lifted_ids_ptr + row * (K + 1) + slot, tl.where(first, ids, -1), mask=slot < K)
        tl.store(p_ptr + row * (K + 1) + slot, tl.where(first, p, -1.0), mask=slot < K)
        tl.store(t_ptr + row, t)
    valid = active & (invalid == 0)
    tl.store(lifted_ids_ptr + row * (K + 1) + K, tl.where(valid & (gold_slot == K), label, -1).to(tl.int32))
    if ids_ptr is not None:
        tl.store(p_ptr + row * (K + 1) + K, -1.0)
    tl.store(gold_slot_ptr + row, tl.where(valid, gold_slot, tl.where(active, _INVALID, _IGNORED)).to(tl.int32))
    tl.store(source_mass_ptr + row, tl.where(invalid, float("nan"), mass))


# The head's elementwise part


@triton.jit
def _logits(
    product_ptr, bias_ptr, columns, inside, MASKED: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr
):  # fmt: skip
    """Logits from h Wᵀ. A lifted column stays -inf, which the softcap alone would make finite."""
    if MASKED:
        product = tl.load(product_ptr + columns, mask=inside, other=float("-inf"))
    else:
        product = tl.load(product_ptr + columns)
    z = product
    if bias_ptr is not None:
        if MASKED:
            z += tl.load(bias_ptr + columns, mask=inside, other=0).to(tl.float32)
        else:
            z += tl.load(bias_ptr + columns).to(tl.float32)
    if SCALE != 1.0:
        z *= SCALE
    if SOFTCAP is not None:
        z = tl.where(product == float("-inf"), float("-inf"), SOFTCAP * tanh(z * (1 / SOFTCAP)))
    return z


@triton.jit
def _slope(z, SOFTCAP: tl.constexpr):
    """The softcap's derivative, 0 for a lifted column."""
    u = z * (1 / SOFTCAP)
    return tl.where(z == float("-inf"), 0.0, 1 - u * u)


# gather and scatter: one warp per row, so that the thread which reads a column is the one that overwrites it


@triton.jit(do_not_specialize=["begin"])
def _gather_kernel(
    logits_ptr,
    bias_ptr,
    lifted_ids_ptr,
    lifted_z_ptr,
    begin,
    V_PADDED: tl.constexpr,
    SLOTS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reads the logits at the lifted ids, -inf for an empty slot. Their columns become -inf."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V_PADDED
    for start in range(0, SLOTS, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        ids = tl.load(lifted_ids_ptr + (begin + row) * SLOTS + slot, mask=slot < SLOTS, other=-1)
        z = _logits(logits_ptr, bias_ptr, ids, ids >= 0, True, SCALE, SOFTCAP)
        tl.store(lifted_z_ptr + row * SLOTS + slot, z, mask=slot < SLOTS)
        tl.store(logits_ptr + ids, float("-inf"), mask=ids >= 0)


@triton.jit(do_not_specialize=["begin"])
def _scatter_kernel(
    grad_ptr,
    lifted_ids_ptr,
    lifted_grad_ptr,
    begin,
    V_PADDED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrites the lifted columns of the dense gradient."""
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, SLOTS, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        ids = tl.load(lifted_ids_ptr + (begin + row) * SLOTS + slot, mask=slot < SLOTS, other=-1)
        grad = tl.load(lifted_grad_ptr + row * SLOTS + slot, mask=ids >= 0, other=0.0)
        tl.store(grad_ptr + row * V_PADDED + ids, grad.to(grad_ptr.dtype.element_ty), mask=ids >= 0)


# entropy: one program per row, between gather and dense, and only where it is asked for


@triton.jit(do_not_specialize=["begin"])
def _entropy_kernel(
    logits_ptr,
    bias_ptr,
    lifted_z_ptr,
    gold_slot_ptr,
    target_entropy_ptr,
    begin,
    V_PADDED: tl.constexpr,
    SLOTS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """The entropy log Σ e + Σ e·(m − z) / Σ e of one row at temperature 1, e = exp(z − m), in which no term is negative."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V_PADDED
    gold_slot = tl.load(gold_slot_ptr + begin + row)
    entropy = 0.0
    if gold_slot != _IGNORED:
        slot = tl.arange(0, BLOCK_SLOTS)
        lifted_z = tl.load(lifted_z_ptr + row * SLOTS + slot, mask=slot < SLOTS, other=float("-inf"))
        m = tl.maximum(tl.max(lifted_z, 0), _LOWEST)
        lifted_e = exact_exp(lifted_z - m)
        total = tl.sum(lifted_e, 0)
        spread = tl.sum(tl.where(lifted_e > 0, lifted_e * (m - lifted_z), 0.0), 0)
        for start in range(0, V_PADDED, BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            z = _logits(logits_ptr, bias_ptr, columns, columns < V_PADDED, True, SCALE, SOFTCAP)
            new_m = tl.maximum(m, tl.max(z, 0))
            shrink = exact_exp(m - new_m)
            e = tl.exp(z - new_m)
            spread = (spread + total * (new_m - m)) * shrink + tl.sum(
                tl.where(z > float("-inf"), e * (new_m - z), 0.0), 0
            )
            total = total * shrink + tl.sum(e, 0)
            m = new_m
        entropy = tl.where(gold_slot == _INVALID, float("nan"), tl.log(total) + spread / total)
    tl.store(target_entropy_ptr + begin + row, entropy)


# dense: one program per row


@triton.jit
def _add_exps(top, total, total_T, z, inv_T, TEMPERED: tl.constexpr):
    """The running maximum and sums of exp of each lane. No lane needs what another thread has: the loop has no barrier."""
    new_top = tl.maximum(top, tl.max(z, 1))
    below = z - new_top[:, None]
    total = total * tl.exp(top - new_top) + tl.sum(tl.exp(below), 1)
    if TEMPERED:
        total_T = total_T * tl.exp((top - new_top) * inv_T) + tl.sum(tl.exp(below * inv_T), 1)
    return new_top, total, total_T


@triton.jit
def _add_logits(total, count, z):
    """The running sum of each lane's logits, and their number. Lifted columns and padding, at -inf, are no logits."""
    real = z > float("-inf")
    return total + tl.sum(tl.where(real, z, 0.0), 1), count + tl.sum(real.to(tl.float32), 1)


@triton.jit
def _store_grad(
    grad_ptr, z, columns, top, coefficient, coefficient_T, even, inv_T,
    V_PADDED: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERED: tl.constexpr, SMOOTHED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    below = z - top
    grad = tl.exp(below) * coefficient
    if TEMPERED:
        grad += tl.exp(below * inv_T) * coefficient_T
    if SMOOTHED:
        grad -= even
    if SOFTCAP is not None:
        grad *= _slope(z, SOFTCAP)
    grad = grad.to(grad_ptr.dtype.element_ty)
    if MASKED:
        tl.store(grad_ptr + columns, grad, mask=columns < V_PADDED)
    else:
        tl.store(grad_ptr + columns, grad)


@triton.jit(do_not_specialize=["begin", "V"])
def _dense_kernel(
    logits_ptr,
    grad_ptr,
    bias_ptr,
    lifted_z_ptr,
    lifted_grad_ptr,
    gold_slot_ptr,
    lifted_ids_ptr,
    p_ptr,
    t_ptr,
    source_weight_ptr,
    ce_weight_ptr,
    kd_weight_ptr,
    loss_ptr,
    ce_ptr,
    kd_ptr,
    target_mass_ptr,
    temperature_ptr,
    begin,
    temperature,
    V,
    V_PADDED: tl.constexpr,
    SLOTS: tl.constexpr,
    W: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    BETA: tl.constexpr,
    LOG_P_SHARE: tl.constexpr,
    LOG_Q_SHARE: tl.constexpr,
    CONDITIONAL: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    EVEN_APART: tl.constexpr,
    TEMPERED: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Losses, statistics and the gradient in h Wᵀ + bias of one row. Of an ignored row they are all 0.

    No gradient is computed where grad_ptr is None. Without a source, p_ptr is None and there is no KD; where source_weight_ptr
    is None, a source that has an entry weighs 1. temperature_ptr holds a temperature for each row, or is None. With EVEN_APART
    the gradient lacks what label smoothing takes from all columns alike. The row's scalars are named as in `chunk_losses` of
    fused_loss_torch.py, which computes the same thing and explains the steps.
    """
    row = tl.program_id(0).to(tl.int64)
    n = begin + row
    logits_ptr += row * V_PADDED
    if grad_ptr is not None:
        grad_ptr += row * V_PADDED
    lanes: tl.constexpr = BLOCK_V // _LANE
    tile = tl.arange(0, lanes)[:, None] * _LANE + tl.arange(0, _LANE)[None, :]
    WHOLE: tl.constexpr = V_PADDED // BLOCK_V * BLOCK_V
    gold_slot = tl.load(gold_slot_ptr + n)
    if gold_slot == _IGNORED:
        tl.store(loss_ptr + n, 0.0)
        tl.store(ce_ptr + n, 0.0)
        tl.store(kd_ptr + n, 0.0)
        tl.store(target_mass_ptr + n, 0.0)
        if grad_ptr is not None:
            zeros = tl.zeros([lanes, _LANE], grad_ptr.dtype.element_ty)
            for start in range(0, V_PADDED, BLOCK_V):
                tl.store(grad_ptr + start + tile, zeros, mask=start + tile < V_PADDED)
    else:
        T = temperature
        if temperature_ptr is not None:
            T = tl.load(temperature_ptr + n).to(tl.float32)
            T = tl.where((T > 0) & (float("inf") > T), T, float("nan"))
        inv_T = 1.0
        if TEMPERED:
            inv_T = 1 / T
        top = tl.full([lanes], _LOWEST, tl.float32)
        total = tl.zeros([lanes], tl.float32)
        total_T = tl.zeros([lanes], tl.float32)
        total_z = tl.zeros([lanes], tl.float32)
        count_z = tl.zeros([lanes], tl.float32)
        for start in range(0, WHOLE, BLOCK_V):
            z = _logits(logits_ptr, bias_ptr, start + tile, None, False, SCALE, SOFTCAP)
            top, total, total_T = _add_exps(top, total, total_T, z, inv_T, TEMPERED)
            if SMOOTHING != 0:
                total_z, count_z = _add_logits(total_z, count_z, z)
        if WHOLE < V_PADDED:
            z = _logits(logits_ptr, bias_ptr, WHOLE + tile, WHOLE + tile < V_PADDED, True, SCALE, SOFTCAP)
            top, total, total_T = _add_exps(top, total, total_T, z, inv_T, TEMPERED)
            if SMOOTHING != 0:
                total_z, count_z = _add_logits(total_z, count_z, z)
        m_dense = tl.max(top, 0)
        sum_dense = tl.sum(total * tl.exp(top - m_dense), 0)
        sum_dense_T = sum_dense
        if TEMPERED:
            sum_dense_T = tl.sum(total_T * tl.exp((top - m_dense) * inv_T), 0)

        slot = tl.arange(0, BLOCK_SLOTS)
        lifted_z = tl.load(lifted_z_ptr + row * SLOTS + slot, mask=slot < SLOTS, other=float("-inf"))
        is_gold = slot == gold_slot
        z_gold = tl.sum(tl.where(is_gold, lifted_z, 0.0), 0)
        # From here on, NaN spreads into all that the row writes.
        z_gold = tl.where(gold_slot == _INVALID, float("nan"), z_gold)
        m = tl.maximum(m_dense, tl.max(lifted_z, 0))
        below = lifted_z - m
        e = exact_exp(below)  # 0 in an empty slot
        e_gold = exact_exp(z_gold - m)
        shrink = exact_exp(m_dense - m)
        others = sum_dense * shrink + tl.sum(tl.where(is_gold, 0.0, e), 0)
        total_e = others + e_gold
        small = others < e_gold
        ce = tl.where(small, log1p(others / tl.where(small, e_gold, 1.0)), tl.log(total_e) - (z_gold - m))
        learnt = ce
        factor = 1.0  # of the softmax in the gradient
        if (SMOOTHING != 0) | (Z_LOSS != 0):
            lse = m + tl.log(total_e)
            if SMOOTHING != 0:
                real = lifted_z > float("-inf")
                sum_z = tl.sum(total_z, 0) + tl.sum(tl.where(real, lifted_z, 0.0), 0)
                whole = tl.sum(count_z, 0) + tl.sum(real.to(tl.float32), 0) == V
                # As in torch: a column that cannot be has no finite -log q.
                learnt = (1 - SMOOTHING) * ce + SMOOTHING * tl.where(whole, lse - sum_z / V, float("inf"))
            if Z_LOSS != 0:
                learnt += Z_LOSS * lse * lse
                factor = 1 + 2 * Z_LOSS * lse
        a = tl.load(ce_weight_ptr + n).to(tl.float32)
        loss = a * learnt
        a *= SCALE  # the gradient leaves through the scale, a factor of every row scalar
        scalar = a * factor
        coefficient = scalar * shrink / total_e
        coefficient_T = 0.0
        grad = scalar * (e / total_e)
        grad = tl.where(is_gold, (scalar - a) * (e / total_e) - a * (others / total_e), grad)
        even = a * (SMOOTHING / V)
        if EVEN_APART:
            even = a * 0.0
        if SMOOTHING != 0:
            grad += tl.where(is_gold, a * SMOOTHING - even, -even)
        kd = 0.0
        target_mass = 0.0
        if p_ptr is not None:
            lifted = tl.load(lifted_ids_ptr + n * SLOTS + slot, mask=slot < SLOTS, other=-1) >= 0
            e_T, shrink_T = e, shrink
            if TEMPERED:
                e_T = exact_exp(below * inv_T)
                shrink_T = exact_exp((m_dense - m) * inv_T)
            total_e_T = tl.sum(tl.where(lifted, e_T, 0.0), 0) + sum_dense_T * shrink_T
            total_e_T = tl.where(gold_slot == _INVALID, float("nan"), total_e_T)
            log_total_T = tl.log(total_e_T)
            q_lifted = e_T / total_e_T
            log_q_lifted = below * inv_T - log_total_T
            grad_T = tl.zeros([BLOCK_SLOTS], tl.float32)
            alpha_dense = tl.full([], 0.0, tl.float32)
            value = tl.full([], 0.0, tl.float32)
            kept_mass = tl.full([], 0.0, tl.float32)
            weights = tl.full([], 0.0, tl.float32)
            for w in range(0, W):
                p = tl.load(p_ptr + (n * W + w) * SLOTS + slot, mask=slot < SLOTS, other=-1.0)
                t = tl.load(t_ptr + n * W + w)
                inside = lifted & ((p < 0) == 0)  # also of an entry that is NaN
                p = tl.where(inside, p, 0.0)
                if source_weight_ptr is None:
                    weight = tl.max(inside.to(tl.float32), 0)
                else:
                    weight = tl.load(source_weight_ptr + n * W + w)
                weights += weight
                kept_mass += weight * tl.sum(tl.where(inside, q_lifted, 0.0), 0)
                if CONDITIONAL:
                    z_inside = tl.where(inside, lifted_z, float("-inf"))
                    below_inside = (z_inside - tl.maximum(tl.max(z_inside, 0), _LOWEST)) * inv_T
                    e_inside = tl.where(inside, exact_exp(below_inside), 0.0)
                    sum_inside = tl.maximum(tl.sum(e_inside, 0), _TINY, propagate_nan=tl.PropagateNan.ALL)
                    q, log_q = e_inside / sum_inside, below_inside - tl.log(sum_inside)
                    parts, slope = divergence_parts(p, q, log_q, DIVERGENCE, BETA, LOG_P_SHARE, LOG_Q_SHARE)
                    value += weight * (tl.sum(tl.where(inside, parts, 0.0), 0) + 0.0 * total_e_T)
                    slope = tl.where(inside, slope, 0.0)
                    grad_T += weight * (slope - q * tl.sum(slope, 0))
                else:
                    outside = lifted & (inside == 0)
                    m_rest = tl.maximum(m_dense, tl.max(tl.where(outside, lifted_z, _LOWEST), 0))
                    no_rest = (m_rest <= _LOWEST) & (t <= _NO_TAIL)
                    in_rest = tl.where(outside, exact_exp((lifted_z - m_rest) * inv_T), 0.0)
                    dense_in_rest = exact_exp((m_dense - m_rest) * inv_T)
                    rest = sum_dense_T * dense_in_rest + tl.sum(in_rest, 0)
                    rest = tl.maximum(rest, _TINY, propagate_nan=tl.PropagateNan.ALL)
                    log_q_rest = (m_rest - m) * inv_T + tl.log(rest) - log_total_T
                    q = tl.where(inside, q_lifted, 0.0)
                    log_q = tl.where(inside, log_q_lifted, float("-inf"))
                    parts, slope = divergence_parts(p, q, log_q, DIVERGENCE, BETA, LOG_P_SHARE, LOG_Q_SHARE)
                    part_rest, slope_rest = divergence_parts(
                        t, exact_exp(log_q_rest), log_q_rest, DIVERGENCE, BETA, LOG_P_SHARE, LOG_Q_SHARE
                    )
                    value += weight * tl.sum(parts, 0) + tl.where(no_rest, 0.0, weight * part_rest)
                    slope_sum = tl.sum(slope, 0) + slope_rest
                    # Divided by the sum of the rest itself, which survives a q_rest that underflows.
                    slope = tl.where(inside, slope, slope_rest * (in_rest / rest))
                    grad_T += weight * (slope - q_lifted * slope_sum)
                    alpha_dense += weight * (slope_rest * dense_in_rest / rest - slope_sum * shrink_T / total_e_T)
            kd = T * T * value
            target_mass = kept_mass / tl.where(weights == 0, 1.0, weights)
            b = tl.load(kd_weight_ptr + n).to(tl.float32)
            loss += b * kd
            b *= SCALE * T
            grad += b * grad_T
            if TEMPERED:
                coefficient_T = b * alpha_dense
            else:
                coefficient += b * alpha_dense
        tl.store(loss_ptr + n, loss)
        tl.store(ce_ptr + n, ce)
        tl.store(kd_ptr + n, kd)
        tl.store(target_mass_ptr + n, target_mass)
        if grad_ptr is not None:
            if SOFTCAP is not None:
                grad *= _slope(lifted_z, SOFTCAP)
            tl.store(lifted_grad_ptr + row * SLOTS + slot, grad, mask=slot < SLOTS)
            # Backwards, because what was read last is still in the cache.
            if WHOLE < V_PADDED:
                columns = WHOLE + tile
                z = _logits(logits_ptr, bias_ptr, columns, columns < V_PADDED, True, SCALE, SOFTCAP)
                _store_grad(
                    *(grad_ptr, z, columns, m_dense, coefficient, coefficient_T, even, inv_T),
                    *(V_PADDED, SOFTCAP, TEMPERED, SMOOTHING != 0, True),
                )
            for done in range(0, WHOLE, BLOCK_V):
                columns = WHOLE - BLOCK_V - done + tile
                z = _logits(logits_ptr, bias_ptr, columns, None, False, SCALE, SOFTCAP)
                _store_grad(
                    *(grad_ptr, z, columns, m_dense, coefficient, coefficient_T, even, inv_T),
                    *(V_PADDED, SOFTCAP, TEMPERED, SMOOTHING != 0, False),
                )
