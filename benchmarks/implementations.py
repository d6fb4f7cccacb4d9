"""What is compared: profuser's loss, distillation in plain torch, and the fused cross-entropies of other projects.

Each function takes those arguments of `fused_linear_fusion_loss` that its loss needs, and returns the mean over rows. The
losses differ in the sources that they use:

| computes | sources |
|---|---|
| "fusion" | all S; Min-CE chooses the winner of each sequence |
| "one source" | only the first |
| "cross-entropy" | none |

Dimension letters: N rows, C rows of a chunk, D hidden, V vocabulary, S sources, K kept entries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from profuser.kernels.common import chunk_rows, chunk_rows_gpu
from profuser.loss import DEFAULT_BETA, fused_linear_fusion_loss


def arguments(case: dict[str, Any], computes: str) -> dict[str, Any]:
    """The arguments of a case that a loss which computes `computes` takes."""
    if computes == "fusion":
        return case
    if computes == "cross-entropy":
        return {name: case[name] for name in ("hidden", "weight", "labels")}
    one = {name: value for name, value in case.items() if name not in ("source_ce", "cu_seqlens")}
    return one | {name: case[name][:1] for name in ("source_ids", "source_logprobs")}


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
    return torch.compile(loss_and_gradient, dynamic=False, fullgraph=True)  # fullgraph rules out a silent fallback


def liger(hidden, weight, labels):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


def cut_cross_entropy(hidden, weight, labels):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels)


def quack(hidden, weight, labels):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, labels)


class Implementation(NamedTuple):
    computes: str
    function: Callable[..., Tensor]
    package: str | None = None  # the package of another project; these need CUDA


IMPLEMENTATIONS = {
    "profuser": Implementation("fusion", fused_linear_fusion_loss),
    "dense-fusellm": Implementation("fusion", fusellm),
    "dense-torch": Implementation("fusion", dense),
    "chunked-torch": Implementation("one source", chunked),
    "chunked-compiled": Implementation("one source", compiled),
    "profuser-no-source": Implementation("cross-entropy", fused_linear_fusion_loss),
    "liger": Implementation("cross-entropy", liger, "liger-kernel"),
    "cut-cross-entropy": Implementation("cross-entropy", cut_cross_entropy, "cut-cross-entropy"),
    "quack": Implementation("cross-entropy", quack, "quack-kernels"),
}
