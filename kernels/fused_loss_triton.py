"""The Triton path of the fused loss: launches the kernels chunk by chunk, between three matrix products.

- `prep` settles the source's distribution of every row. It needs no logits.
- Then, for each chunk, logits = h Wᵀ in fp32.
- `gather` reads the logits at the kept ids and at the gold id, K + 1 of them at most, and leaves -inf in their place.
- `entropy` reads each row once, where entropies are asked for.
- `dense` reads each row twice and treats all of its columns alike: first for the sums, from which it computes the losses and
  the gradients at those ids, then for the gradient of all other columns.
- `scatter` writes the gradients at those ids into the dense one.
- dhidden and dweight follow.

The launches take the place of barriers. Nothing waits for the device, and no shape depends on data: ignored rows are computed
as all others are, and write zeros; a value out of range makes its row NaN. fp64 is left to the plain-torch path.
Dimension letters: N rows, C rows of a chunk, n rows of the present chunk, D hidden, V vocabulary, S sources, K kept entries, W
sources that a row learns from. A row has W·K + 1 slots, the last one for a gold id that is not among the entries. h, p and t as in
fused_loss_torch.py.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .common import IGNORE_INDEX, LOGPROB_SLACK, chunk_rows_gpu, product_into
from .divergences import infinite_at_zero
from .divergences_triton import mixture_constants
from .fused_loss_triton_kernels import (
    IGNORED,
    INVALID,
    _dense_kernel,
    _entropy_kernel,
    _gather_kernel,
    _prep_kernel,
    _scatter_kernel,
)
from .fused_loss_types import Operands, Options, Outputs, Winner
from .head import ChunkedHead, Head
from .kept import absent_tail, prepare_kept
from .left_out import nothing_left_out
from .left_out_capped import CappedProducts, check_capacity
from .tails import BUCKET, CONDITIONAL

# Row strides are multiples of this: every row begins at a multiple of 16 bytes, also in bf16.
PAD = 16
# How many columns a program of `entropy` holds at a time.
ENTROPY_BLOCK = 4096
# How many slots a warp handles at a time.
SLOT_BLOCK = 32


def dense_config(vocabulary: int, sources: int, warp_size: int = 32) -> tuple[int, int]:
    """How many columns a program of `dense` holds at a time, and how many warps it has: one thread per 16 columns.

    The block is the larger one where a row is many of the smaller ones, and learns from one source: several take more registers than
    each of its 1,024 threads can have.
    """
    block = 8192 if vocabulary < 1 << 16 or sources > 1 else 16384
    block = min(block, max(1024, triton.next_power_of_2(vocabulary)))
    return block, block // (16 * warp_size)


def prep_config(entries: int) -> tuple[int, int, int]:
    """The block of slots that a program of `prep` holds, how many it compares them with at a time, and its number of warps."""
    block = triton.next_power_of_2(entries)
    return block, min(block, SLOT_BLOCK), max(1, min(8, block // 32))


@torch.no_grad()
def fused_loss_triton(operands: Operands, options: Options, winner: Winner) -> Outputs:
    """What the op returns, for bf16, fp16 and fp32; the outputs are fp32.

    The matrix products run in hidden's dtype, to which the weight is cast.
    """
    hidden = operands.hidden
    N, D = hidden.shape
    V = operands.weight.shape[0]
    S, _, K = (0, N, 0) if operands.source_ids is None else operands.source_ids.shape
    W = 1 if winner.weight_of_row is None else S
    slots = W * K + 1
    head = Head(operands.weight.to(hidden.dtype), operands.bias, options.softcap, float(options.logit_scale))
    # The kernels take these three to be contiguous.
    operands = operands._replace(
        labels=operands.labels.contiguous(),
        ce_weight=operands.ce_weight.contiguous(),
        kd_weight=operands.kd_weight.contiguous(),
    )

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    # The results of all rows. The kernels write every element of them, also those of ignored rows.
    loss, ce, kd, target_mass = (empty(N) for _ in range(4))
    target_entropy = empty(N) if options.entropies else None
    temperature_of_row = operands.temperature_of_row
    if temperature_of_row is not None:
        temperature_of_row = temperature_of_row.contiguous()
    dhidden = empty(*((N, D) if options.grad_hidden else (0,)))
    caps = options.left_out > 0 and options.any_grad
    # A chunk with a capacity adds to some of its rows only.
    dweight = (torch.zeros if caps else torch.empty)(
        (V, D) if options.grad_weight else (0,), dtype=torch.float32, device=hidden.device
    )
    dbias = hidden.new_zeros(V if options.grad_bias else 0, dtype=torch.float32)

    # The buffers of a chunk, used again by every chunk. Columns beyond V are −inf: they add nothing to a sum of exponentials.
    C = chunk_rows_gpu(N, V, D, options.chunk_size, options.max_chunk_bytes)
    V_padded = -(-V // PAD) * PAD
    logits = empty(C, V_padded)
    logits[:, V:] = -torch.inf
    bias = None if head.bias is None else torch.nn.functional.pad(head.bias, (0, V_padded - V))
    grad = empty(C, V_padded, dtype=hidden.dtype) if options.any_grad else None
    capped = None
    if caps:
        check_capacity(options, min(C, N), slots, V)
        capped = CappedProducts(ChunkedHead(head, hidden.dtype, C), options, dhidden, dweight, dbias)
    lifted_z = empty(C, slots)
    lifted_grad = empty(C, slots) if options.any_grad else None

    # Constants of the compiled kernels.
    sizes = {"V_PADDED": V_padded, "SLOTS": slots}
    log_p_share, log_q_share = mixture_constants(options.divergence, options.divergence_beta)
    family = {
        "W": W, "DIVERGENCE": options.divergence, "BETA": options.divergence_beta, "LOG_P_SHARE": log_p_share,
        "LOG_Q_SHARE": log_q_share, "CONDITIONAL": options.tail == CONDITIONAL, "Z_LOSS": options.z_loss,
        "SMOOTHING": options.label_smoothing, "EVEN_APART": caps,
    }  # fmt: skip
    elementwise = {"SCALE": head.logit_scale, "SOFTCAP": head.softcap}
    block, warps = dense_config(V, W, 64 if torch.version.hip else 32)
    slot_block = min(SLOT_BLOCK, triton.next_power_of_2(slots))

    with torch.cuda.device_of(hidden):
        prepare = launch_prep if winner.weight_of_row is None else prepare_mixed
        found = prepare(operands, options, winner)
        for begin in range(0, N, C):
            rows = slice(begin, min(begin + C, N))
            n = rows.stop - begin
            # An ignored row has a gradient of 0, but 0·NaN is NaN: what its hidden state holds must not reach dweight.
            h = hidden[rows].masked_fill((operands.labels[rows] == IGNORE_INDEX)[:, None], 0)
            # Logits: the first of three matrix products.
            product_into(logits[:n, :V], h, head.weight.t())
            # The kept ids and the gold id leave the logits, all other columns are summed and become their gradient, and
            # the gradients at the ids are written into it. One launch ends before the next one begins.
            _gather_kernel[(n,)](
                logits, bias, found.lifted_ids, lifted_z, begin, **sizes, **elementwise, BLOCK=slot_block, num_warps=1
            )
            if target_entropy is not None:
                _entropy_kernel[(n,)](
                    *(logits, bias, lifted_z, found.gold_slot, target_entropy, begin),
                    **sizes,
                    **elementwise,
                    BLOCK_V=min(block, ENTROPY_BLOCK),
                    BLOCK_SLOTS=triton.next_power_of_2(slots),
                    num_warps=8,
                )
            _dense_kernel[(n,)](
                *(logits, grad, bias, lifted_z, lifted_grad),
                *(found.gold_slot, found.lifted_ids, found.p, found.t, found.source_weight),
                *(operands.ce_weight, operands.kd_weight, loss, ce, kd, target_mass),
                *(temperature_of_row, begin, options.temperature, V),
                **sizes,
                **family,
                TEMPERED=found.p is not None and (temperature_of_row is not None or options.temperature != 1),
                **elementwise,
                BLOCK_V=block,
                BLOCK_SLOTS=triton.next_power_of_2(slots),
                num_warps=warps,
            )
            if grad is None:  # no gradient is asked for
                continue
            _scatter_kernel[(n,)](grad, found.lifted_ids, lifted_grad, begin, **sizes, BLOCK=slot_block, num_warps=1)
            # Gradients of the operands: the two other matrix products.
            grad_rows = grad[:n, :V]
            if capped is not None:
                capped.add(rows, h, grad_rows, found.lifted_ids[rows], even_of_rows(operands, options, rows, V))
                continue
            if options.grad_hidden:
                product_into(dhidden[rows], grad_rows, head.weight)
            if options.grad_weight:
                product_into(dweight, grad_rows.t(), h, accumulate=begin > 0)
            if options.grad_bias:
                dbias.add_(grad_rows.sum(0, dtype=torch.float32))
    if N == 0:  # no chunk has written it
        dweight.zero_()
    return Outputs(
        loss=loss if options.per_row else loss.sum(),
        dhidden=dhidden,
        dweight=dweight,
        dbias=dbias,
        ce=ce,
        kd=kd,
        source_mass=found.source_mass,
        target_mass=target_mass,
        source_entropy=source_entropies(found, operands.labels) if options.entropies else empty(0),
        target_entropy=empty(0) if target_entropy is None else target_entropy,
        winner=winner.chosen,
        left_out=nothing_left_out(dhidden) if capped is None else capped.finish(),
    )


def even_of_rows(operands: Operands, options: Options, rows: slice, vocabulary: int) -> Tensor | None:
    """What label smoothing takes from every column of these rows, (n, 1); None without it."""
    if not options.label_smoothing:
        return None
    even = operands.ce_weight[rows] * (options.logit_scale * options.label_smoothing / vocabulary)
    return even.masked_fill(operands.labels[rows] == IGNORE_INDEX, 0)[:, None]


class Found(NamedTuple):
    """What is known of all rows before there are logits. A row has W·K + 1 slots."""

    gold_slot: Tensor  # (N,) int32, the slot of the gold id, or what the kernels take for an ignored or an invalid row
    lifted_ids: Tensor  # (N, W·K + 1) int32, unique, -1 = empty
    source_mass: Tensor  # (N,)
    p: Tensor | None = (
        None  # (N, W, W·K + 1), -1 where the source has no entry; None without a source, likewise the next
    )
    t: Tensor | None = None  # (N, W)
    source_weight: Tensor | None = None  # (N, W); None where every source that has an entry weighs 1


def source_entropies(found: Found, labels: Tensor) -> Tensor:
    """The entropy (N,) of the sources' distributions over their kept entries and bucket, the weighted mean; 0 where there is none."""
    if found.p is None or found.t is None:
        return torch.zeros_like(found.source_mass)
    entropy = torch.special.entr(found.p.where(found.p != -1, 0)).sum(-1) + torch.special.entr(found.t)
    if found.source_weight is None:
        return entropy.masked_fill(labels == IGNORE_INDEX, 0)
    total = found.source_weight.sum(1)
    return (found.source_weight * entropy).sum(1) / total.where(total != 0, torch.ones_like(total))


def launch_prep(operands: Operands, options: Options, winner: Winner) -> Found:
    """Runs `prep` over all rows. The sources may be strided: (S, N, K) tensors are not copied."""
    ids, logprobs, tail = operands.source_ids, operands.source_logprobs, operands.source_tail
    labels, vocabulary = operands.labels, operands.weight.shape[0]
    sources, rows, entries = (0, labels.shape[0], 0) if ids is None else ids.shape
    block, compare, warps = prep_config(max(entries, 1))
    found = Found(
        gold_slot=labels.new_empty(rows, dtype=torch.int32),
        lifted_ids=labels.new_empty(rows, entries + 1, dtype=torch.int32),
        source_mass=labels.new_empty(rows, dtype=torch.float32),
        p=None if ids is None else labels.new_empty(rows, entries + 1, dtype=torch.float32),
        t=None if ids is None else labels.new_empty(rows, dtype=torch.float32),
    )
    _prep_kernel[(rows,)](
        labels,
        None if winner.of_row is None else winner.of_row.contiguous(),
        ids,
        *((0, 0, 0) if ids is None else ids.stride()),
        logprobs,
        *((0, 0, 0) if logprobs is None else logprobs.stride()),
        tail,
        *((0, 0) if tail is None else tail.stride()),
        *(found.gold_slot, found.lifted_ids, found.p, found.t, found.source_mass),
        sources,
        vocabulary,
        K=entries,
        BUCKET=options.tail == BUCKET,
        ENDLESS=infinite_at_zero(options.divergence),
        ABSENT_TAIL=absent_tail(options.tail),
        BLOCK_K=block,
        BLOCK_COMPARE=compare,
        num_warps=warps,
    )
    return found


def prepare_mixed(operands: Operands, options: Options, winner: Winner) -> Found:
    """What `prep` finds, of rows that learn from several sources at once: in plain torch, and without reading a value.

    A value out of range makes the source's weight NaN, and with it the row.
    """
    labels, ids, logprobs = operands.labels, operands.source_ids, operands.source_logprobs
    assert ids is not None
    assert logprobs is not None
    assert winner.weight_of_row is not None
    rows, vocabulary = labels.shape[0], operands.weight.shape[0]
    active = labels != IGNORE_INDEX
    wrong = (ids < -1) | (ids >= vocabulary) | ((ids >= 0) & ~(logprobs <= LOGPROB_SLACK) & ~logprobs.isnan())
    weight = winner.weight_of_row.where((winner.weight_of_row >= 0) & winner.weight_of_row.isfinite(), torch.nan)
    weight = weight.masked_fill(~active, 0)  # the sources of an ignored row may hold anything
    operands = operands._replace(source_ids=ids.masked_fill(wrong, -1))
    kept = prepare_kept(
        operands, options, winner._replace(weight_of_row=weight), torch.arange(rows, device=labels.device),
        torch.float32, vocabulary, invalid=wrong.any(2).T & (weight != 0).T,
    )  # fmt: skip
    is_gold = kept.has_entry & ~kept.apart
    slots = kept.ids.shape[1]
    gold_slot = torch.where(is_gold.any(1), is_gold.int().argmax(1), slots)
    bad_label = active & ((labels < 0) | (labels >= vocabulary))
    outside_ids = torch.where(active & ~bad_label & (gold_slot == slots), labels, -1)
    gold_slot = gold_slot.masked_fill(~active, IGNORED).masked_fill(bad_label, INVALID)
    return Found(
        gold_slot=gold_slot.int(),
        lifted_ids=torch.cat([kept.ids, outside_ids[:, None]], 1).int(),
        source_mass=kept.mean(kept.mass),
        p=torch.nn.functional.pad(kept.p[..., :-1].where(kept.inside, -1), (0, 1), value=-1.0),
        t=kept.p[..., -1].contiguous(),
        source_weight=kept.weight.contiguous(),
    )
