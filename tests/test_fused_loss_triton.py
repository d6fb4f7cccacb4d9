"""The Triton path of the fused loss against the dense fp64 reference: on a GPU where there is one, else interpreted.

Interpreted, a program costs a millisecond or more, so the cases are small and the blocks are made smaller than V.
"""

import copy
import math
from functools import partial

import pytest
import torch
from loss_checks import DIFFERENTIABLE, make_case, on, run, with_logits

from profuser.kernels import fused_loss as op_module
from profuser.kernels import fused_loss_triton as driver
from profuser.kernels.common import IGNORE_INDEX, chunk_rows_gpu
from profuser.kernels.reference import fusion_loss_reference
from profuser.loss import fused_linear_fusion_loss

pytestmark = [
    pytest.mark.usefixtures("small_blocks"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
ROWS = 10
small_case = partial(make_case, N=ROWS)


# Values and gradients


@pytest.mark.parametrize(
    ("dtype", "tail", "temperature"),
    [
        (torch.float32, "bucket", 1.0),
        (torch.float32, "bucket", 2.5),
        (torch.float32, "renormalize", 1.0),
        (torch.bfloat16, "bucket", 1.0),
        (torch.bfloat16, "renormalize", 2.5),
        (torch.float16, "bucket", 2.5),
    ],
    ids=str,
)
def test_values_and_gradients_are_as_accurate_as_the_dense_reference(triton_check, dtype, tail, temperature):
    triton_check(small_case(dtype, spread=2.0), tail=tail, temperature=temperature)


@pytest.mark.parametrize(
    ("softcap", "logit_scale", "biased"),
    [(None, 1.0, False), (None, 0.3, True), (3.0, 1.0, False), (3.0, 0.3, True), (3.0, 0.3, False)],
)
def test_softcap_scale_and_bias_chain(triton_check, softcap, logit_scale, biased):
    case = small_case(spread=2.0, softcap=softcap, logit_scale=logit_scale)
    if not biased:
        case["bias"] = None
    triton_check(case, temperature=2.0 if biased else 1.0)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 2, 1, 1, 1), (5, 3, 7, 2, 1, 2), (9, 17, 251, 4, 9, 5), (6, 8, 128, 1, 33, 1), (4, 5, 300, 2, 128, 2)],
)
def test_ragged_shapes_and_chunks(triton_check, shape):
    N, D, V, S, K, B = shape
    # The single row's KL is small against its terms.
    triton_check(make_case(N=N, D=D, V=V, S=S, K=K, B=B), chunk_size=4, scale=1.0 if N == 1 else 0.0)


@pytest.mark.parametrize("block", [16, 128, 1024])
def test_the_block_of_columns_does_not_matter(triton_check, monkeypatch, block):
    monkeypatch.setattr(driver, "dense_config", lambda *args: (block, 1))
    triton_check(small_case(N=4, B=1), temperature=1.5, softcap=4.0)


def test_chunks_do_not_change_the_result(triton_loss, poisoned_buffers):
    case = small_case()
    whole = triton_loss(case, chunk_size=1000)
    for options in ({"chunk_size": 4}, {"max_chunk_bytes": 3 * 83 * 4}):
        parts = triton_loss(case, **options)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-6)


def test_chunks_hold_many_rows_and_no_more_than_the_caps():
    assert chunk_rows_gpu(8192, 32000, 4096) == 2048
    assert chunk_rows_gpu(100, 32000, 4096) == 100
    assert chunk_rows_gpu(100_000, 32000, 5000) == 2560  # D/2 = 2500, to a multiple of 128
    assert chunk_rows_gpu(8192, 1000, 64, max_chunk_bytes=4000 * 10 + 1) == 10
    assert chunk_rows_gpu(8192, 1000, 64, max_chunk_bytes=1) == 1
    assert chunk_rows_gpu(0, 1000, 64) == 1


def test_mixed_dtypes_multiply_in_the_dtype_of_hidden(triton_loss):
    case = small_case()
    rounded = case | {"hidden": case["hidden"].bfloat16(), "weight": case["weight"].bfloat16()}
    mixed = case | {"hidden": rounded["hidden"]}
    ours, expected = triton_loss(mixed), triton_loss(rounded)
    assert ours["dhidden"].dtype == torch.bfloat16
    assert ours["dweight"].dtype == torch.float32
    for name in expected:
        torch.testing.assert_close(ours[name].to(expected[name].dtype), expected[name])


def test_strided_operands(triton_loss, device):
    case = small_case(source_tail=torch.rand(3, ROWS, generator=torch.Generator().manual_seed(0)))
    expected = triton_loss(case)
    strided = on(device, case, frozen=DIFFERENTIABLE)
    for name in ("hidden", "weight", "source_tail"):
        strided[name] = strided[name].T.contiguous().T
    for name in ("source_ids", "source_logprobs"):
        strided[name] = strided[name].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for name in ("labels", "ce_weight", "kd_weight", "bias"):
        strided[name] = strided[name].repeat_interleave(2)[::2]
    assert not any(strided[name].is_contiguous() for name in (*DIFFERENTIABLE, "labels", "source_ids", "source_tail"))
    for name in DIFFERENTIABLE:
        strided[name].requires_grad_()
    fused_linear_fusion_loss(**strided, impl="triton").backward()
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(strided[name].grad.cpu(), expected[f"d{name}"])


def test_source_tail_scales_the_entries_to_what_it_leaves(triton_check):
    case = small_case()
    case["source_tail"] = torch.rand(3, ROWS, generator=torch.Generator().manual_seed(0))
    triton_check(case)
    # 0 and 1 are legal ends: no bucket, and nothing but the bucket.
    case["source_tail"][:, ::2] = 0
    case["source_tail"][:, 1::2] = 1
    triton_check(case)


# Rows


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_write_zeros_even_when_they_hold_garbage(triton_loss, reduction, poisoned_buffers):
    clean = small_case()
    ignored = clean["labels"] == IGNORE_INDEX
    assert ignored.any()
    poisoned = copy.deepcopy(clean)
    for name in ("hidden", "ce_weight", "kd_weight"):
        poisoned[name][ignored] = math.nan
    poisoned["source_logprobs"][:, ignored] = math.nan
    poisoned["source_ids"][:, ignored] = 2**31 - 1
    expected, found = triton_loss(clean, reduction=reduction), triton_loss(poisoned, reduction=reduction)
    for name in expected:
        assert torch.isfinite(found[name]).all(), name
        assert torch.equal(found[name], expected[name]), name
    for name in ("dhidden", "ce", "kd", "source_mass", "target_mass"):
        assert not found[name][ignored].any(), name


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("rows", [ROWS, 0])
def test_a_batch_without_valid_rows_is_zero_with_zero_gradients(triton_loss, reduction, rows, poisoned_buffers):
    case = small_case()
    case["labels"][:] = IGNORE_INDEX
    case["hidden"][:] = math.nan
    if rows == 0:
        case |= {name: case[name][:0] for name in ("hidden", "labels", "ce_weight", "kd_weight")}
        case |= {name: case[name][:, :0] for name in ("source_ids", "source_logprobs")}
        case["cu_seqlens"] = torch.zeros(5, dtype=torch.long)
    result = triton_loss(case, reduction=reduction)
    for name in ("loss", "dhidden", "dweight", "dbias", "ce", "kd", "source_mass", "target_mass"):
        assert not result[name].any(), name


def test_rows_without_an_entry_have_no_kd(triton_check):
    case = small_case()
    case["labels"][5] = 7
    case["source_logprobs"][:, 6] = -math.inf
    case["labels"][6] = 7
    ours, _ = triton_check(case)
    for row in (5, 6):
        assert ours["kd"][row] == ours["source_mass"][row] == ours["target_mass"][row] == 0
        assert ours["ce"][row] > 0


@pytest.mark.parametrize("K", [4, 40])
def test_duplicate_ids_add_their_mass(triton_loss, K):
    """Also where the duplicates are further apart than one block of the comparison."""
    case = make_case(N=4, S=1, B=1, K=K)
    case["source_ids"][..., (0, K - 1)] = 9
    merged = copy.deepcopy(case)
    merged["source_ids"][..., K - 1] = -1
    merged["source_logprobs"][..., 0] = case["source_logprobs"][..., (0, K - 1)].logsumexp(-1)
    twice, once = triton_loss(case), triton_loss(merged)
    for name in twice:
        torch.testing.assert_close(twice[name], once[name], rtol=2e-6, atol=1e-6)


def test_padding_may_hold_any_log_probability(triton_loss):
    case = small_case()
    poisoned = copy.deepcopy(case)
    poisoned["source_logprobs"][poisoned["source_ids"] < 0] = math.nan
    expected, found = triton_loss(case), triton_loss(poisoned)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


INVALID = {
    "id beyond the vocabulary": ("source_ids", lambda x: x.index_fill(1, torch.tensor([1]), 2**31 - 1)),
    "id below padding": ("source_ids", lambda x: x.index_fill(1, torch.tensor([1]), -5)),
    "label beyond the vocabulary": ("labels", lambda x: x.index_fill(0, torch.tensor([1]), 83)),
    "negative label": ("labels", lambda x: x.index_fill(0, torch.tensor([1]), -1)),
    "probabilities": ("source_logprobs", lambda x: x.index_fill(1, torch.tensor([1]), 0.5)),
    "NaN": ("source_logprobs", lambda x: x.index_fill(1, torch.tensor([1]), math.nan)),
    "log of a tail mass": ("source_tail", lambda x: x.index_fill(1, torch.tensor([1]), -2.0)),
    "NaN tail": ("source_tail", lambda x: x.index_fill(1, torch.tensor([1]), math.nan)),
    "source out of range": ("source_index", lambda x: x.index_fill(0, torch.tensor([1]), 3)),
}


@pytest.mark.parametrize(("name", "change"), INVALID.values(), ids=INVALID.keys())
def test_a_row_with_a_value_out_of_range_is_nan_and_no_other(triton_loss, monkeypatch, name, change):
    monkeypatch.setattr(op_module, "check_values", lambda *args: None)  # as on a GPU, where it would wait for the data
    case = make_case(N=4)
    case["labels"][:3] = 7
    if name == "source_index":
        case |= {"source_ce": None, "source_index": torch.ones(4).long()}
    if name == "source_tail":
        case["source_tail"] = torch.zeros(3, 4)
    expected = triton_loss(case)
    case[name] = change(case[name])
    found = triton_loss(case)
    others = torch.arange(4) != 1
    assert torch.isnan(found["loss"])
    assert torch.isnan(found["ce"][1] + found["kd"][1])
    for stat in ("ce", "kd", "target_mass", "source_mass"):
        assert torch.equal(found[stat][others], expected[stat][others])
    assert torch.equal(found["dhidden"][others], expected["dhidden"][others])


def test_bounds_that_end_early_make_the_rows_beyond_them_nan(triton_loss, monkeypatch):
    monkeypatch.setattr(op_module, "check_values", lambda *args: None)
    case = small_case(cu_seqlens=torch.tensor([0, 2, 4, 6, 7]))
    case["labels"][:] = 7
    found = triton_loss(case, reduction="none")
    assert torch.isnan(found["loss"]).tolist() == [False] * 7 + [True] * 3


# Numerics


@pytest.mark.parametrize("gap", [10.0, 20.0])
@pytest.mark.parametrize("tail_mass", [1e-7, 0.3])
@pytest.mark.parametrize("label", [1, 40])
def test_the_bucket_is_exact_when_the_target_keeps_almost_nothing_outside(triton_loss, gap, tail_mass, label):
    z = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    z[:, :3] += gap
    case = with_logits(
        z, labels=torch.tensor([label]), source_ids=torch.tensor([[[0, 1, 2]]]),
        source_logprobs=torch.tensor([[[0.5, 0.3, 0.2]]]).log(), source_tail=torch.tensor([[tail_mass]]),
        ce_weight=torch.tensor([0.0]), kd_weight=torch.tensor([1.0]),
    )  # fmt: skip
    ours = triton_loss(case)
    truth = run(fusion_loss_reference, case, upcast=torch.float64)
    torch.testing.assert_close(ours["loss"].double(), truth["loss"], rtol=2e-6, atol=1e-7)
    # Column by column, not against the largest: outside they are smaller by orders of magnitude.
    outside = slice(3, None)
    torch.testing.assert_close(ours["dhidden"][0, outside].double(), truth["dhidden"][0, outside], rtol=1e-5, atol=0)


def test_a_target_without_mass_outside_stays_finite(triton_check):
    z = torch.full((2, 20), -200.0)
    z[:, :2] = 50.0
    case = with_logits(
        z, labels=torch.tensor([0, 7]), source_ids=torch.tensor([[[0, 1]]]).expand(1, 2, 2),
        source_logprobs=torch.tensor([[[0.6, 0.3]]]).log().expand(1, 2, 2), beta=1.0,
    )  # fmt: skip
    triton_check(case)


def test_mass_above_one_by_rounding_is_divided_out(triton_check):
    case = small_case(S=1, B=1)
    case["source_ids"] = torch.arange(6, dtype=torch.int32).expand(1, ROWS, 6).clone()
    logits = torch.randn(1, ROWS, 6, generator=torch.Generator().manual_seed(0))
    triton_check(case | {"source_logprobs": logits.log_softmax(-1) + 1e-3})


def test_ids_that_cover_the_vocabulary_leave_no_bucket(triton_check):
    case = small_case(V=6, K=6)
    case["source_ids"] = torch.arange(6, dtype=torch.int32).expand(3, ROWS, 6).clone()
    case["source_logprobs"] -= 1e-6
    for temperature in (1.0, 0.25):
        triton_check(case, temperature=temperature)


@pytest.mark.parametrize("spread", [20.0, 80.0])
def test_large_logits(triton_check, spread):
    case = make_case(N=14, spread=spread)
    triton_check(case)
    triton_check(case, tail="renormalize", temperature=3.0)


def test_logits_near_eighty_keep_their_probabilities(triton_loss):
    z = 80 + torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    case = with_logits(z, labels=torch.arange(9), reduction="sum")
    truth = run(fusion_loss_reference, case, upcast=torch.float64)
    torch.testing.assert_close(triton_loss(case)["dhidden"].double(), truth["dhidden"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("height", [3.0, 8.0, 25.0])
@pytest.mark.parametrize("source", [False, True])
def test_small_cross_entropy_keeps_its_digits(triton_loss, height, source):
    z = torch.zeros(1, 100)
    z[0, 4] = height
    case = with_logits(z, labels=torch.tensor([4]))
    if source:
        case |= {"source_ids": torch.tensor([[[4, 7]]]), "source_logprobs": torch.full((1, 1, 2), -1.0), "beta": 0.0}
    ours, truth = triton_loss(case), run(fusion_loss_reference, case, upcast=torch.float64)
    torch.testing.assert_close(ours["loss"].double(), truth["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours["dhidden"].double(), truth["dhidden"], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("size", "softcap"), [(1.0, 1.0), (30.0, 1.0), (50.0, 1000.0)])
def test_a_softcap_keeps_small_and_large_logits(triton_check, size, softcap):
    """tanh is computed from exp, by a series where that would cancel: 6e-8 of a softcap of 1000 shows."""
    logits = torch.linspace(-size, size, 6 * 40).view(6, 40)
    triton_check(with_logits(logits, labels=torch.arange(6), reduction="sum"), softcap=softcap)


@pytest.mark.parametrize("gap", [0.0, 1e-3, 5e-2])
def test_target_close_to_the_source(triton_check, gap):
    case = small_case(S=1, B=1, K=6)
    logits = case["hidden"] @ case["weight"].T + case["bias"]
    nearby = logits + gap * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    top = nearby.log_softmax(1).topk(6)
    case |= {"source_ids": top.indices[None], "source_logprobs": top.values[None], "ce_weight": torch.zeros(ROWS)}
    triton_check(case, scale=1 / (case["labels"] != IGNORE_INDEX).sum().item())


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_masked_columns_of_the_vocabulary(triton_check, softcap):
    """A bias of -inf, as for rows of the head beyond the tokenizer; under a softcap that is a finite logit."""
    case = small_case(S=1, B=1, softcap=softcap)
    case["labels"][case["labels"] >= 80] = 0
    case["source_ids"] %= 80
    case["source_ids"][..., 5] = 81
    case["source_logprobs"][..., 5] = -math.inf
    case["bias"][80:] = -math.inf
    for options in ({}, {"temperature": 2.0}, {"tail": "renormalize"}):
        triton_check(case, **options)
