"""The Triton path of the fused loss: launches the kernels chunk by chunk, between the three GEMMs.

`prep` settles each row's distribution without logits. Then per chunk: logits = h Wᵀ in fp32; `gather` lifts the at most
K + 1 sparse columns out and leaves -inf in their place; `dense` streams each row twice without any sparse logic, sums
first, then the gradient, and works out losses and sparse gradients; `scatter` writes those back; dh and dW follow. The
launches are the barriers. Nothing waits for the device and no shape depends on data: ignored rows are computed like any
other and write zeros, and a value out of range makes its row NaN. fp64 is left to the plain-torch path.
Dimension letters: N rows, C rows of a chunk, D hidden, V vocabulary, S sources, K kept entries, K + 1 slots.
"""

import torch
import triton
from torch import Tensor

from .common import IGNORE_INDEX, chunk_rows_gpu
from .fused_loss_triton_kernels import _dense_kernel, _gather_kernel, _prep_kernel, _scatter_kernel

# Row strides are multiples of this, so that every row begins at 16 bytes, also in bf16.
PAD = 16
# Sparse slots handled at a time by one warp.
SLOT_BLOCK = 32


def dense_config(vocabulary: int, warp_size: int = 32) -> tuple[int, int]:
    """(columns a program holds, warps): 16 columns a thread, and the larger block where a row is many of the smaller."""
    block = 8192 if vocabulary < 1 << 16 else 16384
    block = min(block, max(1024, triton.next_power_of_2(vocabulary)))
    return block, block // (16 * warp_size)


def prep_config(entries: int) -> tuple[int, int, int]:
    """(block of slots, slots it is compared with at a time, warps)."""
    block = triton.next_power_of_2(entries)
    return block, min(block, SLOT_BLOCK), max(1, min(8, block // 32))


def product_into(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """out = a b or out += a b; where `out` is wider than a and b, the sums are never rounded to their dtype."""
    mixed = a.dtype != out.dtype
    if mixed and not a.is_cuda:  # only there is such a product one call
        a, b, mixed = a.to(out.dtype), b.to(out.dtype), False
    widen = {"out_dtype": out.dtype} if mixed else {}
    if accumulate:
        torch.addmm(out, a, b, **widen, out=out)
    else:
        torch.mm(a, b, **widen, out=out)  # out=: autocast leaves the operands alone


@torch.no_grad()
def fused_loss_triton(
    hidden, weight, bias, labels, row_winner, source_ids, source_logprobs, source_tail, ce_weight, kd_weight,
    temperature, bucket, softcap, logit_scale, per_row, grad_hidden, grad_weight, grad_bias,
    chunk_size, max_chunk_bytes,
):  # fmt: skip
    """As `fused_loss_torch`, for bf16, fp16 and fp32; what it returns is fp32.

    The GEMMs run in hidden's dtype, to which the weight is cast.
    """
    N, D = hidden.shape
    V = weight.shape[0]
    K = 0 if source_ids is None else source_ids.shape[2]
    slots = K + 1
    need_grad = grad_hidden or grad_weight or grad_bias
    weight = weight.to(hidden.dtype)
    labels, ce_weight, kd_weight = labels.contiguous(), ce_weight.contiguous(), kd_weight.contiguous()

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    loss, ce, kd, source_mass, target_mass = (empty(N) for _ in range(5))
    gold_slot, lifted_ids = empty(N, dtype=torch.int32), empty(N, slots, dtype=torch.int32)
    p, t = (None, None) if source_ids is None else (empty(N, slots), empty(N))
    dhidden = empty(*((N, D) if grad_hidden else (0,)))
    dweight = empty(*((V, D) if grad_weight else (0,)))
    dbias = hidden.new_zeros(V if grad_bias else 0, dtype=torch.float32)

    C = chunk_rows_gpu(N, V, D, chunk_size, max_chunk_bytes)
    padded = -(-V // PAD) * PAD
    logits = empty(C, padded)
    logits[:, V:] = -torch.inf
    bias = None if bias is None else torch.nn.functional.pad(bias, (0, padded - V))
    grad = empty(C, padded, dtype=hidden.dtype) if need_grad else None
    lifted_z = empty(C, slots)
    lifted_grad = empty(C, slots) if need_grad else None

    head = (float(logit_scale), softcap)
    block, warps = dense_config(V, 64 if torch.version.hip else 32)
    slot_block = min(SLOT_BLOCK, triton.next_power_of_2(slots))

    with torch.cuda.device_of(hidden):
        launch_prep(
            labels, row_winner, source_ids, source_logprobs, source_tail, bucket, V,
            (gold_slot, lifted_ids, p, t, source_mass),
        )  # fmt: skip
        for begin in range(0, N, C):
            rows = slice(begin, min(begin + C, N))
            n = rows.stop - begin
            # An ignored row's gradient is 0, but 0·NaN is NaN: what it holds must not reach dW.
            h = hidden[rows].masked_fill((labels[rows] == IGNORE_INDEX)[:, None], 0)
            product_into(logits[:n, :V], h, weight.t())
            _gather_kernel[(n,)](
                logits, bias, lifted_ids, lifted_z, begin, padded, slots, *head, slot_block, num_warps=1
            )
            _dense_kernel[(n,)](
                *(logits, grad, bias, lifted_z, lifted_grad, gold_slot, lifted_ids, p, t),
                *(ce_weight, kd_weight, loss, ce, kd, target_mass, begin, temperature),
                *(padded, slots, p is not None and temperature != 1, *head, block, triton.next_power_of_2(slots)),
                num_warps=warps,
            )
            if not need_grad:
                continue
            _scatter_kernel[(n,)](grad, lifted_ids, lifted_grad, begin, padded, slots, slot_block, num_warps=1)
            grad_rows = grad[:n, :V]
            if grad_hidden:
                product_into(dhidden[rows], grad_rows, weight)
            if grad_weight:
                product_into(dweight, grad_rows.t(), h, accumulate=begin > 0)
            if grad_bias:
                dbias.add_(grad_rows.sum(0, dtype=torch.float32))
    if N == 0:
        dweight.zero_()
    return loss if per_row else loss.sum(), dhidden, dweight, dbias, ce, kd, source_mass, target_mass


def launch_prep(labels, row_winner, source_ids, source_logprobs, source_tail, bucket, vocabulary, outputs) -> None:
    """Runs `prep` over all rows; the sources may be strided, (S, N, K) tensors are not copied."""
    sources, rows, entries = (0, labels.shape[0], 0) if source_ids is None else source_ids.shape
    block, compare, warps = prep_config(max(entries, 1))
    _prep_kernel[(rows,)](
        labels,
        None if row_winner is None else row_winner.contiguous(),
        source_ids,
        *((0, 0, 0) if source_ids is None else source_ids.stride()),
        source_logprobs,
        *((0, 0, 0) if source_logprobs is None else source_logprobs.stride()),
        source_tail,
        *((0, 0) if source_tail is None else source_tail.stride()),
        *outputs,
        *(sources, vocabulary, entries, bucket, block, compare),
        num_warps=warps,
    )
