"""The Triton path of the fused loss: launches the kernels chunk by chunk, between three matrix products.

- `prep` settles the source's distribution of every row. It needs no logits.
- Then, for each chunk, logits = h Wᵀ in fp32.
- `gather` reads the logits at the kept ids and at the gold id, K + 1 of them at most, and leaves -inf in their place.
- `dense` reads each row twice and treats all of its columns alike: first for the sums, from which it computes the losses and
  the gradients at those ids, then for the gradient of all other columns.
- `scatter` writes the gradients at those ids into the dense one.
- dhidden and dweight follow.

The launches take the place of barriers. Nothing waits for the device, and no shape depends on data: ignored rows are computed
as all others are, and write zeros; a value out of range makes its row NaN. fp64 is left to the plain-torch path.
Dimension letters: N rows, C rows of a chunk, n rows of the present chunk, D hidden, V vocabulary, S sources, K kept entries.
A row has K + 1 slots, the last one for a gold id that is not among the entries. h, p and t as in fused_loss_torch.py.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from .common import IGNORE_INDEX, chunk_rows_gpu
from .fused_loss_triton_kernels import _dense_kernel, _gather_kernel, _prep_kernel, _scatter_kernel
from .fused_loss_types import Operands, Options, Outputs, Winner
from .head import Head
from .tails import BUCKET

# Row strides are multiples of this: every row begins at a multiple of 16 bytes, also in bf16.
PAD = 16
# How many slots a warp handles at a time.
SLOT_BLOCK = 32


def dense_config(vocabulary: int, warp_size: int = 32) -> tuple[int, int]:
    """How many columns a program of `dense` holds at a time, and how many warps it has: one thread per 16 columns.

    The block is the larger one where a row is many of the smaller ones.
    """
    block = 8192 if vocabulary < 1 << 16 else 16384
    block = min(block, max(1024, triton.next_power_of_2(vocabulary)))
    return block, block // (16 * warp_size)


def prep_config(entries: int) -> tuple[int, int, int]:
    """The block of slots that a program of `prep` holds, how many it compares them with at a time, and its number of warps."""
    block = triton.next_power_of_2(entries)
    return block, min(block, SLOT_BLOCK), max(1, min(8, block // 32))


def product_into(out: Tensor, left: Tensor, right: Tensor, accumulate: bool = False) -> None:
    """out = left · right, or out += left · right. Where `out` is of a wider dtype, the sums are never rounded to the narrow one."""
    mixed = left.dtype != out.dtype
    if mixed and not left.is_cuda:  # on a CPU no single call multiplies into a wider dtype
        left, right, mixed = left.to(out.dtype), right.to(out.dtype), False
    widen: dict[str, Any] = {"out_dtype": out.dtype} if mixed else {}
    # With out=, autocast does not convert the operands.
    if accumulate:
        torch.addmm(out, left, right, **widen, out=out)
    else:
        torch.mm(left, right, **widen, out=out)


@torch.no_grad()
def fused_loss_triton(operands: Operands, options: Options, winner: Winner) -> Outputs:
    """What the op returns, for bf16, fp16 and fp32; the outputs are fp32.

    The matrix products run in hidden's dtype, to which the weight is cast.
    """
    hidden = operands.hidden
    N, D = hidden.shape
    V = operands.weight.shape[0]
    K = 0 if operands.source_ids is None else operands.source_ids.shape[2]
    slots = K + 1
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
    loss, ce, kd, source_mass, target_mass = (empty(N) for _ in range(5))
    dhidden = empty(*((N, D) if options.grad_hidden else (0,)))
    dweight = empty(*((V, D) if options.grad_weight else (0,)))
    dbias = hidden.new_zeros(V if options.grad_bias else 0, dtype=torch.float32)

    # What `prep` finds for all rows.
    gold_slot, lifted_ids = empty(N, dtype=torch.int32), empty(N, slots, dtype=torch.int32)
    p, t = (None, None) if operands.source_ids is None else (empty(N, slots), empty(N))

    # The buffers of a chunk, used again by every chunk. Columns beyond V are −inf: they add nothing to a sum of exponentials.
    C = chunk_rows_gpu(N, V, D, options.chunk_size, options.max_chunk_bytes)
    V_padded = -(-V // PAD) * PAD
    logits = empty(C, V_padded)
    logits[:, V:] = -torch.inf
    bias = None if head.bias is None else torch.nn.functional.pad(head.bias, (0, V_padded - V))
    grad = empty(C, V_padded, dtype=hidden.dtype) if options.any_grad else None
    lifted_z = empty(C, slots)
    lifted_grad = empty(C, slots) if options.any_grad else None

    # Constants of the compiled kernels.
    sizes = {"V_PADDED": V_padded, "SLOTS": slots}
    elementwise = {"SCALE": head.logit_scale, "SOFTCAP": head.softcap}
    block, warps = dense_config(V, 64 if torch.version.hip else 32)
    slot_block = min(SLOT_BLOCK, triton.next_power_of_2(slots))

    with torch.cuda.device_of(hidden):
        launch_prep(operands, options, winner, (gold_slot, lifted_ids, p, t, source_mass))
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
                logits, bias, lifted_ids, lifted_z, begin, **sizes, **elementwise, BLOCK=slot_block, num_warps=1
            )
            _dense_kernel[(n,)](
                *(logits, grad, bias, lifted_z, lifted_grad, gold_slot, lifted_ids, p, t),
                *(operands.ce_weight, operands.kd_weight, loss, ce, kd, target_mass, begin, options.temperature),
                **sizes,
                TEMPERED=p is not None and options.temperature != 1,
                **elementwise,
                BLOCK_V=block,
                BLOCK_SLOTS=triton.next_power_of_2(slots),
                num_warps=warps,
            )
            if grad is None:  # no gradient is asked for
                continue
            _scatter_kernel[(n,)](grad, lifted_ids, lifted_grad, begin, **sizes, BLOCK=slot_block, num_warps=1)
            # Gradients of the operands: the two other matrix products.
            grad_rows = grad[:n, :V]
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
        source_mass=source_mass,
        target_mass=target_mass,
        winner=winner.chosen,
    )


def launch_prep(operands: Operands, options: Options, winner: Winner, found: tuple[Tensor | None, ...]) -> None:
    """Runs `prep` over all rows, which writes what it finds. The sources may be strided: (S, N, K) tensors are not copied."""
    ids, logprobs, tail = operands.source_ids, operands.source_logprobs, operands.source_tail
    vocabulary = operands.weight.shape[0]
    sources, rows, entries = (0, operands.labels.shape[0], 0) if ids is None else ids.shape
    block, compare, warps = prep_config(max(entries, 1))
    _prep_kernel[(rows,)](
        operands.labels,
        None if winner.of_row is None else winner.of_row.contiguous(),
        ids,
        *((0, 0, 0) if ids is None else ids.stride()),
        logprobs,
        *((0, 0, 0) if logprobs is None else logprobs.stride()),
        tail,
        *((0, 0) if tail is None else tail.stride()),
        *found,
        sources,
        vocabulary,
        K=entries,
        BUCKET=options.tail == BUCKET,
        BLOCK_K=block,
        BLOCK_COMPARE=compare,
        num_warps=warps,
    )
