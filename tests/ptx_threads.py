"""Executes PTX: the threads of one program of a launch, with their registers, their shared memory, and the memory of tensors.

All threads go from instruction to instruction together. Where their ways part, those go on that are furthest behind.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ptx_arithmetic import COMPARISONS, ELEMENTWISE, TYPES, WIDER, as_bits, converted, flushed, number
from ptx_memory import Block
from ptx_program import Fault, Instruction, Program

WARP = 32
ALL, NONE = np.bool_(True), np.bool_(False)
SPACES = ("global", "shared", "param")


class Threads:
    """The threads of one program of a launch, with their registers and their shared memory.

    A register is an array of bits with an element for each thread, or with one for all of them.
    """

    def __init__(
        self, program: Program, parameters: dict[str, int], blocks: list[Block], place: tuple, size: int, shared: int
    ):
        self.program, self.parameters, self.blocks, self.size = program, parameters, blocks, size
        # What nobody has written must not look like a number.
        self.shared = Block("shared memory", 0, np.full(shared, 0xFF, np.uint8))
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
                over = {"max": np.max, "min": np.min, "add": np.sum}[modifiers[1]]
                return [as_bits(np.repeat(over(lanes, axis=1).astype(lanes.dtype), WARP))]
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


def pair_of(value: Any) -> np.ndarray:
    """The two floats in each 64-bit value, (threads or 1, 2)."""
    return np.ascontiguousarray(np.atleast_1d(value)).view(np.float32).reshape(-1, 2)


def is_whole(active: np.ndarray) -> bool:
    """Whether of every warp all threads are active or none, (warps, threads of a warp)."""
    return bool((active.all(1) | ~active.any(1)).all())


def targets_of(operand: Any) -> list[str]:
    return operand if isinstance(operand, list) else [operand]
