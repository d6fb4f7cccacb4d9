"""The source's top-k, log-sum-exp and cross-entropy, computed chunk by chunk, against `torch.topk` on full logits.

    pytest benchmarks/bench_source_topk.py --benchmark-only [--headline]

Both implementations return ids, log-probabilities, log-sum-exp and the labels' cross-entropy. Before one is timed, it is
checked against the dense reference on the first rows. `times_floor` is its median time divided by that of hidden Wᵀ alone,
which is timed between the rounds. "profuser-merged" has, beside that, what alignment asks for: a range over the whole vocabulary
for every row, with one of six maps to another vocabulary.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.cases import ALL_SHAPES, DEVICE, DTYPE, IMPL, INTERPRETED, chosen_shapes, first_rows, make_case
from benchmarks.measure import cuda_peak_mib, gemms, process_peaks_mib, timed
from profuser.kernels.reference import head_logits, source_topk_reference
from profuser.kernels.source_topk import source_topk

CHECKED_ROWS = {"cpu": 160, "cuda": 2304}[DEVICE]
MAPS = 6
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}[DTYPE]  # in nats; bf16 rounds logits of size 16 by 0.03


def full(hidden, weight, labels, k):
    """The plain computation: [N, V] logits, and `logsumexp` and `topk` of them."""
    logits = (hidden @ weight.t()).float()
    lse = logits.logsumexp(1)
    values, ids = logits.topk(k)
    return ids, values - lse[:, None], lse, lse - logits.gather(1, labels[:, None])[:, 0]


def merged(hidden, weight, labels, k):
    """What `source_topk` gives, without the results of the ranges, which its tests check."""
    return source_topk(hidden, weight, labels, k, ranges=whole_ranges(len(labels), len(weight)), impl=IMPL)[:4]


@functools.lru_cache(maxsize=1)
def whole_ranges(
    N: int, V: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A range of all tokens for every row. By each map a third of the tokens has no counterpart, and an eighth shares 256 ids."""
    g = torch.Generator().manual_seed(0)
    maps = torch.arange(V).repeat(MAPS, 1)
    maps[torch.rand(MAPS, V, generator=g) < 1 / 3] = -1
    shared = torch.rand(MAPS, V, generator=g) < 1 / 8
    maps[shared] = torch.randint(256, (int(shared.sum()),), generator=g)
    zeros = torch.zeros(N, dtype=torch.long)
    map_begin = torch.randint(MAPS, (N,), generator=g) * V
    ranges = torch.arange(N), zeros, zeros + V, torch.randperm(V, generator=g), map_begin, maps.flatten()
    rows, lo, hi, order, map_begin, mapped = (x.to(DEVICE) for x in ranges)
    return rows, lo, hi, order, map_begin, mapped


IMPLEMENTATIONS = {"profuser": functools.partial(source_topk, impl=IMPL), "profuser-merged": merged, "torch-full": full}


def pytest_generate_tests(metafunc):
    metafunc.parametrize("shape", chosen_shapes(metafunc.config))
    metafunc.parametrize("implementation", IMPLEMENTATIONS)


def make_step(implementation, shape):
    case = make_case(shape, "peaked")
    inputs = [case[name].detach() for name in ("hidden", "weight", "labels")]
    return functools.partial(IMPLEMENTATIONS[implementation], *inputs, ALL_SHAPES[shape].K)


@functools.cache
def process_peaks(shape):
    return dict(zip(IMPLEMENTATIONS, process_peaks_mib(make_step, [(name, shape) for name in IMPLEMENTATIONS])))


def check(implementation, shape):
    """Checks all values against the reference's, and the ids by the reference's log-probabilities at them."""
    part = first_rows(make_case(shape, "peaked"), CHECKED_ROWS)
    hidden, weight, labels = (part[name].detach() for name in ("hidden", "weight", "labels"))
    ids, *found = IMPLEMENTATIONS[implementation](hidden, weight, labels, ALL_SHAPES[shape].K)
    hidden, weight = hidden.double(), weight.double()
    _, *true = source_topk_reference(hidden, weight, labels, ALL_SHAPES[shape].K)
    at_ids = head_logits(hidden, weight, None, None, 1.0).log_softmax(1).gather(1, ids.long())
    for a, b in zip((*found, at_ids), (*true, true[0]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=TOLERANCE)


def test_source_topk(benchmark, shape, implementation):
    N, D, V, *_ = sizes = ALL_SHAPES[shape]
    benchmark.group = f"top-k {shape}: {N} x {D} x {V}, k={sizes.K}, peaked logits"
    try:
        check(implementation, shape)
        step = make_step(implementation, shape)
        floor = gemms(N, D, V, 1, DTYPE, DEVICE)
        timed(benchmark, step, floor, sizes.rounds, implementation=implementation, computes="top-k", dtype=str(DTYPE))
        if not INTERPRETED:
            peak = cuda_peak_mib(step) if DEVICE == "cuda" else process_peaks(shape)[implementation]
            benchmark.extra_info["peak_mib"] = peak
    except torch.OutOfMemoryError as error:
        pytest.skip(f"{implementation} does not fit at {sizes}: {error}"[:200])
