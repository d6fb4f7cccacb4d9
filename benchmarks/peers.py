"""The losses of other projects, each called as its own trainers call it, and two loops in the style of one that is no package.

| name | project | read at | takes | matrix products | adds up dW in |
|---|---|---|---|---|---|
| `liger`, `liger-cute` | Liger-Kernel | 0.8.5 | labels | 3 | the head's dtype |
| `cut-cross-entropy` | apple/ml-cross-entropy | 25.1.1 | labels | 4, without blocks that round to 0 | the head's dtype |
| `quack`, `quack-logits` | QuACK | 0.6.5 | labels | 3 | fp32 |
| `torch-linear-ce` | torch | 2.13 | labels | 3 | the head's dtype |
| `veomni-style` | VeOmni's `chunk_loss`, written anew | 125eaca | labels | 3 | the head's dtype |
| `veomni-style-topk` | VeOmni's `chunk_topk_distill`, written anew | fc7cc87 | a source's top K | 4 | the head's dtype |
| `trl-kl` | TRL's `kernels/chunked_divergence` | 1.16.0 | a teacher's hidden states and head | 6: two of the teacher's | fp32 |
| `trl-jsd` | the same | 1.16.0 | the same | 8: three of the teacher's | the same |
| `liger-kl` | Liger's `FusedLinearKLDiv` | 0.8.5 | a teacher's probabilities (N, V) | 3 | the head's dtype |
| `liger-jsd` | Liger's `FusedLinearJSD` | 0.8.5 | a teacher's hidden states and head | 4: one of the teacher's | the head's dtype |
| `liger-jsd-compiled` | Liger's `chunked_loss` | 0.8.5 | the same | 4, compiled | the head's dtype |

Where there is a fourth product of the student's, backward computes the logits again.
"CuTe" is the language of NVIDIA's CUTLASS in which QuACK is written and `liger-cute`'s kernel between the products, which `liger` has in
Triton; both need nvidia-cutlass-dsl. `liger-jsd` takes the one in CuTe by itself where that is installed, on Hopper and later.
`quack` takes the fastest pipeline that it has for the shape, on an H100 the one that never writes the gradient in the logits;
`quack-logits` is its older one. `torch-linear-ce` has its default chunks, of about N·D/(2V) rows: the fewer, the more often dW is gone
through. What TRL and Liger learn from a teacher has no label in it, so that all rows count.
Dimension letters: N rows, C rows of a chunk, D hidden, V vocabulary, K kept entries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from profuser.loss import DEFAULT_BETA

FUSION = "fusion"
ONE_SOURCE = "one source"
CROSS_ENTROPY = "cross-entropy"
TEACHER_KL = "teacher, forward KL"
TEACHER_PROBABILITIES = "teacher's probabilities, forward KL"
TEACHER_JSD = "teacher, JSD"
TEACHER_TOP_K = "teacher's top-K, JSD"
TEACHERS = (TEACHER_TOP_K, TEACHER_KL, TEACHER_PROBABILITIES, TEACHER_JSD)
KINDS = (FUSION, ONE_SOURCE, CROSS_ENTROPY, *TEACHERS)

JSD_BETA = 0.5
VEOMNI_CHUNK = 1024
"""Rows of a chunk, VeOmni's default."""


class Implementation(NamedTuple):
    computes: str
    function: Callable[..., Tensor]
    package: str | None = None  # the distribution of another project that it needs
    oldest: str | None = None  # the first release of it that has this loss
    needs_cuda: bool = False


def liger(hidden, weight, labels):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


def liger_cute(hidden, weight, labels):
    from liger_kernel.backends import dispatch

    loss, *_ = dispatch("fused_linear_cross_entropy", hidden, weight, labels, impl="nvidia-cutedsl")
    return loss


def cut_cross_entropy(hidden, weight, labels):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels)


def quack(hidden, weight, labels, use_scaled_exp):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, labels, use_scaled_exp=use_scaled_exp)


def torch_linear_cross_entropy(hidden, weight, labels):
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, labels, options=options)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Each chunk's loss is differentiated by autograd as soon as it is known, and its gradients are kept until backward."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, need_gradient):
        total = torch.zeros((), device=hidden.device)
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
        chunks = (x.split(VEOMNI_CHUNK) for x in (hidden, labels, dhidden))
        for h, gold, out in zip(*chunks, strict=True):
            with torch.enable_grad():
                h, w = h.detach().requires_grad_(), weight.detach().requires_grad_()
                loss = F.cross_entropy(F.linear(h, w).float(), gold, reduction="sum") / len(labels)
            total += loss.detach()
            if need_gradient:
                of_hidden, of_weight = torch.autograd.grad(loss, (h, w))
                out.copy_(of_hidden)
                dweight += of_weight
        ctx.save_for_backward(dhidden, dweight)
        return total

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad_loss,) = grad_outputs
        return *(gradient * grad_loss for gradient in ctx.saved_tensors), None, None


def veomni_style(hidden, weight, labels):
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, torch.is_grad_enabled())


class _ChunkedTopK(torch.autograd.Function):
    """CE and KL of every row, (N,) each, from chunks of logits that backward computes again."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, ids, p):
        ce, kl = [], []
        for h, gold, at, of_source in zip(*(x.split(VEOMNI_CHUNK) for x in (hidden, labels, ids, p)), strict=True):
            log_q = F.linear(h, weight).float().log_softmax(1)
            ce.append(F.nll_loss(log_q, gold, reduction="none"))
            kl.append((torch.xlogy(of_source, of_source) - of_source * log_q.gather(1, at)).sum(1))
        ctx.save_for_backward(hidden, weight, labels, ids, p)
        return torch.cat(ce), torch.cat(kl)

    @staticmethod
    def backward(ctx, *grad_outputs):
        hidden, weight, labels, ids, p = ctx.saved_tensors
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
        parts = (hidden, labels, ids, p, *grad_outputs, dhidden)
        for h, gold, at, of_source, of_ce, of_kl, out in zip(*(x.split(VEOMNI_CHUNK) for x in parts), strict=True):
            q = F.linear(h, weight).float().softmax(1)
            g = (of_ce + of_kl * of_source.sum(1))[:, None] * q
            g.scatter_add_(1, at, -of_kl[:, None] * of_source)
            g.scatter_add_(1, gold[:, None], -of_ce[:, None])
            g = g.to(h.dtype)
            torch.mm(g, weight, out=out)
            dweight += g.t() @ h
        return dhidden, dweight, None, None, None


def veomni_style_topk(hidden, weight, labels, source_ids, source_logprobs, tail):
    assert tail == "renormalize"
    ce, kl = _ChunkedTopK.apply(hidden, weight, labels, source_ids[0].long(), source_logprobs[0].softmax(1))
    return ce.mean() + DEFAULT_BETA * kl.mean()


def trl(hidden, weight, labels, teacher_hidden, teacher_weight, beta):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    per_row, _ = ChunkedDivergenceFunction.apply(hidden, weight, None, teacher_hidden, teacher_weight, None, beta)
    return per_row.mean()


def liger_kl(hidden, weight, labels, teacher_probabilities):
    from liger_kernel.transformers import LigerFusedLinearKLDivLoss

    return LigerFusedLinearKLDivLoss()(hidden, weight, teacher_probabilities)


def liger_jsd(hidden, weight, labels, teacher_hidden, teacher_weight):
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=JSD_BETA)(hidden, weight, teacher_hidden, teacher_weight, None)


def liger_chunked_jsd(hidden, weight, labels, teacher_hidden, teacher_weight):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=JSD_BETA)
    return loss(hidden, weight, teacher_hidden, teacher_weight, labels)


def peer(computes: str, function: Callable[..., Tensor], package: str, oldest: str | None, **options) -> Implementation:
    """A loss of another project whose kernels need CUDA."""
    return Implementation(computes, functools.partial(function, **options), package, oldest, needs_cuda=True)


PEERS = {
    "liger": peer(CROSS_ENTROPY, liger, "liger-kernel", None),
    "liger-cute": peer(CROSS_ENTROPY, liger_cute, "liger-kernel", "0.8.5"),
    "cut-cross-entropy": peer(CROSS_ENTROPY, cut_cross_entropy, "cut-cross-entropy", None),
    "quack": peer(CROSS_ENTROPY, quack, "quack-kernels", "0.6.5", use_scaled_exp=None),
    "quack-logits": peer(CROSS_ENTROPY, quack, "quack-kernels", "0.6.5", use_scaled_exp=False),
    "torch-linear-ce": Implementation(CROSS_ENTROPY, torch_linear_cross_entropy, "torch", "2.13"),
    "veomni-style": Implementation(CROSS_ENTROPY, veomni_style),
    "veomni-style-topk": Implementation(ONE_SOURCE, veomni_style_topk),
    "trl-kl": Implementation(TEACHER_KL, functools.partial(trl, beta=0.0), "trl", "1.16"),
    "trl-jsd": Implementation(TEACHER_JSD, functools.partial(trl, beta=JSD_BETA), "trl", "1.16"),
    "liger-kl": peer(TEACHER_PROBABILITIES, liger_kl, "liger-kernel", "0.8.5"),
    "liger-jsd": peer(TEACHER_JSD, liger_jsd, "liger-kernel", "0.8.5"),
    "liger-jsd-compiled": Implementation(TEACHER_JSD, liger_chunked_jsd, "liger-kernel", "0.8.5"),
}
