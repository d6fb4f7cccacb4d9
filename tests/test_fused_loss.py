"""The fused loss against the dense fp64 reference, and the reference against formulas written out by hand.

An error is allowed up to twice what the dense reference makes in the same dtype, plus a floor for results that
happen to come out exact.
"""

import copy
import math

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


# The oracle against formulas written out by hand


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
def test_mixed_dtypes_of_hidden_and_head(dtype):
    case = make_case(torch.float32)
    case["hidden"] = case["hidden"].to(dtype)
    ours = run(fused_linear_fusion_loss, case, chunk_size=8)
    truth = run(fusion_loss_reference, case, upcast=torch.float64)
    assert ours["dhidden"].dtype == dtype
    assert ours["dweight"].dtype == torch.float32
    for name in ("loss", "dweight", "dbias"):
        torch.testing.assert_close(ours[name].double(), truth[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("logit_scale", [1.0, 0.3])
@pytest.mark.parametrize("biased", [True, False])
def test_softcap_scale_and_bias_chain(softcap, logit_scale, biased):
    case = make_case(spread=2.0, softcap=softcap, logit_scale=logit_scale)
    if not biased:
        case["bias"] = None
    for temperature in (1.0, 2.0):
        assert_as_accurate_as_reference(case, temperature=temperature)


@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 1, 1, 1), (5, 3, 7, 2, 1, 2), (123, 17, 251, 4, 9, 5), (64, 8, 128, 1, 33, 1)]
)
@pytest.mark.parametrize("chunk_size", [None, 1, 50])
def test_ragged_shapes(shape, chunk_size):
    N, D, V, S, K, B = shape
    case = make_case(N=N, D=D, V=V, S=S, K=K, B=B)
    assert_close_to_truth(case, chunk_size=chunk_size)


def test_source_tail_scales_the_entries_to_what_it_leaves():
    case = make_case()
    case["source_tail"] = torch.rand(3, 37)
    assert_as_accurate_as_reference(case)
    # 0 and 1 are legal ends: no bucket, and nothing but the bucket.
    case["source_tail"][:, ::2] = 0
    case["source_tail"][:, 1::2] = 1
    ours, _ = assert_as_accurate_as_reference(case)
    case["source_tail"][:, ::2] = -1e-6
    case["source_tail"][:, 1::2] = 1 + 1e-6
    rounded = run(fused_linear_fusion_loss, case, chunk_size=8)
    for name in ours:
        assert torch.equal(rounded[name], ours[name]), name


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_max_chunk_bytes_and_chunk_size_do_not_change_the_result(tail):
    case = {k: v.double() if k in DIFFERENTIABLE else v for k, v in make_case().items()}
    whole = run(fused_linear_fusion_loss, case, tail=tail, chunk_size=1000)
    for options in ({"chunk_size": 5}, {"max_chunk_bytes": 3 * 83 * 8}, {"max_chunk_bytes": 1}):
        parts = run(fused_linear_fusion_loss, case, tail=tail, **options)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=1e-12)


# Rows


def test_ignored_rows_add_nothing_even_when_they_hold_garbage():
    clean = make_case()
    ignored = clean["labels"] == IGNORE_INDEX
    assert ignored.any()
    poisoned = copy.deepcopy(clean)
    for name in ("hidden", "ce_weight", "kd_weight"):
        poisoned[name][ignored] = math.nan
    poisoned["source_logprobs"][:, ignored] = math.nan
    poisoned["source_logprobs"][:, ignored, ::2] = math.inf
    poisoned["source_ids"][:, ignored] = 2**31 - 1
    for reduction in ("mean", "sum", "none"):
        expected = run(fused_linear_fusion_loss, clean, reduction=reduction)
        found = run(fused_linear_fusion_loss, poisoned, reduction=reduction)
        for name in expected:
            assert torch.equal(found[name], expected[name]), name
        assert not found["dhidden"][ignored].any()


def test_a_nan_in_an_ignored_rows_grad_output_adds_nothing():
    case = make_case()
    grad_output = torch.where(case["labels"] == IGNORE_INDEX, math.nan, 1.0)
    expected = run(fused_linear_fusion_loss, case, reduction="none")
    hidden, weight, bias = (case[name].requires_grad_() for name in DIFFERENTIABLE)
    loss = fused_linear_fusion_loss(**case, reduction="none")
    grads = torch.autograd.grad(loss, (hidden, weight, bias), grad_output)
    for name, grad in zip(DIFFERENTIABLE, grads, strict=True):
        assert torch.equal(grad, expected[f"d{name}"])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [37, 0])
def test_a_batch_without_valid_rows_is_zero_with_zero_gradients(reduction, rows):
    case = make_case()
    case["labels"][:] = IGNORE_INDEX
    case["hidden"][:] = math.nan
    if rows == 0:
        case |= {name: case[name][:0] for name in ("hidden", "labels", "ce_weight", "kd_weight")}
        case |= {name: case[name][:, :0] for name in ("source_ids", "source_logprobs")}
        case["cu_seqlens"] = torch.zeros(5, dtype=torch.long)
    result = run(fused_linear_fusion_loss, case, reduction=reduction)
    for name in ("loss", "dhidden", "dweight", "dbias", "ce", "kd", "source_mass", "target_mass"):
        assert not result[name].any(), name


def test_rows_without_an_entry_have_no_kd():
    case = make_case()
    case["labels"][5] = 7
    case["source_logprobs"][:, 6] = -math.inf
    case["labels"][6] = 7
    ours, _ = assert_as_accurate_as_reference(case)
    for row in (5, 6):
        assert ours["kd"][row] == ours["source_mass"][row] == ours["target_mass"][row] == 0
        assert ours["ce"][row] > 0


def test_duplicate_ids_add_their_mass():
    case = make_case(S=1, B=1, K=4)
    case["source_ids"][..., 0:2] = 9
    merged = copy.deepcopy(case)
    merged["source_ids"][..., 1] = -1
    merged["source_logprobs"][..., 0] = case["source_logprobs"][..., :2].logsumexp(-1)
    for tail in ("bucket", "renormalize"):
        twice, once = (run(fused_linear_fusion_loss, c, tail=tail) for c in (case, merged))
        for name in twice:
            torch.testing.assert_close(twice[name], once[name], rtol=2e-6, atol=1e-6)


def test_padding_may_hold_any_log_probability():
    case = make_case()
    poisoned = copy.deepcopy(case)
    poisoned["source_logprobs"][poisoned["source_ids"] < 0] = math.nan
    expected, found = run(fused_linear_fusion_loss, case), run(fused_linear_fusion_loss, poisoned)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_a_nan_in_a_valid_row_shows_in_the_loss():
    case = make_case(S=1, B=1)
    case["source_logprobs"][0, 0, 0] = math.nan
    assert torch.isnan(run(fused_linear_fusion_loss, case)["loss"])


# Numerics


def single_row(z, ids, p, label, **case):
    """One fp32 row with the given logits; only KD unless ce_weight says otherwise."""
    weights = {"ce_weight": torch.tensor([0.0]), "kd_weight": torch.tensor([1.0])}
    return with_logits(
        torch.tensor([z]), labels=torch.tensor([label]), source_ids=torch.tensor([[ids]]),
        source_logprobs=torch.tensor([[p]], dtype=torch.float64).log().float(), **(weights | case),
    )  # fmt: skip


@pytest.mark.parametrize("gap", [10.0, 16.0, 20.0])
@pytest.mark.parametrize("tail_mass", [1e-7, 1e-3, 0.3])
def test_the_bucket_is_exact_when_the_target_keeps_almost_nothing_outside(gap, tail_mass):
    """At gap 20 the mass outside is about 1e-7: as 1 - Σ it would have no correct digit in fp32."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50, generator=generator)
    z[:3] += gap
    for label in (1, 40):
        case = single_row(z.tolist(), [0, 1, 2], [0.5, 0.3, 0.2], label)
        case["source_tail"] = torch.tensor([[tail_mass]])
        ours = run(fused_linear_fusion_loss, case)
        truth = run(fusion_loss_reference, case, upcast=torch.float64)
        torch.testing.assert_close(ours["loss"].double(), truth["loss"], rtol=2e-6, atol=1e-7)
        # Column by column, not against the largest: outside they are smaller by orders of magnitude.
        outside = slice(3, None)
        torch.testing.assert_close(
            ours["dhidden"][0, outside].double(), truth["dhidden"][0, outside], rtol=1e-5, atol=0
        )


def test_a_target_without_mass_outside_stays_finite():
    z = torch.full((20,), -200.0)
    z[:2] = 50.0
    for label in (0, 7):
        case = single_row(z.tolist(), [0, 1], [0.6, 0.3], label, ce_weight=torch.tensor([1.0]))
        assert_as_accurate_as_reference(case)


def test_mass_above_one_by_rounding_is_divided_out():
    case = make_case(S=1, B=1)
    case["source_ids"] = torch.arange(6, dtype=torch.int32).expand(1, 37, 6).clone()
    case["source_logprobs"] = torch.randn(1, 37, 6).log_softmax(-1) + 1e-3
    ours, _ = assert_as_accurate_as_reference(case)
    renormalized = run(fused_linear_fusion_loss, case, tail="renormalize")
    torch.testing.assert_close(ours["dhidden"], renormalized["dhidden"])


def test_ids_that_cover_the_vocabulary_leave_no_bucket():
    case = make_case(V=6, K=6)
    case["source_ids"] = torch.arange(6, dtype=torch.int32).expand(3, 37, 6).clone()
    case["source_logprobs"] -= 1e-6
    for temperature in (1.0, 0.25):
        assert_as_accurate_as_reference(case, temperature=temperature)


@pytest.mark.parametrize("spread", [20.0, 80.0])
def test_large_logits(spread):
    case = make_case(spread=spread)
    assert_as_accurate_as_reference(case)
    assert_as_accurate_as_reference(case, tail="renormalize", temperature=3.0)


def test_logits_near_eighty_keep_their_probabilities():
    """exp(z - lse) would lose 4e-6: the rounding of lse at 80."""
    z = 80 + torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(9)
    ours = run(fused_linear_fusion_loss, with_logits(z, labels=labels, reduction="sum"))
    truth = run(fusion_loss_reference, with_logits(z, labels=labels, reduction="sum"), upcast=torch.float64)
    torch.testing.assert_close(ours["dhidden"].double(), truth["dhidden"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("source", [False, True])
def test_small_cross_entropy_keeps_its_digits(source):
    """-log(1 - 1e-9) is 0 when it is computed as lse - z."""
    z = torch.zeros(1, 100)
    z[0, 4] = 25.0
    case = with_logits(z, labels=torch.tensor([4]))
    if source:
        case |= {"source_ids": torch.tensor([[[4, 7]]]), "source_logprobs": torch.full((1, 1, 2), -1.0), "beta": 0.0}
    ours, truth = run(fused_linear_fusion_loss, case), run(fusion_loss_reference, case, upcast=torch.float64)
    torch.testing.assert_close(ours["loss"].double(), truth["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours["dhidden"].double(), truth["dhidden"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("gap", [0.0, 1e-3, 5e-2])
def test_target_close_to_the_source(gap):
    case = make_case(S=1, B=1, K=6)
    logits = case["hidden"] @ case["weight"].T + case["bias"]
    nearby = logits + gap * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    top = nearby.log_softmax(1).topk(6)
    case |= {"source_ids": top.indices[None], "source_logprobs": top.values[None], "ce_weight": torch.zeros(37)}
    assert_as_accurate_as_reference(case, scale=1 / (case["labels"] != IGNORE_INDEX).sum().item())


def test_masked_columns_of_the_vocabulary():
    """A bias of -inf, as for rows of the head beyond the tokenizer, on columns outside the ids or without mass."""
    case = make_case(S=1, B=1)
    case["labels"][case["labels"] >= 80] = 0
    case["source_ids"] %= 80
    case["source_ids"][..., 5] = 81
    case["source_logprobs"][..., 5] = -math.inf
    case["bias"][80:] = -math.inf
    for options in ({}, {"temperature": 2.0}, {"tail": "renormalize"}):
        assert_as_accurate_as_reference(case, **options)


# Reductions and weights


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_reductions(reduction, softcap):
    assert_as_accurate_as_reference(make_case(), reduction=reduction, softcap=softcap, temperature=1.5)


def test_default_weights():
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


@pytest.mark.parametrize("number", [5, torch.tensor(5)])
def test_num_items_in_batch_divides_the_mean(number):
    case = make_case(torch.float64)
    total = run(fused_linear_fusion_loss, case, reduction="sum")
    mean = run(fused_linear_fusion_loss, case, num_items_in_batch=number)
    for name in ("loss", "dhidden", "dweight", "dbias"):
        torch.testing.assert_close(mean[name], total[name] / 5)
    case["labels"][:] = IGNORE_INDEX
    assert run(fused_linear_fusion_loss, case, num_items_in_batch=number * 0)["loss"] == 0


def test_splitting_a_batch_adds_up():
    """reduction="sum" with the step's weights: two halves give the gradients of the whole."""
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
