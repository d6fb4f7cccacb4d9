"""The Triton path of the fused loss against the dense fp64 reference: on a GPU where there is one, else interpreted.

Interpreted, a program costs a millisecond or more, so the cases are small and the blocks are made smaller than V.
"""

import copy
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from loss_checks import DIFFERENTIABLE, assert_as_accurate_as_reference, make_case, on, run, with_logits
from test_fused_loss_autograd import LargestTensor, op_arguments

from profuser.kernels import fused_loss as op_module
from profuser.kernels import fused_loss_triton as driver
from profuser.kernels.common import IGNORE_INDEX, chunk_rows_gpu
from profuser.kernels.fused_loss import fused_loss
from profuser.kernels.reference import fusion_loss_reference
from profuser.loss import fused_linear_fusion_loss

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
ROWS = 10
small_case = partial(make_case, N=ROWS)


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    """V=83 becomes a whole block of columns and a masked one."""
    if "gpu" not in request.keywords:
        monkeypatch.setattr(driver, "dense_config", lambda *args: (64, 1))


@pytest.fixture
def loss(device):
    """`run` of the Triton path."""
    return partial(run, fused_linear_fusion_loss, device=device, impl="triton")


@pytest.fixture
def check(device):
    return partial(assert_as_accurate_as_reference, device=device, impl="triton")


@pytest.fixture
def poisoned_buffers(monkeypatch):
    """Every buffer begins as NaN, so that what no kernel writes shows in the results."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        buffer = empty(*args, **kwargs)
        return buffer.fill_(math.nan if buffer.is_floating_point() else -7)

    monkeypatch.setattr(torch, "empty", poisoned)


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
def test_values_and_gradients_are_as_accurate_as_the_dense_reference(check, dtype, tail, temperature):
    check(small_case(dtype, spread=2.0), tail=tail, temperature=temperature)


@pytest.mark.parametrize(
    ("softcap", "logit_scale", "biased"),
    [(None, 1.0, False), (None, 0.3, True), (3.0, 1.0, False), (3.0, 0.3, True), (3.0, 0.3, False)],
)
def test_softcap_scale_and_bias_chain(check, softcap, logit_scale, biased):
    case = small_case(spread=2.0, softcap=softcap, logit_scale=logit_scale)
    if not biased:
        case["bias"] = None
    check(case, temperature=2.0 if biased else 1.0)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 2, 1, 1, 1), (5, 3, 7, 2, 1, 2), (9, 17, 251, 4, 9, 5), (6, 8, 128, 1, 33, 1), (4, 5, 300, 2, 128, 2)],
)
def test_ragged_shapes_and_chunks(check, shape):
    N, D, V, S, K, B = shape
    # The single row's KL is small against its terms.
    check(make_case(N=N, D=D, V=V, S=S, K=K, B=B), chunk_size=4, scale=1.0 if N == 1 else 0.0)


@pytest.mark.parametrize("block", [16, 128, 1024])
def test_the_block_of_columns_does_not_matter(check, monkeypatch, block):
    monkeypatch.setattr(driver, "dense_config", lambda *args: (block, 1))
    check(small_case(N=4, B=1), temperature=1.5, softcap=4.0)


def test_chunks_do_not_change_the_result(loss, poisoned_buffers):
    case = small_case()
    whole = loss(case, chunk_size=1000)
    for options in ({"chunk_size": 4}, {"max_chunk_bytes": 3 * 83 * 4}):
        parts = loss(case, **options)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-6)


def test_chunks_hold_many_rows_and_no_more_than_the_caps():
    assert chunk_rows_gpu(8192, 32000, 4096) == 2048
    assert chunk_rows_gpu(100, 32000, 4096) == 100
    assert chunk_rows_gpu(100_000, 32000, 5000) == 2560  # D/2 = 2500, to a multiple of 128
    assert chunk_rows_gpu(8192, 1000, 64, max_chunk_bytes=4000 * 10 + 1) == 10
    assert chunk_rows_gpu(8192, 1000, 64, max_chunk_bytes=1) == 1
    assert chunk_rows_gpu(0, 1000, 64) == 1


def test_mixed_dtypes_multiply_in_the_dtype_of_hidden(loss):
    case = small_case()
    rounded = case | {"hidden": case["hidden"].bfloat16(), "weight": case["weight"].bfloat16()}
    mixed = case | {"hidden": rounded["hidden"]}
    ours, expected = loss(mixed), loss(rounded)
    assert ours["dhidden"].dtype == torch.bfloat16
    assert ours["dweight"].dtype == torch.float32
    for name in expected:
        torch.testing.assert_close(ours[name].to(expected[name].dtype), expected[name])


def test_strided_operands(loss):
    case = small_case()
    expected = loss(case)
    for name in ("hidden", "weight"):
        case[name] = case[name].T.contiguous().T
    for name in ("source_ids", "source_logprobs"):
        case[name] = case[name].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for name in ("labels", "ce_weight", "kd_weight", "bias"):
        case[name] = case[name].repeat_interleave(2)[::2]
    case["source_tail"] = torch.full((ROWS, 3), 0.25).T
    found = loss(case | {"source_tail": None})
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    contiguous = loss(case | {"source_tail": torch.full((3, ROWS), 0.25)})
    assert torch.equal(loss(case)["loss"], contiguous["loss"])


def test_source_tail_scales_the_entries_to_what_it_leaves(check):
    case = small_case()
    case["source_tail"] = torch.rand(3, ROWS, generator=torch.Generator().manual_seed(0))
    check(case)
    # 0 and 1 are legal ends: no bucket, and nothing but the bucket.
    case["source_tail"][:, ::2] = 0
    case["source_tail"][:, 1::2] = 1
    check(case)


# Rows


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_write_zeros_even_when_they_hold_garbage(loss, reduction, poisoned_buffers):
    clean = small_case()
    ignored = clean["labels"] == IGNORE_INDEX
    assert ignored.any()
    poisoned = copy.deepcopy(clean)
    for name in ("hidden", "ce_weight", "kd_weight"):
        poisoned[name][ignored] = math.nan
    poisoned["source_logprobs"][:, ignored] = math.nan
    poisoned["source_ids"][:, ignored] = 2**31 - 1
    expected, found = loss(clean, reduction=reduction), loss(poisoned, reduction=reduction)
    for name in expected:
        assert torch.isfinite(found[name]).all(), name
        assert torch.equal(found[name], expected[name]), name
    for name in ("dhidden", "ce", "kd", "source_mass", "target_mass"):
        assert not found[name][ignored].any(), name


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("rows", [ROWS, 0])
def test_a_batch_without_valid_rows_is_zero_with_zero_gradients(loss, reduction, rows, poisoned_buffers):
    case = small_case()
    case["labels"][:] = IGNORE_INDEX
    case["hidden"][:] = math.nan
    if rows == 0:
        case |= {name: case[name][:0] for name in ("hidden", "labels", "ce_weight", "kd_weight")}
        case |= {name: case[name][:, :0] for name in ("source_ids", "source_logprobs")}
        case["cu_seqlens"] = torch.zeros(5, dtype=torch.long)
    result = loss(case, reduction=reduction)
    for name in ("loss", "dhidden", "dweight", "dbias", "ce", "kd", "source_mass", "target_mass"):
        assert not result[name].any(), name


def test_rows_without_an_entry_have_no_kd(check):
    case = small_case()
    case["labels"][5] = 7
    case["source_logprobs"][:, 6] = -math.inf
    case["labels"][6] = 7
    ours, _ = check(case)
    for row in (5, 6):
        assert ours["kd"][row] == ours["source_mass"][row] == ours["target_mass"][row] == 0
        assert ours["ce"][row] > 0


@pytest.mark.parametrize("K", [4, 40])
def test_duplicate_ids_add_their_mass(loss, K):
    """Also where the duplicates are further apart than one block of the comparison."""
    case = make_case(N=4, S=1, B=1, K=K)
    case["source_ids"][..., (0, K - 1)] = 9
    merged = copy.deepcopy(case)
    merged["source_ids"][..., K - 1] = -1
    merged["source_logprobs"][..., 0] = case["source_logprobs"][..., (0, K - 1)].logsumexp(-1)
    twice, once = loss(case), loss(merged)
    for name in twice:
        torch.testing.assert_close(twice[name], once[name], rtol=2e-6, atol=1e-6)


def test_padding_may_hold_any_log_probability(loss):
    case = small_case()
    poisoned = copy.deepcopy(case)
    poisoned["source_logprobs"][poisoned["source_ids"] < 0] = math.nan
    expected, found = loss(case), loss(poisoned)
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
def test_a_row_with_a_value_out_of_range_is_nan_and_no_other(loss, monkeypatch, name, change):
    monkeypatch.setattr(op_module, "check_values", lambda *args: None)  # as on a GPU, where it would wait for the data
    case = small_case()
    case["labels"][:3] = 7
    if name == "source_index":
        case |= {"source_ce": None, "source_index": torch.ones(ROWS).long()}
    if name == "source_tail":
        case["source_tail"] = torch.zeros(3, ROWS)
    expected = loss(case)
    case[name] = change(case[name])
    found = loss(case)
    others = torch.arange(ROWS) != 1
    assert torch.isnan(found["loss"])
    assert torch.isnan(found["ce"][1] + found["kd"][1])
    for stat in ("ce", "kd", "target_mass", "source_mass"):
        assert torch.equal(found[stat][others], expected[stat][others])
    assert torch.equal(found["dhidden"][others], expected["dhidden"][others])


def test_bounds_that_end_early_make_the_rows_beyond_them_nan(loss, monkeypatch):
    monkeypatch.setattr(op_module, "check_values", lambda *args: None)
    case = small_case(cu_seqlens=torch.tensor([0, 2, 4, 6, 7]))
    case["labels"][:] = 7
    found = loss(case, reduction="none")
    assert torch.isnan(found["loss"]).tolist() == [False] * 7 + [True] * 3


# Numerics


@pytest.mark.parametrize("gap", [10.0, 20.0])
@pytest.mark.parametrize("tail_mass", [1e-7, 0.3])
@pytest.mark.parametrize("label", [1, 40])
def test_the_bucket_is_exact_when_the_target_keeps_almost_nothing_outside(loss, gap, tail_mass, label):
    z = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    z[:, :3] += gap
    case = with_logits(
        z, labels=torch.tensor([label]), source_ids=torch.tensor([[[0, 1, 2]]]),
        source_logprobs=torch.tensor([[[0.5, 0.3, 0.2]]]).log(), source_tail=torch.tensor([[tail_mass]]),
        ce_weight=torch.tensor([0.0]), kd_weight=torch.tensor([1.0]),
    )  # fmt: skip
    ours = loss(case)
    truth = run(fusion_loss_reference, case, upcast=torch.float64)
    torch.testing.assert_close(ours["loss"].double(), truth["loss"], rtol=2e-6, atol=1e-7)
    # Column by column, not against the largest: outside they are smaller by orders of magnitude.
    outside = slice(3, None)
    torch.testing.assert_close(ours["dhidden"][0, outside].double(), truth["dhidden"][0, outside], rtol=1e-5, atol=0)


def test_a_target_without_mass_outside_stays_finite(check):
    z = torch.full((2, 20), -200.0)
    z[:, :2] = 50.0
    case = with_logits(
        z, labels=torch.tensor([0, 7]), source_ids=torch.tensor([[[0, 1]]]).expand(1, 2, 2),
        source_logprobs=torch.tensor([[[0.6, 0.3]]]).log().expand(1, 2, 2), beta=1.0,
    )  # fmt: skip
    check(case)


def test_mass_above_one_by_rounding_is_divided_out(check):
    case = small_case(S=1, B=1)
    case["source_ids"] = torch.arange(6, dtype=torch.int32).expand(1, ROWS, 6).clone()
    logits = torch.randn(1, ROWS, 6, generator=torch.Generator().manual_seed(0))
    check(case | {"source_logprobs": logits.log_softmax(-1) + 1e-3})


def test_ids_that_cover_the_vocabulary_leave_no_bucket(check):
    case = small_case(V=6, K=6)
    case["source_ids"] = torch.arange(6, dtype=torch.int32).expand(3, ROWS, 6).clone()
    case["source_logprobs"] -= 1e-6
    for temperature in (1.0, 0.25):
        check(case, temperature=temperature)


@pytest.mark.parametrize("spread", [20.0, 80.0])
def test_large_logits(check, spread):
    case = make_case(N=18, spread=spread)
    check(case)
    check(case, tail="renormalize", temperature=3.0)


def test_logits_near_eighty_keep_their_probabilities(loss):
    z = 80 + torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    case = with_logits(z, labels=torch.arange(9), reduction="sum")
    truth = run(fusion_loss_reference, case, upcast=torch.float64)
    torch.testing.assert_close(loss(case)["dhidden"].double(), truth["dhidden"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("height", [3.0, 8.0, 25.0])
@pytest.mark.parametrize("source", [False, True])
def test_small_cross_entropy_keeps_its_digits(loss, height, source):
    z = torch.zeros(1, 100)
    z[0, 4] = height
    case = with_logits(z, labels=torch.tensor([4]))
    if source:
        case |= {"source_ids": torch.tensor([[[4, 7]]]), "source_logprobs": torch.full((1, 1, 2), -1.0), "beta": 0.0}
    ours, truth = loss(case), run(fusion_loss_reference, case, upcast=torch.float64)
    torch.testing.assert_close(ours["loss"].double(), truth["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours["dhidden"].double(), truth["dhidden"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e-4, 0.1, 1.0, 30.0])
def test_a_softcap_keeps_small_and_large_logits(check, size):
    """tanh is computed from exp, by a series where that would cancel."""
    logits = torch.linspace(-size, size, 6 * 40).view(6, 40)
    check(with_logits(logits, labels=torch.arange(6), reduction="sum"), softcap=1.0)


@pytest.mark.parametrize("gap", [0.0, 1e-3, 5e-2])
def test_target_close_to_the_source(check, gap):
    case = small_case(S=1, B=1, K=6)
    logits = case["hidden"] @ case["weight"].T + case["bias"]
    nearby = logits + gap * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    top = nearby.log_softmax(1).topk(6)
    case |= {"source_ids": top.indices[None], "source_logprobs": top.values[None], "ce_weight": torch.zeros(ROWS)}
    check(case, scale=1 / (case["labels"] != IGNORE_INDEX).sum().item())


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_masked_columns_of_the_vocabulary(check, softcap):
    """A bias of -inf, as for rows of the head beyond the tokenizer; under a softcap that is a finite logit."""
    case = small_case(S=1, B=1, softcap=softcap)
    case["labels"][case["labels"] >= 80] = 0
    case["source_ids"] %= 80
    case["source_ids"][..., 5] = 81
    case["source_logprobs"][..., 5] = -math.inf
    case["bias"][80:] = -math.inf
    for options in ({}, {"temperature": 2.0}, {"tail": "renormalize"}):
        check(case, **options)


# Which source


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
    by_row = loss(case | {"cu_seqlens": None, "labels": case["labels"].int()}, source_index=per_row.int(), chunk_size=8)
    assert by_row["winner"].tolist() == per_row.tolist()
    for name in ("loss", "dhidden", "dweight", "dbias", "kd"):
        assert torch.equal(ours[name], by_row[name]), name


def test_without_a_source_it_is_cross_entropy(loss, poisoned_buffers):
    case = {k: v for k, v in small_case().items() if k in ("hidden", "weight", "labels", "bias")}
    for reduction in ("mean", "none"):
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


# Autograd


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_grad_output_scales_the_gradient(loss, reduction):
    case = small_case()
    once, scaled = loss(case, reduction=reduction), loss(case, reduction=reduction, grad_output=-3.7)
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(scaled[f"d{name}"], -3.7 * once[f"d{name}"])


def test_none_weighs_each_row_by_its_grad_output(loss):
    case = small_case()
    grad_output = torch.randn(ROWS, generator=torch.Generator().manual_seed(0))
    grad_output[case["labels"] == IGNORE_INDEX] = math.nan
    truth = run(fusion_loss_reference, case, reduction="none", grad_output=grad_output.nan_to_num())
    ours = loss(case, reduction="none", grad_output=grad_output)
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(ours[f"d{name}"], truth[f"d{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_two_backwards_add_the_gradient_twice(loss, device, reduction):
    case = small_case()
    expected = loss(case, reduction=reduction)
    case = on(device, case)
    total = fused_linear_fusion_loss(**case, reduction=reduction, impl="triton").sum()
    total.backward(retain_graph=True)
    total.backward()
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(case[name].grad.cpu(), 2 * expected[f"d{name}"])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",), DIFFERENTIABLE], ids="-".join)
def test_frozen_parts_get_no_gradient(loss, device, frozen, reduction, poisoned_buffers):
    case = small_case()
    expected = loss(case, reduction=reduction)
    case = on(device, case, frozen)
    result = fused_linear_fusion_loss(**case, reduction=reduction, impl="triton")
    torch.testing.assert_close(result.detach().cpu(), expected["loss"])
    if result.requires_grad:
        result.sum().backward()
    for name in DIFFERENTIABLE:
        if name in frozen:
            assert case[name].grad is None
        else:
            torch.testing.assert_close(case[name].grad.cpu(), expected[f"d{name}"])


def test_a_tied_head_gets_both_gradients(device):
    case = small_case()
    table = case.pop("weight")
    tokens = torch.randint(83, (ROWS,), generator=torch.Generator().manual_seed(0))
    grads = []
    for place, function in ((device, partial(fused_linear_fusion_loss, impl="triton")), ("cpu", fusion_loss_reference)):
        tied = table.to(place, copy=True).requires_grad_()
        moved = {k: v.to(place) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
        function(**(moved | {"hidden": F.embedding(tokens.to(place), tied).tanh(), "weight": tied})).backward()
        grads.append(tied.grad.cpu())
    torch.testing.assert_close(*grads)


def test_gradient_checkpointing_recomputes_the_same(loss, device):
    case = small_case()
    expected = loss(case)
    case = on(device, case)
    hidden, weight = case.pop("hidden"), case.pop("weight")

    def head(hidden, weight):
        return fused_linear_fusion_loss(hidden, weight, **case, impl="triton")

    torch.utils.checkpoint.checkpoint(head, hidden, weight, use_reentrant=False).backward()
    torch.testing.assert_close(hidden.grad.cpu(), expected["dhidden"])
    torch.testing.assert_close(weight.grad.cpu(), expected["dweight"])


def test_distributed_data_parallel(loss, device):
    case = small_case()
    expected = loss(case)

    class HeadWithLoss(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = torch.nn.Parameter(weight)

        def forward(self, **case):
            return fused_linear_fusion_loss(weight=self.weight, **case, impl="triton")

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        case = on(device, case)
        model = torch.nn.parallel.DistributedDataParallel(HeadWithLoss(case.pop("weight").detach()))
        model(**case).backward()
        torch.testing.assert_close(model.module.weight.grad.cpu(), expected["dweight"])
        torch.testing.assert_close(case["hidden"].grad.cpu(), expected["dhidden"])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("sources", [True, False])
def test_opcheck(device, per_row, sources):
    case = make_case(N=5, B=2)
    if not sources:
        case = {k: v for k, v in case.items() if k not in ("source_ids", "source_logprobs", "source_ce", "cu_seqlens")}
    needs = {f"grad_{name}": not per_row for name in DIFFERENTIABLE}
    arguments = op_arguments(on(device, case), per_row=per_row, temperature=2.0, impl="triton", **needs)
    torch.library.opcheck(fused_loss, arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_in_one_graph(loss, device, reduction):
    case = small_case()
    expected = loss(case, reduction=reduction)
    compiled = torch.compile(fused_linear_fusion_loss, fullgraph=True, backend="aot_eager")
    found = run(compiled, case, device=device, reduction=reduction, impl="triton")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_casts_hidden_and_leaves_the_logits_and_the_weight_gradient_in_fp32(loss, device, dtype):
    case = small_case()
    rounded = loss(case | {"hidden": case["hidden"].bfloat16()})
    with torch.autocast(device, dtype=torch.bfloat16):
        found = loss(case | {"hidden": case["hidden"].to(dtype)})
    assert found["dhidden"].dtype == dtype
    assert found["dweight"].dtype == torch.float32
    for name in rounded:
        assert torch.equal(found[name], rounded[name].to(found[name].dtype)), name


# Memory and interface


def test_no_tensor_is_larger_than_a_chunk_of_logits_or_a_gradient(device):
    N, D, V, chunk = 24, 6, 300, 4
    case = on(device, make_case(N=N, D=D, V=V, K=4, temperature=2.0, softcap=3.0))
    sizes = []
    with LargestTensor(sizes, inside="profuser::fused_loss"):
        fused_linear_fusion_loss(**case, chunk_size=chunk, impl="triton").backward()
    padded = V + 4
    assert chunk * padded in sizes
    assert max(sizes) <= max(chunk * padded, N * D, V * D) < N * V


def test_the_driver_reads_nothing_back(device, monkeypatch):
    """No .item(), no data-dependent shape: what would make the host wait for the device."""
    case = on(device, small_case())
    monkeypatch.setattr(op_module, "check_values", lambda *args: None)
    forbidden = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
    with torch.profiler.profile() as profile:
        fused_linear_fusion_loss(**case, impl="triton", chunk_size=4).backward()
    assert not forbidden & {event.key for event in profile.key_averages()}


def test_triton_without_a_gpu_or_the_interpreter_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"needs a CUDA device, hidden is on cpu; use impl=None.*TRITON_INTERPRET=1"):
        fused_linear_fusion_loss(**small_case(), impl="triton")


def test_the_cpu_path_works_without_triton():
    """As on macOS, where it cannot be installed."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from profuser.loss import fused_linear_fusion_loss
hidden, weight = torch.ones(2, 3), torch.ones(5, 3)
print(fused_linear_fusion_loss(hidden, weight, torch.tensor([1, 2])).item())
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(math.log(5))
