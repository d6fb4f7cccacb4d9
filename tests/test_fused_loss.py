"""The fused loss against the dense fp64 reference, and the reference against formulas written out by hand.

An error is allowed up to twice what the dense reference makes in the same dtype, plus a floor for results that
happen to come out exact.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from profuser.kernels.common import IGNORE_INDEX
from profuser.kernels.fused_loss import fused_loss, fused_loss_torch
from profuser.kernels.reference import fusion_loss_reference
from profuser.loss import DEFAULT_BETA, FusedLinearFusionLoss, fused_linear_fusion_loss

# Floor of the allowed error, relative to the largest true entry: a few roundings of the dtype.
FLOOR = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 5e-3}
DIFFERENTIABLE = ("hidden", "weight", "bias")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_case(dtype=torch.float32, N=37, D=20, V=83, S=3, K=6, B=4, spread=1.0, seed=0, **options):
    """Ragged sizes, ignored rows, duplicate and padded ids, gold ids inside and outside, rows without an entry."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(V, (N,), generator=g)
    labels[torch.rand(N, generator=g) < 0.3] = IGNORE_INDEX
    labels[0] = V // 2
    ids = torch.randint(V, (S, N, K), generator=g, dtype=torch.int32)
    ids[:, ::3, 0] = labels[::3].clamp_min(0).int()
    if K > 3:
        ids[:, ::4, 2] = ids[:, ::4, 1]
        ids[:, 1::4, 3] = -1
    ids[:, 5:6] = -1
    logprobs = torch.randn(S, N, K, generator=g).log_softmax(-1) - 0.25
    bounds = torch.linspace(0, N, B + 1).long()
    case = {
        "hidden": torch.randn(N, D, generator=g) * spread,
        "weight": torch.randn(V, D, generator=g) / D**0.5,
        "labels": labels,
        "source_ids": ids,
        "source_logprobs": logprobs,
        "source_ce": torch.rand(S, B, generator=g),
        "cu_seqlens": bounds,
        "ce_weight": torch.rand(N, generator=g),
        "kd_weight": torch.rand(N, generator=g),
        "bias": torch.randn(V, generator=g),
    }
    for name in DIFFERENTIABLE:
        case[name] = case[name].to(dtype)
    return case | options


def run(function, case, upcast=None, grad_output=None, **options):
    """Loss, gradients of hidden, weight and bias, and stats."""
    case = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in case.items()} | options
    leaves = [name for name in DIFFERENTIABLE if case.get(name) is not None]
    for name in leaves:
        case[name] = (case[name] if upcast is None else case[name].to(upcast)).requires_grad_()
    loss, stats = function(**case, return_stats=True)
    (loss if grad_output is None else loss * grad_output).sum().backward()
    return {"loss": loss.detach()} | {f"d{name}": case[name].grad for name in leaves} | stats


def assert_as_accurate_as_reference(case, scale=0.0, chunk_size=8, **options):
    """Every result within twice the same-dtype reference's own error against fp64.

    `scale`: size of the terms a result is the difference of, where that is larger than the result.
    """
    dtype = case["hidden"].dtype
    truth = run(fusion_loss_reference, case, upcast=torch.float64, **options)
    same_dtype = run(fusion_loss_reference, case, **options)
    ours = run(fused_linear_fusion_loss, case, chunk_size=chunk_size, **options)
    assert ours.keys() == truth.keys()
    for name, true in truth.items():
        assert ours[name].shape == true.shape, name
        if name == "winner":
            assert torch.equal(ours[name], true)
            continue
        assert torch.isfinite(true).all(), f"{name}: the case itself is not finite"
        error = (ours[name].double() - true).abs().max().item()
        floor = FLOOR[dtype] * max(scale, true.abs().max().item())
        allowed = 2 * (same_dtype[name].double() - true).abs().max().item() + floor
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    return ours, truth


def assert_close_to_truth(case, tolerance=1e-9, chunk_size=None, **options):
    case = {k: v.double() if k in DIFFERENTIABLE and v is not None else v for k, v in case.items()}
    ours = run(fused_linear_fusion_loss, case, chunk_size=chunk_size, **options)
    truth = run(fusion_loss_reference, case, **options)
    for name, true in truth.items():
        torch.testing.assert_close(ours[name], true, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    return ours


def with_logits(logits, **case):
    """A case whose logits are given: hidden = logits and weight = 1, so that dhidden is the gradient in the logits."""
    return {"hidden": logits, "weight": torch.eye(logits.shape[1], dtype=logits.dtype)} | case


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


# Which source


def test_min_ce_picks_the_lowest_finite_source_of_each_sequence():
    nan, inf = math.nan, math.inf
    source_ce = torch.tensor([
        [1.0, nan, 2.0, nan, 0.5, -inf],
        [0.5, 3.0, 2.0, inf, nan, 4.0],
        [0.7, inf, 2.5, nan, 0.5, nan],
    ])  # fmt: skip
    case = make_case(B=6, source_ce=source_ce, cu_seqlens=torch.tensor([0, 4, 9, 9, 20, 30, 37]))
    case["labels"][:] = 1
    ours, _ = assert_as_accurate_as_reference(case)
    assert ours["winner"].tolist() == [1, 1, 0, -1, 0, 1]
    assert not ours["kd"][9:20].any()
    assert ours["ce"][9:20].all()


def test_a_loser_is_not_read():
    case = make_case()
    expected = run(fused_linear_fusion_loss, case)
    lost = torch.ones(3, 37, dtype=torch.bool)
    for b, s in enumerate(expected["winner"].tolist()):
        lost[s, case["cu_seqlens"][b] : case["cu_seqlens"][b + 1]] = False
    case["source_logprobs"][lost] = math.nan
    case["source_ids"][lost] = 0
    found = run(fused_linear_fusion_loss, case)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_source_index_per_sequence_equals_per_row():
    case = make_case()
    del case["source_ce"]
    per_sequence = torch.tensor([2, -1, 0, 1])
    per_row = per_sequence.repeat_interleave(case["cu_seqlens"].diff())
    ours = assert_close_to_truth(case, source_index=per_sequence)
    assert ours["winner"].tolist() == per_sequence.tolist()
    del case["cu_seqlens"]
    by_row = assert_close_to_truth(case, source_index=per_row.int())
    assert by_row["winner"].tolist() == per_row.tolist()
    for name in ("loss", "dhidden", "dweight", "dbias", "kd"):
        assert torch.equal(ours[name], by_row[name]), name


@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64])
def test_one_sequence_needs_no_bounds(cu_dtype):
    case = make_case(B=1)
    bounds = case.pop("cu_seqlens")
    ours = assert_close_to_truth(case)
    assert torch.equal(ours["loss"], assert_close_to_truth(case, cu_seqlens=bounds.to(cu_dtype))["loss"])


def test_one_source_is_top_k_distillation():
    case = make_case(S=1, B=1)
    del case["source_ce"], case["cu_seqlens"]
    ours, _ = assert_as_accurate_as_reference(case)
    assert ours["winner"].tolist() == [0]
    everything_missing = run(fused_linear_fusion_loss, case, source_ce=torch.tensor([[math.nan]]))
    assert everything_missing["winner"].tolist() == [-1]
    assert not everything_missing["kd"].any()


def test_without_a_source_it_is_cross_entropy():
    case = {k: v for k, v in make_case(torch.float64).items() if k in ("hidden", "weight", "labels", "bias")}
    for reduction in ("mean", "sum", "none"):
        ours = run(fused_linear_fusion_loss, case, reduction=reduction, chunk_size=5)
        hidden, weight, bias = (case[name].clone().requires_grad_() for name in DIFFERENTIABLE)
        expected = F.cross_entropy(F.linear(hidden, weight, bias), case["labels"], reduction=reduction)
        expected.sum().backward()
        torch.testing.assert_close(ours["loss"], expected.detach())
        for name, leaf in zip(DIFFERENTIABLE, (hidden, weight, bias), strict=True):
            torch.testing.assert_close(ours[f"d{name}"], leaf.grad)
    assert ours["winner"].tolist() == [-1]


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


# Autograd


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_grad_output_scales_the_gradient(reduction):
    case = make_case(torch.float64)
    once = run(fused_linear_fusion_loss, case, reduction=reduction)
    scaled = run(fused_linear_fusion_loss, case, reduction=reduction, grad_output=-3.7)
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(scaled[f"d{name}"], -3.7 * once[f"d{name}"])


def test_the_scale_of_a_bf16_gradient_is_not_rounded_to_bf16():
    case = make_case(torch.bfloat16, num_items_in_batch=307)  # bf16 rounds 1/307 by 0.22 %
    ours = run(fused_linear_fusion_loss, case)["dhidden"].double()
    true = run(fusion_loss_reference, case, upcast=torch.float64)["dhidden"]
    assert ((ours * true).sum() / (true * true).sum()).item() == pytest.approx(1, abs=5e-4)


def test_transposed_operands():
    case = make_case(torch.float64)
    for name in ("hidden", "weight"):
        case[name] = case[name].T.contiguous().T
    for name in ("source_ids", "source_logprobs"):
        case[name] = case[name].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert_close_to_truth(case, chunk_size=8)
    for name in DIFFERENTIABLE:
        case[name].requires_grad_()
    torch.library.opcheck(fused_loss, op_arguments(case))


def test_none_weighs_each_row_by_its_grad_output():
    case = make_case(torch.float64)
    assert_close_to_truth(case, reduction="none")
    grad_output = torch.randn(37, dtype=torch.float64)
    ours = run(fused_linear_fusion_loss, case, reduction="none", grad_output=grad_output)
    truth = run(fusion_loss_reference, case, reduction="none", grad_output=grad_output)
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(ours[f"d{name}"], truth[f"d{name}"])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_two_backwards_add_the_gradient_twice(reduction):
    case = make_case(torch.float64)
    expected = run(fused_linear_fusion_loss, case, reduction=reduction)
    for name in DIFFERENTIABLE:
        case[name].requires_grad_()
    loss = fused_linear_fusion_loss(**case, reduction=reduction).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(case[name].grad, 2 * expected[f"d{name}"])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",), ("hidden", "weight"), DIFFERENTIABLE])
def test_frozen_parts_get_no_gradient(frozen, reduction):
    case = make_case()
    expected = run(fused_linear_fusion_loss, case, reduction=reduction)
    learning = [name for name in DIFFERENTIABLE if name not in frozen]
    for name in learning:
        case[name].requires_grad_()
    loss = fused_linear_fusion_loss(**case, reduction=reduction)
    torch.testing.assert_close(loss.detach(), expected["loss"])
    assert loss.requires_grad == bool(learning)
    if learning:
        loss.sum().backward()
    for name in DIFFERENTIABLE:
        if name in frozen:
            assert case[name].grad is None
        else:
            torch.testing.assert_close(case[name].grad, expected[f"d{name}"])


def test_no_gradient_is_computed_without_autograd():
    case = make_case()
    expected = run(fused_linear_fusion_loss, case)["loss"]
    for name in DIFFERENTIABLE:
        case[name].requires_grad_()
    sizes = []
    with torch.no_grad(), LargestTensor(sizes, inside="profuser::fused_loss"):
        loss = fused_linear_fusion_loss(**case, chunk_size=4)
    torch.testing.assert_close(loss, expected)
    assert max(sizes) < 83 * 20  # no [V, D] gradient


def test_a_tied_head_gets_both_gradients():
    case = make_case(torch.float64)
    table = case.pop("weight")
    tokens = torch.randint(83, (37,))
    grads = []
    for function in (fused_linear_fusion_loss, fusion_loss_reference):
        tied = table.clone().requires_grad_()
        function(**(case | {"hidden": F.embedding(tokens, tied).tanh(), "weight": tied})).backward()
        grads.append(tied.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"tail": "renormalize", "temperature": 2.0}, {"softcap": 2.0, "logit_scale": 0.5}], ids=str
)
def test_gradcheck(reduction, options):
    case = make_case(torch.float64, N=7, D=3, V=9, S=2, K=4, B=2)
    leaves = [case.pop(name).requires_grad_() for name in DIFFERENTIABLE]

    def loss(hidden, weight, bias):
        return fused_linear_fusion_loss(
            hidden=hidden, weight=weight, bias=bias, **case, **options, reduction=reduction, chunk_size=3
        )

    assert torch.autograd.gradcheck(loss, leaves)


def op_arguments(case, **options):
    """The op's positional arguments for a case of the public function."""
    names = ("source_ids", "source_logprobs", "source_tail", "source_ce", "source_index", "cu_seqlens")
    defaults = {
        "temperature": 1.0, "bucket": True, "softcap": None, "logit_scale": 1.0, "per_row": False, "grad_hidden": True,
        "grad_weight": True, "grad_bias": True, "chunk_size": 8, "max_chunk_bytes": None,
    } | options  # fmt: skip
    return (
        case["hidden"], case["weight"], case.get("bias"), case["labels"], *(case.get(name) for name in names),
        case["ce_weight"], case["kd_weight"], *defaults.values(),
    )  # fmt: skip


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("sources", [True, False])
def test_opcheck(per_row, sources):
    case = make_case()
    if not sources:
        case = {k: v for k, v in case.items() if k not in ("source_ids", "source_logprobs", "source_ce", "cu_seqlens")}
    for name in DIFFERENTIABLE:
        case[name].requires_grad_()
    needs = {f"grad_{name}": not per_row for name in DIFFERENTIABLE}
    torch.library.opcheck(fused_loss, op_arguments(case, per_row=per_row, temperature=2.0, **needs))


def compiled_results(backend):
    for reduction in ("mean", "none"):
        case = make_case()
        expected = run(fused_linear_fusion_loss, case, reduction=reduction)
        compiled = torch.compile(fused_linear_fusion_loss, fullgraph=True, backend=backend)
        yield run(compiled, case, reduction=reduction), expected


def test_compiles_in_one_graph():
    for found, expected in compiled_results("aot_eager"):
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])


@pytest.mark.long
def test_compiles_with_inductor():
    for found, expected in compiled_results("inductor"):
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])


def test_autocast_leaves_the_logits_in_fp32():
    case = make_case()
    expected = run(fused_linear_fusion_loss, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(fused_linear_fusion_loss, case)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


# Memory


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of every new tensor an op returns; `inside` is an op to be looked into."""

    def __init__(self, sizes, inside=None):
        super().__init__()
        self.sizes, self.inside = sizes, inside

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.inside is not None and func.name() == self.inside:
            with LargestTensor(self.sizes):
                return fused_loss_torch(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for tensor, described in zip(out if isinstance(out, tuple) else (out,), func._schema.returns, strict=False):
            # A return that aliases an argument is a view or was written in place.
            if isinstance(tensor, torch.Tensor) and described.alias_info is None:
                self.sizes.append(tensor.numel())
        return out


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "softcap": 3.0}], ids=str)
def test_no_tensor_is_larger_than_a_chunk_of_logits_or_a_gradient(options):
    N, D, V, chunk = 512, 6, 300, 8
    case = make_case(N=N, D=D, V=V, K=4, **options)
    del case["bias"]
    sizes = []
    for reduction in ("mean", "none"):
        with LargestTensor(sizes, inside="profuser::fused_loss"):
            run(fused_linear_fusion_loss, case, reduction=reduction, chunk_size=chunk)
    # The whole batch's sources and gradients are allowed, the whole batch's logits are 50 chunks.
    assert max(sizes) <= max(chunk * V, N * D, V * D, 3 * N * 4)


def test_a_bf16_head_is_not_copied_to_fp32_at_once():
    case = make_case(torch.bfloat16, N=64, D=256, V=1000, K=4)
    sizes = []
    with LargestTensor(sizes):
        fused_loss_torch(*op_arguments(case, grad_weight=False, grad_bias=False, chunk_size=16))
    assert max(sizes) <= 64 * 256 < 1000 * 256


# Interface


def test_the_module_is_the_function():
    case = make_case(tail="renormalize")
    module = FusedLinearFusionLoss(temperature=2.0, tail="renormalize", reduction="sum", return_stats=True)
    del case["tail"]
    loss, stats = module(**case)
    expected, expected_stats = fused_linear_fusion_loss(
        **case, temperature=2.0, tail="renormalize", reduction="sum", return_stats=True
    )
    assert torch.equal(loss, expected)
    assert stats.keys() == expected_stats.keys()
    assert not list(module.parameters())
    assert "temperature=2.0" in repr(module)


def test_stats_are_detached_and_add_up_to_the_loss():
    case = make_case(torch.float64)
    for name in DIFFERENTIABLE:
        case[name].requires_grad_()
    loss, stats = fused_linear_fusion_loss(**case, reduction="sum", temperature=1.5, return_stats=True)
    assert {name: tuple(value.shape) for name, value in stats.items()} == {
        "ce": (37,), "kd": (37,), "source_mass": (37,), "target_mass": (37,), "winner": (4,)
    }  # fmt: skip
    assert not any(value.requires_grad for value in stats.values())
    total = (case["ce_weight"] * stats["ce"] + case["kd_weight"] * stats["kd"]).sum()
    torch.testing.assert_close(loss.detach(), total)


WRONG = {
    "id beyond the vocabulary": ({"source_ids": lambda x: x.index_fill(1, torch.tensor([0]), 83)}, "< 83.*got 83"),
    "id below padding": ({"source_ids": lambda x: x.index_fill(1, torch.tensor([0]), -2)}, ">= -1.*got -2"),
    "label beyond the vocabulary": ({"labels": lambda x: x.index_fill(0, torch.tensor([0]), 83)}, "labels must be in"),
    "negative label": ({"labels": lambda x: x.index_fill(0, torch.tensor([0]), -1)}, r"labels must be in.*got -1"),
    "probabilities": ({"source_logprobs": torch.exp}, "natural log-probabilities <= 0.*take log"),
    "K-first layout": ({"source_ids": lambda x: x.permute(2, 1, 0)[:, :5]}, r"\(S, N, K\).*got \(6, 5, 3\)"),
    "N last": ({"source_ids": lambda x: x.transpose(1, 2)}, r"\(S, N, K\) with N=37.*permute"),
    "no source axis": ({"source_ids": lambda x: x[0]}, r"unsqueeze\(0\)"),
    "log-probabilities of another top-k": ({"source_logprobs": lambda x: x[..., :4]}, "source_ids' shape"),
    "no log-probabilities": ({"source_logprobs": lambda x: None}, "needs source_logprobs"),
    "float ids": ({"source_ids": lambda x: x.float()}, "int32 or int64"),
    "integer log-probabilities": ({"source_logprobs": lambda x: x.int()}, "source_logprobs must be floating"),
    "sources without ids": ({"source_ids": lambda x: None}, "source_logprobs needs source_ids"),
    "label of another length": ({"labels": lambda x: x[1:]}, r"labels must be \(N,\) with N=37, got \(36,\)"),
    "float labels": ({"labels": lambda x: x.float()}, "labels must be int64"),
    "hidden with a batch axis": ({"hidden": lambda x: x[None]}, r"hidden must be \(N, D\)"),
    "transposed head": ({"weight": lambda x: x.T}, r"weight must be \(V, D\)"),
    "bias of another head": ({"bias": lambda x: x[1:]}, r"bias must be \(V,\)"),
    "integer hidden": ({"hidden": lambda x: x.int()}, "hidden must be floating point"),
    "beta and kd_weight": ({"beta": 0.5}, "beta or kd_weight, not both"),
    "negative beta": ({"beta": -1.0, "kd_weight": None}, "beta must be >= 0"),
    "source_ce and source_index": ({"source_index": torch.zeros(4).long()}, "source_ce or source_index, not both"),
    "no choice": ({"source_ce": None}, "with S=3 sources a choice is needed"),
    "source_ce transposed": ({"source_ce": lambda x: x.T}, r"source_ce must be \(S, B\) with S=3"),
    "bounds missing": ({"cu_seqlens": None}, "cu_seqlens is required when B > 1"),
    "bounds of another batch": ({"cu_seqlens": torch.tensor([0, 20, 37])}, "B=2 sequences"),
    "bounds that end early": ({"cu_seqlens": torch.tensor([0, 9, 18, 27, 36])}, "rise from 0 to N=37"),
    "bounds that fall": ({"cu_seqlens": torch.tensor([0, 18, 9, 27, 37])}, "rise from 0 to N=37"),
    "source_index out of range": (
        {"source_ce": None, "source_index": torch.tensor([0, 1, 2, 3])}, r"source_index must be in \[0, 3\).*got 3",
    ),
    "float source_index": ({"source_ce": None, "source_index": torch.zeros(4)}, "source_index must be"),
    "temperature 0": ({"temperature": 0.0}, "temperature must be > 0.*got 0.0"),
    "negative temperature": ({"temperature": -1.0}, "temperature must be > 0"),
    "softcap 0": ({"softcap": 0.0}, "softcap must be > 0"),
    "logit_scale 0": ({"logit_scale": 0.0}, "logit_scale must be > 0"),
    "chunk of no rows": ({"chunk_size": 0}, "chunk_size must be >= 1"),
    "chunk of no bytes": ({"max_chunk_bytes": 0}, "max_chunk_bytes must be >= 1"),
    "unknown tail": ({"tail": "drop"}, "tail must be one of"),
    "tail mass without a bucket": ({"source_tail": torch.zeros(3, 37), "tail": "renormalize"}, "needs tail='bucket'"),
    "tail mass per entry": ({"source_tail": torch.zeros(3, 37, 6)}, r"source_tail must be \(S, N\)"),
    "log of a tail mass": ({"source_tail": torch.full((3, 37), -2.0)}, r"linear mass in \[0, 1\].*exp"),
    "unknown reduction": ({"reduction": "batchmean"}, "reduction must be one of"),
    "divisor of a sum": ({"reduction": "sum", "num_items_in_batch": 5}, "is for reduction='mean'"),
    "negative divisor": ({"num_items_in_batch": -1}, "num_items_in_batch must be >= 0"),
    "weight per sequence": ({"ce_weight": torch.ones(4)}, r"ce_weight must be \(N,\)"),
    "source that requires grad": ({"source_logprobs": lambda x: x.requires_grad_()}, "must not require grad"),
    "triton without a GPU": ({"impl": "triton"}, "needs a CUDA device.*hidden is on cpu"),
    "unknown impl": ({"impl": "cuda"}, "impl must be None"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_name_the_rule_the_value_and_the_fix(changes, message):
    case = make_case()
    for name, change in changes.items():
        case[name] = change(case[name]) if callable(change) else change
    with pytest.raises(ValueError, match=message) as error:
        fused_linear_fusion_loss(**case)
    assert "\n" not in str(error.value)
