"""The fused loss, chunk by chunk, for any device and dtype: three matrix products, and what is done to the logits between them.

The first gives a chunk's logits. `chunk_losses.py`, or the C++ of `row_losses.py`, turns them into losses and, in place, into their
gradient, from which the other two make the gradients of hidden states and head.

Dimension letters: N rows, n rows with a label, C rows of a chunk, D hidden, V vocabulary.
The formula's letters, as in README.md: z logits, h hidden states, a and b the rows' weights of CE and KD, T the temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunk_losses import ChunkLosses, chunk_losses
from .common import IGNORE_INDEX, chunk_rows, compute_dtype, product_into
from .fused_loss_types import Operands, Options, Outputs, Winner
from .head import ChunkedHead, Head
from .kept import prepare_kept
from .left_out import ThinnedProducts, nothing_left_out
from .left_out_capped import CappedProducts, check_capacity
from .row_losses import RowLosses
from .vocabulary_slice import VocabularySlice


@torch.no_grad()
def fused_loss_torch(operands: Operands, options: Options, winner: Winner, vocabulary: VocabularySlice) -> Outputs:
    """What the op returns. Rows without a label are left out of the computation: what they hold is never read."""
    hidden, weight, labels = operands.hidden, operands.weight, operands.labels
    N, D = hidden.shape
    V = vocabulary.size
    dtype = compute_dtype(hidden, weight)

    # What needs no logits, for all rows with a label at once.
    rows = (labels != IGNORE_INDEX).nonzero()[:, 0]
    n = rows.shape[0]
    gold = labels[rows].long()
    a, b = operands.ce_weight[rows].to(dtype), operands.kd_weight[rows].to(dtype)
    kept = (
        None if operands.source_ids is None else prepare_kept(operands, options, winner, rows, dtype, vocabulary.whole)
    )

    T = options.temperature
    T_of_row = None if operands.temperature_of_row is None else operands.temperature_of_row[rows].to(dtype)[:, None]

    # The buffers of a chunk, used again by every chunk: logits, which become their gradient; the softcap's derivative; and in torch their
    # exponentials at T. The last two exist only where they differ from the first, or are needed.
    thins = options.left_out > 0 and options.any_grad
    C = chunk_rows(n, vocabulary.share, dtype.itemsize, options.chunk_size, options.max_chunk_bytes)
    head = ChunkedHead(Head(weight, operands.bias, options.softcap, options.logit_scale), dtype, C)
    # Of a sliced head there is one column more, for what is written at ids that another process has.
    spare = int(vocabulary.group is not None)
    wide = hidden.new_empty(min(C, n), V + spare, dtype=dtype)
    logits = wide[:, :V]
    in_rows = None
    if not spare and RowLosses.take(logits):
        scale = options.logit_scale
        in_rows = RowLosses(gold, kept, a * scale, b * scale, T if T_of_row is None else T_of_row, options)
    at_T = (in_rows is None or thins) and kept is not None and (T_of_row is not None or T != 1)
    exps_T = torch.empty_like(logits) if at_T else None
    slope = torch.empty_like(logits) if options.softcap is not None and options.any_grad else None

    # The results. Rows without a label have zeros.
    losses = hidden.new_zeros(len(ChunkLosses._fields), n, dtype=dtype)
    dhidden = hidden.new_zeros(N, D, dtype=dtype) if options.grad_hidden else hidden.new_empty(0, dtype=dtype)
    # The first chunk writes it, and others add.
    dweight = weight.new_empty((V, D) if options.grad_weight else (0,), dtype=dtype)
    if thins or n == 0:
        dweight.zero_()
    dbias = weight.new_zeros(V, dtype=dtype) if options.grad_bias else weight.new_empty(0, dtype=dtype)
    thinned = capped = None
    if thins and options.left_out_capacity is not None:
        check_capacity(options, min(C, n), 1 if kept is None else kept.ids.shape[1] + 1, V)
        capped = CappedProducts(head, options, dhidden, dweight, dbias)
    elif thins:
        thinned = ThinnedProducts(head, options, dhidden, dweight, dbias)

    for begin in range(0, n, C):
        chunk = slice(begin, min(begin + C, n))  # of the n rows with a label
        at = chunk if n == N else rows[chunk]  # of all N rows; a slice where it can be, because it copies nothing

        # Logits: the first of three matrix products.
        h = hidden[at].to(dtype)
        size = h.shape[0]
        slope_c = None if slope is None else slope[:size]
        z = head.logits_into(logits[:size], h, slope_c)

        # Losses, and the gradient or what it is made of. It leaves through logit_scale, which multiplies it as a whole: a factor of the
        # weights does the same.
        exps_T_c = None if exps_T is None else exps_T[:size]
        gradient = None
        if in_rows is not None and not thins:
            in_rows.write(chunk, z, losses[:, chunk], slope_c)
        elif in_rows is not None:
            gradient = in_rows.parts(chunk, z, losses[:, chunk], exps_T_c, with_mass=thinned is not None)
        else:
            of_chunk, gradient = chunk_losses(
                z,
                wide[:size],
                exps_T_c,
                gold[chunk],
                None if kept is None else kept.of(chunk),
                a[chunk] * options.logit_scale,
                b[chunk] * options.logit_scale,
                T if T_of_row is None else T_of_row[chunk],
                options,
                vocabulary,
            )
            losses[:, chunk] = torch.stack(of_chunk)

        # The gradient in the logits' place, unless columns are left out.
        if gradient is not None and thinned is not None:
            if slope_c is not None:
                gradient, slope_c = gradient.through(slope_c, z, exps_T_c), None
            if thinned.add(at, h, z, exps_T_c, gradient):
                continue
        if gradient is not None:
            even = gradient.even
            if capped is not None and even is not None:
                gradient = gradient._replace(even=None, lifted=gradient.lifted + even)
            gradient.write(z, wide[:size], exps_T_c, slope_c)
            if capped is not None:
                capped.add(at, h, z, gradient.columns, even)
                continue

        # Gradients of the operands: the two other matrix products.
        if options.grad_hidden:
            dhidden[at] = head.pull_back(z)
        if options.grad_weight:
            product_into(dweight, z.t(), h, accumulate=begin > 0 or thins)
        if options.grad_bias:
            dbias.add_(z.sum(0))

    of_row = ChunkLosses(*losses)
    term = a * of_row.learnt
    source_mass = torch.zeros_like(term)
    if kept is not None:
        term += b * of_row.kd
        source_mass = kept.mean(kept.mass)
    source_entropy = target_entropy = None
    if options.entropies:
        target_entropy = of_row.entropy
        source_entropy = torch.zeros_like(term) if kept is None else kept.mean(torch.special.entr(kept.p).sum(2))

    def of_all_rows(of_labelled: Tensor | None) -> Tensor:
        if of_labelled is None:
            return hidden.new_empty(0, dtype=dtype)
        return hidden.new_zeros(N, dtype=dtype).index_copy_(0, rows, of_labelled)

    products = thinned if capped is None else capped
    left_out = nothing_left_out(dhidden) if products is None else products.finish()
    if options.grad_hidden and not options.partial_hidden_grad:
        dhidden = vocabulary.total(dhidden)
    return Outputs(
        loss=of_all_rows(term) if options.per_row else term.sum(),
        dhidden=dhidden,
        dweight=dweight,
        dbias=dbias,
        ce=of_all_rows(of_row.ce),
        kd=of_all_rows(of_row.kd),
        source_mass=of_all_rows(source_mass),
        target_mass=of_all_rows(of_row.target_mass),
        source_entropy=of_all_rows(source_entropy),
        target_entropy=of_all_rows(target_entropy),
        winner=winner.chosen,
        left_out=left_out,
    )
