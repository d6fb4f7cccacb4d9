"""A source's top-k log-probabilities and the label's cross-entropy, without [N, V] logits (training-mode capture).

A chunk of rows at a time, without gradients: Triton kernels on CUDA (source_topk_triton.py), plain torch anywhere. Equal
logits rank by ascending token id, on every platform, so that a store can be rebuilt byte for byte.
Dimension letters: N rows, D hidden, V vocabulary, R ranges.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .common import (
    IGNORE_INDEX,
    check_device,
    check_head,
    check_label_values,
    check_labels_shape,
    check_scalars,
    check_tensors,
    choose_impl,
    chunk_rows,
    compute_dtype,
    cross_entropy_from_sums,
)
from .head import ChunkedHead, Head

TRITON_MAX_K = 128  # more candidates do not fit a program's registers
TRITON_CHUNK_ROWS = 2048  # fewer leave part of a large GPU idle in every chunk's GEMM


def source_topk(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    k: int,
    *,
    vocab_map: Tensor | None = None,
    ranges: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    impl: str | None = None,
) -> tuple[Tensor, ...]:
    """The k most probable next tokens of every row, and the negative log-probability of its label.

    Args:
        hidden: (N, D) any float dtype, last hidden states; row n predicts labels[n].
        weight: (V, D) language-model head; logits and sums are computed in fp32 (fp64 if either is fp64).
        labels: (N,) int64 or int32; IGNORE_INDEX rows have ce 0 and their top-k all the same.
        k: entries to keep, 1..V.
        vocab_map: (V,) integers, the id of each token in another vocabulary, -1 = none. The top k are chosen among the
            source's own tokens and then mapped: the masses of equal ids are added, and what has no id is left out (its
            mass belongs to the tail). lse, ce and range_logmass do not change.
        ranges: (rows (R,) ascending, lo (R,), hi (R,), vocab_order (V',)) integers: for row rows[r] also the exact mass of
            the tokens vocab_order[lo[r]:hi[r]] and the k most probable of them, ties in that order.
        temperature: T > 0 of logprobs and lse; ce is always at 1.
        bias, softcap, logit_scale: as in `fused_linear_fusion_loss`.
        chunk_size: rows whose logits exist at a time; chosen when None.
        impl: "torch", "triton" (CUDA, or any device under TRITON_INTERPRET=1; k <= 128, no fp64), or None: Triton on CUDA
            wherever it can.
    Returns:
        ids (N, k) int32, most probable first, ties to the lowest id; logprobs (N, k) fp32, natural log of the full
        softmax at T; lse (N,) fp32, log-sum-exp of logits/T; ce (N,) fp32 in nats. With ranges also range_ids (R, k) int32,
        -1 = padding, range_logprobs (R, k) and range_logmass (R,) fp32, both absolute at T, -inf where there is nothing or
        no probability. With vocab_map ids are the mapped ones, ordered and padded in the same way.
        A row with NaN or +inf among its logits has NaN lse, logprobs and ce (0 if ignored), and ids without meaning but in
        bounds. Logits of -inf are no obstacle.
    Raises:
        ValueError: shapes, dtypes or devices contradict each other; k outside 1..V; impl cannot do it. In plain torch also a
            label outside the vocabulary; ranges outside the rows or the order, or rows that do not ascend; vocab_map < -1.
            Triton reads no value on the host: such a label gives ce NaN, such a range NaN and ids -1, any id < 0 is -1.
    """
    check_scalars(temperature, softcap, logit_scale, chunk_size)
    check_head(hidden, weight, labels, bias)
    head = Head(weight, bias, softcap, logit_scale)
    dtype, vocabulary = compute_dtype(hidden, weight), weight.shape[0]
    _check_shapes(labels, k, vocabulary, vocab_map, ranges)
    with torch.no_grad():
        if not _use_triton(impl, hidden.device, dtype, k):
            _check_values(labels, vocabulary, vocab_map)
            chunk = chunk_rows(hidden.shape[0], vocabulary, dtype.itemsize, chunk_size)
            chunked = ChunkedHead(head, dtype, chunk)
            scratch = hidden.new_empty(chunk, vocabulary, dtype=dtype)

            def logits(rows: slice) -> Tensor:
                h = hidden[rows].to(dtype)
                return chunked.logits_into(scratch[: h.shape[0]], h)

            found = _topk(logits, labels, k, temperature, chunk, _listed_ranges(ranges, labels, vocabulary))
        else:
            from .source_topk_triton import topk_rows

            chunk = chunk_rows(hidden.shape[0], vocabulary, dtype.itemsize, chunk_size or TRITON_CHUNK_ROWS)
            found = topk_rows(
                _fp32_logits(hidden, weight, chunk), labels, k, vocabulary, temperature, chunk, ranges, bias, softcap, logit_scale
            )  # fmt: skip
        return found if vocab_map is None else _mapped(found, vocab_map)


def source_topk_from_logits(
    logits: Tensor,
    labels: Tensor,
    k: int,
    *,
    vocab_map: Tensor | None = None,
    ranges: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    impl: str | None = None,
) -> tuple[Tensor, ...]:
    """`source_topk` for a model that only gives its (N, V) final logits, which stay as they are; the same returns."""
    check_scalars(temperature, None, 1.0, chunk_size)
    if logits.dim() != 2 or not logits.dtype.is_floating_point:
        raise ValueError(
            f"logits must be (N, V) floating point, got {tuple(logits.shape)} {logits.dtype}; flatten rows"
        )
    check_labels_shape(labels, logits.shape[0])
    check_device(logits, labels=labels)
    dtype, vocabulary = compute_dtype(logits), logits.shape[1]
    _check_shapes(labels, k, vocabulary, vocab_map, ranges)
    with torch.no_grad():
        if not _use_triton(impl, logits.device, dtype, k):
            _check_values(labels, vocabulary, vocab_map)
            chunk = chunk_rows(*logits.shape, dtype.itemsize, chunk_size)
            listed = _listed_ranges(ranges, labels, vocabulary)
            found = _topk(lambda rows: logits[rows].to(dtype, copy=True), labels, k, temperature, chunk, listed)
        else:
            from .source_topk_triton import topk_rows

            chunk = chunk_rows(*logits.shape, dtype.itemsize, chunk_size or TRITON_CHUNK_ROWS)
            found = topk_rows(lambda rows: logits[rows].contiguous(), labels, k, vocabulary, temperature, chunk, ranges)
        return found if vocab_map is None else _mapped(found, vocab_map)


def _use_triton(impl: str | None, device: torch.device, dtype: torch.dtype, k: int) -> bool:
    unable = None
    if dtype != torch.float32 or k > TRITON_MAX_K:
        unable = f"takes k <= {TRITON_MAX_K} and at most fp32, got k={k} and {dtype}; use impl='torch'"
    return choose_impl(impl, device, unable) == "triton"


def _fp32_logits(hidden: Tensor, weight: Tensor, chunk: int) -> Callable[[slice], Tensor]:
    """Raw fp32 logits of a slice of rows, (C, W): W is V rounded up, so that every row starts on a 64-byte boundary."""
    vocabulary = weight.shape[0]
    scratch = hidden.new_empty(chunk, -(-vocabulary // 16) * 16, dtype=torch.float32)
    chunked = ChunkedHead(Head(weight), torch.float32, chunk)
    tensor_cores = hidden.is_cuda and hidden.dtype == weight.dtype != torch.float32

    def logits(rows: slice) -> Tensor:
        h = hidden[rows]
        z = scratch[: h.shape[0]]
        if tensor_cores:  # bf16 or fp16 operands, fp32 sums and results
            torch.mm(h, weight.t(), out_dtype=torch.float32, out=z[:, :vocabulary])
        else:
            chunked.logits_into(z[:, :vocabulary], h.float())
        return z

    return logits


def _check_shapes(labels: Tensor, k: int, vocabulary: int, vocab_map: Tensor | None, ranges) -> None:
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k must be in 1..{vocabulary} (the vocabulary), got {k}; 10 is the usual choice")
    if vocab_map is not None:
        check_device(labels, vocab_map=vocab_map)
        if vocab_map.shape != (vocabulary,) or not _is_integer(vocab_map):
            raise ValueError(
                f"vocab_map must be ({vocabulary},) integers, an id or -1 for each token of the source, got "
                f"{tuple(vocab_map.shape)} {vocab_map.dtype}"
            )
    if ranges is None:
        return
    if len(ranges) != 4:
        raise ValueError(
            f"ranges must be rows (R,), lo (R,), hi (R,) and vocab_order (V',), got {len(ranges)} values; profuser.prefix_ranges "
            "gives all four"
        )
    rows, lo, hi, order = ranges
    check_tensors(rows=rows, lo=lo, hi=hi, vocab_order=order, vocab_map=vocab_map)
    check_device(labels, rows=rows, lo=lo, hi=hi, vocab_order=order)
    if order.dim() != 1 or any(x.dim() != 1 or len(x) != len(rows) for x in (rows, lo, hi)):
        raise ValueError(
            "ranges must be rows (R,), lo (R,), hi (R,) and vocab_order (V',), got "
            f"{tuple(rows.shape)}, {tuple(lo.shape)}, {tuple(hi.shape)}, {tuple(order.shape)}"
        )
    if not all(_is_integer(x) for x in ranges):
        raise ValueError(f"ranges must be integers, got {', '.join(str(x.dtype) for x in ranges)}")


def _is_integer(x: Tensor) -> bool:
    return not (x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool)


def _check_values(labels: Tensor, vocabulary: int, vocab_map: Tensor | None) -> None:
    check_label_values(labels, vocabulary)
    if vocab_map is not None and (least := int(vocab_map.min())) < -1:
        raise ValueError(f"vocab_map must be >= -1, got {least}; -1 stands for a token that has no counterpart")


def _listed_ranges(ranges, labels: Tensor, vocabulary: int) -> tuple[list[tuple[int, int, int]], Tensor] | None:
    """([(row, lo, hi)], order) with every value in bounds."""
    if ranges is None:
        return None
    rows, lo, hi, order = ranges
    if len(order) and not 0 <= int(order.min()) <= int(order.max()) < vocabulary:
        raise ValueError(
            f"vocab_order must be < {vocabulary} (the vocabulary), got {int(order.min())}..{int(order.max())}; "
            "build it from this model's tokenizer"
        )
    listed = list(zip(rows.tolist(), lo.tolist(), hi.tolist()))
    previous = 0
    for row, first, last in listed:
        if not (previous <= row < labels.shape[0] and 0 <= first <= last <= len(order)):
            raise ValueError(
                f"a range must have its row in [{previous}, {labels.shape[0]}) (ascending) and 0 <= lo <= hi <= {len(order)}, "
                f"got row {row}, [{first}, {last}); sort the ranges by row"
            )
        previous = row
    return listed, order.long()


def _topk(logits, labels: Tensor, k: int, temperature: float, chunk: int, ranges=None) -> tuple[Tensor, ...]:
    """`logits(rows)` gives a chunk that may be overwritten."""
    N = labels.shape[0]
    ids = labels.new_empty(N, k, dtype=torch.int32)
    logprobs = labels.new_empty(N, k, dtype=torch.float32)
    lse = labels.new_empty(N, dtype=torch.float32)
    ce = labels.new_empty(N, dtype=torch.float32)
    listed, order = ranges or ([], None)
    range_ids = labels.new_full((len(listed), k), -1, dtype=torch.int32)
    range_logprobs = labels.new_full((len(listed), k), -torch.inf, dtype=torch.float32)
    range_logmass = labels.new_full((len(listed),), -torch.inf, dtype=torch.float32)
    done = 0  # ranges
    for begin in range(0, N, chunk):
        rows = slice(begin, min(begin + chunk, N))
        z = logits(rows)
        values, kept = _stable_topk(z, k)
        gold = labels[rows].long()
        valid = gold != IGNORE_INDEX
        gold = gold.clamp_min(0)[:, None]
        m = values[:, :1].clamp_min(torch.finfo(z.dtype).min)  # -inf - -inf would be NaN, even where lse is not
        below = z.gather(1, gold) - m
        z.sub_(m)
        first = done
        while done < len(listed) and listed[done][0] < rows.stop:
            row, lo, hi = listed[done]
            if lo < hi:
                among = order[lo:hi]
                shifted = z[row - begin, among] / temperature
                range_logmass[done] = shifted.logsumexp(0)
                best, at = _stable_topk(shifted[None], min(k, hi - lo))
                range_logprobs[done, : len(at[0])], range_ids[done, : len(at[0])] = best[0], among[at[0]].int()
            done += 1
        sum_T = None if temperature == 1 else (z / temperature).exp_().sum(1, keepdim=True)
        z.exp_()
        if sum_T is None:
            sum_T = z.sum(1, keepdim=True)
        # Once more without the gold id: a small CE is no difference of near-equal sums, and no sum at T depends on a label.
        others = z.scatter_(1, gold, 0).sum(1, keepdim=True)
        ce[rows] = torch.where(valid, cross_entropy_from_sums(others, below.exp(), below)[:, 0], 0)
        ids[rows] = kept
        logprobs[rows] = (values - m) / temperature - sum_T.log()
        lse[rows] = (m / temperature + sum_T.log())[:, 0]
        if done > first:
            of_range = torch.tensor([row - begin for row, _, _ in listed[first:done]], device=lse.device)
            log_sum = sum_T.log()[of_range, 0]
            range_logmass[first:done] -= log_sum
            range_logprobs[first:done] -= log_sum[:, None]
    if ranges is None:
        return ids, logprobs, lse, ce
    range_ids.masked_fill_(~range_logprobs.isfinite(), -1)
    return ids, logprobs, lse, ce, range_ids, range_logprobs, range_logmass


def _stable_topk(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, largest first, equal ones by ascending index (torch.topk promises no order)."""
    wide = min(k + 1, z.shape[1])
    values, ids = z.topk(wide, dim=1)
    # Which of several equal values was kept is arbitrary only where the first value left out equals the last kept.
    if wide > k and (tied := values[:, k - 1] == values[:, k]).any():
        best, order = z[tied].sort(dim=1, descending=True, stable=True)
        values[tied, :k], ids[tied, :k] = best[:, :k], order[:, :k]
    values, ids = values[:, :k], ids[:, :k]
    ids, by_id = ids.sort(1)
    values, by_value = values.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, by_value)


def _mapped(found: tuple[Tensor, ...], vocab_map: Tensor) -> tuple[Tensor, ...]:
    """What was found, its ids translated by `vocab_map` and merged."""
    ids, logprobs, lse, ce, *of_ranges = found
    if of_ranges:
        of_ranges[:2] = _merged(*of_ranges[:2], vocab_map)
    return *_merged(ids, logprobs, vocab_map), lse, ce, *of_ranges


def _merged(ids: Tensor, logprobs: Tensor, vocab_map: Tensor) -> tuple[Tensor, Tensor]:
    mapped = torch.where(ids < 0, -1, vocab_map[ids.long().clamp_min(0)].int())
    mapped, by_id = mapped.sort(dim=1, stable=True)
    merged = logprobs.gather(1, by_id)
    # Equal ids are neighbours now. Each sum takes in the one `step` before it, twice as far every time, and the last of its
    # run ends with the whole: a fixed order of additions, which atomics would not have.
    step = 1
    while step < ids.shape[1]:
        equal = mapped[:, step:] == mapped[:, :-step]
        grown = torch.where(equal, torch.logaddexp(merged[:, step:], merged[:, :-step]), merged[:, step:])
        merged = torch.cat([merged[:, :step], grown], 1)
        step *= 2
    none = (mapped < 0) | (merged == -torch.inf)
    none[:, :-1] |= mapped[:, 1:] == mapped[:, :-1]
    merged, by_mass = merged.masked_fill(none, -torch.inf).sort(dim=1, descending=True, stable=True)
    return mapped.masked_fill(none, -1).gather(1, by_mass), merged
