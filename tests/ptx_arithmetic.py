"""What single instructions of PTX compute, with NumPy: arithmetic, comparisons and conversions.

Each takes and returns the values of all threads. Approximate functions of the hardware are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import numpy as np

TYPES = {
    f"{kind}{bits}": np.dtype(f"{numpy_kind}{bits // 8}")
    for kind, numpy_kind in (("b", "u"), ("u", "u"), ("s", "i"), ("f", "f"))
    for bits in (8, 16, 32, 64)
    if (kind, bits) != ("f", 8)
}


def as_bits(value: Any) -> Any:
    value = np.asarray(value)
    return value if value.dtype == bool else value.view(f"u{value.dtype.itemsize}")


def number(text: str, dtype: np.dtype) -> np.ndarray | np.generic:
    """An immediate value: 12, -3, 0x1F, or the bits of a float as in 0f3F800000."""
    if text[:2] in ("0f", "0F", "0d", "0D"):
        bits = int(text[2:], 16)
        return np.dtype(f"u{4 if text[1] in 'fF' else 8}").type(bits).view(dtype)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    return unsigned.type(int(text.rstrip("U"), 0) % (1 << (8 * dtype.itemsize))).view(dtype)


def flushed(value: np.ndarray) -> np.ndarray:
    """A float without denormal numbers."""
    return np.where(abs(value) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), value), value)


def to_bf16(value: np.ndarray) -> np.ndarray:
    """The bits of a float, rounded to bf16, as 16-bit integers."""
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded.astype(np.uint16))


def integer_division(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b without what is behind the point, as C has it."""
    b = np.where(b == 0, 1, b)
    return (np.sign(a) * np.sign(b) * (abs(a) // abs(b))).astype(a.dtype)


def shifted(a: np.ndarray, by: np.ndarray, left: bool) -> np.ndarray:
    """A shift by as many bits as there are or by more leaves nothing, or the sign."""
    bits = 8 * a.dtype.itemsize
    by = by.astype(np.uint32)
    some = np.minimum(by, bits - 1).astype(a.dtype)
    if not left:
        return np.where((by >= bits) & (a.dtype.kind == "u"), a.dtype.type(0), a >> some)
    return np.where(by >= bits, a.dtype.type(0), a << some)


def extremum(*operands: Any, picks: Callable, of_numbers: Callable, of_bits: Callable) -> Any:
    """A maximum or minimum of two values or three. Of a number and NaN it is the number, or NaN with .NaN; −0 is below 0."""
    *values, modifiers = operands

    def of_two(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if a.dtype.kind != "f":
            return picks(a, b)
        found = picks(a, b) if "NaN" in modifiers else of_numbers(a, b)
        return np.where(a == b, of_bits(as_bits(a), as_bits(b)).view(a.dtype), found)

    return reduce(of_two, values)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a·b + c, rounded once."""
    wide = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    return wide.astype(a.dtype)


def divided(a: np.ndarray, b: np.ndarray, _: Sequence[str]) -> np.ndarray:
    return a / b if a.dtype.kind == "f" else integer_division(a, b)


ELEMENTWISE: dict[str, Callable] = {
    "mov": lambda a, _: a,
    "add": lambda a, b, _: a + b,
    "sub": lambda a, b, _: a - b,
    "mul": lambda a, b, _: a * b,
    "mad": lambda a, b, c, _: a * b + c,
    "fma": lambda a, b, c, _: fused(a, b, c),
    "div": divided,
    "max": partial(extremum, picks=np.maximum, of_numbers=np.fmax, of_bits=np.bitwise_and),
    "min": partial(extremum, picks=np.minimum, of_numbers=np.fmin, of_bits=np.bitwise_or),
    "and": lambda a, b, _: a & b,
    "or": lambda a, b, _: a | b,
    "xor": lambda a, b, _: a ^ b,
    "not": lambda a, _: ~a,
    "neg": lambda a, _: -a,
    "abs": lambda a, _: abs(a),
    "shl": lambda a, b, _: shifted(a, b, left=True),
    "shr": lambda a, b, _: shifted(a, b, left=False),
    "prmt": lambda a, b, selector, _: permuted(a, b, selector),
    "ex2": lambda a, _: np.exp2(a),
    "lg2": lambda a, _: np.log2(a),
    "rcp": lambda a, _: 1 / a,
    "sqrt": lambda a, _: np.sqrt(a),
    "rsqrt": lambda a, _: 1 / np.sqrt(a),
}


def permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four of the eight bytes of two registers, each named by four bits of the selector; the highest one asks for its sign alone."""
    eight = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(a)
    for n in range(4):
        which = (selector >> np.uint32(4 * n)) & np.uint32(15)
        byte = (eight >> ((which & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(255)
        sign = (byte >> np.uint32(7)) * np.uint32(255)
        result = result | (np.where(which > 7, sign, byte) << np.uint32(8 * n))
    return result


COMPARISONS: dict[str, Callable] = {
    "eq": np.equal,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
}

WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def converted(value: np.ndarray, target: str, source: str, modifiers: Sequence[str]) -> np.ndarray:
    """A conversion of one value. Floats become integers only by rounding."""
    if source == "bf16":
        value = (value.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if target == "bf16":
        return to_bf16(value)
    dtype = TYPES[target]
    rounding = {"rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc, "rni": np.rint}
    for name, rounds in rounding.items():
        if name in modifiers:
            value = rounds(value)
    if value.dtype.kind == "f" and dtype.kind != "f":
        limits = np.iinfo(dtype)
        inside = np.clip(np.nan_to_num(value.astype(np.float64)), float(limits.min), float(limits.max))
        return np.where(inside >= float(limits.max), limits.max, inside.astype(dtype))
    return value.astype(dtype)
