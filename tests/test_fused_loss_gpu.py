"""The fused loss at sizes that need a GPU: it is accurate, small in memory, right beyond 32 bits, and never waits."""

import math

import pytest
import torch
from loss_checks import DIFFERENTIABLE, make_case, on, run

from profuser.kernels.common import IGNORE_INDEX, chunk_rows_gpu
from profuser.kernels.reference import fusion_loss_reference
from profuser.loss import fused_linear_fusion_loss

pytestmark = pytest.mark.gpu


def large_case(dtype=torch.bfloat16, N=2048, D=256, V=32000, **options):
    return make_case(dtype, N=N, D=D, V=V, K=10, B=8, spread=2.0, bias=None, **options)


def relative_error(found, true):
    return ((found.double() - true.double()).norm() / true.double().norm()).item()


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "softcap": 30.0}], ids=str)
@pytest.mark.parametrize("V", [32000, 32003, 32768])
def test_bf16_gradients_are_accurate_at_full_size(V, options):
    case = large_case(N=256, V=V, **options)  # so few rows, because the reference is computed on the CPU
    truth = run(fusion_loss_reference, case, upcast=torch.float32)
    for chunk_size in (None, 100):
        ours = run(fused_linear_fusion_loss, case, device="cuda", chunk_size=chunk_size)
        assert ours["loss"].item() == pytest.approx(truth["loss"].item(), rel=1e-5)
        assert torch.equal(ours["winner"], truth["winner"])
        for name in ("ce", "kd", "target_mass"):
            assert relative_error(ours[name], truth[name]) < 1e-5, name
        for name in ("dhidden", "dweight"):
            assert relative_error(ours[name], truth[name]) < 5e-3, name


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"temperature": 2.0, "softcap": 30.0}], ids=str)
def test_columns_that_are_left_out_are_those_of_plain_torch_and_the_bound_holds(options):
    case = large_case(V=32000) | {"chunk_size": 1024}
    case["labels"].clamp_(min=0)  # the chunks of plain torch have no other rows
    capped = case | {"left_out": 0.003, "left_out_capacity": 16384}
    truth = run(fused_linear_fusion_loss, case, upcast=torch.float32, **options)
    by_torch = run(fused_linear_fusion_loss, capped, upcast=torch.float32, **options)
    ours = run(fused_linear_fusion_loss, capped, device="cuda", **options)
    assert ours["loss"].item() == pytest.approx(truth["loss"].item(), rel=1e-5)
    for name in ("left_out_share", "columns_needed", "hidden_error_bound"):
        assert ours[name].item() == pytest.approx(by_torch[name].item(), rel=0.05), name
    for name in ("dhidden", "dweight"):
        assert relative_error(ours[name], by_torch[name]) < 1e-2, name
    error = (ours["dhidden"].double() - truth["dhidden"].double()).norm()
    assert error <= ours["hidden_error_bound"] + 5e-3 * truth["dhidden"].double().norm()


def test_fp64_takes_the_torch_path():
    case = make_case(torch.float64)
    ours = run(fused_linear_fusion_loss, case, device="cuda")
    truth = run(fusion_loss_reference, case)
    for name in ("loss", "dhidden", "dweight", "dbias"):
        torch.testing.assert_close(ours[name], truth[name])


def test_memory_is_one_chunk_of_logits_and_the_fp32_weight_gradient():
    N, D, V = 8192, 1024, 32000
    case = on("cuda", large_case(N=N, D=D, V=V))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fused_linear_fusion_loss(**case).backward()
    used = torch.cuda.max_memory_allocated() - before
    C = chunk_rows_gpu(N, V, D)
    logits_and_gradient = C * V * (4 + 2)
    results = (N * D + V * D) * 4
    scaled = N * D * 2 + V * D * (4 + 2)  # backward writes the products with grad_output into new tensors
    assert used < results + max(logits_and_gradient, scaled) + C * D * 2 + (64 << 20)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 40 << 30,
    reason="needs a CUDA GPU of 40 GB",
)
def test_a_chunk_of_more_than_2_to_the_31_logits_equals_small_chunks():
    N, V = 16384, 151936
    assert N * V > 2**31
    case = on("cuda", large_case(N=N, D=64, V=V))
    results = []
    for chunk_size in (N, 1024):
        case["hidden"].grad = case["weight"].grad = None
        loss = fused_linear_fusion_loss(**case, chunk_size=chunk_size)
        loss.backward()
        results.append((loss.detach(), case["hidden"].grad, case["weight"].grad))
    for whole, parts in zip(*results, strict=True):
        assert relative_error(whole, parts) < 1e-3


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("sources", [True, False])
@pytest.mark.parametrize("capped", [True, False])
def test_nothing_waits_for_the_device(reduction, sources, capped):
    case = on("cuda", large_case(N=512))
    if not sources:
        case = {name: case[name] for name in ("hidden", "weight", "labels")}
    if capped:
        case |= {"left_out": 0.003, "left_out_capacity": 16384}

    def step(**options):
        loss, _ = fused_linear_fusion_loss(**case, reduction=reduction, return_stats=True, **options)
        loss.sum().backward()

    step()  # this call compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(chunk_size=256)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_bad_row_is_nan_and_no_other():
    case = large_case(N=512)
    case["labels"][:3] = 7
    expected = run(fused_linear_fusion_loss, case, device="cuda", reduction="none")
    case["labels"][1] = 2**30
    case["source_ids"][:, 2] = 2**31 - 1
    found = run(fused_linear_fusion_loss, case, device="cuda", reduction="none")
    assert torch.isnan(found["loss"]).nonzero()[:, 0].tolist() == [1, 2]
    others = torch.ones(512, dtype=torch.bool).index_fill(0, torch.tensor([1, 2]), False)
    assert torch.equal(found["loss"][others], expected["loss"][others])


def test_compiled_with_inductor_it_gives_the_same():
    case = large_case(N=512)
    expected = run(fused_linear_fusion_loss, case, device="cuda")
    compiled = torch.compile(fused_linear_fusion_loss, fullgraph=True)
    found = run(compiled, case, device="cuda")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-6)


def test_autocast_multiplies_in_bf16_and_keeps_an_fp32_weight_gradient():
    case = large_case(torch.float32, N=512)
    rounded = run(fused_linear_fusion_loss, case | {"hidden": case["hidden"].bfloat16()}, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = run(fused_linear_fusion_loss, case, device="cuda")
    for name in ("loss", "dweight"):
        assert torch.equal(found[name], rounded[name]), name


def test_an_ignored_row_costs_no_accuracy_when_it_holds_nan():
    case = large_case(N=512)
    expected = run(fused_linear_fusion_loss, case, device="cuda")
    case["hidden"][case["labels"] == IGNORE_INDEX] = math.nan
    found = run(fused_linear_fusion_loss, case, device="cuda")
    for name in ("loss", *(f"d{name}" for name in DIFFERENTIABLE if case[name] is not None)):
        assert torch.equal(found[name], expected[name]), name
