"""What is compared: profuser's loss, distillation in plain torch, and, in peers.py, the losses of other projects.

Each function takes those arguments of `fused_linear_fusion_loss` that its loss needs, or a teacher's hidden states and head, and
returns the mean over rows. The losses differ in what they learn from:

| computes | beside the labels it takes | loss of a row |
|---|---|---|
| "fusion" | the top-K entries of all S sources; Min-CE chooses the winner of each sequence | CE + β·KL(P, Q), K entries renormalised |
| "one source" | the top-K entries of the first source | the same |
| "cross-entropy" | nothing | CE |
| "teacher, forward KL" | a teacher's hidden states and head | KL(P, Q), no CE |
| "teacher's probabilities, forward KL" | the same as a tensor (N, V) | KL(P, Q), no CE |
| "teacher, JSD" | a teacher's hidden states and head | generalised JSD at 1/2 of P and Q, no CE |
| "teacher's top-K, JSD" | the same, of which it makes the top K and a bucket for the rest | the same of these parts |

Dimension letters: N rows, C rows of a chunk, D hidden, V vocabulary, S sources, K kept entries.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

from benchmarks.cases import DEVICE, IMPL, INTERPRETED, TEACHER_ENTRIES
from benchmarks.measure import package_version
from benchmarks.peers import (
    CROSS_ENTROPY,
    FUSION,
    JSD_BETA,
    ONE_SOURCE,
    PEERS,
    TEACHER_PROBABILITIES,
    TEACHER_TOP_K,
    TEACHERS,
    Implementation,
)
from profuser.kernels.common import chunk_rows, chunk_rows_gpu
from profuser.kernels.source_topk import source_topk
from profuser.loss import DEFAULT_BETA, fused_linear_fusion_loss


def arguments(case: dict[str, Any], computes: str) -> dict[str, Any]:
    """The arguments of a case that a loss which computes `computes` takes; `benchmarks.cases.make_teacher` adds the teacher's."""
    if computes == FUSION:
        return case
    if computes == CROSS_ENTROPY:
        return {name: case[name] for name in ("hidden", "weight", "labels")}
    if computes in TEACHERS:
        own = {name: case[name] for name in ("hidden", "weight", "labels")}
        teacher = {name: case[name] for name in ("teacher_hidden", "teacher_weight")}
        if computes == TEACHER_PROBABILITIES:
            return own | {"teacher_probabilities": probabilities(**teacher)}
        return own | teacher
    one = {name: value for name, value in case.items() if name not in ("source_ce", "cu_seqlens")}
    return one | {name: case[name][:1] for name in ("source_ids", "source_logprobs")}


def probabilities(teacher_hidden, teacher_weight):
    """A teacher's probabilities (N, V) in its dtype, made before anything is timed."""
    parts = teacher_hidden.split(1024)
    return torch.cat([F.linear(h, teacher_weight).float().softmax(1).to(h.dtype) for h in parts])


def fusellm(hidden, weight, labels, source_ids, source_logprobs, source_ce, cu_seqlens, tail):
    """The loss as FuseLLM's collator and trainer compute it.

    Every source is a dense [N, V] distribution in bf16, and the winner's is picked among them elementwise. Cross-entropy and
    KL of [N, V] logits follow, each with a log-softmax of its own. The collator's loop over positions is left out in
    FuseLLM's favour. Ranks take the place of its rewards, because bf16 rounds close rewards to the same number.
    """
    assert tail == "renormalize"
    N, V = len(labels), weight.shape[0]
    distributions, rewards = [], []
    for ids, logprobs, rank in zip(source_ids, source_logprobs, source_ce.argsort(0).argsort(0)):
        dense_source = torch.zeros(N, V, dtype=torch.bfloat16, device=hidden.device)
        distributions.append(dense_source.scatter_(1, ids.long(), logprobs.softmax(1).bfloat16()))
        rewards.append(-rank.repeat_interleave(cu_seqlens.diff())[:, None].bfloat16().expand(N, V))
    best = torch.stack(rewards, dim=-1).argmax(-1, keepdim=True)
    source = torch.stack(distributions, dim=-1).gather(-1, best).squeeze(-1)
    logits = F.linear(hidden, weight).float()
    kl = F.kl_div(logits.log_softmax(1), source, reduction="none").sum(1)
    return F.cross_entropy(logits, labels) + DEFAULT_BETA * kl.mean()


def dense(hidden, weight, labels, source_ids, source_logprobs, source_ce, cu_seqlens, tail):
    """The leanest loss that still holds [N, V] tensors: it makes only the winner's dense, and takes one log-softmax."""
    assert tail == "renormalize"
    winner = source_ce.argmin(0).repeat_interleave(cu_seqlens.diff())
    rows = torch.arange(len(labels), device=labels.device)
    p = source_logprobs[winner, rows].softmax(1)
    source = p.new_zeros(len(labels), weight.shape[0]).scatter_(1, source_ids[winner, rows].long(), p)
    log_q = F.linear(hidden, weight).float().log_softmax(1)
    kl = F.kl_div(log_q, source, reduction="none").sum(1)
    return F.nll_loss(log_q, labels) + DEFAULT_BETA * kl.mean()


def loss_and_gradient(logits: Tensor, labels: Tensor, ids: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of CE + beta·KL over fp32 logits (C, V), and its gradient in them."""
    log_q = logits.log_softmax(1)
    gold = labels[:, None]
    kl = torch.xlogy(p, p) - p * log_q.gather(1, ids)
    loss = DEFAULT_BETA * kl.sum() - log_q.gather(1, gold).sum()
    gradient = log_q.exp_().mul_(1 + DEFAULT_BETA).scatter_add_(1, ids, -DEFAULT_BETA * p)
    return loss, gradient.scatter_add_(1, gold, -torch.ones_like(p[:, :1]))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, ids, p, loss_and_gradient, need_gradient):
        N, (V, D) = len(labels), weight.shape
        C = chunk_rows_gpu(N, V, D) if hidden.is_cuda else chunk_rows(N, V, hidden.element_size())
        total = p.new_zeros(())
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
        for begin in range(0, N, C):
            rows = slice(begin, begin + C)
            h = hidden[rows]
            loss, gradient = loss_and_gradient((h @ weight.t()).float(), labels[rows], ids[rows], p[rows])
            total += loss
            if need_gradient:
                gradient = gradient.to(hidden.dtype)
                torch.mm(gradient, weight, out=dhidden[rows])
                dweight.addmm_(gradient.t(), h)
        ctx.save_for_backward(dhidden.div_(N), dweight.div_(N))
        return total / N

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad_loss,) = grad_outputs
        return *(gradient * grad_loss for gradient in ctx.saved_tensors), *(None,) * 5


def chunked(hidden, weight, labels, source_ids, source_logprobs, tail, loss_and_gradient=loss_and_gradient):
    """What one would write by hand: a loop over chunks as large as ours, with gradients by formula and three GEMMs."""
    assert tail == "renormalize"
    ids, p = source_ids[0].long(), source_logprobs[0].softmax(1)
    return _Chunked.apply(hidden, weight, labels, ids, p, loss_and_gradient, torch.is_grad_enabled())


def compiled(**case):
    """The same loop as `chunked`, with what happens between its GEMMs compiled."""
    return chunked(**case, loss_and_gradient=_compiled_loss_and_gradient())


@functools.cache
def _compiled_loss_and_gradient():
    # fullgraph rules out a silent fallback.
    return torch.compile(loss_and_gradient, dynamic=False, fullgraph=True, disable=INTERPRETED)


def teacher_topk(hidden, weight, labels, teacher_hidden, teacher_weight):
    """How this project takes a dense teacher: first its top K, by one matrix product, and then the loss of them, by three."""
    ids, logprobs, _, _ = source_topk(teacher_hidden, teacher_weight, labels, TEACHER_ENTRIES, impl=IMPL)
    return fused_linear_fusion_loss(
        *(hidden, weight, labels, ids[None], logprobs[None]),
        ce_weight=torch.zeros_like(labels, dtype=torch.float32),
        kd_weight=torch.ones_like(labels, dtype=torch.float32),
        divergence="jsd",
        divergence_beta=JSD_BETA,
        impl=IMPL,
    )


ours = functools.partial(fused_linear_fusion_loss, impl=IMPL)

IMPLEMENTATIONS = {
    "profuser": Implementation(FUSION, ours),
    "dense-fusellm": Implementation(FUSION, fusellm),
    "dense-torch": Implementation(FUSION, dense),
    "chunked-torch": Implementation(ONE_SOURCE, chunked),
    "chunked-compiled": Implementation(ONE_SOURCE, compiled),
    "profuser-no-source": Implementation(CROSS_ENTROPY, ours),
    "profuser-teacher": Implementation(TEACHER_TOP_K, teacher_topk),
    **PEERS,
}


def why_not(name: str) -> str | None:
    """Why an implementation cannot run on this machine; None if nothing is known against it."""
    _, _, package, oldest, needs_cuda = IMPLEMENTATIONS[name]
    if package is None:
        return None
    # Where our kernels are interpreted, so are those of others.
    if needs_cuda and DEVICE != "cuda" and not INTERPRETED:
        return f"{name} needs CUDA"
    version = package_version(package)
    if version is None:
        return f"{name} needs {package}, which is not installed"
    if oldest is not None and Version(version) < Version(oldest):
        return f"{name} needs {package} >= {oldest}, {version} is installed"
    return None
