"""Helpers of the fused loss's tests: cases, and the comparison with the dense reference."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from profuser.kernels.common import IGNORE_INDEX
from profuser.kernels.reference import fusion_loss_reference
from profuser.loss import fused_linear_fusion_loss

# An error of a few roundings of the dtype, relative to the largest true entry, is always allowed.
FLOOR = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 5e-3, torch.float16: 1e-3}
DIFFERENTIABLE = ("hidden", "weight", "bias")
Case = dict[str, Any]
"""The arguments of `fused_linear_fusion_loss`, which are tensors and options."""


def make_case(
    dtype: torch.dtype = torch.float32,
    N: int = 37,
    D: int = 20,
    V: int = 83,
    S: int = 3,
    K: int = 6,
    B: int = 4,
    spread: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> Case:
    """A case that has everything which is easily wrong.

    It has ragged sizes, ignored rows, duplicate and padded ids, rows without an entry, and gold ids inside and outside the
    kept ones.
    """
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
    case: Case = {
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


def run(
    function: Callable[..., Any],
    case: Case,
    upcast: torch.dtype | None = None,
    grad_output: Any = None,
    device: str = "cpu",
    **options: Any,
) -> dict[str, Tensor]:
    """The loss, the gradients of hidden, weight and bias, and the stats, computed on `device` and returned on the CPU."""
    case = {k: v.to(device, copy=True) if isinstance(v, torch.Tensor) else v for k, v in (case | options).items()}
    case.setdefault("entropies", True)
    leaves = [name for name in DIFFERENTIABLE if case.get(name) is not None]
    for name in leaves:
        case[name] = (case[name] if upcast is None else case[name].to(upcast)).requires_grad_()
    loss, stats = function(**case, return_stats=True)
    weight = 1.0 if grad_output is None else torch.as_tensor(grad_output, dtype=loss.dtype, device=device)
    (loss * weight).sum().backward()
    results = {"loss": loss.detach()} | {f"d{name}": case[name].grad for name in leaves} | stats
    return {name: result.cpu() for name, result in results.items()}


def on(device: str, case: Case, frozen: Collection[str] = ()) -> Case:
    """A copy of the case on `device`, whose differentiable tensors require gradients unless they are in `frozen`."""
    case = {k: v.to(device, copy=True) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    for name in DIFFERENTIABLE:
        if case.get(name) is not None:
            case[name].requires_grad_(name not in frozen)
    return case


def assert_as_accurate_as_reference(
    case: Case, scale: float = 0.0, chunk_size: int = 8, device: str = "cpu", impl: str | None = None, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Checks that no result has more than twice the error of the reference in the same dtype, both against fp64.

    `scale` is the size of the terms whose difference a result is, where that is larger than the result itself. `device` and
    `impl` are those of the op; the reference runs on the CPU.
    """
    dtype = case["hidden"].dtype
    truth = run(fusion_loss_reference, case, upcast=torch.float64, **options)
    same_dtype = run(fusion_loss_reference, case, **options)
    ours = run(fused_linear_fusion_loss, case, device=device, chunk_size=chunk_size, impl=impl, **options)
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


def assert_close_to_truth(
    case: Case, tolerance: float = 1e-9, chunk_size: int | None = None, **options: Any
) -> dict[str, Tensor]:
    case = {k: v.double() if k in DIFFERENTIABLE and v is not None else v for k, v in case.items()}
    ours = run(fused_linear_fusion_loss, case, chunk_size=chunk_size, **options)
    truth = run(fusion_loss_reference, case, **options)
    for name, true in truth.items():
        torch.testing.assert_close(ours[name], true, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    return ours


def assert_columns_needed_of_the_chunk_that_needs_most(case: Case, **options: Any) -> None:
    """Checks `columns_needed` of two chunks of 16 rows. The case must have 32 rows, and its own labels and sources are left aside.

    The rows of the first chunk are nearly certain, those of the second are not.
    """
    case = {name: case[name] for name in ("hidden", "weight", "bias")} | {"labels": torch.full((32,), 5)}
    case["hidden"] = case["hidden"] * torch.where(torch.arange(32)[:, None] < 16, 3.0, 0.1)

    def needed(rows: Any) -> float:
        some = case | {name: case[name][rows] for name in ("hidden", "labels")}
        return run(fused_linear_fusion_loss, some, chunk_size=16, **options)["columns_needed"].item()

    few, many = needed(slice(16)), needed(slice(16, 32))
    assert few < many
    assert needed(slice(None)) == needed([*range(16, 32), *range(16)]) == many


def with_logits(logits: Tensor, **case: Any) -> Case:
    """A case with given logits. The hidden states are the logits and the weight is 1, so dhidden is the gradient in them."""
    return {"hidden": logits, "weight": torch.eye(logits.shape[1], dtype=logits.dtype)} | case
