"""The plain torch path of the fused loss agrees with the dense fp64 reference, and that with formulas written out by hand.

What the Triton path must do as well stands in test_fused_loss.py. An error may be up to twice that of the dense reference in the
same dtype, plus a floor for reference results that happen to be exact.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_checks import (
    DIFFERENTIABLE,
    assert_as_accurate_as_reference,
    assert_close_to_truth,
    make_case,
    run,
    with_logits,
)

from profuser.kernels.common import IGNORE_INDEX
from profuser.kernels.reference import fusion_loss_reference
from profuser.loss import DEFAULT_BETA, fused_linear_fusion_loss


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# The reference is compared with formulas written out by hand.


def test_reference_and_op_equal_kl_div_when_every_token_is_kept():
    N, V = 6, 11
    logits = torch.randn(N, V, dtype=torch.float64)
    source = torch.randn(N, V, dtype=torch.float64).log_softmax(1)
    labels = torch.randint(V, (N,))
    free = logits.clone().requires_grad_()
    kl = F.kl_div(free.log_softmax(1), source, log_target=True, reduction="none").sum(1)
    expected = F.cross_entropy(free, labels, reduction="sum") + 0.5 * kl.sum()
    expected.backward()
    ids = torch.arange(V).expand(1, N, V)
    for tail in ("bucket", "renormalize"):
        for function in (fusion_loss_reference, fused_linear_fusion_loss):
            case = with_logits(logits, labels=labels, source_ids=ids, source_logprobs=source[None])
            result = run(function, case, beta=0.5, tail=tail, reduction="sum")
            torch.testing.assert_close(result["loss"], expected.detach())
            torch.testing.assert_close(result["dhidden"], free.grad)
            torch.testing.assert_close(result["kd"], kl.detach())


def test_reference_and_op_match_a_bucket_worked_by_hand():
    q = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    case = with_logits(
        q.log(),
        labels=torch.tensor([2]),
        source_ids=torch.tensor([[[0, 1]]]),
        source_logprobs=torch.tensor([[[0.5, 0.3]]], dtype=torch.float64).log(),
        ce_weight=torch.tensor([0.0]),
        kd_weight=torch.tensor([1.0]),
    )
    bucket = 0.5 * math.log(0.5 / 0.1) + 0.3 * math.log(0.3 / 0.2) + 0.2 * math.log(0.2 / 0.7)
    renormalized = 0.625 * math.log(0.625 / 0.1) + 0.375 * math.log(0.375 / 0.2)
    outside = 1 - 0.2 / 0.7
    expected = {
        "bucket": (bucket, [0.1 - 0.5, 0.2 - 0.3, 0.3 * outside, 0.4 * outside]),
        "renormalize": (renormalized, [0.1 - 0.625, 0.2 - 0.375, 0.3, 0.4]),
    }
    for tail, (value, grad) in expected.items():
        for function in (fusion_loss_reference, fused_linear_fusion_loss):
            result = run(function, case, tail=tail)
            assert result["loss"].item() == pytest.approx(value, rel=1e-12)
            assert result["dhidden"][0].tolist() == pytest.approx(grad, rel=1e-12)
            assert result["source_mass"].item() == pytest.approx(0.8)
            assert result["target_mass"].item() == pytest.approx(0.3)


# Values and gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_values_and_gradients_are_as_accurate_as_the_dense_reference(dtype, tail, temperature):
    assert_as_accurate_as_reference(make_case(dtype, spread=2.0), tail=tail, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_and_head_may_have_different_dtypes(dtype):
    case = make_case(torch.float32)
    case["hidden"] = case["hidden"].to(dtype)
    ours = run(fused_linear_fusion_loss, case, chunk_size=8)
    truth = run(fusion_loss_reference, case, upcast=torch.float64)
    assert ours["dhidden"].dtype == dtype
    assert ours["dweight"].dtype == torch.float32
    for name in ("loss", "dweight", "dbias"):
        torch.testing.assert_close(ours[name].double(), truth[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 1, 1, 1), (5, 3, 7, 2, 1, 2), (123, 17, 251, 4, 9, 5), (64, 8, 128, 1, 33, 1)]
)
@pytest.mark.parametrize("chunk_size", [None, 1, 50])
def test_ragged_shapes_and_chunks_give_the_reference(shape, chunk_size):
    N, D, V, S, K, B = shape
    case = make_case(N=N, D=D, V=V, S=S, K=K, B=B)
    assert_close_to_truth(case, chunk_size=chunk_size)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_max_chunk_bytes_and_chunk_size_do_not_change_the_result(tail):
    case = {k: v.double() if k in DIFFERENTIABLE else v for k, v in make_case().items()}
    whole = run(fused_linear_fusion_loss, case, tail=tail, chunk_size=1000)
    limits: list[dict[str, Any]] = [{"chunk_size": 5}, {"max_chunk_bytes": 3 * 83 * 8}, {"max_chunk_bytes": 1}]
    for options in limits:
        parts = run(fused_linear_fusion_loss, case, tail=tail, **options)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=1e-12)


# Rows


def test_a_nan_in_an_ignored_rows_grad_output_adds_nothing():
    case = make_case()
    grad_output = torch.where(case["labels"] == IGNORE_INDEX, math.nan, 1.0)
    expected = run(fused_linear_fusion_loss, case, reduction="none")
    hidden, weight, bias = (case[name].requires_grad_() for name in DIFFERENTIABLE)
    loss = fused_linear_fusion_loss(**case, reduction="none")
    grads = torch.autograd.grad(loss, (hidden, weight, bias), grad_output)
    for name, grad in zip(DIFFERENTIABLE, grads, strict=True):
        assert torch.equal(grad, expected[f"d{name}"])


def test_a_nan_in_a_valid_row_shows_in_the_loss():
    case = make_case(S=1, B=1)
    case["source_logprobs"][0, 0, 0] = math.nan
    assert torch.isnan(run(fused_linear_fusion_loss, case)["loss"])


def test_entries_that_leave_the_bucket_less_than_no_mass_are_an_error():
    case = make_case(S=1, B=1)
    case["source_ids"][0, 0] = torch.arange(6)
    case["source_logprobs"][0, 0, :2] = 0.0
    with pytest.raises(ValueError, match=r"add up to a mass of 2\.\d+; take log_softmax"):
        run(fused_linear_fusion_loss, case)
    # Entries that are renormalised, or scaled to what a given tail leaves, need not be normalised.
    assert_as_accurate_as_reference(case, tail="renormalize")
    assert_as_accurate_as_reference(case | {"source_tail": torch.full((1, 37), 0.25)})


def test_a_label_far_above_all_other_logits_costs_a_finite_divergence():
    """Beside the one entry of the source, the label has all of the target's mass."""
    hidden = torch.full((1, 1), 1000.0, dtype=torch.float64, requires_grad=True)
    head = torch.tensor([[1.0], [0.0], [0.0], [0.0]], dtype=torch.float64)
    sources = {"source_ids": torch.tensor([[[1]]]), "source_logprobs": torch.tensor([[[0.5]]]).log()}
    loss, stats = fused_linear_fusion_loss(hidden, head, torch.tensor([0]), **sources, beta=1.0, return_stats=True)
    loss.backward()
    assert stats["kd"].item() == pytest.approx(500 - math.log(2))
    assert hidden.grad is not None
    assert hidden.grad.item() == pytest.approx(0.5)  # half of the mass should be at a logit of 0


# Reductions and weights


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_every_reduction_equals_the_reference(reduction, softcap):
    assert_as_accurate_as_reference(make_case(), reduction=reduction, softcap=softcap, temperature=1.5)


def test_the_default_weights_are_those_of_fusellm():
    case = make_case()
    kd_weight = case.pop("kd_weight")
    given = assert_close_to_truth(case | {"kd_weight": DEFAULT_BETA * case["ce_weight"]})
    torch.testing.assert_close(assert_close_to_truth(case)["loss"], given["loss"])
    torch.testing.assert_close(assert_close_to_truth(case, beta=0.1 / 0.9)["loss"], given["loss"])
    del case["ce_weight"]
    stats = assert_close_to_truth(case, beta=2.0, reduction="sum")
    torch.testing.assert_close(stats["loss"], stats["ce"].sum() + 2 * stats["kd"].sum())
    stats = assert_close_to_truth(case | {"kd_weight": kd_weight}, reduction="sum")
    torch.testing.assert_close(stats["loss"], stats["ce"].sum() + (kd_weight * stats["kd"]).sum())


@pytest.mark.parametrize("number", [5, 0.5, torch.tensor(5), torch.tensor(0.5)])
def test_num_items_in_batch_divides_the_mean(number):
    case = make_case(torch.float64)
    total = run(fused_linear_fusion_loss, case, reduction="sum")
    mean = run(fused_linear_fusion_loss, case, num_items_in_batch=number)
    for name in ("loss", "dhidden", "dweight", "dbias"):
        torch.testing.assert_close(mean[name], total[name] / float(number))
    case["labels"][:] = IGNORE_INDEX
    assert run(fused_linear_fusion_loss, case, num_items_in_batch=number * 0)["loss"] == 0


def test_a_number_of_items_as_a_tensor_neither_widens_the_loss_nor_is_negative():
    case = make_case()
    loss = run(fused_linear_fusion_loss, case, num_items_in_batch=torch.tensor([7.0], dtype=torch.float64))["loss"]
    assert loss.dtype == torch.float32
    assert run(fused_linear_fusion_loss, case, num_items_in_batch=torch.tensor(-7))["loss"].isnan()


def test_splitting_a_batch_adds_up():
    """With reduction="sum" and the step's weights, the gradients of two halves add up to those of the whole."""
    case = make_case(torch.float64, B=2, reduction="sum")
    whole = run(fused_linear_fusion_loss, case)
    middle, halves = case["cu_seqlens"][1].item(), []
    for rows, b in ((slice(None, middle), slice(0, 1)), (slice(middle, None), slice(1, 2))):
        half = case | {name: case[name][rows] for name in ("hidden", "labels", "ce_weight", "kd_weight")}
        half |= {name: case[name][:, rows] for name in ("source_ids", "source_logprobs")}
        half |= {"source_ce": case["source_ce"][:, b], "cu_seqlens": None}
        halves.append(run(fused_linear_fusion_loss, half))
    for name in ("loss", "dweight", "dbias"):
        torch.testing.assert_close(halves[0][name] + halves[1][name], whole[name])
    torch.testing.assert_close(torch.cat([h["dhidden"] for h in halves]), whole["dhidden"])
