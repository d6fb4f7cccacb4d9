"""What the fused loss takes and what it gives: its tensors, its options and its results, each under its name.

torch.library wants an op with a flat list of arguments. It gets the fields of `Operands`, then those of `Options`: a new
tensor or option is one field here and one keyword of `fused_linear_fusion_loss`. All code behind the op reads the fields
by name.
Dimension letters: N rows, D hidden, V vocabulary, S sources, K kept entries, B sequences.
"""

import inspect
from collections.abc import Sequence
from types import GenericAlias
from typing import Any, Final, NamedTuple, get_type_hints

from torch import Tensor

from .divergences import FORWARD_KL
from .tails import BUCKET

MIN_CE: Final = "min_ce"
SOFTMAX: Final = "softmax"
COMBINE = (MIN_CE, SOFTMAX)
"""What `source_ce` decides: the one source of lowest cross-entropy, or a weight for each."""


class Operands(NamedTuple):
    """The tensors, described at `fused_linear_fusion_loss`. None stands for one that is not given."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (N,)
    ce_weight: Tensor  # (N,)
    kd_weight: Tensor  # (N,)
    bias: Tensor | None = None  # (V,)
    source_ids: Tensor | None = None  # (S, N, K)
    source_logprobs: Tensor | None = None  # (S, N, K)
    source_tail: Tensor | None = None  # (S, N)
    source_ce: Tensor | None = None  # (S, B)
    source_index: Tensor | None = None  # (B,) or (N,)
    source_weight: Tensor | None = None  # (S, B) or (S, N)
    cu_seqlens: Tensor | None = None  # (B + 1,)
    temperature_of_row: Tensor | None = None  # (N,), in place of the one temperature


class Options(NamedTuple):
    """Everything else, described at `fused_linear_fusion_loss`, but for `per_row` and what is said beside it."""

    temperature: float = 1.0
    tail: str = BUCKET
    divergence: str = FORWARD_KL  # by `canonical`
    divergence_beta: float = 0.5
    combine: str = MIN_CE
    combine_temperature: float = 1.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    left_out: float = 0.0
    left_out_capacity: int | None = None
    left_out_bound: bool = False  # whether the bound on its error is computed
    softcap: float | None = None
    logit_scale: float = 1.0
    entropies: bool = False  # whether they are computed
    per_row: bool = False  # whether the loss is (N,), one per row, or the sum of those
    grad_hidden: bool = False  # whether forward computes this gradient; likewise the next two
    grad_weight: bool = False
    grad_bias: bool = False
    chunk_size: int | None = None
    max_chunk_bytes: int | None = None
    valid_rows: int | None = None
    process_group: str | None = None  # its name; None where the head is whole
    partial_hidden_grad: bool = False
    impl: str = "torch"  # "torch" or "triton", by `choose_impl`

    @property
    def any_grad(self) -> bool:
        return self.grad_hidden or self.grad_weight or self.grad_bias


class Outputs(NamedTuple):
    """All that one forward computes. Every tensor but `winner` is in the compute dtype, fp32 or fp64."""

    loss: Tensor  # the sum over the rows, or (N,) with per_row
    dhidden: Tensor  # (N, D), the gradient for a grad_output of 1, or empty where it was not asked for; likewise the next two
    dweight: Tensor  # (V, D)
    dbias: Tensor  # (V,)
    ce: Tensor  # (N,) cross-entropy, unweighted
    kd: Tensor  # (N,) T²·D, the sources weighted, the row not
    source_mass: Tensor  # (N,) the mass of the kept entries as it was given, the sources' weighted mean
    target_mass: Tensor  # (N,) the target's mass on those ids at T, likewise
    source_entropy: Tensor  # (N,) of the sources' kept entries and bucket, the weighted mean; or empty
    target_entropy: Tensor  # (N,) of softmax(z) over the vocabulary, at temperature 1; or empty
    winner: Tensor  # (B,) or (N,) int64, as Winner.chosen
    left_out: Tensor  # (4,) by STATISTICS of left_out.py

    def gradients(self) -> dict[str, Tensor]:
        """The gradients by the names of the operands that they belong to, in the order of `DIFFERENTIABLE`."""
        return {"hidden": self.dhidden, "weight": self.dweight, "bias": self.dbias}


class Winner(NamedTuple):
    """The source that is learnt from: its number, or -1 for no distillation. Of mixed sources, the one of largest weight."""

    chosen: Tensor  # (B,) int64, or (N,) where source_index or source_weight has one per row
    of_row: Tensor | None  # (N,) int64; None without sources, and where they are mixed
    weight_of_row: Tensor | None = None  # (S, N), the compute dtype; None where they are not mixed


DIFFERENTIABLE = ("hidden", "weight", "bias")
ARGUMENTS = (*Operands._fields, *Options._fields)


def grouped(flat: Sequence[Any]) -> tuple[Operands, Options]:
    """The op's flat arguments, or one value for each of them, under their names."""
    tensors = len(Operands._fields)
    return Operands(*flat[:tensors]), Options(*flat[tensors:])


def flat_signature() -> inspect.Signature:
    """The signature of a function of all the fields in a row, from which torch.library infers the op's schema."""
    fields = get_type_hints(Operands) | get_type_hints(Options)
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, positional, annotation=kind) for name, kind in fields.items()]
    returned = tuple(get_type_hints(Outputs).values())
    return inspect.Signature(parameters, return_annotation=GenericAlias(tuple, returned))
