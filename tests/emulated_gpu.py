"""Runs Triton's kernels as they are compiled for an NVIDIA GPU, without having one: their PTX, executed with NumPy.

Triton's interpreter runs the Python source of a kernel, in which there are neither threads nor types of registers. Here runs what the
compiler makes of it: vectors of 16 bytes, exchange between the threads of a warp and through shared memory, predicates, roundings to
bf16. Beyond the values it finds what a GPU does not forgive:

- an access outside of the tensors that a launch was given, or at an address that is no multiple of its size;
- memory of a tensor that two warps of a launch touch, if one of them writes, because nothing orders them;
- shared memory that a warp writes and another one touches without a barrier in between;
- a barrier that some threads do not reach, or an exchange of threads of which some are elsewhere.

An instruction that is not known here is an error, too. The threads of a warp are taken to stay together where their ways do not part, as
Triton has it. Approximate functions of the hardware are exact, and nothing is said about speed.

`install()` lets every launch of this process run so. It needs a process in which TRITON_INTERPRET was not set when Triton was imported.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial, reduce
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

WARP = 32
NOBODY, MANY = -1, -2
ALL, NONE = np.bool_(True), np.bool_(False)
SHARED = "shared memory"

TYPES = {
    f"{kind}{bits}": np.dtype(f"{numpy_kind}{bits // 8}")
    for kind, numpy_kind in (("b", "u"), ("u", "u"), ("s", "i"), ("f", "f"))
    for bits in (8, 16, 32, 64)
    if (kind, bits) != ("f", 8)
}
SPACES = ("global", "shared", "param")


class Fault(AssertionError):
    """What a GPU would not forgive, or what cannot be executed here."""


# -- a program ----------------------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    """`@predicate operation operands`. The operation is split at its dots; a list of operands stands in braces."""

    text: str
    predicate: str
    negated: bool
    operation: list[str]
    operands: list[Any]


@dataclass(frozen=True)
class Program:
    """A kernel: its instructions, where its labels are, and the names of its parameters."""

    name: str
    instructions: list[Instruction]
    labels: dict[str, int]
    parameters: list[str]


@cache
def parse(ptx: str) -> Program:
    """Reads the only kernel of a PTX module."""
    head, body = ptx.split(".entry", 1)[1].split("\n{", 1)
    name = head.split("(")[0].strip()
    instructions, labels = [], {}
    for raw in re.sub(r"//.*", "", body).split("$L__func_end")[0].splitlines():
        line = raw.strip()
        if label := re.fullmatch(r"(\$\w+):", line):
            labels[label[1]] = len(instructions)
        elif line.strip("{}") and not line.startswith("."):
            instructions.append(parse_instruction(line))
    return Program(name, instructions, labels, re.findall(rf"{name}_param_\d+", head))


def parse_instruction(line: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*);", line)
    if found is None:
        raise Fault(f"cannot be read: {line}")
    negation, predicate, operation, rest = found.groups()
    operands: list[Any] = []
    for part in re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s][^,]*", rest):
        is_list = part.startswith("{")
        operands.append([each.strip() for each in part.strip("{}").split(",")] if is_list else part.strip())
    return Instruction(line, predicate or "", bool(negation), operation.split("."), operands)


# -- memory -------------------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """Some memory, and which warp has read and written each byte of it since the launch began, or since the last barrier."""

    what: str
    begin: int
    bytes: np.ndarray
    readers: np.ndarray = field(init=False)
    writers: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.readers, self.writers = (np.full(len(self.bytes), NOBODY, np.int64) for _ in range(2))

    def forget(self) -> None:
        """All warps have met: what was touched before no longer counts."""
        self.readers.fill(NOBODY)
        self.writers.fill(NOBODY)

    def load(self, addresses: np.ndarray, size: int, warps: np.ndarray) -> np.ndarray:
        """Returns the bytes (threads, size) at some addresses."""
        at, warps = self.places(addresses, size), warps[:, None]
        writers, readers = self.writers[at], self.readers[at]
        if ((writers != NOBODY) & (writers != warps)).any():
            raise Fault(f"{self.what} is read that another warp has written, and nothing is between them")
        self.readers[at] = np.where((readers == NOBODY) | (readers == warps), warps, MANY)
        self.readers[at[self.readers[at] != warps]] = (
            MANY  # several warps read it at a time, and the last one stands there
        )
        return self.bytes[at]

    def store(self, addresses: np.ndarray, values: np.ndarray, warps: np.ndarray) -> None:
        """Writes bytes (threads, size). Several threads may write the same to one address."""
        at, warps = self.places(addresses, values.shape[1]), warps[:, None]
        writers, readers = self.writers[at], self.readers[at]
        rewritten = (writers != NOBODY) & (writers != warps) & (self.bytes[at] != values)
        read = (readers != NOBODY) & (readers != warps)
        self.bytes[at] = values
        if rewritten.any() or read.any() or (self.bytes[at] != values).any():
            raise Fault(f"{self.what} is written that another warp touches, and nothing is between them")
        self.writers[at] = warps

    def places(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """The numbers (threads, size) of the bytes that stand at some addresses."""
        return (addresses.astype(np.int64) - self.begin)[:, None] + np.arange(size)


def tensor_block(number: int, tensor: torch.Tensor) -> Block:
    storage = tensor.untyped_storage()
    size, begin = storage.nbytes(), storage.data_ptr()
    return Block(
        f"tensor {number} of the launch", begin, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(begin))
    )


# -- what instructions compute ------------------------------------------------------------------------------------------


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


# -- the threads of a program ---------------------------------------------------------------------------------------------


class Threads:
    """The threads of one program of a launch, with their registers and their shared memory.

    A register is an array of bits with an element for each thread, or with one for all of them.
    """

    def __init__(
        self, program: Program, parameters: dict[str, int], blocks: list[Block], place: tuple, size: int, shared: int
    ):
        self.program, self.parameters, self.blocks, self.size = program, parameters, blocks, size
        # What nobody has written must not look like a number.
        self.shared = Block(SHARED, 0, np.full(shared, 0xFF, np.uint8))
        self.registers: dict[str, Any] = {
            "%tid.x": np.arange(size, dtype=np.uint32),
            "%laneid": np.arange(size, dtype=np.uint32) % WARP,
            "%ntid.x": np.uint32(size),
            "global_smem": np.uint64(0),
        } | {f"%ctaid.{axis}": np.uint32(at) for axis, at in zip("xyz", place)}
        self.warps = np.arange(size) // WARP + (place[0] + (place[1] << 20)) * (size // WARP)

    def run(self) -> None:
        """Runs all threads to the end: always those that are furthest behind, so that they meet again where their ways do."""
        instructions, end = self.program.instructions, len(self.program.instructions)
        places, at, mask = np.zeros(self.size, np.int64), 0, ALL
        while at < end:
            try:
                jumping, target = self.step(instructions[at], mask)
            except Fault as fault:
                raise Fault(f"{self.program.name}: {fault}\n  {instructions[at].text}") from None
            except (KeyError, ValueError, TypeError, IndexError) as error:
                raise Fault(f"{self.program.name}: not known here: {instructions[at].text} ({error!r})") from error
            if mask is ALL and (jumping.all() or not jumping.any()):
                at = target if jumping.any() else at + 1
                continue
            places[self.spread(mask)] = at + 1
            places[self.spread(jumping)] = target
            at = int(places.min())
            mask = ALL if (places == at).all() else places == at

    def step(self, instruction: Instruction, mask: Any) -> tuple[Any, int]:
        """Executes an instruction in some threads. Returns which of them jump, and where to."""
        _, predicate, negated, operation, operands = instruction
        active = mask
        if predicate:
            active = mask & (~self.registers[predicate] if negated else self.registers[predicate])
        kind = operation[0]
        if kind in ("bra", "ret"):
            return active, self.program.labels[operands[0]] if kind == "bra" else len(self.program.instructions)
        if kind == "bar":
            if not active.all():
                raise Fault("some threads of a program never reach a barrier")
            if operation[1] != "warp":
                self.shared.forget()
        elif active.any():
            if kind in ("shfl", "redux", "ldmatrix") and not is_whole(self.by_warp(active)):
                raise Fault("only some of the threads of a warp exchange something")
            if kind in ("ld", "ldmatrix", "st"):
                self.access(kind, operation, operands, active)
            else:
                for name, value in zip(targets_of(operands[0]), self.results(operation, operands), strict=True):
                    self.set(name, value, active)
        return NONE, 0

    def by_warp(self, value: Any) -> np.ndarray:
        """A value of all threads as one for each, (warps, threads of a warp)."""
        return self.spread(value).reshape(-1, WARP)

    def set(self, name: str, value: Any, active: Any) -> None:
        if not active.all():
            value = np.where(active, value, self.registers.get(name, value.dtype.type(0)))
        self.registers[name] = value

    def get(self, name: str, type: str) -> Any:
        """An operand as values of a type."""
        if type == "pred":
            return self.registers[name] if name.startswith("%") else np.bool_(int(name))
        dtype = TYPES[type]
        if name not in self.registers:  # a register that nobody has written yet may hold anything
            return dtype.type(0) if name.startswith("%") else number(name, dtype)
        value = self.registers[name]
        if value.dtype.itemsize != dtype.itemsize:  # the lower bits
            value = value.astype(f"u{dtype.itemsize}")
        return value.view(dtype)

    def spread(self, value: Any) -> np.ndarray:
        """A value of all threads as one for each."""
        return np.broadcast_to(value, (self.size,))

    # -- instructions that compute

    def results(self, operation: list[str], operands: list[Any]) -> list[Any]:
        """The bits of what an instruction computes, for each register that it writes."""
        kind, *modifiers = operation
        type = modifiers[-1] if modifiers else ""
        match kind:
            case "mov" if isinstance(operands[0], list):  # the parts of a register
                size = TYPES[type].itemsize // len(operands[0])
                whole = self.get(operands[1], type)
                return [(whole >> (8 * size * n)).astype(f"u{size}") for n in range(len(operands[0]))]
            case "mov" if isinstance(operands[1], list):  # a register of parts
                bits = 8 * TYPES[type].itemsize // len(operands[1])
                parts = [self.get(name, f"b{bits}").astype(TYPES[type]) for name in operands[1]]
                return [sum(part << TYPES[type].type(bits * n) for n, part in enumerate(parts))]
            case "setp":
                a, b = (self.get(name, type) for name in operands[1:3])
                return [np.asarray(COMPARISONS[modifiers[0]](a, b))]
            case "selp":
                a, b = (self.get(name, type) for name in operands[1:3])
                return [as_bits(np.where(self.registers[operands[3]], a, b))]
            case "cvt":
                return [as_bits(self.convert(modifiers, operands[1:]))]
            case "shfl":
                return [self.exchanged(modifiers[1], *operands[1:4])]
            case "redux":
                lanes = self.by_warp(self.get(operands[1], type))
                reduce = {"max": np.max, "min": np.min, "add": np.sum}[modifiers[1]]
                return [as_bits(np.repeat(reduce(lanes, axis=1).astype(lanes.dtype), WARP))]
            case "bfe":
                value, begin, count = self.get(operands[1], type), int(operands[2]), int(operands[3])
                unused = 8 * value.dtype.itemsize - count
                return [as_bits((value << value.dtype.type(unused - begin)) >> value.dtype.type(unused))]
            case "mul" | "mad" if "wide" in modifiers:
                wide = WIDER[type]
                a, b = (self.get(name, type).astype(TYPES[wide]) for name in operands[1:3])
                return [as_bits(a * b + (self.get(operands[3], wide) if kind == "mad" else 0))]
        if "hi" in modifiers:
            raise Fault("not known here")
        if type.endswith("x2"):  # two values in a register
            pairs = [pair_of(self.get(name, "b64")) for name in operands[1:]]
            return [np.ascontiguousarray(ELEMENTWISE[kind](*pairs, modifiers)).view(np.uint64)[:, 0]]
        if type in ("bf16", "f16") and "f32" in modifiers:  # all but the last are narrower
            narrow = [
                converted(self.get(name, "u16" if type == "bf16" else type), "f32", type, []) for name in operands[1:-1]
            ]
            values = [*narrow, self.get(operands[-1], "f32")]
        else:
            values = [self.get(name, type) for name in operands[1:]]
        if kind in ("shl", "shr"):
            values[1] = self.get(operands[2], "u32")
        if "ftz" in modifiers:
            values = list(map(flushed, values))
        result = np.asarray(ELEMENTWISE[kind](*values, modifiers))
        return [as_bits(flushed(result) if "ftz" in modifiers else result)]

    def convert(self, modifiers: list[str], operands: list[str]) -> np.ndarray:
        *how, target, source = modifiers
        if not target.endswith("x2"):
            value = self.get(operands[0], "u16" if source == "bf16" else source)
            if "ftz" in how and value.dtype == np.float32:
                value = flushed(value)
            return np.asarray(converted(np.asarray(value), target, source, how))
        high, low = (converted(np.asarray(self.get(name, source)), target[:-2], source, how) for name in operands)
        high, low = (as_bits(half).astype(np.uint32) for half in (high, low))
        return (high << np.uint32(16)) | low

    def exchanged(self, how: str, value: str, lane: str, bound: str) -> np.ndarray:
        """What each thread gets of another one of its warp."""
        if bound != "31":
            raise Fault("not known here")
        own = np.arange(self.size)
        other = self.get(lane, "u32").astype(np.int64)
        other = own ^ other if how == "bfly" else own // WARP * WARP + self.spread(other) % WARP
        return self.spread(self.get(value, "b32"))[other]

    # -- instructions that access memory

    def access(self, kind: str, operation: list[str], operands: list[Any], active: Any) -> None:
        """Loads or stores one element for each thread, or a vector of them."""
        space = next(part for part in operation if part in SPACES)
        dtype = TYPES[operation[-1]]
        place, registers = (operands[1], operands[0]) if kind != "st" else operands
        registers = registers if isinstance(registers, list) else [registers]
        base, _, offset = place.strip("[] ").partition("+")
        base, offset = base.strip(), int(offset or 0)
        if space == "param":
            self.registers[registers[0]] = as_bits(np.array(self.parameters[base]).astype(np.int64).astype(dtype))
            return
        which = np.flatnonzero(self.spread(active))
        address = self.spread(self.get(base, "u64") + np.uint64(offset % (1 << 64)))
        size = dtype.itemsize * len(registers)
        if kind == "ldmatrix":
            self.load_matrix(address, registers, "x1" in operation and "trans" not in operation)
            return
        block = self.block_of(space, address[which], size)
        if kind == "st":
            parts = [as_bits(np.ascontiguousarray(self.spread(self.get(name, operation[-1])))) for name in registers]
            values = np.stack(parts, 1).astype(f"u{dtype.itemsize}").view(np.uint8)
            block.store(address[which], values[which], self.warps[which])
            return
        found = np.ascontiguousarray(block.load(address[which], size, self.warps[which])).view(f"u{dtype.itemsize}")
        for n, name in enumerate(registers):
            kept = max(dtype.itemsize, 2)  # no register is smaller
            value = np.zeros(self.size, f"u{kept}")
            value[which] = found[:, n].view(dtype).astype(f"{dtype.kind}{kept}").view(f"u{kept}")
            self.set(name, value, active)

    def block_of(self, space: str, addresses: np.ndarray, size: int) -> Block:
        """The memory in which all of these addresses are."""
        if (addresses % np.uint64(size)).any():
            raise Fault(f"an access of {size} bytes at an address that is no multiple of it")
        first, last = int(addresses.min()), int(addresses.max()) + size
        for block in [self.shared] if space == "shared" else self.blocks:
            if block.begin <= first and last <= block.begin + len(block.bytes):
                return block
        raise Fault(f"an access outside of {'shared memory' if space == 'shared' else 'the tensors of the launch'}")

    def load_matrix(self, addresses: np.ndarray, registers: list[str], known: bool) -> None:
        """Loads 8x8 elements of 16 bits for each warp, whose rows are where its first eight threads say."""
        if not known:
            raise Fault("not known here")
        found = np.empty(self.size, np.uint32)
        for begin in range(0, self.size, WARP):
            rows = addresses[begin : begin + 8]
            block = self.block_of("shared", rows, 16)
            values = np.ascontiguousarray(block.load(rows, 16, self.warps[begin : begin + 8]))
            found[begin : begin + WARP] = values.view(np.uint32).ravel()
        self.registers[registers[0]] = found


def as_bits(value: Any) -> Any:
    value = np.asarray(value)
    return value if value.dtype == bool else value.view(f"u{value.dtype.itemsize}")


def pair_of(value: Any) -> np.ndarray:
    """The two floats in each 64-bit value, (threads or 1, 2)."""
    return np.ascontiguousarray(np.atleast_1d(value)).view(np.float32).reshape(-1, 2)


def is_whole(active: np.ndarray) -> bool:
    """Whether of every warp all threads are active or none, (warps, threads of a warp)."""
    return bool((active.all(1) | ~active.any(1)).all())


def targets_of(operand: Any) -> list[str]:
    return operand if isinstance(operand, list) else [operand]


# -- launches -------------------------------------------------------------------------------------------------------------


class PtxBackend(CUDABackend):
    """Triton's compiler for NVIDIA, up to PTX."""

    def __init__(self, target: GPUTarget):
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages, options, language) -> None:
        super().add_stages(stages, options, language)
        del stages["cubin"]

    def hash(self) -> str:  # pyrefly: ignore[bad-override]  # there it is a cached function
        return f"{super().hash()}-emulated"


class Launcher:
    """Runs all programs of a launch, one after the other."""

    def __init__(self, source, metadata):
        self.types = list(source.signature.values())
        self.size, self.shared = WARP * metadata.num_warps, metadata.shared

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *arguments) -> None:
        program = parse(function)
        given = [value for value, type in zip(arguments, self.types, strict=True) if type != "constexpr"]
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        bits = [value.data_ptr() if isinstance(value, torch.Tensor) else bits_of(value) for value in given]
        blocks = {t.untyped_storage().data_ptr(): tensor_block(n, t) for n, t in enumerate(tensors) if t.numel()}
        parameters = dict(zip(program.parameters, [*bits, 0, 0], strict=True))  # the last two are for scratch memory
        with np.errstate(all="ignore"):
            for place in np.ndindex(x, y, z):
                Threads(program, parameters, list(blocks.values()), place, self.size, self.shared).run()


def bits_of(value: float | bool) -> int:
    """A number as it is handed to a kernel: floats with 32 bits."""
    return int(np.float32(value).view(np.uint32)) if isinstance(value, float) else int(value)


class Driver:
    """Stands in for Triton's driver of a GPU."""

    launcher_cls = Launcher

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, WARP)
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        """The module, the kernel, its registers, its spills, and how many threads it may have."""
        return kernel, kernel.decode(), 0, 0, 1024


def install(capability: int = 90) -> None:
    """Lets every kernel that is launched in this process run here.

    Args:
        capability: the architecture that kernels are compiled for; 90 stands for sm_90.
    """
    backends["nvidia"] = type(backends["nvidia"])(PtxBackend, backends["nvidia"].driver)
    driver: Any = Driver(capability)
    triton.runtime.driver.set_active(driver)
    # The kernels are decorated when they are imported, for the compiler or for the interpreter.
    assert os.environ.get("TRITON_INTERPRET") != "1"
    importlib.import_module("profuser.kernels.fused_loss_triton")
    importlib.import_module("profuser.kernels.source_topk_triton")
