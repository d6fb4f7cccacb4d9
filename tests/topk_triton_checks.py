"""What the tests of the Triton path of `source_topk` share: their cases and their checks against fp64."""

from typing import Any

import pytest
import torch

from profuser.kernels.common import IGNORE_INDEX
from profuser.kernels.reference import logits_topk_reference, source_topk_reference
from profuser.kernels.source_topk import Ranges, source_topk, source_topk_from_logits

# The interpreter computes with NumPy, which warns. Where a result is an infinity or a NaN, a test asserts it.
MARKS = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("numpy_xor", "poisoned_memory"),
]
NAMES = ("ids", "logprobs", "lse", "ce", "range_ids", "range_logprobs", "range_logmass")
FLOOR = 1e-6  # a few roundings of fp32 and of a GPU's exp2, relative to the largest true entry


def assert_as_accurate_as_fp32(ours, truth, fp32):
    """Checks that ids are equal, that values have at most twice the error of the same formulas in fp32, and that NaN and
    infinities stand where they should.
    """
    for name, found, true, same in zip(NAMES, ours, truth, fp32, strict=False):
        found = found.cpu()
        assert found.shape == true.shape, name
        if name.endswith("ids"):
            assert found.dtype == torch.int32
            assert torch.equal(found.long(), true), name
            continue
        assert found.dtype == torch.float32
        finite = true.isfinite()
        torch.testing.assert_close(found[~finite], true[~finite].float(), equal_nan=True, msg=name)
        found, true, same = (x[finite].double() for x in (found, true, same))
        if len(true):
            allowed = 2 * (same - true).abs().max() + FLOOR * true.abs().max()
            error = (found - true).abs().max()
            assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def check_logits(device, logits, labels, k, chunk_size=2, **options):
    ours = source_topk_from_logits(
        logits.to(device), labels.to(device), k, chunk_size=chunk_size, impl="triton", **on(device, options)
    )
    truth = logits_topk_reference(logits.double(), labels, k, **options)
    assert len(ours) == len(truth)
    assert_as_accurate_as_fp32(ours, truth, logits_topk_reference(logits.float(), labels, k, **options))


def check_hidden(device, case, k, chunk_size=2, **options):
    ours = source_topk(**on(device, case), k=k, chunk_size=chunk_size, impl="triton", **on(device, options))
    upcast = {name: x.double() if x.is_floating_point() else x for name, x in case.items()}
    truth = source_topk_reference(**upcast, k=k, **options)
    assert len(ours) == len(truth)
    assert_as_accurate_as_fp32(ours, truth, source_topk_reference(**case, k=k, **options))


def on(device, options) -> dict[str, Any]:
    """The dict with every tensor in it, or in a tuple in it, moved to the device."""

    def move(x):
        return x.to(device) if torch.is_tensor(x) else tuple(map(move, x)) if isinstance(x, tuple) else x

    return {name: move(x) for name, x in options.items()}


def random_logits(N, V, seed=0, spread=3.0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(V, (N,), generator=g)
    labels[1::4] = IGNORE_INDEX
    return torch.randn(N, V, generator=g) * spread, labels


def make_case(dtype=torch.float32, N=5, D=12, V=83, seed=0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(V, (N,), generator=g)
    labels[1::4] = IGNORE_INDEX
    return {
        "hidden": (torch.randn(N, D, generator=g) * 4).to(dtype),
        "weight": (torch.randn(V, D, generator=g) / D**0.5).to(dtype),
        "labels": labels,
    }


def make_ranges(N, V, R, seed=0) -> Ranges:
    """Ranges of every size over a shuffled vocabulary without its last ids.

    Among them are an empty range, one of a single id, one of all ids, and several of the same row.
    """
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(max(1, V - 3), generator=g)
    rows = torch.randint(N, (R,), generator=g).sort().values
    edges = torch.randint(len(order) + 1, (2, R), generator=g).sort(0).values
    edges[:, 0], edges[:, 1], edges[:, 2] = torch.tensor([1, 1]), torch.tensor([0, 1]), torch.tensor([0, len(order)])
    lo, hi = edges
    return rows, lo, hi, order
