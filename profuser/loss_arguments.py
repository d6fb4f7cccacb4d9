"""The checks of the fused loss's arguments: options out of range or at odds with each other, tensors that do not fit together.

They read no values, as those of kernels/common.py, which both ops share.
Dimension letters: N rows, S sources, K kept entries, B sequences.
"""

import math

import torch
from torch import Tensor

from .kernels.common import check_numbers
from .kernels.divergences import check_divergence
from .kernels.fused_loss_types import COMBINE, MIN_CE
from .kernels.tails import BUCKET, RENORMALIZE, TAILS

REDUCTIONS = ("mean", "sum", "none")


def check_family(
    tail: str,
    *,
    divergence: str,
    divergence_beta: float,
    combine: str,
    combine_temperature: float,
    z_loss: float,
    label_smoothing: float,
    left_out: float,
    left_out_capacity: int | None,
    softcap: float | None,
) -> None:
    """Raises ValueError or TypeError unless there is such a member of the family of losses."""
    check_numbers(
        divergence_beta=divergence_beta, combine_temperature=combine_temperature, z_loss=z_loss,
        label_smoothing=label_smoothing, left_out=left_out,
    )  # fmt: skip
    check_divergence(divergence, divergence_beta, tail)
    if combine not in COMBINE:
        raise ValueError(
            f"combine must be one of {COMBINE}, got {combine!r}; FuseLLM's AvgCE is 'softmax', and weights of "
            "your own are source_weight"
        )
    if not 0 < combine_temperature < math.inf:
        raise ValueError(
            f"combine_temperature must be > 0 and finite, got {combine_temperature}; 1.0 weights by exp(-CE), and "
            f"combine={MIN_CE!r} is the limit at 0"
        )
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be >= 0 and finite, got {z_loss}; 1e-4 is usual")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}; 0.1 is usual")
    if not 0 <= left_out < 1:
        raise ValueError(f"left_out must be in [0, 1), got {left_out}; 0 is exact, 0.003 about as exact as bf16")
    if left_out and label_smoothing and softcap is not None:
        raise ValueError(
            f"left_out must be 0 with label_smoothing under a softcap (where the smoothed part is not alike in all columns), got "
            f"{left_out}; leave one of them out"
        )
    if left_out_capacity is None:
        return
    check_numbers(whole=True, left_out_capacity=left_out_capacity)
    if left_out_capacity < 1 or not left_out:
        raise ValueError(
            f"left_out_capacity must be > 0 and come with left_out, got {left_out_capacity} and left_out={left_out}; it is how many "
            "columns of the logits each chunk of rows keeps"
        )


def check_valid_rows(valid_rows: int | None) -> None:
    """Raises ValueError or TypeError unless it is None or a number of rows. A tensor is refused: to read it would be to wait."""
    if valid_rows is not None:
        check_numbers(whole=True, valid_rows=valid_rows)
        if valid_rows < 0:
            raise ValueError(f"valid_rows must be >= 0, got {valid_rows}; count the labels on the host, or pass None")


def check_source_temperature(source_temperature: float, temperature: float, tail: str) -> None:
    """Raises ValueError unless log-probabilities at `source_temperature` can serve a loss at `temperature` with this tail."""
    check_numbers(source_temperature=source_temperature)
    if not 0 < source_temperature < math.inf:
        raise ValueError(
            f"source_temperature must be > 0 and finite, got {source_temperature}; 1.0 is that of a plain log_softmax"
        )
    if tail == BUCKET and source_temperature != temperature:
        raise ValueError(
            f"source_temperature must be the loss's temperature {temperature} with tail={tail!r} (a tail of many tokens has no "
            f"temperature), got {source_temperature}; use tail={RENORMALIZE!r}"
        )


def check_options(
    tail: str,
    reduction: str,
    num_items_in_batch: int | Tensor | None,
    beta: float | None,
    kd_weight: Tensor | None,
    max_chunk_bytes: int | None,
) -> None:
    """Raises ValueError or TypeError for an option that is out of range, or for two that exclude each other."""
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {TAILS}, got {tail!r}; 'bucket' keeps the mass outside the top-k")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}; the default is 'mean'")
    if num_items_in_batch is not None:
        if reduction != "mean":
            raise ValueError(f"num_items_in_batch is for reduction='mean', got {reduction!r}; divide by it outside")
        if isinstance(num_items_in_batch, Tensor):
            if num_items_in_batch.numel() != 1:
                shape = tuple(num_items_in_batch.shape)
                raise ValueError(f"num_items_in_batch must be one number, got {shape}; sum it over the optimizer step")
        else:
            check_numbers(num_items_in_batch=num_items_in_batch)
            if not 0 <= num_items_in_batch < math.inf:
                raise ValueError(
                    f"num_items_in_batch must be >= 0 and finite, got {num_items_in_batch}; count the valid labels"
                )
    if beta is not None:
        check_numbers(beta=beta)
        if kd_weight is not None:
            raise ValueError(f"give beta or kd_weight, not both, got beta={beta} and a kd_weight; multiply it in")
        if not 0 <= beta < math.inf:
            raise ValueError(f"beta must be >= 0 and finite, got {beta}; 0 turns distillation off")
    if max_chunk_bytes is not None:
        check_numbers(whole=True, max_chunk_bytes=max_chunk_bytes)
        if max_chunk_bytes < 1:
            raise ValueError(f"max_chunk_bytes must be >= 1, got {max_chunk_bytes}; pass None for no cap")


def check_sources(
    rows: int,
    tail: str,
    source_ids: Tensor | None,
    source_logprobs: Tensor | None,
    source_tail: Tensor | None,
    source_ce: Tensor | None,
    source_index: Tensor | None,
    source_weight: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raises ValueError unless the sources fit together, and fit the rows."""
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2):
        raise ValueError(f"cu_seqlens must be (B+1,), from 0 to N, got {tuple(cu_seqlens.shape)}; cumulate the lengths")
    if cu_seqlens is not None and cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int64 or int32, got {cu_seqlens.dtype}; cast it with .int()")
    if source_ids is None:
        for name, value in (
            ("source_logprobs", source_logprobs), ("source_tail", source_tail),
            ("source_ce", source_ce), ("source_index", source_index), ("source_weight", source_weight),
        ):  # fmt: skip
            if value is not None:
                raise ValueError(f"{name} needs source_ids, got None; give both, or neither for cross-entropy alone")
        return
    if source_logprobs is None:
        raise ValueError("source_ids needs source_logprobs, got None; give both, or neither for cross-entropy alone")
    shape = tuple(source_ids.shape)
    if len(shape) != 3 or shape[1] != rows:
        if len(shape) == 2 and shape[0] == rows:
            fix = "unsqueeze(0) a single source"
        elif rows in shape:
            fix = "permute the axes into this order"
        else:
            fix = "flatten and shift the rows as hidden's"
        raise ValueError(f"source_ids must be (S, N, K) with N={rows}, got {shape}; {fix}")
    sources = shape[0]
    if sources == 0 or shape[2] == 0:
        raise ValueError(f"source_ids must hold a source and an entry, got {shape}; pass None for cross-entropy alone")
    if source_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"source_ids must be int32 or int64, got {source_ids.dtype}; cast them with .int()")
    if source_logprobs.shape != source_ids.shape:
        raise ValueError(
            f"source_logprobs must have source_ids' shape {shape}, got {tuple(source_logprobs.shape)}; "
            "take both from one top-k"
        )
    if not source_logprobs.dtype.is_floating_point:
        raise ValueError(f"source_logprobs must be floating point, got {source_logprobs.dtype}; give natural logs")
    if source_logprobs.dtype == torch.bfloat16 and tail == BUCKET and source_tail is None:
        raise ValueError(
            "source_logprobs must be float16 or wider where the bucket is what they lack of 1, got torch.bfloat16, which "
            "moves it by up to 0.0035; take log_softmax of logits.float(), or give source_tail"
        )
    if source_tail is not None:
        if tail != BUCKET:
            raise ValueError(f"source_tail needs tail='bucket', got {tail!r}; drop it: this tail divides it out")
        if source_tail.shape != shape[:2]:
            fix = "unsqueeze(0) that of a single source" if source_tail.dim() == 1 else "sum over K"
            raise ValueError(f"source_tail must be (S, N) = {shape[:2]}, got {tuple(source_tail.shape)}; {fix}")
    choices = {"source_ce": source_ce, "source_index": source_index, "source_weight": source_weight}
    given = [name for name, value in choices.items() if value is not None]
    if len(given) > 1:
        raise ValueError(
            f"give one of {', '.join(choices)}, got {' and '.join(given)}; source_index and source_weight already fix the choice"
        )
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if source_ce is not None:
        if source_ce.dim() != 2 or source_ce.shape[0] != sources:
            if source_ce.dim() == 1:
                fix = "unsqueeze(1) that of one sequence"
            elif source_ce.dim() == 2 and source_ce.shape[1] == sources:
                fix = "transpose it"
            else:
                fix = "give a row for each source of source_ids"
            raise ValueError(f"source_ce must be (S, B) with S={sources}, got {tuple(source_ce.shape)}; {fix}")
        found, name = source_ce.shape[1], "source_ce"
    elif source_index is not None:
        if source_index.dim() != 1 or source_index.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"source_index must be (B,) or (N,) int64 or int32, got {tuple(source_index.shape)} "
                f"{source_index.dtype}; give one source number per sequence or row"
            )
        if source_index.shape[0] == rows:
            return
        found, name = source_index.shape[0], "source_index"
    elif source_weight is not None:
        if source_weight.dim() != 2 or source_weight.shape[0] != sources or not source_weight.dtype.is_floating_point:
            raise ValueError(
                f"source_weight must be (S, B) or (S, N) floating point with S={sources}, got {tuple(source_weight.shape)} "
                f"{source_weight.dtype}; give a weight of each source per sequence or row"
            )
        if source_weight.shape[1] == rows:
            return
        found, name = source_weight.shape[1], "source_weight"
    else:
        if sources != 1:
            fix = "give source_ce, source_index or source_weight" + (
                ", or put K last if it stands first" if shape[2] == 1 else ""
            )
            raise ValueError(f"with S={sources} sources a choice is needed, got none; {fix}")
        return
    if sequences is None and found != 1:
        rows_too = "" if name == "source_ce" else f", or one for each of N={rows} rows"
        raise ValueError(
            f"cu_seqlens is required when B > 1, {name} has B={found}; give the (B+1,) sequence bounds{rows_too}"
        )
    if sequences is not None and found != sequences:
        raise ValueError(f"{name} must have B={sequences} sequences as cu_seqlens, got {found}; give one per sequence")
