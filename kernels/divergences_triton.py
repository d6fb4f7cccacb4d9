"""The divergences for the Triton kernels: `divergence_parts` of divergences_torch.py, for a row's slots or its bucket."""

import math

import triton
import triton.language as tl

from .divergences import FORWARD_KL, JSD, REVERSE_KL, SKEW_KL, SKEW_REVERSE_KL, TVD
from .triton_math import exact_exp, log1p

_FORWARD_KL, _REVERSE_KL, _JSD = tl.constexpr(FORWARD_KL), tl.constexpr(REVERSE_KL), tl.constexpr(JSD)
_SKEW_KL, _SKEW_REVERSE_KL, _TVD = tl.constexpr(SKEW_KL), tl.constexpr(SKEW_REVERSE_KL), tl.constexpr(TVD)


def mixture_constants(divergence: str, beta: float) -> tuple[float, float]:
    """The logarithms of the shares that P and Q have in the mixture M; zeros where there is none."""
    if divergence not in (JSD, SKEW_KL, SKEW_REVERSE_KL):
        return 0.0, 0.0
    share_of_p = 1 - beta if divergence == SKEW_REVERSE_KL else beta
    return math.log(share_of_p), math.log(1 - share_of_p)


@triton.jit
def divergence_parts(
    p, q, log_q, DIVERGENCE: tl.constexpr, BETA: tl.constexpr, LOG_P_SHARE: tl.constexpr, LOG_Q_SHARE: tl.constexpr
):
    """What each part adds to D, and q·(∂D/∂q + c), as in divergences_torch.py."""
    log_p = tl.where(p == 0, float("-inf"), tl.log(tl.where(p == 0, 1.0, p)))
    if DIVERGENCE == _FORWARD_KL:
        value = tl.where(p == 0, 0.0, p * (log_p - log_q))
        slope = -p
    elif DIVERGENCE == _REVERSE_KL:
        value = tl.where(q == 0, 0.0, q * (log_q - log_p))
        slope = value
    elif DIVERGENCE == _TVD:
        value = tl.abs(p - q) * 0.5
        slope = tl.where(q > p, 0.5 * q, tl.where(q < p, -0.5 * q, 0.0 * q))
    else:
        left, right = log_p + LOG_P_SHARE, log_q + LOG_Q_SHARE
        high = tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)
        low = tl.minimum(left, right, propagate_nan=tl.PropagateNan.ALL)
        empty = high == float("-inf")
        log_m = tl.where(empty, 0.0, high + log1p(exact_exp(tl.where(empty, 0.0, low - high))))
        q_over_m = tl.where(empty, 0.0, exact_exp(log_q - log_m))
        q_against_m = tl.where(q == 0, 0.0, q * (log_q - log_m))
        p_against_m = tl.where(p == 0, 0.0, p * (log_p - log_m))
        if DIVERGENCE == _JSD:
            value = BETA * p_against_m + (1 - BETA) * q_against_m
            slope = (1 - BETA) * q_against_m
        elif DIVERGENCE == _SKEW_KL:
            value = p_against_m
            slope = (1 - BETA) * (1 - BETA) * q_over_m * (q - p)
        else:
            value = q_against_m
            slope = q_against_m + BETA * (1 - BETA) * q_over_m * (p - q)
    return value, slope
