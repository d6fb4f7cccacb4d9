"""The fused loss, forward and backward, against dense distillation in plain torch as FuseLLM trains.

    pytest benchmarks/bench_fused_loss.py --benchmark-only

Both get the same inputs and are compared before they are timed. CPU shapes, fp32. The peak memory in extra_info is
measured in a process of its own.
"""

import multiprocessing
import platform
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from profuser.kernels.reference import fusion_loss_reference
from profuser.loss import fused_linear_fusion_loss

# name: N rows, D hidden, V vocabulary, S sources, K kept entries, B sequences
SHAPES = {
    "demo": (1500, 128, 768, 3, 10, 48),
    "vocabulary-32k": (1024, 128, 32000, 3, 10, 4),
    "smollm2": (512, 576, 49152, 3, 10, 2),
}


def make_case(name):
    """Peaked logits, as of a trained model: a target that already gives its sources' tokens most of its mass."""
    N, D, V, S, K, B = SHAPES[name]
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=g) / D**0.5
    labels = torch.randint(V, (N,), generator=g)
    hidden = torch.randn(N, D, generator=g) + 12 * F.normalize(weight[labels], dim=1)
    ids = torch.randint(V, (S, N, K), generator=g)
    ids[:, :, 0] = labels
    logprobs = (4 * torch.randn(S, N, K, generator=g)).sort(dim=-1, descending=True).values.log_softmax(-1) - 0.05
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "labels": labels,
        "source_ids": ids.int(),
        "source_logprobs": logprobs,
        "source_ce": torch.rand(S, B, generator=g),
        "cu_seqlens": torch.linspace(0, N, B + 1).long(),
    }


def dense(hidden, weight, labels, source_ids, source_logprobs, source_ce, cu_seqlens):
    """[N, V] logits and a dense [N, V] source distribution per row, as FuseLLM's collator and loss make them.

    The bucket of the tail is one more column on both sides; the weights are FuseLLM's 0.9 : 0.1.
    """
    winner = source_ce.argmin(0).repeat_interleave(cu_seqlens.diff())
    rows = torch.arange(len(labels))
    ids, p = source_ids[winner, rows].long(), source_logprobs[winner, rows].exp()
    source = torch.zeros(len(labels), weight.shape[0]).scatter_add_(1, ids, p)
    log_q = F.linear(hidden, weight).log_softmax(1)
    outside = log_q.scatter(1, ids, -torch.inf).logsumexp(1)
    t = 1 - p.sum(1)
    kl = torch.xlogy(source, source).sum(1) - (source * log_q).sum(1) + t * (t.log() - outside)
    return (F.nll_loss(log_q, labels, reduction="sum") + 0.1 / 0.9 * kl.sum()) / len(labels)


IMPLEMENTATIONS = {"profuser": fused_linear_fusion_loss, "dense": dense}


def step(function, case):
    case["hidden"].grad = case["weight"].grad = None
    loss = function(**case)
    loss.backward()
    return loss.detach()


def resident_mib(field):
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def put_peak(implementation, shape, queue):
    torch.set_num_threads(1)
    case = make_case(shape)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew here
    before = resident_mib("VmRSS")
    step(IMPLEMENTATIONS[implementation], case)
    queue.put(round(resident_mib("VmHWM") - before, 1))


def measure_peak(implementation, shape):
    """MiB that one forward + backward adds to the resident set, gradients included; None where there is no /proc."""
    if platform.system() != "Linux":
        return None
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=put_peak, args=(implementation, shape, queue))
    process.start()
    peak = queue.get(timeout=600)
    process.join()
    return peak


def check(function, case):
    """Loss and gradients equal the fp64 reference's on 64 rows, as two sequences: all rows would not fit in memory."""
    rows = 64
    part = {name: case[name][:rows].detach() for name in ("hidden", "labels")}
    part |= {name: case[name][:, :rows] for name in ("source_ids", "source_logprobs")}
    part |= {
        "source_ce": case["source_ce"][:, :2],
        "cu_seqlens": torch.tensor([0, rows // 3, rows]),
        "weight": case["weight"].detach(),
    }
    results = []
    for implementation, dtype in ((function, torch.float32), (fusion_loss_reference, torch.float64)):
        operands = part | {name: part[name].detach().to(dtype).requires_grad_() for name in ("hidden", "weight")}
        loss = step(implementation, operands)
        results.append((loss, operands["hidden"].grad, operands["weight"].grad))
    for found, true in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=1e-4 * true.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_forward_and_backward(benchmark, implementation, shape):
    N, D, V, S, K, _ = SHAPES[shape]
    benchmark.group = f"fused_loss {shape}: {N} x {D} x {V}, S={S}, K={K}"
    function, case = IMPLEMENTATIONS[implementation], make_case(shape)
    check(function, case)
    benchmark.extra_info.update(
        torch=torch.__version__,
        python=platform.python_version(),
        machine=platform.machine(),
        threads=torch.get_num_threads(),
        dtype="float32",
        peak_rss_mib=measure_peak(implementation, shape),
    )
    benchmark.pedantic(step, args=(function, case), rounds=20 if shape == "demo" else 3, warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["gemm_gflops"] = round(6 * N * D * V / seconds / 1e9, 1)
