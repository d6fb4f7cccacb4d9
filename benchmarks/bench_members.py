"""Every member of the family of losses at one shape, on a GPU 4096 x 4096 x 128256: checked against the reference, and timed.

    pytest benchmarks/bench_members.py --benchmark-only

Loss, statistics and gradients of the first rows are compared with the reference in fp64 before a member is timed, at the vocabulary
that is timed, so that the compiled kernels are the same. `times_floor` is the median time divided by that of three matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from benchmarks.cases import ALL_SHAPES, DEVICE, DTYPE, IMPL, INTERPRETED, first_rows, make_case
from benchmarks.measure import cuda_peak_mib, gemms, timed
from profuser.kernels.common import IGNORE_INDEX
from profuser.kernels.reference import fusion_loss_reference
from profuser.loss import fused_linear_fusion_loss

SHAPE = "4k-128k" if DEVICE == "cuda" or INTERPRETED else "vocabulary-32k"
CHECKED_ROWS = 48
LOSS_TOLERANCE, GRADIENT_TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-3, 1e-2)}[DTYPE]
STATISTICS = ("ce", "kd", "source_mass", "target_mass")
ENTROPIES = ("source_entropy", "target_entropy")

Arguments = dict[str, Any]


class Member(NamedTuple):
    options: Arguments  # which the reference takes as well
    tensors: Callable[[Arguments], Arguments] = lambda case: {}  # what is made of a case, likewise
    ours: Callable[[Arguments], Arguments] = (
        lambda case: {}
    )  # what the reference does not take, because it has the exact values


def every_second_label(case: Arguments) -> Arguments:
    labels = case["labels"].clone()
    labels[1::2] = IGNORE_INDEX
    return {"labels": labels}


def temperature_of_row(case: Arguments) -> Arguments:
    return {"temperature": torch.linspace(0.5, 2.0, len(case["labels"]), device=DEVICE)}


def weight_of_source(case: Arguments) -> Arguments:
    sources, rows, _ = case["source_ids"].shape
    return {"source_ce": None, "source_weight": torch.rand(sources, rows, device=DEVICE)}


def half_of_the_rows(case: Arguments) -> Arguments:
    return {"valid_rows": (len(case["labels"]) + 1) // 2}


def two_fifths_of_the_columns(case: Arguments) -> Arguments:
    return {"left_out": 0.003, "left_out_capacity": len(case["weight"]) * 2 // 5 // 128 * 128}


def one_process(case: Arguments) -> Arguments:
    """A head that is "divided" among one process: the collective calls of the divided one, in plain torch."""
    if not dist.is_initialized():
        backend = "nccl" if DEVICE == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return {"process_group": dist.group.WORLD, "impl": None}


MEMBERS = {
    "forward_kl": Member({}),
    "reverse_kl": Member({"divergence": "reverse_kl"}),
    "jsd": Member({"divergence": "jsd"}),
    "combine-softmax": Member({"combine": "softmax"}),
    "entropies": Member({"entropies": True}),
    "left_out_capacity": Member({}, ours=two_fifths_of_the_columns),
    "valid_rows": Member({}, every_second_label, half_of_the_rows),
    "z_loss": Member({"z_loss": 1e-4}),
    "label_smoothing": Member({"label_smoothing": 0.1}),
    "skew_kl": Member({"divergence": "skew_kl", "divergence_beta": 0.1}),
    "skew_reverse_kl": Member({"divergence": "skew_reverse_kl", "divergence_beta": 0.1}),
    "tvd": Member({"divergence": "tvd"}),
    "conditional": Member({"divergence": "reverse_kl", "tail": "conditional"}),
    "renormalize": Member({"tail": "renormalize"}),
    "temperature": Member({"temperature": 2.0}),
    "temperature-of-row": Member({}, temperature_of_row),
    "softcap": Member({"softcap": 30.0}),
    "source_weight-jsd": Member({"divergence": "jsd"}, weight_of_source),
    "everything": Member(
        {"combine": "softmax", "divergence": "jsd", "z_loss": 1e-4, "label_smoothing": 0.1, "softcap": 30.0, "entropies": True},
        temperature_of_row,
    ),
    "process_group": Member({}, ours=one_process),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _groups_end():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def results(function: Callable[..., Any], case: Arguments) -> dict[str, torch.Tensor]:
    names = STATISTICS + (ENTROPIES if case.get("entropies") else ())
    loss, stats = function(**case, return_stats=True)
    dhidden, dweight = torch.autograd.grad(loss, (case["hidden"], case["weight"]))
    found = {"loss": loss.detach(), **{name: stats[name] for name in names}, "dhidden": dhidden, "dweight": dweight}
    return found | {name: stats[name] for name in ("hidden_error_bound",) if name in stats}


def errors(member: Member, case: Arguments) -> dict[str, float]:
    """The relative errors of everything that the member gives for a case, and where it is not exact the bound on dhidden's."""
    case = case | member.options
    case |= member.tensors(case)
    found = results(fused_linear_fusion_loss, case | {"impl": IMPL} | member.ours(case))
    exact = case | {name: case[name].detach().double().requires_grad_() for name in ("hidden", "weight")}
    with torch.device(DEVICE):
        true = results(fusion_loss_reference, exact)
    relative = {name: ((found[name].double() - b).norm() / b.norm()).item() for name, b in true.items()}
    if (bound := found.get("hidden_error_bound")) is not None:
        relative["bound"] = (bound / true["dhidden"].norm()).item()
    return relative


def check(found: dict[str, float]) -> None:
    """The weight's gradient has no bound of its own; its error is about as large as hidden's, whose bound is a multiple of it."""
    bound = found.get("bound", 0.0)
    for what, error in found.items():
        if what != "bound":
            assert error < (GRADIENT_TOLERANCE + bound if what.startswith("d") else LOSS_TOLERANCE), found


@pytest.mark.parametrize("name", MEMBERS)
def test_member(benchmark, name):
    N, D, V, *_ = sizes = ALL_SHAPES[SHAPE]
    member, case = MEMBERS[name], make_case(SHAPE, "peaked") | {"tail": "bucket"}
    benchmark.group = f"members of the family {SHAPE}: {sizes}, forward_backward, peaked logits"
    found = errors(member, first_rows(case, CHECKED_ROWS))
    check(found)

    inputs = case | member.options
    inputs |= member.tensors(inputs)
    inputs |= {"impl": IMPL} | member.ours(inputs)

    def step():
        loss = fused_linear_fusion_loss(**inputs)
        return torch.autograd.grad(loss, (case["hidden"], case["weight"]))

    info = {f"{what}_error": float(f"{error:.2g}") for what, error in found.items()}
    info |= {"implementation": f"profuser, {name}", "computes": "fusion", "dtype": str(DTYPE)}
    try:
        timed(benchmark, step, gemms(N, D, V, 3, DTYPE, DEVICE), sizes.rounds, **info)
        if DEVICE == "cuda":
            benchmark.extra_info["peak_mib"] = cuda_peak_mib(step) - (N * D + V * D) * DTYPE.itemsize / 2**20
    except torch.OutOfMemoryError as error:
        pytest.skip(f"{name} does not fit at {sizes}: {error}"[:200])
