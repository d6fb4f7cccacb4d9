"""`left_out_capacity`: both paths keep the same columns, which are those of `left_out` where they are as many; the bound covers the error.

The truth is the exact loss, and the gradient with `left_out` alone, which other tests compare with it.
"""

from typing import Any

import numpy as np
import pytest
import torch
from loss_checks import DIFFERENTIABLE, Case, assert_columns_needed_of_the_chunk_that_needs_most, make_case, on, run
from test_divergences import FAMILY, mixed_case, named

from profuser.fusion_model import FusionModel
from profuser.kernels import left_out as module
from profuser.kernels import left_out_capped
from profuser.kernels.common import IGNORE_INDEX
from profuser.loss import FusedLinearFusionLoss, fused_linear_fusion_loss

GRADIENTS = ("dhidden", "dweight", "dbias")
OPTIONS = [
    {}, {"z_loss": 1e-2, "logit_scale": 0.7}, {"softcap": 6.0}, {"label_smoothing": 0.2}, {"divergence": "jsd"},
    {"tail": "conditional"},
]  # fmt: skip


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch):
    """Small vocabularies must not fall back to the exact gradient, and several blocks and stand-ins must be met."""
    monkeypatch.setattr(module, "PAYS", 1.0)
    monkeypatch.setattr(left_out_capped, "BLOCK", 48)
    monkeypatch.setattr(left_out_capped, "GATHERED", 2)


def peaked(N: int = 10, V: int = 300, mixed: bool = False, **options: Any) -> Case:
    case = (mixed_case if mixed else make_case)(V=V, N=N, K=4, spread=4.0, **options)
    labels = case["labels"]
    labels[labels == IGNORE_INDEX] = 7  # the Triton path computes ignored rows, which would make its chunks others
    return case | {"weight": case["weight"] * 2}


def error_of(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], name: str) -> float:
    return (got[name].double() - exact[name].double()).norm().item()


# In plain torch


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_with_as_many_columns_it_is_left_out(mixed, options):
    case = peaked(mixed=mixed, dtype=torch.float64)
    by_share = run(fused_linear_fusion_loss, case, left_out=0.01, **options)
    needed = int(by_share["columns_needed"])
    assert needed < 300
    got = run(fused_linear_fusion_loss, case, left_out=0.01, left_out_capacity=max(needed, 130), **options)
    if needed >= 130:
        assert got.keys() == by_share.keys()
        for name, value in by_share.items():
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-13, msg=name)
    assert got["columns_needed"] == needed


@pytest.mark.parametrize("member", FAMILY[::3], ids=named)
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_what_is_left_out_is_said_and_bounded(member, temperature):
    case = peaked(N=24, mixed=True, dtype=torch.float64)
    options: Case = {"temperature": temperature, "chunk_size": 8, **member}
    exact = run(fused_linear_fusion_loss, case, **options)
    got = {
        k: run(fused_linear_fusion_loss, case, left_out=1e-3, left_out_capacity=k, **options) for k in (110, 200, 300)
    }
    for name in ("loss", "ce", "kd"):
        assert torch.equal(got[110][name], exact[name])
    errors = [error_of(result, exact, "dhidden") for result in got.values()]
    for result, error in zip(got.values(), errors):
        assert error <= result["hidden_error_bound"] + 1e-13
        assert result["hidden_error_bound"] <= 12 * error + 1e-12  # it says something
    shares = [result["left_out_share"].item() for result in got.values()]
    assert shares[0] > shares[1] > shares[2] == 0
    assert errors[0] > errors[1] > errors[2]
    assert [result["kept_share"].item() for result in got.values()] == pytest.approx([110 / 300, 200 / 300, 1])
    assert (shares[1] <= 1e-3) == (got[200]["columns_needed"] <= 200)
    for name in GRADIENTS:
        torch.testing.assert_close(got[300][name], exact[name], rtol=1e-10, atol=1e-13)


def test_a_trainer_that_follows_columns_needed_leaves_out_what_it_asked_for():
    case, capacity = peaked(N=24, dtype=torch.float64), 80
    for _ in range(2):
        got = run(fused_linear_fusion_loss, case, left_out=0.01, left_out_capacity=capacity, chunk_size=8)
        capacity = np.int64(max(int(got["columns_needed"]), 80))  # which is an int as well
    assert 0 < got["left_out_share"] <= 0.01
    assert got["kept_share"] < 1


def test_the_columns_needed_are_those_of_the_chunk_that_needs_most():
    assert_columns_needed_of_the_chunk_that_needs_most(peaked(N=32), left_out=0.05, left_out_capacity=200)


def test_losses_of_single_rows_have_the_gradient_of_their_sum():
    case = peaked(N=24)
    options = {"left_out": 0.01, "left_out_capacity": 100, "chunk_size": 8}
    total = run(fused_linear_fusion_loss, case, reduction="sum", **options)
    single = run(fused_linear_fusion_loss, case, reduction="none", **options)
    for name in GRADIENTS:
        torch.testing.assert_close(single[name], total[name], rtol=1e-5, atol=1e-7)
    assert all(single[name].isnan() for name in module.STATISTICS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"left_out_capacity": 100}, ValueError, "left_out_capacity must be > 0 and come with left_out, got 100 and left_out=0.0"),
        ({"left_out": 0.1, "left_out_capacity": 0}, ValueError, "left_out_capacity must be > 0"),
        ({"left_out": 0.1, "left_out_capacity": 0.5}, TypeError, "left_out_capacity must be a whole number, got 0.5"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_one_line(options, error, message):
    with pytest.raises(error, match=message):
        fused_linear_fusion_loss(**make_case(), **options)
    with pytest.raises(error, match=message):
        FusedLinearFusionLoss(**options)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_capacity_that_could_leave_out_a_lifted_entry_is_refused(impl):
    case = peaked(N=24)
    case["hidden"].requires_grad_()
    message = "left_out_capacity must be at least rows of a chunk x kept ids and label = 8 x 5, .* got 39; raise it, or lower chunk_size"
    with pytest.raises(ValueError, match=message):
        fused_linear_fusion_loss(**case, left_out=0.1, left_out_capacity=39, chunk_size=8, impl=impl)
    fused_linear_fusion_loss(**case, left_out=0.1, left_out_capacity=40, chunk_size=8, impl="torch").backward()


def test_all_columns_are_enough_for_any_chunk():
    case = peaked(N=24, V=50)
    exact = run(fused_linear_fusion_loss, case, chunk_size=24)
    # A chunk may lift 24 x 5 entries, which are more than the columns.
    found = run(fused_linear_fusion_loss, case, chunk_size=24, left_out=0.1, left_out_capacity=50)
    torch.testing.assert_close(found["dhidden"], exact["dhidden"])


def test_a_model_takes_it():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    fusion = FusionModel(LlamaForCausalLM(LlamaConfig(vocab_size=90, **sizes)), left_out=0.01, left_out_capacity=32)
    ids = torch.randint(90, (1, 9))
    fusion(input_ids=ids, labels=ids)["loss"].backward()
    assert fusion.model.lm_head.weight.grad is not None


# On a GPU, or in Triton's interpreter


def few(**options: Any) -> Case:
    """Few rows, because a program takes milliseconds in the interpreter."""
    return peaked(N=5, V=120, B=2, **options)


CAPPED: Case = {"left_out": 0.01, "left_out_capacity": 40, "chunk_size": 3}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
class TestTriton:
    @pytest.mark.parametrize("options", [*OPTIONS, {"temperature": 1.5, "softcap": 6.0}], ids=str)
    def test_it_is_that_of_plain_torch(self, triton_loss, options):
        case = few(mixed="jsd" in options.values())
        options = CAPPED | options
        torch_path = run(fused_linear_fusion_loss, case, **options)
        got = triton_loss(case, **options)
        assert got.keys() == torch_path.keys()
        assert got["left_out_share"] > 0
        for name, value in torch_path.items():
            scale = value.abs().max().item()
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=2e-5 * scale, msg=name)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_16_bits_stay_within_the_bound_and_their_rounding(self, triton_loss, dtype):
        case = few(dtype=dtype)
        exact = run(fused_linear_fusion_loss, case, upcast=torch.float64)
        rounded = triton_loss(case, chunk_size=CAPPED["chunk_size"])
        got = triton_loss(case, **CAPPED)
        assert torch.equal(got["ce"], rounded["ce"])
        assert 0 < got["left_out_share"] < 0.2
        rounding = error_of(rounded, exact, "dhidden")
        assert error_of(got, exact, "dhidden") <= got["hidden_error_bound"] + 1.1 * rounding
        alike = run(fused_linear_fusion_loss, case, **CAPPED)
        for name in GRADIENTS:
            assert error_of(got, alike, name) <= 2 * error_of(rounded, exact, name) + 2e-3 * exact[name].norm(), name

    def test_ignored_rows_may_hold_nan_and_a_bound_leaves_them_out(self, triton_loss):
        case = few()
        case["labels"][::2] = IGNORE_INDEX
        options = CAPPED | {"chunk_size": 5}
        before = triton_loss(case, **options)
        case["hidden"][::2] = torch.nan
        after = triton_loss(case, **options)
        compacted = triton_loss(case, valid_rows=2, **options)
        for name in ("loss", *GRADIENTS):
            assert torch.equal(after[name], before[name]), name
            torch.testing.assert_close(compacted[name], before[name], rtol=1e-5, atol=1e-6, msg=name)
        assert not after["dhidden"][::2].any()

    def test_a_row_that_is_nan_shows(self, triton_loss):
        case = few()
        case["hidden"][3] = torch.nan
        got = triton_loss(case, **CAPPED)
        assert got["loss"].isnan()
        assert got["dhidden"][3].isnan().all()
        assert got["dweight"].isnan().all()

    def test_parts_alone_have_the_same_gradient(self, triton_loss, device):
        case = few()
        whole = triton_loss(case, **CAPPED)
        for name in ("hidden", "weight"):
            alone = on(device, case, frozen=[other for other in DIFFERENTIABLE if other != name]) | CAPPED
            (grad,) = torch.autograd.grad(fused_linear_fusion_loss(**alone, impl="triton"), alone[name])
            torch.testing.assert_close(grad.cpu(), whole[f"d{name}"], rtol=1e-5, atol=1e-7)
