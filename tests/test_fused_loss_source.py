"""Which source a row of the fused loss is distilled from, on both of its paths: plain torch and Triton."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from loss_checks import DIFFERENTIABLE, assert_as_accurate_as_reference, make_case, run

from profuser.loss import fused_linear_fusion_loss

pytestmark = [
    pytest.mark.usefixtures("small_blocks"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
ROWS = 10  # an interpreted program costs a millisecond
small_case = partial(make_case, N=ROWS)


@pytest.fixture(params=["torch", "triton"])
def path(request, device):
    """The options of `run` that choose a path."""
    return {"impl": request.param, "device": device if request.param == "triton" else "cpu"}


@pytest.fixture
def loss(path):
    return partial(run, fused_linear_fusion_loss, **path)


@pytest.fixture
def check(path):
    return partial(assert_as_accurate_as_reference, **path)


def test_min_ce_picks_the_lowest_finite_source_of_each_sequence(check):
    nan, inf = math.nan, math.inf
    source_ce = torch.tensor([
        [1.0, nan, 2.0, nan, 0.5, -inf],
        [0.5, 3.0, 2.0, inf, nan, 4.0],
        [0.7, inf, 2.5, nan, 0.5, nan],
    ])  # fmt: skip
    case = small_case(B=6, source_ce=source_ce, cu_seqlens=torch.tensor([0, 2, 4, 4, 6, 8, 10]))
    case["labels"][:] = 1
    ours, _ = check(case)
    assert ours["winner"].tolist() == [1, 1, 0, -1, 0, 1]
    assert not ours["kd"][4:6].any()
    assert ours["ce"][4:6].all()


def test_a_loser_is_not_read(loss):
    case = small_case()
    expected = loss(case)
    lost = torch.ones(3, ROWS, dtype=torch.bool)
    for b, s in enumerate(expected["winner"].tolist()):
        lost[s, case["cu_seqlens"][b] : case["cu_seqlens"][b + 1]] = False
    case["source_logprobs"][lost] = math.nan
    case["source_ids"][lost] = 0
    found = loss(case)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_source_index_per_sequence_equals_per_row(loss, check):
    case = small_case(source_ce=None)
    per_sequence = torch.tensor([2, -1, 0, 1])
    per_row = per_sequence.repeat_interleave(case["cu_seqlens"].diff())
    ours, _ = check(case, source_index=per_sequence)
    assert ours["winner"].tolist() == per_sequence.tolist()
    by_row = loss(case | {"cu_seqlens": None, "labels": case["labels"].int()}, source_index=per_row.int(), chunk_size=8)
    assert by_row["winner"].tolist() == per_row.tolist()
    for name in ("loss", "dhidden", "dweight", "dbias", "kd"):
        assert torch.equal(ours[name], by_row[name]), name


@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64])
def test_one_sequence_needs_no_bounds(check, cu_dtype):
    case = small_case(B=1)
    bounds = case.pop("cu_seqlens")
    ours, _ = check(case)
    assert torch.equal(ours["loss"], check(case, cu_seqlens=bounds.to(cu_dtype))[0]["loss"])


def test_one_source_is_top_k_distillation(loss, check):
    case = small_case(S=1, B=1)
    del case["source_ce"], case["cu_seqlens"]
    ours, _ = check(case)
    assert ours["winner"].tolist() == [0]
    everything_missing = loss(case, source_ce=torch.tensor([[math.nan]]))
    assert everything_missing["winner"].tolist() == [-1]
    assert not everything_missing["kd"].any()


def test_without_a_source_it_is_cross_entropy(loss, poisoned_buffers):
    case = {k: v for k, v in small_case().items() if k in ("hidden", "weight", "labels", "bias")}
    for reduction in ("mean", "sum", "none"):
        ours = loss(case, reduction=reduction, chunk_size=5)
        hidden, weight, bias = (case[name].clone().requires_grad_() for name in DIFFERENTIABLE)
        expected = F.cross_entropy(F.linear(hidden, weight, bias), case["labels"], reduction=reduction)
        expected.sum().backward()
        torch.testing.assert_close(ours["loss"], expected.detach())
        for name, leaf in zip(DIFFERENTIABLE, (hidden, weight, bias), strict=True):
            torch.testing.assert_close(ours[f"d{name}"], leaf.grad)
    assert ours["winner"].tolist() == [-1]
    for name in ("kd", "source_mass", "target_mass"):
        assert not ours[name].any()
