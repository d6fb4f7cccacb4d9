"""`left_out`: the gradients have an error that the bound covers, what is said to be exact is, and 0 is the exact loss.

The truth is the exact loss, which other tests compare with the dense reference.
"""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from loss_checks import Case, assert_columns_needed_of_the_chunk_that_needs_most, make_case, run, with_logits
from test_divergences import FAMILY, mixed_case, named

from profuser.kernels import left_out as module
from profuser.kernels.common import IGNORE_INDEX
from profuser.loss import FusedLinearFusionLoss, fused_linear_fusion_loss

ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _thin_where_it_can_be(monkeypatch):
    """Small vocabularies must not fall back to the exact gradient, and several blocks and stand-ins must be met."""
    monkeypatch.setattr(module, "PAYS", 1.0)
    monkeypatch.setattr(module, "BLOCK", 13)
    monkeypatch.setattr(module, "GATHERED", 2)


def peaked(**options: Any) -> Case:
    case = make_case(V=300, spread=4.0, **options)
    return case | {"weight": case["weight"] * 2}


def assert_bounded(
    case: Case, share: float = 0.05, chunk_size: int | None = 8, **options: Any
) -> dict[str, torch.Tensor]:
    """Checks `left_out` against the exact loss: the loss is the same, bias's gradient is exact, and the bound holds."""
    exact = run(fused_linear_fusion_loss, case, chunk_size=chunk_size, **options)
    got = run(fused_linear_fusion_loss, case, chunk_size=chunk_size, left_out=share, **options)
    rounding = ROUNDING[case["hidden"].dtype]
    for name in ("loss", "ce", "kd", "source_mass", "target_mass", "winner"):
        assert torch.equal(got[name], exact[name]), name
    if "dbias" in exact:
        scale = exact["dbias"].abs().max().item()
        torch.testing.assert_close(got["dbias"], exact["dbias"], rtol=rounding, atol=rounding * scale)
    error = (got["dhidden"].double() - exact["dhidden"].double()).norm().item()
    slack = rounding * exact["dhidden"].double().norm().item()
    assert error <= got["hidden_error_bound"].item() + slack
    assert got["left_out_share"].item() <= share * (1 + 1e-6)
    got["error"] = torch.tensor(error)
    return got


# The gradient


@pytest.mark.parametrize("member", FAMILY, ids=named)
def test_every_member_keeps_within_the_bound(member):
    for case in (peaked(dtype=torch.float64), mixed_case(dtype=torch.float64, V=300, spread=4.0)):
        got = assert_bounded(case, temperature=1.5, **member)
        assert got["kept_share"] < 1
        assert got["left_out_share"] > 0
        assert 0 < got["hidden_error_bound"] <= 12 * got["error"]  # it says something


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {}, {"temperature": 2.0}, {"z_loss": 1e-2, "logit_scale": 0.7}, {"softcap": 6.0, "temperature": 1.5},
        {"label_smoothing": 0.2, "z_loss": 1e-2}, {"label_smoothing": 0.2, "temperature": 0.7}, {"reduction": "sum"},
    ],
    ids=str,
)  # fmt: skip
def test_every_option_keeps_within_the_bound(dtype, options):
    got = assert_bounded(peaked(dtype=dtype), **options)
    assert got["kept_share"] < 1
    assert got["error"] > 0


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 2.0}, {"softcap": 6.0}, {"softcap": 6.0, "temperature": 1.5}], ids=str
)
def test_the_rows_of_the_extension_leave_out_what_torchs_do(options):
    """fp32 goes through the C++ extension, which also adds up the columns, and fp64 through torch."""
    ours, theirs = (
        run(fused_linear_fusion_loss, peaked(dtype=dtype), chunk_size=8, left_out=0.05, **options)
        for dtype in (torch.float32, torch.float64)
    )
    assert 0 < theirs["left_out_share"] < 0.05
    for name in ("left_out_share", "kept_share", "hidden_error_bound"):
        torch.testing.assert_close(ours[name].double(), theirs[name], rtol=1e-4, atol=0)


def test_the_lifted_entries_are_exact():
    """Each row's gradient at its gold and kept ids is that of the exact loss, and the row's sum is kept."""
    case = peaked(dtype=torch.float64)
    logits = case["hidden"] @ case["weight"].T
    case = with_logits(logits) | {
        name: case[name] for name in ("labels", "source_ids", "source_logprobs", "source_ce", "cu_seqlens", "kd_weight")
    }
    exact = run(fused_linear_fusion_loss, case, chunk_size=8)["dhidden"]
    got = run(fused_linear_fusion_loss, case, chunk_size=8, left_out=0.3)["dhidden"]
    valid = case["labels"] != IGNORE_INDEX
    assert not torch.equal(got, exact)
    torch.testing.assert_close(got.sum(1), exact.sum(1), rtol=1e-10, atol=1e-12)
    of_source = torch.searchsorted(case["cu_seqlens"][1:], torch.arange(len(valid)), right=True)
    winner = case["source_ce"].argmin(0)[of_source]
    ids = case["source_ids"][winner, torch.arange(len(valid))].long()
    ids = torch.cat([torch.where(ids < 0, case["labels"][:, None], ids), case["labels"][:, None]], 1)[valid]
    torch.testing.assert_close(got[valid].gather(1, ids), exact[valid].gather(1, ids), rtol=1e-12, atol=1e-15)


def test_equal_rows_lose_nothing():
    """The stand-in of rows that are multiples of each other is what was left out."""
    case = peaked(dtype=torch.float64, S=1, B=1)
    for name in ("source_ids", "source_logprobs", "source_ce", "cu_seqlens", "kd_weight"):
        del case[name]
    case |= {"hidden": case["hidden"][:1].expand(37, 20).clone(), "labels": torch.full((37,), 5)}
    exact = run(fused_linear_fusion_loss, case)
    got = run(fused_linear_fusion_loss, case, left_out=0.2)
    assert got["left_out_share"] > 0.1
    for name in ("dhidden", "dweight", "dbias"):
        torch.testing.assert_close(got[name], exact[name], rtol=1e-10, atol=1e-12)


def test_a_row_alone_loses_nothing():
    case = peaked(dtype=torch.float64)
    exact = run(fused_linear_fusion_loss, case)
    got = run(fused_linear_fusion_loss, case, left_out=0.3, chunk_size=1)
    assert got["left_out_share"] > 0.1
    for name in ("dhidden", "dweight", "dbias"):
        torch.testing.assert_close(got[name], exact[name], rtol=1e-10, atol=1e-12)


def fuzzed(kind: str, rows: int, seed: int) -> Case:
    """Logits of one kind, over a random head; with one kept id of five among them being the gold one."""
    g = torch.Generator().manual_seed(seed)
    V, D = 97, 12
    height = {"random": 1.0, "peaked": 5.0, "one-hot": 60.0, "uniform": 1e-3}[kind]
    weight = torch.randn(V, D, generator=g, dtype=torch.float64)
    labels = torch.randint(V, (rows,), generator=g)
    hidden = torch.randn(rows, D, generator=g, dtype=torch.float64)
    if kind in ("peaked", "one-hot"):
        hidden = 0.3 * hidden + weight[labels] / weight[labels].norm(dim=1, keepdim=True)
    logprobs, ids = torch.randn(1, rows, V, generator=g).log_softmax(-1).topk(5)
    ids[0, ::5, 4] = labels[::5]
    return {
        "hidden": hidden * height, "weight": weight, "labels": labels, "source_ids": ids, "source_logprobs": logprobs,
        "kd_weight": 3 * torch.rand(rows, generator=g),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["random", "peaked", "one-hot", "uniform"])
@pytest.mark.parametrize("batches", [10, pytest.param(310, marks=pytest.mark.long)])
def test_the_bound_holds_on_fuzzed_rows(kind, batches):
    for seed, share in zip(range(batches), itertools.cycle((1e-4, 0.01, 0.2, 0.7))):
        assert_bounded(fuzzed(kind, 9, seed), share=share, chunk_size=4, divergence=("forward_kl", "tvd")[seed % 2])


# What it leaves alone


@pytest.mark.parametrize("share", [0.0, 1e-12])
def test_nothing_left_out_is_the_exact_loss(share, monkeypatch):
    monkeypatch.setattr(module, "PAYS", 0.7)
    case = peaked()
    exact = run(fused_linear_fusion_loss, case, chunk_size=8)
    got = run(fused_linear_fusion_loss, case, chunk_size=8, left_out=share)
    assert all(torch.equal(got[name], value) for name, value in exact.items())
    assert share or got.keys() == exact.keys()
    if share:
        assert [got[name].item() for name in ("left_out_share", "kept_share", "hidden_error_bound")] == [0, 1, 0]


def test_flat_logits_are_computed_as_a_whole(monkeypatch):
    monkeypatch.setattr(module, "PAYS", 0.7)
    case = make_case(spread=0.01) | {"bias": None}
    exact = run(fused_linear_fusion_loss, case)
    got = run(fused_linear_fusion_loss, case, left_out=0.01)
    assert got["kept_share"] == 1
    assert all(torch.equal(got[name], value) for name, value in exact.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_columns_needed_are_those_of_the_chunk_that_needs_most(dtype):
    assert_columns_needed_of_the_chunk_that_needs_most(peaked(dtype=dtype, N=32), left_out=0.05)


# Rows, columns and operands that are easily forgotten


def test_ignored_rows_may_hold_anything_and_may_fill_chunks():
    case = peaked(dtype=torch.float64)
    case["labels"][8:24] = IGNORE_INDEX
    before = assert_bounded(case)
    ignored = case["labels"] == IGNORE_INDEX
    case["hidden"][ignored] = torch.nan
    after = run(fused_linear_fusion_loss, case, chunk_size=8, left_out=0.05)
    for name in ("loss", "dhidden", "dweight", "dbias"):
        assert torch.equal(after[name], before[name]), name
    assert (after["dhidden"][ignored] == 0).all()
    case["labels"][:] = IGNORE_INDEX
    nothing = run(fused_linear_fusion_loss, case, left_out=0.05)
    assert [nothing[name].item() for name in ("left_out_share", "kept_share", "hidden_error_bound")] == [0, 1, 0]
    assert not any(nothing[name].any() for name in ("dhidden", "dweight", "dbias"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_padded_entries_are_no_part_of_the_mass(dtype):
    """Slots without an entry point at the label, whose gradient counts once."""
    case = peaked(dtype=dtype)
    padded = dict(case)
    for name, value in (("source_ids", -1), ("source_logprobs", 0.0)):
        padded[name] = torch.nn.functional.pad(case[name], (0, 20), value=value)
    found, expected = (run(fused_linear_fusion_loss, one, left_out=0.05, chunk_size=8) for one in (padded, case))
    for name in ("left_out_share", "kept_share", "columns_needed"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=0)


def test_a_vocabulary_smaller_than_the_entries():
    case = make_case(dtype=torch.float64, V=4, K=6, spread=4.0)
    assert_bounded(case, share=0.5)
    assert_bounded(case, share=0.5, temperature=2.0)


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"label_smoothing": 0.1}], ids=str)
def test_columns_that_cannot_be_have_no_gradient(options):
    case = peaked(dtype=torch.float64, seed=3)
    named_ids = set(case["labels"].tolist()) | set(case["source_ids"].flatten().tolist())
    free = [j for j in range(300) if j not in named_ids][:20]
    case["bias"][free] = -torch.inf
    exact = run(fused_linear_fusion_loss, case, chunk_size=8, **options)
    got = run(fused_linear_fusion_loss, case, chunk_size=8, left_out=0.05, **options)
    assert got["kept_share"] < 1
    assert got["dhidden"].isfinite().all()
    torch.testing.assert_close(got["dbias"][free], exact["dbias"][free])
    torch.testing.assert_close(got["dweight"][free], exact["dweight"][free])


def test_rows_without_any_weight_add_nothing():
    case = peaked(dtype=torch.float64)
    case["ce_weight"][:] = 0
    case["kd_weight"][:20] = 0
    got = assert_bounded(case)
    assert (got["dhidden"][:20] == 0).all()
    case["kd_weight"][:] = 0
    assert not run(fused_linear_fusion_loss, case, left_out=0.05)["dweight"].any()


def test_a_row_that_is_nan_shows():
    case = peaked()
    case["hidden"][0] = torch.nan
    got = run(fused_linear_fusion_loss, case, left_out=0.05, chunk_size=8)
    assert got["loss"].isnan()
    assert got["dweight"].isnan().all()
    assert got["dhidden"][0].isnan().all()


def test_transposed_operands_and_frozen_parts_give_the_same():
    case = peaked()
    whole = run(fused_linear_fusion_loss, case, left_out=0.05, chunk_size=8)
    strided = case | {name: case[name].t().contiguous().t() for name in ("hidden", "weight")}
    again = run(fused_linear_fusion_loss, strided, left_out=0.05, chunk_size=8)
    for name in ("dhidden", "dweight", "dbias"):
        torch.testing.assert_close(again[name], whole[name], rtol=1e-5, atol=1e-7)
    for name in ("hidden", "weight"):
        leaf = case[name].clone().requires_grad_()
        loss = fused_linear_fusion_loss(**case | {name: leaf}, left_out=0.05, chunk_size=8)
        (grad,) = torch.autograd.grad(loss, leaf)
        assert torch.equal(grad, whole[f"d{name}"])


# Around it


def test_accumulated_halves_add_up_within_their_bounds():
    case = peaked(dtype=torch.float64, S=1, B=1, N=32, reduction="sum")
    del case["source_ce"], case["cu_seqlens"]
    exact = run(fused_linear_fusion_loss, case)
    halves = []
    for rows in (slice(16), slice(16, None)):
        half = case | {name: case[name][rows] for name in ("hidden", "labels", "ce_weight", "kd_weight")}
        half |= {name: case[name][:, rows] for name in ("source_ids", "source_logprobs")}
        halves.append(assert_bounded(half))
    torch.testing.assert_close(sum(half["loss"] for half in halves), exact["loss"])
    error = (torch.cat([half["dhidden"] for half in halves]) - exact["dhidden"]).norm()
    assert error <= sum(half["hidden_error_bound"] ** 2 for half in halves) ** 0.5


def test_the_bound_is_that_of_the_reduction_and_unknown_for_single_rows():
    case = peaked(dtype=torch.float64)
    total = run(fused_linear_fusion_loss, case, left_out=0.05, reduction="sum")["hidden_error_bound"]
    mean = run(fused_linear_fusion_loss, case, left_out=0.05, num_items_in_batch=5)["hidden_error_bound"]
    torch.testing.assert_close(mean, total / 5)
    rows = run(fused_linear_fusion_loss, case, left_out=0.05, reduction="none")
    assert rows["hidden_error_bound"].isnan()
    summed = run(fused_linear_fusion_loss, case, left_out=0.05, reduction="sum")
    torch.testing.assert_close(rows["dhidden"], summed["dhidden"])
    with torch.no_grad():
        _, stats = fused_linear_fusion_loss(**case, left_out=0.05, return_stats=True)
    assert [stats[name].item() for name in ("left_out_share", "kept_share", "hidden_error_bound")] == [0, 1, 0]


def test_autocast_leaves_it_in_fp32():
    case = peaked()
    plain = run(fused_linear_fusion_loss, case, left_out=0.05, chunk_size=8)
    with torch.autocast("cpu", torch.bfloat16):
        under = run(fused_linear_fusion_loss, case, left_out=0.05, chunk_size=8)
    assert all(torch.equal(under[name], value) for name, value in plain.items())


def test_a_compiled_caller_gets_the_same():
    case = peaked()
    expected = run(fused_linear_fusion_loss, case, left_out=0.05, chunk_size=8)
    compiled = torch.compile(fused_linear_fusion_loss, fullgraph=True, backend="aot_eager")
    got = run(compiled, case, left_out=0.05, chunk_size=8)
    for name in ("loss", "dhidden", "dweight", "dbias", "hidden_error_bound"):
        torch.testing.assert_close(got[name], expected[name], msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"left_out": 1.0}, r"left_out must be in \[0, 1\), got 1.0; 0 is exact"),
        ({"left_out": -0.1}, r"left_out must be in \[0, 1\), got -0.1"),
        ({"left_out": 0.1, "label_smoothing": 0.1, "softcap": 3.0}, "left_out must be 0 with label_smoothing under a softcap"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_said_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        fused_linear_fusion_loss(**make_case(), **options)
    with pytest.raises(ValueError, match=message):
        FusedLinearFusionLoss(**options)


def test_triton_refuses_it(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("profuser.kernels.common.HAS_TRITON", True)
    with pytest.raises(ValueError, match=r"left_out must be 0 with impl='triton', got 0\.1; leave it out"):
        fused_linear_fusion_loss(**make_case(), left_out=0.1, impl="triton")


def test_a_divided_head_refuses_it(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="left_out must be 0 with a process_group, got"):
            fused_linear_fusion_loss(**make_case(), left_out=0.1, process_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
