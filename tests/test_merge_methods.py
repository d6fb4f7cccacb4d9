"""Every merging method against a dense reference in numpy, in one block and in several, with little memory."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from merge_models import whole
from safetensors import safe_open
from safetensors.torch import save_file

from profuser.merge import blocks, methods
from profuser.merge.blocks import Blocks
from profuser.merge.settings import METHODS
from profuser.merge.trim import trims
from profuser.merge.widen import widen


@pytest.fixture(params=[(6, 5), (23,), (3, 2, 4)], ids=["matrix", "vector", "kernel"])
def tensors(request, in_blocks):
    torch.manual_seed(0)
    base = torch.randn(request.param, dtype=torch.float64)
    return base, [base + 0.3 * torch.randn(request.param, dtype=torch.float64) for _ in range(3)]


def test_linear(tensors):
    _, (a, b, c) = tensors
    expected = (0.2 * a + 0.3 * b + 1.0 * c).numpy()
    merged = whole(methods.linear, [a, b, c], [0.2, 0.3, 1.0])
    np.testing.assert_allclose(merged, expected / 1.5, atol=1e-12)
    merged = whole(methods.linear, [a, b, c], [0.2, 0.3, 1.0], normalize=False)
    np.testing.assert_allclose(merged, expected, atol=1e-12)
    merged = whole(methods.linear, [a, b, c], [-0.2, -0.3, -1.0])
    np.testing.assert_allclose(merged, expected / 1.5, atol=1e-12)
    with pytest.raises(ValueError, match="add up to 0"):
        whole(methods.linear, [a, b], [1.0, -1.0])


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(tensors, t):
    _, (a, b, _) = tensors
    x, y = a.numpy().ravel(), b.numpy().ravel()
    angle = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    expected = (np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)
    np.testing.assert_allclose(whole(methods.slerp, [a, b], t).numpy().ravel(), expected, atol=1e-9)
    # The same direction is interpolated linearly, and so is a tensor of zeros.
    np.testing.assert_allclose(whole(methods.slerp, [a, 2 * a], t), (1 + t) * a, atol=1e-12)
    assert torch.isfinite(whole(methods.slerp, [a, torch.zeros_like(a)], t)).all()


def test_opposite_tensors_are_interpolated_linearly(tensors):
    """Between them there is no shortest way on the sphere."""
    _, (a, *_) = tensors
    np.testing.assert_allclose(whole(methods.slerp, [a, -a], 0.25), 0.5 * a, atol=1e-12)


def test_task_arithmetic(tensors):
    base, (a, b, _) = tensors
    expected = base + 0.8 * (0.6 * (a - base) + 0.5 * (b - base))
    merged = whole(methods.task_arithmetic, [base, a, b], [0.6, 0.5], scale=0.8)
    np.testing.assert_allclose(merged, expected, atol=1e-12)
    mean = base + (0.6 * (a - base) + 0.5 * (b - base)) / 1.1
    merged = whole(methods.task_arithmetic, [base, a, b], [0.6, 0.5], normalize=True)
    np.testing.assert_allclose(merged, mean, atol=1e-12)


def test_task_vectors_whose_weights_add_up_to_0_are_not_normalised(tensors):
    base, (a, b, _) = tensors
    merged = whole(methods.task_arithmetic, [base, a, b], [1.0, -1.0], normalize=True)
    np.testing.assert_allclose(merged, base + a - b, atol=1e-12)


def test_where_task_vectors_cancel_out_what_is_positive_is_elected():
    base, a, b = torch.zeros(3), torch.tensor([1.0, 2.0, 0.0]), torch.tensor([-1.0, 1.0, 0.0])
    merged = whole(methods.ties, [base, a, b], [1.0, 1.0], [1.0, 1.0], normalize=False)
    assert merged.tolist() == [1.0, 3.0, 0.0]


def test_ties(tensors):
    base, models = tensors
    weights, densities = [0.6, 0.5, 0.2], [0.5, 0.3, 1.0]
    weighted = []
    for model, weight, density in zip(models, weights, densities, strict=True):
        delta = (model - base).numpy().ravel()
        kept = max(1, int(density * delta.size))
        delta[np.argsort(-abs(delta), kind="stable")[kept:]] = 0
        weighted.append(weight * delta)
    sign = np.where(sum(weighted) >= 0, 1, -1)
    agrees = [np.sign(delta) == sign for delta in weighted]
    total = sum(delta * mask for delta, mask in zip(weighted, agrees, strict=True))
    divisor = sum(weight * mask for weight, mask in zip(weights, agrees, strict=True))
    expected = base.numpy().ravel() + total / np.where(divisor == 0, 1, divisor)
    np.testing.assert_allclose(
        whole(methods.ties, [base, *models], weights, densities).numpy().ravel(), expected, atol=1e-12
    )


def test_dare_keeps_a_share_and_the_expected_value():
    base, model = torch.zeros(400, 500), torch.ones(400, 500)
    for method in (methods.dare_linear, methods.dare_ties):
        merged = whole(method, [base, model], [0.5], [0.3], torch.Generator().manual_seed(1))
        assert merged.unique().tolist() == pytest.approx([0.0, 0.5 / 0.3])
        assert float((merged > 0).float().mean()) == pytest.approx(0.3, abs=0.005)
        assert float(merged.mean()) == pytest.approx(0.5, abs=0.01)
        again = whole(method, [base, model], [0.5], [0.3], torch.Generator().manual_seed(1))
        assert torch.equal(merged, again)
    kept = whole(methods.dare_ties, [base, model], [0.5], [1.0], torch.Generator())
    assert torch.equal(kept, torch.full_like(base, 0.5))


@pytest.mark.parametrize("densities", [[0.3, 0.6, 0.4], [1.0, 0.6, 1.0], [0.3, 1.0, 0.4]])
def test_dares_random_numbers_are_those_for_one_whole_task_vector_after_the_other(tensors, densities):
    """Whatever the blocks are, a seed gives one result."""
    base, models = tensors
    generator, expected = torch.Generator().manual_seed(5), base.clone()
    for model, density in zip(models, densities, strict=True):
        kept = torch.rand(base.shape, generator=generator) < density if density < 1 else torch.ones_like(base)
        expected += 0.5 * kept * (model - base) / density
    found = whole(methods.dare_linear, [base, *models], [0.5] * 3, densities, torch.Generator().manual_seed(5))
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [1e-9, 0.2, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("steps", [1, 3, 40, None], ids=lambda steps: f"steps {steps}")
def test_exactly_the_share_of_largest_elements_is_kept_and_of_equal_ones_the_first(in_blocks, dtype, density, steps):
    """`steps` different magnitudes make ties, in vectors with both signs and zeros; None gives numbers of all sizes."""
    rng = np.random.default_rng(3)
    values = rng.integers(-(steps or 1), (steps or 1) + 1, 211) * 0.37
    if steps is None:
        values = rng.standard_normal(211) * 10.0 ** rng.uniform(-40, 30, 211)
    delta = torch.from_numpy(values).to(dtype)
    parameter = Blocks([torch.zeros_like(delta), delta], [None, None])
    (trim,) = trims(parameter, [density])
    assert trim is not None
    found = torch.cat([trim(tensor - base) for base, tensor in parameter])
    kept = max(1, int(density * len(delta)))
    expected = torch.zeros_like(delta)
    first = np.argsort(-delta.abs().numpy(), kind="stable")[:kept].copy()
    expected[first] = delta[first]
    assert torch.equal(found, expected)
    assert trims(parameter, [1.0]) == [None]


def dense_widen(base: np.ndarray, models: list[np.ndarray], by_row: bool) -> np.ndarray:
    """WIDEN, column by column."""
    if base.ndim == 1:
        changes = [np.array([abs(m - base) for m in models])]
    else:
        shape = base.shape
        flat = [x.reshape(shape[0], -1) for x in (base, *models)]
        flat = flat if by_row else [x.T for x in flat]  # a row of `flat` is a column of the paper
        magnitude, direction = [], []
        for model in flat[1:]:
            magnitude.append([abs(np.linalg.norm(w) - np.linalg.norm(w0)) for w, w0 in zip(model, flat[0])])
            direction.append([1 - w @ w0 / np.linalg.norm(w) / np.linalg.norm(w0) for w, w0 in zip(model, flat[0])])
        changes = [np.array(magnitude), np.array(direction)]
    weights = []
    for of_kind in changes:
        n = of_kind.shape[1]
        ranks = np.array([[sum(of_model < value) for value in of_model] for of_model in of_kind])
        importance = np.exp(ranks / n) / np.exp(ranks / n).sum(0)
        importance[2 * ranks > n - 1] = 1
        weights.append(importance)
    merged = base.copy()
    for n, model in enumerate(models):
        weight = np.mean([kind[n] for kind in weights], axis=0)
        if base.ndim > 1:
            weight = weight.reshape(-1, *[1] * (base.ndim - 1)) if by_row else weight.reshape(1, *base.shape[1:])
        merged = merged + weight * (model - base)
    return merged


@pytest.mark.parametrize("by_row", [False, True])
def test_widen(tensors, by_row):
    base, models = tensors
    expected = dense_widen(base.numpy(), [model.numpy() for model in models], by_row)
    np.testing.assert_allclose(whole(widen, [base, *models], by_row=by_row), expected, atol=1e-10)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory of a process is read from /proc")
@pytest.mark.parametrize("method", METHODS)
def test_no_whole_tensor_is_in_memory(tmp_path, monkeypatch, method):
    """A tensor has 8 MB, or 16 MB in the dtype of the computation, and a block 64 kB."""
    monkeypatch.setattr(blocks, "BLOCK", 1 << 14)
    shape = (1 << 14, 1 << 8)
    base = (0.02 * torch.randn(shape)).bfloat16()
    save_file({"0": base, "1": base + base.flip(0) / 8, "2": base + base.flip(1) / 8}, tmp_path / "x.safetensors")
    count = 2 if method == "slerp" else 3
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        parameter = Blocks([file.get_tensor(f"{n}") for n in range(count)], [None] * count)
    settings: dict[str, tuple] = {
        "linear": ([0.2, 0.3, 0.4],),
        "slerp": (0.3,),
        "task_arithmetic": ([0.5, 0.3],),
        "ties": ([0.5, 0.3], [0.5, 0.3]),
        "dare_linear": ([0.5, 0.3], [0.5, 0.3], torch.Generator()),
        "dare_ties": ([0.5, 0.3], [0.5, 0.3], torch.Generator()),
        "widen": (),
    }
    function = widen if method == "widen" else getattr(methods, method)
    start = most = 0
    for _ in range(2):  # the second time, no library asks for memory for the first time
        start = most = own_memory()
        for part in function(parameter, *settings[method]):
            assert part.numel() <= 1 << 14
            most = max(most, own_memory())
    assert most - start < 4e6


def own_memory() -> int:
    """The bytes that belong to this process alone; what is mapped from files does not count."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
