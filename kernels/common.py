"""What the ops share: the label to ignore, argument checks, chunk sizes, cross-entropy from sums of exponentials, mixed products.

Checks of shapes read no values: they cost nothing on a GPU and torch.compile traces through them. Checks of values read the
data, and therefore run inside an op's own implementation.
Dimension letters: N rows, D hidden, V vocabulary.
"""

import importlib.util
import math
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100
HAS_TRITON = importlib.util.find_spec("triton") is not None

# A chunk of fewer than about 2^18 logits spends its time in Python. Every chunk of the loss reads and writes the whole weight gradient, and
# with `left_out` gathers rows of the head, which takes too long for few rows. Of many rows a cache holds nothing, and more columns have to
# be kept.
MIN_CHUNK_ROWS = 256
CHUNK_ELEMENTS = 1 << 18
# The top k writes nothing of that size.
MIN_CHUNK_ROWS_TOPK = 128
# On a GPU every chunk reads and writes the whole fp32 weight gradient, which takes too long for few rows.
MIN_CHUNK_ROWS_GPU = 2048

# Maxima start here and not at -inf: where all columns of a row are lifted, -inf - -inf would be NaN. It can be divided by T.
LOWEST = -1e30
# Rounding to fp16, or adding the masses of merged tokens, leaves a log-probability just above 0. A probability is far above.
LOGPROB_SLACK = 1e-2
# As much may rounding move a tail out of [0, 1].
TAIL_SLACK = 1e-3
# A tail of so much is nothing but rounding, where no column outside the entries can have a probability.
NO_TAIL = 1e-5
# As much may rounding to a coarse dtype move a row's mass above 1. Padding with a real id, or logarithms to another base, moves
# it further.
MASS_SLACK = 5e-2


def check_head(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError unless hidden (N, D), weight (V, D), labels (N,) and bias (V,) fit together.

    Raises TypeError for what is no tensor.
    """
    check_tensors(hidden=hidden, weight=weight, labels=labels, bias=bias)
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if hasattr(tensor, "full_tensor"):
            raise ValueError(
                f"{name} must be a plain tensor, got a sharded DTensor; shard only the module whose forward calls the loss "
                f"(FusionModel's), or pass {name}.full_tensor(grad_placements=[Partial('avg')])"
            )
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}; cast it to float32 or bfloat16")
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be (N, D), got {tuple(hidden.shape)}; flatten batch and length into N")
    check_labels_shape(labels, hidden.shape[0])
    width = hidden.shape[1]
    if weight.dim() != 2 or weight.shape[1] != width:
        if weight.numel() == 0:
            fix = "a sharded head must be gathered first"
        elif weight.dim() == 2 and weight.shape[0] == width:
            fix = "transpose it if that is (D, V); if hidden holds logits, pass the last hidden states"
        else:
            fix = "pass lm_head.weight"
        raise ValueError(f"weight must be (V, D) with hidden's D={width}, got {tuple(weight.shape)}; {fix}")
    if weight.numel() == 0:
        raise ValueError(
            f"weight must be (V, D) with V, D > 0, got {tuple(weight.shape)}; a sharded head must be gathered first"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (V,) = ({weight.shape[0]},), got {tuple(bias.shape)}; pass lm_head.bias")
    check_device(hidden, weight=weight, labels=labels, bias=bias)


def check_tensors(**arguments: Tensor | None) -> None:
    """Raises TypeError for what is neither a tensor nor None. hidden, weight and labels may not be None either.

    Raises ValueError for a DTensor among those that are no operands of a matrix product: `check_head` speaks of these.
    """
    for name, value in arguments.items():
        if hasattr(value, "full_tensor") and name not in ("hidden", "weight", "bias"):
            raise ValueError(f"{name} must be a plain tensor, got a DTensor; pass {name}.full_tensor()")
        if isinstance(value, Tensor) or (value is None and name not in ("hidden", "weight", "labels")):
            continue
        attribute = next(
            (held for held in ("weight", "last_hidden_state") if isinstance(getattr(value, held, None), Tensor)), None
        )
        if attribute:
            fix = f"pass its .{attribute}"
        elif name == "hidden":
            fix = "pass the last hidden states, last_hidden_state or hidden_states[-1] of a model called for them"
        else:
            fix = "make it one with torch.as_tensor"
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}; {fix}")


def check_labels_shape(labels: Tensor, rows: int) -> None:
    """Raises ValueError unless labels are (N,) integers."""
    if labels.dim() != 1 or labels.shape[0] != rows:
        if labels.dim() == 2 and labels.shape[0] == rows:
            fix = "give token ids, argmax(-1) of one-hot labels" if labels.shape[1] > 1 else "squeeze(1) them"
        else:
            fix = "flatten them; drop the first label and the last hidden state of each sequence"
        raise ValueError(f"labels must be (N,) with N={rows}, got {tuple(labels.shape)}; {fix}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels must be int64 or int32, got {labels.dtype}; call labels.long()")


def check_device(hidden: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError for a tensor on another device than hidden."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} must be on hidden's device {hidden.device}, got {tensor.device}; move it there")


def check_numbers(whole: bool = False, **options: object) -> None:
    """Raises TypeError for an option that is no number. A tensor is none: it would get no gradient, or wait for its device."""
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, kinds):
            expected = "a whole number" if whole else "a number"
            raise TypeError(f"{name} must be {expected}, got {value!r} ({type(value).__name__}); convert it")


def check_scalars(temperature: float, softcap: float | None, logit_scale: float, chunk_size: int | None) -> None:
    """Raises ValueError unless the scalars are positive and finite, and TypeError for what is no number."""
    check_numbers(temperature=temperature, logit_scale=logit_scale, softcap=1.0 if softcap is None else softcap)
    check_numbers(whole=True, chunk_size=1 if chunk_size is None else chunk_size)
    if not 0 < temperature < math.inf:  # not math.isfinite, which torch.compile cannot trace
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}; 1.0 leaves the logits as they are")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be > 0 and finite, got {softcap}; pass None for a model without one")
    if not 0 < logit_scale < math.inf:
        raise ValueError(f"logit_scale must be > 0 and finite, got {logit_scale}; 1.0 leaves the logits as they are")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1 row, got {chunk_size}; pass None to have it chosen")


def choose_impl(impl: str | None, device: torch.device, unable: str | None) -> str:
    """The implementation to use, "torch" or "triton": the one that is asked for, or else the device's.

    `unable` says why Triton cannot do it and what to do instead; None means that it can.
    """
    if impl not in (None, "torch", "triton"):
        raise ValueError(f"impl must be None, 'torch' or 'triton', got {impl!r}; None chooses by device")
    if impl is None:
        return "triton" if device.type == "cuda" and HAS_TRITON and unable is None else "torch"
    if impl == "torch":
        return impl
    if unable is not None:
        raise ValueError(f"impl='triton' {unable}")
    if not HAS_TRITON:
        raise ValueError("impl='triton' needs the triton package, it is not installed; use impl=None")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl='triton' needs a CUDA device, the tensors are on {device}; use impl=None, or set TRITON_INTERPRET=1 before "
            "Python starts to interpret the kernels"
        )
    return impl


def check_label_values(labels: Tensor, vocabulary: int) -> None:
    """Raises ValueError where a label is neither IGNORE_INDEX nor in [0, V). Reads the data."""
    bad = ((labels < 0) & (labels != IGNORE_INDEX)) | (labels >= vocabulary)
    if bad.any():
        label = labels[bad][0].item()
        fix = f"mark what is not learnt with {IGNORE_INDEX}" if label < 0 else "tokenize with the target's tokenizer"
        raise ValueError(f"labels must be in [0, {vocabulary}) or {IGNORE_INDEX}, got {label}; {fix}")


def compute_dtype(*operands: Tensor) -> torch.dtype:
    """fp64 where an operand is fp64, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in operands) else torch.float32


def chunk_rows(
    rows: int,
    vocabulary: int,
    itemsize: int,
    chunk_size: int | None = None,
    max_chunk_bytes: int | None = None,
    fewest: int | None = None,
) -> int:
    """How many rows of logits are held at a time on a CPU.

    It is `chunk_size`, or depends on the vocabulary where that is None, and is then at least `fewest`, or MIN_CHUNK_ROWS. The logits
    never exceed `max_chunk_bytes`, unless a single row does.
    """
    chunk = chunk_size or max(fewest or MIN_CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary)
    if max_chunk_bytes is not None:
        chunk = min(chunk, max_chunk_bytes // (vocabulary * itemsize))
    return max(1, min(chunk, rows))


def chunk_rows_gpu(
    rows: int, vocabulary: int, width: int, chunk_size: int | None = None, max_chunk_bytes: int | None = None
) -> int:
    """How many rows of fp32 logits are held at a time on a GPU: many, because each chunk passes over the weight gradient once.

    `chunk_size` and `max_chunk_bytes` are as in `chunk_rows`. Chunks are made equal. One that is up to a quarter larger is
    preferred to one more.
    """
    chunk = chunk_size
    if chunk is None:
        chunk = max(MIN_CHUNK_ROWS_GPU, width // 2)
        chunks = max(1, math.ceil(rows / chunk - 0.25))
        chunk = math.ceil(rows / chunks / 128) * 128
    if max_chunk_bytes is not None:
        chunk = min(chunk, max_chunk_bytes // (vocabulary * 4))
    return max(1, min(chunk, rows))


def cross_entropy_from_sums(others: Tensor, gold: Tensor, gold_below_max: Tensor) -> Tensor:
    """The cross-entropy log((others + gold) / gold), with others = Σ exp(z − m) over all ids but the gold one, gold = exp(z_gold − m).

    Where it is small, log1p keeps it exact. Where it is not, the logarithm of gold is taken from its logit, as `gold_below_max`
    = z_gold − m, because the exponential may underflow.
    """
    small = others < gold
    return torch.where(
        small, torch.log1p(others / gold.where(small, torch.ones_like(gold))), (others + gold).log() - gold_below_max
    )


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
