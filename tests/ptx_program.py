"""Reads PTX: a kernel's instructions, its labels and its parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple


class Fault(AssertionError):
    """What a GPU would not forgive, or what cannot be executed here."""


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
