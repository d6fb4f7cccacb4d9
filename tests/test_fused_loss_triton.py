"""The Triton path of the fused loss where it differs from the plain one: blocks, chunks, strides, values out of range.

It runs on a GPU if there is one, and otherwise in Triton's interpreter. What both paths must do stands in test_fused_loss.py.
"""

import math
from functools import partial

import pytest
import torch
from loss_checks import DIFFERENTIABLE, make_case, on, run

from profuser.kernels import fused_loss as op_module
from profuser.kernels import fused_loss_triton as driver
from profuser.kernels.common import chunk_rows_gpu
from profuser.loss import fused_linear_fusion_loss

pytestmark = [
    pytest.mark.usefixtures("small_blocks"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
ROWS = 10  # few, because a program takes a millisecond in the interpreter
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
    "shape",
    [(1, 1, 2, 1, 1, 1), (5, 3, 7, 2, 1, 2), (9, 17, 251, 4, 9, 5), (6, 8, 128, 1, 33, 1), (4, 5, 300, 2, 128, 2)],
)
def test_ragged_shapes_and_chunks_cost_no_accuracy(triton_check, shape):
    N, D, V, S, K, B = shape
    # The KL of the single row is small compared with its terms, so the scale of the terms is what counts.
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
    assert chunk_rows_gpu(100_000, 32000, 5000) == 2560  # D/2 = 2500, rounded up to a multiple of 128
    assert chunk_rows_gpu(8192, 1000, 64, max_chunk_bytes=4000 * 10 + 1) == 10
    assert chunk_rows_gpu(8192, 1000, 64, max_chunk_bytes=1) == 1
    assert chunk_rows_gpu(0, 1000, 64) == 1


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("mixed", [False, True])
def test_rows_without_a_label_are_left_out_by_a_bound(device, poisoned_buffers, monkeypatch, reduction, mixed):
    case = small_case(reduction=reduction)
    if mixed:
        del case["source_ce"]
        case |= {"source_weight": torch.rand(3, ROWS), "source_tail": torch.rand(3, ROWS) / 2}
    labelled = int((case["labels"] != -100).sum())
    assert labelled < ROWS - 1
    computed = []
    launch = driver.fused_loss_triton
    monkeypatch.setattr(driver, "fused_loss_triton", lambda *a: computed.append(len(a[0].labels)) or launch(*a))
    of_all = run(fused_linear_fusion_loss, case, device=device, impl="triton")
    for bound in (labelled, labelled + 1):
        bounded = run(fused_linear_fusion_loss, case, device=device, impl="triton", valid_rows=bound)
        for name, value in of_all.items():
            torch.testing.assert_close(bounded[name], value, msg=name)
    assert set(computed) == {labelled, labelled + 1, ROWS}  # without a bound all of them are


def test_a_bound_that_is_too_low_makes_loss_and_gradients_nan(device, monkeypatch):
    monkeypatch.setattr(op_module, "check_values", lambda *arguments: None)  # as on a GPU, where values are not read
    labelled = int((small_case()["labels"] != -100).sum())
    for bound in (0, 2, labelled - 1):
        rows = fused_linear_fusion_loss(**on(device, small_case()), impl="triton", valid_rows=bound, reduction="none")
        assert rows.isnan().all()
        case = on(device, small_case())
        loss = fused_linear_fusion_loss(**case, impl="triton", valid_rows=bound)
        loss.backward()
        assert loss.isnan()
        assert case["weight"].grad.isnan().all()
    case = on(device, small_case())
    loss = fused_linear_fusion_loss(**case, impl="triton", valid_rows=2)
    loss.backward()
    assert loss.isnan()
    assert case["weight"].grad.isnan().all()
    assert case["hidden"].grad.isnan().any()


def test_mixed_dtypes_multiply_in_the_dtype_of_hidden(triton_loss):
    case = small_case()
    rounded = case | {"hidden": case["hidden"].bfloat16(), "weight": case["weight"].bfloat16()}
    mixed = case | {"hidden": rounded["hidden"]}
    ours, expected = triton_loss(mixed), triton_loss(rounded)
    assert ours["dhidden"].dtype == torch.bfloat16
    assert ours["dweight"].dtype == torch.float32
    for name in expected:
        torch.testing.assert_close(ours[name].to(expected[name].dtype), expected[name])


def test_strided_operands_give_the_same(triton_loss, device):
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


# Values out of range


INVALID = {
    "id beyond the vocabulary": ("source_ids", lambda x: x.index_fill(1, torch.tensor([1]), 2**31 - 1)),
    "id below padding": ("source_ids", lambda x: x.index_fill(1, torch.tensor([1]), -5)),
    "label beyond the vocabulary": ("labels", lambda x: x.index_fill(0, torch.tensor([1]), 83)),
    "negative label": ("labels", lambda x: x.index_fill(0, torch.tensor([1]), -1)),
    "probabilities": ("source_logprobs", lambda x: x.index_fill(1, torch.tensor([1]), 0.5)),
    "mass above 1": ("source_logprobs", lambda x: x.index_fill(1, torch.tensor([1]), 0.0)),
    "NaN": ("source_logprobs", lambda x: x.index_fill(1, torch.tensor([1]), math.nan)),
    "log of a tail mass": ("source_tail", lambda x: x.index_fill(1, torch.tensor([1]), -2.0)),
    "NaN tail": ("source_tail", lambda x: x.index_fill(1, torch.tensor([1]), math.nan)),
    "source out of range": ("source_index", lambda x: x.index_fill(0, torch.tensor([1]), 3)),
}


@pytest.mark.parametrize(("name", "change"), INVALID.values(), ids=INVALID.keys())
def test_a_row_with_a_value_out_of_range_is_nan_and_no_other(triton_loss, monkeypatch, name, change):
    # On a GPU values are not checked, because the check would wait for the data.
    monkeypatch.setattr(op_module, "check_values", lambda *args: None)
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
