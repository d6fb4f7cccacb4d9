"""A source's top-k log-probabilities and the label's cross-entropy, without [N, V] logits: what capture stores of a source.

Logits exist for a chunk of rows at a time, and there are no gradients. On CUDA Triton kernels do the work
(source_topk_triton.py), on any other device plain torch does, in this file. Equal logits rank by ascending token id on every
platform, so that a store can be rebuilt byte for byte.
Dimension letters: N rows, C rows of a chunk, D hidden, V vocabulary, V' entries of an ordered vocabulary, R ranges.
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

Ranges = tuple[Tensor, Tensor, Tensor, Tensor]
"""rows (R,), lo (R,), hi (R,) and vocab_order (V',), as `source_topk` takes them."""
ListedRanges = tuple[list[tuple[int, int, int]], Tensor]
"""The same as a list of (row, lo, hi), and the order."""

TRITON_MAX_K = 128  # more candidates do not fit the registers of a program
TRITON_CHUNK_ROWS = 2048  # with fewer rows each matrix product leaves part of a large GPU idle


def source_topk(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    k: int,
    *,
    vocab_map: Tensor | None = None,
    ranges: Ranges | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    impl: str | None = None,
) -> tuple[Tensor, ...]:
    """The k most probable next tokens of every row, and the negative log-probability of its label.

    Args:
        hidden: (N, D) any float dtype, last hidden states. Row n predicts labels[n].
        weight: (V, D) language-model head. Logits and sums are computed in fp32, or in fp64 if either is fp64.
        labels: (N,) int64 or int32. IGNORE_INDEX rows have ce 0, and a top-k as all rows have.
        k: number of entries to keep, 1..V.
        vocab_map: (V,) integers, the id of each token in another vocabulary, -1 for none. The top k are chosen among the
            source's own tokens and mapped afterwards: the masses of equal ids are added, and a token without an id is left
            out, so that its mass belongs to the tail. lse, ce and range_logmass do not change.
        ranges: four tensors of integers: rows (R,) ascending, lo (R,), hi (R,) and vocab_order (V',). For row rows[r] they ask
            for the exact mass of the tokens vocab_order[lo[r]:hi[r]], and for the k most probable of those. Equal ones rank
            in that order.
        temperature: T > 0 of logprobs and lse. ce is always at 1.
        bias, softcap, logit_scale: as in `fused_linear_fusion_loss`.
        chunk_size: number of rows whose logits exist at a time. None chooses it.
        impl: "torch", "triton" (CUDA, or any device under TRITON_INTERPRET=1; k <= 128, no fp64), or None: Triton on CUDA
            wherever it can do it.
    Returns:
        ids: (N, k) int32, most probable first, equal ones by ascending id. With vocab_map the mapped ids, -1 for padding.
        logprobs: (N, k) fp32, natural logarithms of the full softmax at T, -inf for padding.
        lse: (N,) fp32, log-sum-exp of logits/T.
        ce: (N,) fp32 in nats.
        With ranges there are three more: range_ids (R, k) int32, -1 for padding; range_logprobs (R, k) fp32 and
        range_logmass (R,) fp32, both of the full softmax at T, -inf where there is no token or no probability.
        A row with NaN or +inf among its logits has NaN lse, logprobs and ce (0 if it is ignored), and ids that mean nothing
        but are in bounds. Logits of -inf are allowed.
    Raises:
        ValueError: shapes, dtypes or devices contradict each other; k is outside 1..V; impl cannot do it. In plain torch also:
            a label is outside the vocabulary; ranges are outside the rows or the order, or their rows do not ascend; an
            entry of vocab_map is below -1. Triton never reads a value back to the host. There, such a label gives a ce of
            NaN, such a range NaN and ids of -1, and any mapped id below 0 counts as -1.

    Example:
        >>> import torch
        >>> from profuser.kernels.source_topk import source_topk
        >>> hidden, head = torch.randn(6, 16), torch.randn(50, 16)  # 6 tokens, a vocabulary of 50
        >>> labels = torch.randint(50, (6,))
        >>> ids, logprobs, lse, ce = source_topk(hidden, head, labels, k=3)
        >>> ids.shape, ce.shape
        (torch.Size([6, 3]), torch.Size([6]))
        >>> torch.allclose(logprobs, (hidden @ head.T).log_softmax(-1).topk(3).values, atol=1e-5)
        True
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
                of_chunk = hidden[rows].to(dtype)
                return chunked.logits_into(scratch[: of_chunk.shape[0]], of_chunk)

            found = _topk(logits, labels, k, temperature, chunk, _listed_ranges(ranges, labels, vocabulary))
        else:
            from .source_topk_triton import topk_rows

            chunk = chunk_rows(hidden.shape[0], vocabulary, dtype.itemsize, chunk_size or TRITON_CHUNK_ROWS)
            found = topk_rows(
                _fp32_products(hidden, weight, chunk),
                labels,
                k,
                vocabulary,
                temperature,
                chunk,
                ranges,
                bias=head.bias,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
            )
        return found if vocab_map is None else _mapped(found, vocab_map)


def source_topk_from_logits(
    logits: Tensor,
    labels: Tensor,
    k: int,
    *,
    vocab_map: Tensor | None = None,
    ranges: Ranges | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    impl: str | None = None,
) -> tuple[Tensor, ...]:
    """`source_topk` for a model that gives only its final logits (N, V), which are not changed. It returns the same."""
    check_scalars(temperature, None, 1.0, chunk_size)
    if logits.dim() != 2 or not logits.dtype.is_floating_point:
        raise ValueError(
            f"logits must be (N, V) floating point, got {tuple(logits.shape)} {logits.dtype}; flatten rows"
        )
    check_labels_shape(labels, logits.shape[0])
    check_device(logits, labels=labels)
    count, vocabulary = logits.shape
    dtype = compute_dtype(logits)
    _check_shapes(labels, k, vocabulary, vocab_map, ranges)
    with torch.no_grad():
        if not _use_triton(impl, logits.device, dtype, k):
            _check_values(labels, vocabulary, vocab_map)
            chunk = chunk_rows(count, vocabulary, dtype.itemsize, chunk_size)
            listed = _listed_ranges(ranges, labels, vocabulary)
            found = _topk(lambda rows: logits[rows].to(dtype, copy=True), labels, k, temperature, chunk, listed)
        else:
            from .source_topk_triton import topk_rows

            chunk = chunk_rows(count, vocabulary, dtype.itemsize, chunk_size or TRITON_CHUNK_ROWS)
            found = topk_rows(lambda rows: logits[rows].contiguous(), labels, k, vocabulary, temperature, chunk, ranges)
        return found if vocab_map is None else _mapped(found, vocab_map)


def _use_triton(impl: str | None, device: torch.device, dtype: torch.dtype, k: int) -> bool:
    unable = None
    if dtype != torch.float32 or k > TRITON_MAX_K:
        unable = f"takes k <= {TRITON_MAX_K} and at most fp32, got k={k} and {dtype}; use impl='torch'"
    return choose_impl(impl, device, unable) == "triton"


def _fp32_products(hidden: Tensor, weight: Tensor, chunk: int) -> Callable[[slice], Tensor]:
    """A function of a slice of rows that gives their hidden Wᵀ in fp32, (C, W), before bias, scale and softcap.

    W is V rounded up, so that every row starts on a 64-byte boundary.
    """
    vocabulary = weight.shape[0]
    scratch = hidden.new_empty(chunk, -(-vocabulary // 16) * 16, dtype=torch.float32)
    chunked = ChunkedHead(Head(weight), torch.float32, chunk)
    tensor_cores = hidden.is_cuda and hidden.dtype == weight.dtype != torch.float32

    def products(rows: slice) -> Tensor:
        of_chunk = hidden[rows]
        found = scratch[: of_chunk.shape[0]]
        if tensor_cores:  # the operands are bf16 or fp16, sums and results fp32
            torch.mm(of_chunk, weight.t(), out_dtype=torch.float32, out=found[:, :vocabulary])
        else:
            chunked.logits_into(found[:, :vocabulary], of_chunk.float())
        return found

    return products


def _check_shapes(labels: Tensor, k: int, vocabulary: int, vocab_map: Tensor | None, ranges: Ranges | None) -> None:
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
    rows, lo, hi, vocab_order = ranges
    check_tensors(rows=rows, lo=lo, hi=hi, vocab_order=vocab_order, vocab_map=vocab_map)
    check_device(labels, rows=rows, lo=lo, hi=hi, vocab_order=vocab_order)
    if vocab_order.dim() != 1 or any(x.dim() != 1 or len(x) != len(rows) for x in (rows, lo, hi)):
        raise ValueError(
            "ranges must be rows (R,), lo (R,), hi (R,) and vocab_order (V',), got "
            f"{tuple(rows.shape)}, {tuple(lo.shape)}, {tuple(hi.shape)}, {tuple(vocab_order.shape)}"
        )
    if not all(_is_integer(x) for x in ranges):
        raise ValueError(f"ranges must be integers, got {', '.join(str(x.dtype) for x in ranges)}")


def _is_integer(x: Tensor) -> bool:
    return not (x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool)


def _check_values(labels: Tensor, vocabulary: int, vocab_map: Tensor | None) -> None:
    check_label_values(labels, vocabulary)
    if vocab_map is not None and (least := int(vocab_map.min())) < -1:
        raise ValueError(f"vocab_map must be >= -1, got {least}; -1 stands for a token that has no counterpart")


def _listed_ranges(ranges: Ranges | None, labels: Tensor, vocabulary: int) -> ListedRanges | None:
    """The ranges as a list of (row, lo, hi), and the vocabulary's order; ValueError for a value out of bounds."""
    if ranges is None:
        return None
    rows, lo, hi, vocab_order = ranges
    if len(vocab_order) and not 0 <= int(vocab_order.min()) <= int(vocab_order.max()) < vocabulary:
        raise ValueError(
            f"vocab_order must be < {vocabulary} (the vocabulary), got {int(vocab_order.min())}..{int(vocab_order.max())}; "
            "build it from this model's tokenizer"
        )
    listed = list(zip(rows.tolist(), lo.tolist(), hi.tolist()))
    previous = 0
    for row, first, last in listed:
        if not (previous <= row < labels.shape[0] and 0 <= first <= last <= len(vocab_order)):
            raise ValueError(
                f"a range must have its row in [{previous}, {labels.shape[0]}) (ascending) and 0 <= lo <= hi <= "
                f"{len(vocab_order)}, got row {row}, [{first}, {last}); sort the ranges by row"
            )
        previous = row
    return listed, vocab_order.long()


def _topk(
    logits: Callable[[slice], Tensor],
    labels: Tensor,
    k: int,
    temperature: float,
    chunk: int,
    ranges: ListedRanges | None,
) -> tuple[Tensor, ...]:
    """What `source_topk` returns, in plain torch. `logits(rows)` gives the logits of a chunk, which may be overwritten."""
    N = labels.shape[0]
    ids = labels.new_empty(N, k, dtype=torch.int32)
    logprobs = labels.new_empty(N, k, dtype=torch.float32)
    lse = labels.new_empty(N, dtype=torch.float32)
    ce = labels.new_empty(N, dtype=torch.float32)
    listed, vocab_order = ranges or ([], labels.new_empty(0))
    range_ids = labels.new_full((len(listed), k), -1, dtype=torch.int32)
    range_logprobs = labels.new_full((len(listed), k), -torch.inf, dtype=torch.float32)
    range_logmass = labels.new_full((len(listed),), -torch.inf, dtype=torch.float32)
    ranges_done = 0
    for begin in range(0, N, chunk):
        rows = slice(begin, min(begin + chunk, N))
        z = logits(rows)
        values, kept = _stable_topk(z, k)
        gold = labels[rows].long()
        valid = gold != IGNORE_INDEX
        gold = gold.clamp_min(0)[:, None]

        # All that follows is relative to the row's maximum. It is finite also in a row of -inf, where -inf - -inf is NaN.
        row_max = values[:, :1].clamp_min(torch.finfo(z.dtype).min)
        gold_below = z.gather(1, gold) - row_max
        z.sub_(row_max)

        # The ranges of this chunk, for now without the row's log-sum-exp. They come in the order of their rows.
        first_range = ranges_done
        while ranges_done < len(listed) and listed[ranges_done][0] < rows.stop:
            row, lo, hi = listed[ranges_done]
            if lo < hi:
                among = vocab_order[lo:hi]
                within = z[row - begin, among] / temperature
                range_logmass[ranges_done] = within.logsumexp(0)
                best, at = _stable_topk(within[None], min(k, hi - lo))
                range_logprobs[ranges_done, : len(at[0])] = best[0]
                range_ids[ranges_done, : len(at[0])] = among[at[0]].int()
            ranges_done += 1

        # Sums over the row: at T for the log-probabilities, and at 1 without the gold id for the cross-entropy. Thus a
        # small cross-entropy is no difference of nearly equal sums, and no log-probability depends on a label.
        sum_T = None if temperature == 1 else (z / temperature).exp_().sum(1, keepdim=True)
        z.exp_()
        if sum_T is None:
            sum_T = z.sum(1, keepdim=True)
        others = z.scatter_(1, gold, 0).sum(1, keepdim=True)
        ce[rows] = torch.where(valid, cross_entropy_from_sums(others, gold_below.exp(), gold_below)[:, 0], 0)
        ids[rows] = kept
        logprobs[rows] = (values - row_max) / temperature - sum_T.log()
        lse[rows] = (row_max / temperature + sum_T.log())[:, 0]

        if ranges_done > first_range:
            row_of_range = [row - begin for row, _, _ in listed[first_range:ranges_done]]
            log_sum = sum_T.log()[torch.tensor(row_of_range, device=lse.device), 0]
            range_logmass[first_range:ranges_done] -= log_sum
            range_logprobs[first_range:ranges_done] -= log_sum[:, None]
    if ranges is None:
        return ids, logprobs, lse, ce
    range_ids.masked_fill_(~range_logprobs.isfinite(), -1)
    return ids, logprobs, lse, ce, range_ids, range_logprobs, range_logmass


def _stable_topk(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, largest first, equal ones by ascending index: torch.topk promises no order of those."""
    wide = min(k + 1, z.shape[1])
    values, ids = z.topk(wide, dim=1)
    # Which of several equal values torch.topk keeps is arbitrary. That matters only where the first value that is left out
    # equals the last one that is kept: those rows are sorted.
    if wide > k and (tied := values[:, k - 1] == values[:, k]).any():
        best, by_value = z[tied].sort(dim=1, descending=True, stable=True)
        values[tied, :k], ids[tied, :k] = best[:, :k], by_value[:, :k]
    values, ids = values[:, :k], ids[:, :k]
    # Sorted by id first, a stable sort by value leaves equal values in the order of their ids.
    ids, by_id = ids.sort(1)
    values, by_value = values.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, by_value)


def _mapped(found: tuple[Tensor, ...], vocab_map: Tensor) -> tuple[Tensor, ...]:
    """What was found, with its ids translated by `vocab_map` and the masses of equal ids added."""
    ids, logprobs, lse, ce, *of_ranges = found
    if of_ranges:
        range_ids, range_logprobs, _ = of_ranges
        of_ranges[:2] = _merged(range_ids, range_logprobs, vocab_map)
    return *_merged(ids, logprobs, vocab_map), lse, ce, *of_ranges


def _merged(ids: Tensor, logprobs: Tensor, vocab_map: Tensor) -> tuple[Tensor, Tensor]:
    """The mapped ids of each row, most probable first, -1 and -inf behind them, and their log-probabilities."""
    mapped = torch.where(ids < 0, -1, vocab_map[ids.long().clamp_min(0)].int())
    mapped, by_id = mapped.sort(dim=1, stable=True)
    merged = logprobs.gather(1, by_id)
    # Equal ids are neighbours now, a run. Each entry adds the one `step` before it if that is of its run, and `step` doubles:
    # in the end the last entry of a run holds the sum of it all. Unlike with atomics, the order of the additions is fixed.
    step = 1
    while step < ids.shape[1]:
        equal = mapped[:, step:] == mapped[:, :-step]
        grown = torch.where(equal, torch.logaddexp(merged[:, step:], merged[:, :-step]), merged[:, step:])
        merged = torch.cat([merged[:, :step], grown], 1)
        step *= 2
    # All others of a run are dropped, as are tokens without an id and entries without mass.
    dropped = (mapped < 0) | (merged == -torch.inf)
    dropped[:, :-1] |= mapped[:, 1:] == mapped[:, :-1]
    merged, by_mass = merged.masked_fill(dropped, -torch.inf).sort(dim=1, descending=True, stable=True)
    return mapped.masked_fill(dropped, -1).gather(1, by_mass), merged
