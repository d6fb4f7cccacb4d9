"""Elementary functions for the Triton kernels of both ops, made of operations that every target and the interpreter have.

libdevice is neither in the interpreter nor on every target. README.md says how exact the functions are.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def fast_exp(x):
    """exp(x) in one instruction. tl.exp spends four more on results below 1e-38, which are 0 here."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def exact_exp(x):
    """exp(x) for x <= 0 to a few ulp: tl.exp rounds x·log2(e), which costs 1e-6 at x = -25."""
    x = tl.maximum(x, -150.0, propagate_nan=tl.PropagateNan.ALL)  # exp is 0 below; the remainder of -inf would be NaN
    k = tl.floor(x * _LOG2_E + 0.5)
    # ln 2 in two parts, of which the product with the first one is exact.
    remainder = (x - k * 0.693145751953125) - k * 1.4286068203094173e-06
    return tl.exp(remainder) * tl.exp2(k)


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1, as 2·artanh(x / (2 + x)). It is exact for small x, which 1 + x has lost."""
    s = x / (2 + x)
    r = s * s
    series = 1 / 9 + r * (1 / 11 + r * (1 / 13 + r * (1 / 15 + r * (1 / 17))))
    return 2 * s * (1 + r * (1 / 3 + r * (1 / 5 + r * (1 / 7 + r * series))))


@triton.jit
def tanh(x):
    """tanh(x), by an odd polynomial where 1 - exp(-2|x|) would cancel. With tl.fma, so that every kernel rounds alike."""
    a = tl.abs(x)
    near = tl.minimum(a, 0.3)
    s = near * near
    p = tl.fma(s, 62.0 / 2835.0, -17.0 / 315.0)
    p = tl.fma(s, p, 2.0 / 15.0)
    p = tl.fma(s, p, -1.0 / 3.0)
    p = tl.fma(s, p, 1.0)
    e = fast_exp(-2.0 * a)
    t = tl.where(a < 0.3, near * p, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0, -t, t)
