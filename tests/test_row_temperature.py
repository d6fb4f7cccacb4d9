"""A temperature for each row, on both paths: each row is that of a loss at its own temperature, and no other is touched."""

import math
from functools import partial

import pytest
import torch
from loss_checks import DIFFERENTIABLE, assert_as_accurate_as_reference, assert_close_to_truth, make_case, run
from test_divergences import FAMILY, mixed_case, named

from profuser.kernels import fused_loss as op_module
from profuser.kernels.common import IGNORE_INDEX
from profuser.loss import FusedLinearFusionLoss, fused_linear_fusion_loss

pytestmark = [
    pytest.mark.usefixtures("small_blocks"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
ROWS = 10


def temperatures(rows=ROWS):
    return torch.linspace(0.5, 3.0, rows)


@pytest.fixture(params=["torch", "triton"])
def path(request, device):
    return {"impl": request.param, "device": device if request.param == "triton" else "cpu"}


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "tail": "renormalize"}, {"divergence": "jsd"}], ids=str)
def test_each_row_is_as_accurate_as_the_reference(path, options):
    case = make_case(N=ROWS, spread=2.0, temperature=temperatures(), **options)
    assert_as_accurate_as_reference(case, scale=1.0, **path)


@pytest.mark.parametrize("member", FAMILY[::4], ids=named)
def test_every_member_is_the_dense_formula(member):
    assert_close_to_truth(mixed_case(spread=2.0, temperature=temperatures(37)), chunk_size=8, **member)


def test_rows_at_one_temperature_are_those_of_the_number(path):
    case = make_case(N=ROWS)
    expected = run(fused_linear_fusion_loss, case, temperature=2.5, **path)
    got = run(fused_linear_fusion_loss, case, temperature=torch.full((ROWS,), 2.5), **path)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_the_module_takes_it_with_the_rows():
    case = make_case(N=ROWS)
    module, of_rows = FusedLinearFusionLoss(temperature=2.0, tail="renormalize"), temperatures()
    expected = fused_linear_fusion_loss(**case, tail="renormalize", temperature=of_rows)
    assert torch.equal(module(**case, temperature=of_rows), expected)
    assert torch.equal(module(**case), fused_linear_fusion_loss(**case, tail="renormalize", temperature=2.0))


def test_it_passes_gradcheck():
    case = mixed_case(dtype=torch.float64, N=4, D=3, V=7, S=2, K=3, B=1, temperature=temperatures(4).double())
    case["labels"] = case["labels"].clamp_min(0)
    leaves = [case.pop(name).requires_grad_() for name in DIFFERENTIABLE]

    def loss(hidden, weight, bias):
        return fused_linear_fusion_loss(hidden=hidden, weight=weight, bias=bias, chunk_size=3, **case)

    assert torch.autograd.gradcheck(loss, leaves)


def test_ignored_rows_may_have_any_temperature(path):
    case = make_case(N=ROWS, temperature=temperatures())
    expected = run(fused_linear_fusion_loss, case, **path)
    ignored = case["labels"] == IGNORE_INDEX
    assert ignored.any()
    case["temperature"] = case["temperature"].masked_fill(ignored, math.nan)
    got = run(fused_linear_fusion_loss, case, **path)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_temperature_out_of_range_is_an_error_or_makes_its_row_nan(path, value, monkeypatch):
    case = make_case(N=ROWS, temperature=temperatures())
    expected = run(fused_linear_fusion_loss, case, reduction="none", **path) if path["impl"] == "triton" else {}
    case["temperature"][0] = value
    with pytest.raises(ValueError, match=r"temperature must be > 0 and finite, got .* for a row; 1\.0 leaves"):
        run(fused_linear_fusion_loss, case, **path)
    if path["impl"] == "triton":
        monkeypatch.setattr(op_module, "check_values", lambda *arguments: None)  # as on a GPU
        got = run(fused_linear_fusion_loss, case, reduction="none", **path)
        assert got["loss"][0].isnan()
        assert torch.equal(got["loss"][1:], expected["loss"][1:])


def test_a_bound_of_rows_takes_the_temperatures_along(device):
    case = make_case(N=ROWS, temperature=temperatures())
    labelled = int((case["labels"] != IGNORE_INDEX).sum())
    of = partial(run, fused_linear_fusion_loss, case, device=device, impl="triton")
    bounded = of(valid_rows=labelled)
    for name, value in of().items():
        torch.testing.assert_close(bounded[name], value, msg=name)


def test_what_is_no_temperature_is_refused():
    for temperature, message in (
        (torch.ones(4), r"temperature must be \(N,\) = \(37,\), got \(4,\)"),
        (torch.ones(37, dtype=torch.int64), "temperature must be floating point, got torch.int64"),
        (torch.ones(37, requires_grad=True), "temperature must not require grad"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_linear_fusion_loss(**make_case(), temperature=temperature)
