"""The divergences: what a target's distribution Q costs beside a source's P, and how that changes with Q.

Both are distributions over the same few parts: the kept ids, and the bucket of all the others. Each member of the family is a
sum over the parts. The loss needs its value and, per part, q·∂D/∂q; README.md derives the gradient in the logits from those.
`reference.py` has the values once more, on purpose, and its gradients by autograd.

β is `divergence_beta`. M, the mixture, is βP + (1 − β)Q for `jsd` and `skew_kl`, (1 − β)P + βQ for `skew_reverse_kl`:

    forward_kl         KL(P ‖ Q)
    reverse_kl         KL(Q ‖ P)
    jsd                β·KL(P ‖ M) + (1 − β)·KL(Q ‖ M); at β = 0 it is forward_kl, at β = 1 reverse_kl (arXiv 2306.13649, as in TRL)
    skew_kl            KL(P ‖ M), β being the paper's α (arXiv 2402.03898)
    skew_reverse_kl    KL(Q ‖ M), likewise
    tvd                ½ Σ |P − Q|
"""

import math
from typing import Final, Literal, get_args

import torch
from torch import Tensor

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)

FORWARD_KL: Final = "forward_kl"
REVERSE_KL: Final = "reverse_kl"
JSD: Final = "jsd"
SKEW_KL: Final = "skew_kl"
SKEW_REVERSE_KL: Final = "skew_reverse_kl"
TVD: Final = "tvd"

TAIL_FLOOR = 1e-6
"""The least mass of the bucket where the divergence would be infinite at 0. It costs log(1/TAIL_FLOOR) = 13.8 nats at most."""


def canonical(divergence: str, beta: float) -> str:
    """The member's plain name: at its ends a mixture is one of the two distributions, and a KL without one is left."""
    if (divergence == JSD and beta == 0) or (divergence == SKEW_KL and beta == 0):
        return FORWARD_KL
    if (divergence == JSD and beta == 1) or (divergence == SKEW_REVERSE_KL and beta == 0):
        return REVERSE_KL
    return divergence


def infinite_at_zero(divergence: str) -> bool:
    """Whether a part that the source gives no mass at all makes the (canonical) divergence infinite."""
    return divergence == REVERSE_KL


def divergence_parts(
    divergence: str, beta: float, p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor
) -> tuple[Tensor, Tensor]:
    """What each part adds to the (canonical) divergence, and q·(∂D/∂q + c) with one c for all parts of a row.

    The gradient in the logits does not depend on c, which is chosen so that nothing large cancels. All tensors have one shape,
    parts last. Where p is 0, log_p is −inf; a part with p = q = 0 adds nothing to either.
    """
    if divergence == FORWARD_KL:
        # An entry with p = 0 is left out by name: its log q may be −inf.
        return torch.where(p == 0, 0, p * (log_p - log_q)), -p
    if divergence == REVERSE_KL:
        value = torch.where(q == 0, 0, q * (log_q - log_p))
        return value, value
    if divergence == TVD:
        return (p - q).abs() / 2, q * (q - p).sign() / 2

    share_of_p = 1 - beta if divergence == SKEW_REVERSE_KL else beta
    log_m = torch.logaddexp(log_p + math.log(share_of_p), log_q + math.log(1 - share_of_p))
    empty = log_m == -torch.inf
    q_over_m = torch.where(empty, 0, (log_q - log_m).exp())
    q_against_m = torch.where(q == 0, 0, q * (log_q - log_m))
    p_against_m = torch.where(p == 0, 0, p * (log_p - log_m))
    if divergence == JSD:
        return beta * p_against_m + (1 - beta) * q_against_m, (1 - beta) * q_against_m
    if divergence == SKEW_KL:
        # q·(1 − β)·(1 − p/m), with c = 1 − β
        return p_against_m, (1 - beta) ** 2 * q_over_m * (q - p)
    return q_against_m, q_against_m - beta * q_over_m * q
