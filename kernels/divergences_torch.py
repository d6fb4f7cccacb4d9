"""The divergences in plain torch: their values and slopes, part by part. README.md derives the gradient in the logits from those."""

import math

import torch
from torch import Tensor

from .divergences import FORWARD_KL, JSD, REVERSE_KL, SKEW_KL, SKEW_REVERSE_KL, TVD


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
    # q·log(q/m) + q·β·(1 − q/m), with c = β − 1
    return q_against_m, q_against_m + beta * (1 - beta) * q_over_m * (p - q)
