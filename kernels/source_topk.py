"""A source's top-k log-probabilities and the label's cross-entropy, without [N, V] logits: what capture stores of a source.

Logits exist for a chunk of rows at a time, and there are no gradients. On CUDA Triton kernels do the work
(source_topk_triton.py), on any other device plain torch does (source_topk_torch.py). Equal logits rank by ascending token id on
every platform, so that a store can be rebuilt byte for byte.
Dimension letters: N rows, C rows of a chunk, D hidden, V vocabulary, V' entries of an ordered vocabulary, R ranges, L entries of
the ranges' maps.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import source_topk_torch
from .common import (
    MIN_CHUNK_ROWS_TOPK,
    check_device,
    check_head,
    check_label_values,
    check_labels_shape,
    check_scalars,
    check_tensors,
    choose_impl,
    chunk_rows,
    compute_dtype,
)
from .head import ChunkedHead, Head

Ranges = tuple[Tensor, Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""rows (R,), lo (R,), hi (R,), vocab_order (V',), and perhaps map_begin (R,) and mapped (L,), as `source_topk` takes them."""

MAX_ID = 2**31 - 1
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
        vocab_map: (V,) integers, the id of each token in another vocabulary, -1 for none. The masses of all tokens of an id
            are added over the whole vocabulary, and the k most probable ids are kept. A token without an id is left out, so
            that its mass belongs to the tail. lse, ce and range_logmass do not change.
        ranges: four tensors of integers: rows (R,) ascending, lo (R,), hi (R,) and vocab_order (V',). For row rows[r] they ask
            for the exact mass of the tokens vocab_order[lo[r]:hi[r]], and for the k most probable of those. Equal ones rank
            in that order. With vocab_map it is the k most probable ids, whose masses are added over the range.
            Two more tensors give ranges maps of their own: map_begin (R,) and mapped (L,). In range r, unless map_begin[r] is
            -1, the token vocab_order[lo[r] + i] counts for the id mapped[map_begin[r] + i], or for none if that is -1. The
            range's k most probable ids are asked for then, without the mass of the row's own label; that remains in the
            exact mass of the range. It costs little if many ranges have the same lo, hi and map_begin.
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
            a label is outside the vocabulary; ranges are outside the rows, the order or their maps, or their rows do not
            ascend; an entry of vocab_map or mapped is below -1. Triton reads no value back to the host but which ranges have
            maps. There, such a label gives a ce of NaN, such a range NaN and ids of -1, and any mapped id below 0 counts as
            -1.

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
            chunk = chunk_rows(hidden.shape[0], vocabulary, dtype.itemsize, chunk_size, fewest=MIN_CHUNK_ROWS_TOPK)
            chunked = ChunkedHead(head, dtype, chunk)
            scratch = hidden.new_empty(chunk, vocabulary, dtype=dtype)

            def logits(rows: slice) -> Tensor:
                of_chunk = hidden[rows].to(dtype)
                return chunked.logits_into(scratch[: of_chunk.shape[0]], of_chunk)

            asked_for = _listed_ranges(ranges, labels, vocabulary)
            return source_topk_torch.topk_rows(logits, labels, k, vocabulary, temperature, chunk, vocab_map, asked_for)
        from .source_topk_triton import topk_rows

        chunk = chunk_rows(hidden.shape[0], vocabulary, dtype.itemsize, chunk_size or TRITON_CHUNK_ROWS)
        return topk_rows(
            _fp32_products(hidden, weight, chunk),
            labels,
            k,
            vocabulary,
            temperature,
            chunk,
            vocab_map,
            ranges,
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
        )


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
            chunk = chunk_rows(count, vocabulary, dtype.itemsize, chunk_size, fewest=MIN_CHUNK_ROWS_TOPK)
            asked_for = _listed_ranges(ranges, labels, vocabulary)
            return source_topk_torch.topk_rows(
                lambda rows: logits[rows].to(dtype, copy=True),
                labels,
                k,
                vocabulary,
                temperature,
                chunk,
                vocab_map,
                asked_for,
            )
        from .source_topk_triton import topk_rows

        chunk = chunk_rows(count, vocabulary, dtype.itemsize, chunk_size or TRITON_CHUNK_ROWS)
        return topk_rows(
            lambda rows: logits[rows].contiguous(), labels, k, vocabulary, temperature, chunk, vocab_map, ranges
        )


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
    if len(ranges) not in (4, 6):
        raise ValueError(
            "ranges must be rows (R,), lo (R,), hi (R,) and vocab_order (V',), and for ranges with maps also map_begin (R,) and "
            f"mapped (L,), got {len(ranges)} values; profuser.prefix_ranges gives the first four"
        )
    named = dict(zip(("rows", "lo", "hi", "vocab_order", "map_begin", "mapped"), ranges))
    check_tensors(**named)
    check_device(labels, **named)
    of_ranges = [x for name, x in named.items() if name not in ("vocab_order", "mapped")]
    if any(x.dim() != 1 for x in ranges) or any(len(x) != len(ranges[0]) for x in of_ranges):
        raise ValueError(
            "ranges must be rows (R,), lo (R,), hi (R,) and vocab_order (V',), and perhaps map_begin (R,) and mapped (L,), got "
            + ", ".join(str(tuple(x.shape)) for x in ranges)
        )
    if not all(_is_integer(x) for x in ranges):
        raise ValueError(f"ranges must be integers, got {', '.join(str(x.dtype) for x in ranges)}")


def _is_integer(x: Tensor) -> bool:
    return not (x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool)


def _check_values(labels: Tensor, vocabulary: int, vocab_map: Tensor | None) -> None:
    check_label_values(labels, vocabulary)
    if vocab_map is not None:
        _check_mapped_ids("vocab_map", vocab_map)


def _check_mapped_ids(name: str, mapped: Tensor) -> None:
    """Raises ValueError for what is neither an id nor -1."""
    if not len(mapped):
        return
    least, most = int(mapped.min()), int(mapped.max())
    if least < -1:
        raise ValueError(f"{name} must be >= -1, got {least}; -1 stands for a token that has no counterpart")
    if most > MAX_ID:
        raise ValueError(f"{name} must be <= {MAX_ID}, got {most}; ids are returned as int32")


def _listed_ranges(ranges: Ranges | None, labels: Tensor, vocabulary: int) -> source_topk_torch.ListedRanges | None:
    """The ranges as numbers; ValueError for a value out of bounds."""
    if ranges is None:
        return None
    rows, lo, hi, vocab_order, *maps = ranges
    map_begin, mapped = maps or (torch.full_like(rows, -1, dtype=torch.int64), vocab_order[:0])
    if len(vocab_order) and not 0 <= int(vocab_order.min()) <= int(vocab_order.max()) < vocabulary:
        raise ValueError(
            f"vocab_order must be < {vocabulary} (the vocabulary), got {int(vocab_order.min())}..{int(vocab_order.max())}; "
            "build it from this model's tokenizer"
        )
    _check_mapped_ids("mapped", mapped)
    listed = list(zip(rows.tolist(), lo.tolist(), hi.tolist(), map_begin.tolist()))
    previous = 0
    for row, first, last, begin in listed:
        if not (previous <= row < labels.shape[0] and 0 <= first <= last <= len(vocab_order)):
            raise ValueError(
                f"a range must have its row in [{previous}, {labels.shape[0]}) (ascending) and 0 <= lo <= hi <= "
                f"{len(vocab_order)}, got row {row}, [{first}, {last}); sort the ranges by row"
            )
        most = max(-1, len(mapped) - (last - first))
        if not -1 <= begin <= most:
            raise ValueError(
                f"map_begin must be in -1..{most} (mapped has {len(mapped)} entries, the range [{first}, {last}) takes "
                f"{last - first}), got {begin}; -1 stands for a range without a map"
            )
        previous = row
    return source_topk_torch.ListedRanges(listed, vocab_order.long(), mapped.long())
