"""Cross-entropy plus a divergence from the sources' kept entries, without [N, V] logits: the op and its gradients.

The op checks values, chooses the winning sources, and leaves the rest to fused_loss_torch.py or to fused_loss_triton.py,
which compute the same thing, the second one on a GPU.

The gradients are computed in forward, together with the loss, and backward only multiplies them by grad_output. Where
each row has a loss of its own, it also has a grad_output of its own: forward then computes no gradient, and backward runs
the op again. There is no second derivative. Arguments are checked by profuser/loss.py; only their values are checked here.
Dimension letters: N rows, D hidden, V vocabulary, S sources, K kept entries, B sequences.
"""

from typing import Any

import torch
from torch import Tensor

from .common import IGNORE_INDEX, LOGPROB_SLACK, check_label_values, compute_dtype
from .compacted import Compacted
from .fused_loss_torch import fused_loss_torch
from .fused_loss_types import (
    ARGUMENTS,
    DIFFERENTIABLE,
    SOFTMAX,
    Operands,
    Options,
    Outputs,
    Winner,
    flat_signature,
    grouped,
)
from .vocabulary_slice import check_same_rows, slice_of


def fused_loss(operands: Operands, options: Options) -> Outputs:
    """The op, with its arguments and results under their names."""
    return Outputs(*fused_loss_op(*operands, *options))


def fused_loss_forward(operands: Operands, options: Options) -> Outputs:
    """What the op computes."""
    triton = options.impl == "triton"
    vocabulary = slice_of(operands.weight, options.process_group)
    check_same_rows(operands.labels, vocabulary)
    # Reading a value would wait for the GPU. There the kernels make the loss of a row with a value out of range NaN.
    if not (triton and operands.hidden.is_cuda):
        check_values(operands, vocabulary.whole, options.valid_rows)
    winner = choose_winner(operands, options)
    if not triton:
        return fused_loss_torch(operands, options, winner, vocabulary)
    from .fused_loss_triton import fused_loss_triton  # imported late: without a GPU there may be no triton

    if options.valid_rows is None or options.valid_rows >= operands.labels.shape[0]:
        return fused_loss_triton(operands, options, winner)
    compacted = Compacted.of(operands.labels, options.valid_rows)
    operands, winner = compacted.select(operands, winner)
    return compacted.expand(fused_loss_triton(operands, options, winner), options)


def check_values(operands: Operands, vocabulary: int, valid_rows: int | None) -> None:
    """Raises ValueError for a value that is out of range. The sources of ignored rows may hold anything."""
    labels, source_ids, source_logprobs = operands.labels, operands.source_ids, operands.source_logprobs
    rows = labels.shape[0]
    sequences = 1 if operands.cu_seqlens is None else operands.cu_seqlens.shape[0] - 1
    check_label_values(labels, vocabulary)
    if valid_rows is not None and (labelled := int((labels != IGNORE_INDEX).sum())) > valid_rows:
        raise ValueError(
            f"valid_rows must be at least the {labelled} rows with a label, got {valid_rows}; count labels"
        )
    if operands.cu_seqlens is not None:
        bounds = operands.cu_seqlens
        bad = (bounds[0] != 0) | (bounds[-1] != rows) | (bounds.diff() < 0).any()
        if bad:
            raise ValueError(
                f"cu_seqlens must rise from 0 to N={rows}, got {bounds.tolist()[:8]}; cumulate the sequence lengths"
            )
    if operands.temperature_of_row is not None:
        of_row = operands.temperature_of_row
        bad = ~((of_row > 0) & of_row.isfinite()) & (labels != IGNORE_INDEX)
        if bad.any():
            raise ValueError(
                f"temperature must be > 0 and finite, got {of_row[bad][0].item():.6g} for a row; 1.0 leaves the logits as they are"
            )
    if source_ids is None or source_logprobs is None:  # they come together
        return
    if operands.source_index is not None:
        sources = source_ids.shape[0]
        bad = (operands.source_index < -1) | (operands.source_index >= sources)
        if bad.shape[0] != sequences:  # one for each row, of which ignored ones may hold anything
            bad = bad & (labels != IGNORE_INDEX)
        if bad.any():
            raise ValueError(
                f"source_index must be in [0, {sources}) or -1 for no distillation, got "
                f"{operands.source_index[bad][0].item()}; number the sources as source_ids does"
            )
    if operands.source_weight is not None:
        weight = operands.source_weight.to(compute_dtype(operands.hidden, operands.weight))
        bad = ~((weight >= 0) & weight.isfinite())  # also true for NaN
        if weight.shape[1] != sequences:
            bad = bad & (labels != IGNORE_INDEX)
        if bad.any():
            raise ValueError(
                f"source_weight must be >= 0 and finite, got {operands.source_weight[bad][0].item():.6g}; "
                "0 leaves a source out"
            )
    if source_ids.numel() == 0:
        return
    # One pass over each finds out whether there is anything to look for. Only then does it matter which rows have a label.
    valid = (labels != IGNORE_INDEX)[:, None]
    lowest, highest = source_ids.aminmax()
    if lowest < -1 or highest >= vocabulary:
        bad = ((source_ids >= vocabulary) | (source_ids < -1)) & valid
        if bad.any():
            raise ValueError(
                f"source_ids must be < {vocabulary} (the target's vocabulary) and >= -1 (padding), "
                f"got {source_ids[bad][0].item()}; map the source's tokens to this target's tokenizer"
            )
    if not source_logprobs.max() <= LOGPROB_SLACK:  # also true where one is NaN, which may hide a larger one
        bad = (source_logprobs > LOGPROB_SLACK) & valid & (source_ids >= 0)
        if bad.any():
            raise ValueError(
                f"source_logprobs must be natural log-probabilities <= 0, got {source_logprobs[bad][0].item():.6g}; "
                "take log() of probabilities, log_softmax() of logits"
            )


def choose_winner(operands: Operands, options: Options) -> Winner:
    """The source that each sequence learns from, and each row; or the weights of all sources, for each row.

    `source_index` says it, for each sequence or for each row. Else it is the source of lowest cross-entropy (Min-CE): NaN
    and infinite values do not take part, of equal values the first wins, and where none takes part there is no winner.
    With neither, the first source wins everywhere. `source_weight`, or SOFTMAX of the cross-entropies, mixes the sources.
    """
    bounds = operands.cu_seqlens
    sequences = 1 if bounds is None else bounds.shape[0] - 1
    weight = source_weights(operands, options)
    if weight is not None:
        largest, chosen = weight.max(0).values, weight.argmax(0)
        chosen = chosen.masked_fill(largest == 0, -1)
        if weight.shape[1] == sequences:
            weight = of_rows(weight, operands, outside=torch.nan)
        return Winner(chosen, None, weight.contiguous())
    if operands.source_index is not None:
        chosen = operands.source_index.to(torch.int64, copy=True)  # a copy: an op may not return its input
    elif operands.source_ce is not None:
        ce = torch.where(operands.source_ce.isfinite(), operands.source_ce, torch.inf)
        # min also returns indices, but only argmin promises the first of equal values.
        lowest, chosen = ce.min(0).values, ce.argmin(0)
        chosen = chosen.masked_fill(lowest == torch.inf, -1)
    else:
        first = -1 if operands.source_ids is None else 0
        chosen = torch.full((sequences,), first, dtype=torch.int64, device=operands.labels.device)

    if operands.source_ids is None:
        return Winner(chosen, None)
    if chosen.shape[0] != sequences:  # source_index names one per row
        is_source = (chosen >= -1) & (chosen < operands.source_ids.shape[0])
        chosen = chosen.masked_fill(~is_source & (operands.labels == IGNORE_INDEX), -1)
        return Winner(chosen, chosen)
    return Winner(chosen, of_rows(chosen, operands, outside=-2))


def source_weights(operands: Operands, options: Options) -> Tensor | None:
    """The weight of each source, (S, B) or (S, N) in the compute dtype; None where one source is chosen."""
    dtype = compute_dtype(operands.hidden, operands.weight)
    if operands.source_weight is not None:
        return operands.source_weight.to(dtype)
    if operands.source_ce is None or options.combine != SOFTMAX:
        return None
    # Relative to the lowest, with all digits that are given: large values would lose their differences otherwise.
    takes_part = operands.source_ce.isfinite()
    ce = operands.source_ce.to(torch.promote_types(operands.source_ce.dtype, dtype))
    ce = torch.where(takes_part, ce, torch.inf)
    above = torch.where(takes_part, ce - ce.amin(0), torch.inf)
    # Where no source takes part the softmax is NaN.
    return (-above / options.combine_temperature).softmax(0).to(dtype).masked_fill(~takes_part, 0)


def of_rows(of_sequence: Tensor, operands: Operands, outside: float) -> Tensor:
    """What a sequence has, for each of its rows: (…, B) → (…, N).

    Rows beyond the last bound are an error where values may be read. Where they may not, `outside` marks those rows.
    """
    rows, bounds = operands.labels.shape[0], operands.cu_seqlens
    if bounds is None or bounds.shape[0] == 2:
        return of_sequence.expand(*of_sequence.shape[:-1], rows)
    row = torch.arange(rows, device=of_sequence.device)
    sequence_of_row = torch.searchsorted(bounds[1:].contiguous(), row.to(bounds.dtype), right=True)
    return torch.nn.functional.pad(of_sequence, (0, 1), value=outside)[..., sequence_of_row]


# The op as torch.library knows it: flat arguments, flat results


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(fused_loss_forward(*grouped(arguments)))


_forward.__signature__ = flat_signature()  # pyrefly: ignore[missing-attribute]  # typeshed lacks it
fused_loss_op = torch.library.custom_op("profuser::fused_loss", mutates_args=())(_forward)


@fused_loss_op.register_fake
def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    """Empty tensors of the right shapes and dtypes, which is all that tracing needs."""
    operands, options = grouped(arguments)
    hidden, weight = operands.hidden, operands.weight
    N = hidden.shape[0]
    V, D = weight.shape
    dtype = compute_dtype(hidden, weight)
    if operands.source_index is not None:
        winners = operands.source_index.shape[0]
    elif operands.source_weight is not None:
        winners = operands.source_weight.shape[1]
    elif operands.source_ce is not None:
        winners = operands.source_ce.shape[1]
    else:
        winners = 1 if operands.cu_seqlens is None else operands.cu_seqlens.shape[0] - 1
    outputs = Outputs(
        loss=hidden.new_empty((N,) if options.per_row else (), dtype=dtype),
        dhidden=hidden.new_empty((N, D) if options.grad_hidden else (0,), dtype=dtype),
        dweight=weight.new_empty((V, D) if options.grad_weight else (0,), dtype=dtype),
        dbias=weight.new_empty((V,) if options.grad_bias else (0,), dtype=dtype),
        ce=hidden.new_empty(N, dtype=dtype),
        kd=hidden.new_empty(N, dtype=dtype),
        source_mass=hidden.new_empty(N, dtype=dtype),
        target_mass=hidden.new_empty(N, dtype=dtype),
        source_entropy=hidden.new_empty(N if options.entropies else 0, dtype=dtype),
        target_entropy=hidden.new_empty(N if options.entropies else 0, dtype=dtype),
        winner=hidden.new_empty(winners, dtype=torch.int64),
        left_out=hidden.new_empty(4, dtype=dtype),
    )
    return tuple(outputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    operands, options = grouped(inputs)
    outputs = Outputs(*output)
    ctx.mark_non_differentiable(*(value for name, value in outputs._asdict().items() if name != "loss"))
    ctx.set_materialize_grads(False)
    ctx.options = options
    ctx.dtypes = {name: x.dtype for name in DIFFERENTIABLE if (x := getattr(operands, name)) is not None}
    ctx.save_for_backward(*(operands if options.per_row else outputs.gradients().values()))


def _backward(ctx: Any, grad_loss: Tensor | None, *grads_of_the_rest: Tensor | None) -> tuple[Tensor | None, ...]:
    # The gradients are data here and no graph: a penalty on them would be left out without a word.
    if torch.is_grad_enabled():
        raise RuntimeError("the fused loss has no second derivative, got create_graph=True; call backward without it")
    if grad_loss is None:
        return _of_every_argument({})
    operands_need, _ = grouped(ctx.needs_input_grad)
    needed = [name for name in DIFFERENTIABLE if getattr(operands_need, name)]
    if ctx.options.per_row:
        gradients = _recomputed(Operands(*ctx.saved_tensors), ctx.options, needed, grad_loss)
        return _of_every_argument({name: gradients[name].to(ctx.dtypes[name]) for name in needed})
    gradients = dict(zip(DIFFERENTIABLE, ctx.saved_tensors, strict=True))
    last = _is_last()
    return _of_every_argument(
        {name: _scaled(gradients[name], grad_loss, ctx.dtypes[name], in_place=last) for name in needed}
    )


def _is_last() -> bool:
    """Whether the graph's buffers are freed after this backward, so that nobody will ask for its gradients again.

    What is compiled or recorded may run again with the same tensors.
    """
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def _of_every_argument(gradients: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    """What backward has to return: one gradient per argument of the op, None for those that have none."""
    return tuple(gradients.get(name) for name in ARGUMENTS)


def _recomputed(operands: Operands, options: Options, needed: list[str], grad_loss: Tensor) -> dict[str, Tensor]:
    """The gradients of Σ grad_loss · loss over the rows: the op runs once more, with grad_loss in the rows' weights."""
    operands = Operands._make(None if x is None else x.detach() for x in operands)
    operands = operands._replace(ce_weight=operands.ce_weight * grad_loss, kd_weight=operands.kd_weight * grad_loss)
    asked_for: dict[str, Any] = {f"grad_{name}": name in needed for name in DIFFERENTIABLE}
    # What is only said beside the gradients has been said, or cannot be said here.
    options = options._replace(per_row=False, entropies=False, left_out_bound=False, **asked_for)
    return fused_loss(operands, options).gradients()


def _scaled(gradient: Tensor, grad_loss: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """gradient · grad_loss; `in_place` allows that to be the same tensor, which spares one as large as the head.

    The product is formed in the loss's dtype: a grad_output of 1/N, rounded to bf16, would scale the whole gradient wrongly.
    The product is written in its final dtype: an fp32 one as large as the head would be one copy too many.
    """
    grad_loss = grad_loss.detach()
    # What traces a graph gives other kinds of tensors.
    if in_place and type(gradient) is Tensor and gradient.dtype == grad_loss.dtype == dtype:
        on_cpu = grad_loss.device.type == "cpu"  # to read a number of a GPU is to wait for it
        return gradient if on_cpu and grad_loss.item() == 1 else gradient.mul_(grad_loss)
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient.to(grad_loss.dtype), grad_loss, out=out)


fused_loss_op.register_autograd(_backward, setup_context=_setup_context)
