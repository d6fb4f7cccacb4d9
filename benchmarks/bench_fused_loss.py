"""The loss, forward alone and with backward, against distillation in plain torch and other projects' losses.

    pytest benchmarks/bench_fused_loss.py --benchmark-only [--headline]

All implementations get the same inputs. Before one is timed, it is checked against the dense reference on the first rows: also those
that learn from a dense teacher, of which the reference takes all V columns as kept entries.
`times_floor` is its median time divided by that of the matrix products alone, which are timed between the rounds: one
product for the forward pass, three with gradients. `peak_mib` does not count the inputs, nor, on CUDA, the gradients. On a CPU
it comes from the high-water mark of a process.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from benchmarks.cases import (
    ALL_SHAPES,
    DEVICE,
    DTYPE,
    INTERPRETED,
    SHAPES,
    TEACHER_ENTRIES,
    chosen_shapes,
    first_rows,
    make_case,
    make_teacher,
)
from benchmarks.implementations import IMPLEMENTATIONS, arguments, why_not
from benchmarks.measure import cuda_peak_mib, gemms, package_version, process_peaks_mib, timed
from benchmarks.peers import JSD_BETA, KINDS, TEACHER_KL, TEACHER_PROBABILITIES, TEACHER_TOP_K, TEACHERS
from profuser.kernels.reference import fusion_loss_reference

# The forward pass is timed on one kind of logits only, because it does not depend on their values. What learns from a dense teacher
# is timed in the one run that trains on logits as they are.
RUNS = (("forward_backward", "random"), ("forward_backward", "peaked"), ("forward", "peaked"))
GEMMS = {"forward": 1, "forward_backward": 3}
CHECKED_ROWS = 320  # on a CPU more rows than one chunk has; on a GPU tests see to that
# The largest relative error of loss and gradients. In bf16 it allows for logits in bf16; extra_info has the errors found.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}[DTYPE]
TEACHER_RUN = ("forward_backward", "peaked")
TEACHER_CHECKED_ROWS = 160  # few, because the reference takes all columns for entries
LOCAL = tuple(name for name, implementation in IMPLEMENTATIONS.items() if implementation.package is None)
BF16_SOURCES_TOLERANCE = 1e-2  # FuseLLM holds the sources' distributions in bf16


def pytest_generate_tests(metafunc):
    # Side by side those that compute the same, so that what is true is computed once for all of them.
    by_what_it_computes = sorted(IMPLEMENTATIONS.items(), key=lambda item: KINDS.index(item[1].computes))
    runs = [
        (shape, mode, logits, implementation)
        for shape in chosen_shapes(metafunc.config)
        for mode, logits in RUNS
        for implementation, (computes, *_) in by_what_it_computes
        if computes not in TEACHERS or (mode, logits) == TEACHER_RUN
    ]
    metafunc.parametrize(("shape", "mode", "logits", "implementation"), runs, ids=map("-".join, runs))


def case_for(computes, shape, logits):
    case = make_case(shape, logits)
    return case | make_teacher(shape, logits) if computes in TEACHERS else case


def step_of(implementation, case, mode):
    """A function without arguments that returns the loss, and with backward also the gradients of hidden and weight."""
    computes, function, *_ = IMPLEMENTATIONS[implementation]
    inputs = arguments(case, computes)

    def forward():
        with torch.no_grad():
            return function(**inputs)

    def forward_backward():
        loss = function(**inputs)
        return loss.detach(), *torch.autograd.grad(loss, (case["hidden"], case["weight"]))

    return {"forward": forward, "forward_backward": forward_backward}[mode]


def make_step(implementation, shape, logits, mode):
    return step_of(implementation, case_for(IMPLEMENTATIONS[implementation].computes, shape, logits), mode)


def checked_rows(computes, shape, logits):
    rows = TEACHER_CHECKED_ROWS if computes in TEACHERS else CHECKED_ROWS
    return first_rows(case_for(computes, shape, logits), rows)


@functools.lru_cache(maxsize=1)
def truth(shape, logits, computes):
    """Loss and gradients of the first rows, from the reference in fp64."""
    case = checked_rows(computes, shape, logits)
    case |= {name: case[name].detach().double().requires_grad_() for name in ("hidden", "weight")}
    inputs = teacher_reference(case, computes) if computes in TEACHERS else arguments(case, computes)
    with torch.device(DEVICE):
        loss = fusion_loss_reference(**inputs)
    return loss.detach(), *torch.autograd.grad(loss, (case["hidden"], case["weight"]))


def teacher_reference(case: dict[str, Any], computes: str) -> dict[str, Any]:
    """What the reference takes of a dense teacher: its entries as those of one source, and no cross-entropy."""
    logprobs = (case["teacher_hidden"].double() @ case["teacher_weight"].double().t()).log_softmax(1)
    N, V = logprobs.shape
    ids = torch.arange(V, device=DEVICE).expand(N, V)
    if computes == TEACHER_TOP_K:
        logprobs, ids = logprobs.topk(TEACHER_ENTRIES)
    divergence = "forward_kl" if computes in (TEACHER_KL, TEACHER_PROBABILITIES) else "jsd"
    weights = {"ce_weight": logprobs.new_zeros(N), "kd_weight": logprobs.new_ones(N)}
    own = {name: case[name] for name in ("hidden", "weight", "labels")}
    entries = {"source_ids": ids[None], "source_logprobs": logprobs[None]}
    return own | entries | weights | {"divergence": divergence, "divergence_beta": JSD_BETA}


@functools.lru_cache(maxsize=len(IMPLEMENTATIONS))
def errors(implementation, shape, logits):
    """The relative errors of loss, dhidden and dweight on the first rows."""
    computes = IMPLEMENTATIONS[implementation].computes
    found = step_of(implementation, checked_rows(computes, shape, logits), "forward_backward")()
    true = truth(shape, logits, computes)
    pairs = zip(("loss", "dhidden", "dweight"), found, true)
    return {f"{name}_error": ((a.double() - b).norm() / b.norm()).item() for name, a, b in pairs}


@functools.cache
def process_peaks(shape, names):
    """The peak memory of forward and backward on a CPU, by implementation."""
    peaks = process_peaks_mib(make_step, [(name, shape, "peaked", "forward_backward") for name in names])
    return dict(zip(names, peaks))


def skip_unless_it_runs(implementation, shape, logits):
    reason = why_not(implementation)
    if reason is not None:
        pytest.skip(reason)
    package = IMPLEMENTATIONS[implementation].package
    if package is None:
        return
    try:
        errors(implementation, shape, logits)
    except Exception as error:  # another project's code may meet versions that it does not support
        pytest.skip(
            f"{implementation} ({package} {package_version(package)}) does not run here: {type(error).__name__}: {error}"[
                :300
            ]
        )


def test_loss(benchmark, shape, mode, logits, implementation):
    skip_unless_it_runs(implementation, shape, logits)
    N, D, V, *_ = sizes = ALL_SHAPES[shape]
    computes = IMPLEMENTATIONS[implementation].computes
    benchmark.group = f"loss {shape}: {sizes}, {mode}, {logits} logits"
    try:
        found = errors(implementation, shape, logits)
        allowed = max(TOLERANCE, BF16_SOURCES_TOLERANCE if implementation == "dense-fusellm" else 0)
        assert all(error < allowed for error in found.values()), found
        step = make_step(implementation, shape, logits, mode)
        floor = gemms(N, D, V, GEMMS[mode], DTYPE, DEVICE)
        info = {name: float(f"{error:.2g}") for name, error in found.items()}
        info |= {"implementation": implementation, "computes": computes, "dtype": str(DTYPE)}
        timed(benchmark, step, floor, sizes.rounds, **info)
        if DEVICE == "cuda":
            peak = cuda_peak_mib(step)
            if mode == "forward_backward":
                peak -= (N * D + V * D) * DTYPE.itemsize / 2**20
            benchmark.extra_info["peak_mib"] = peak
        elif mode == "forward_backward" and not INTERPRETED:
            # One process measures all of ours. With a large shape it would also run those that were not asked for.
            names = LOCAL if shape in SHAPES and implementation in LOCAL else (implementation,)
            benchmark.extra_info["peak_mib"] = process_peaks(shape, names)[implementation]
    except torch.OutOfMemoryError as error:
        pytest.skip(f"{implementation} does not fit at {sizes}: {error}"[:200])
