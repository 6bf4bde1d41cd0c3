"""Parses the HLO text of a compiled program into instructions and counts how often each one runs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)(?=\()")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_MANY_CALLS = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BOUND = re.compile(r"[su]32\[\]\S* constant\((\d+)\)")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation."""

    name: str
    # Name of the computation that contains it.
    computation: str
    # Type of the result, as in the text; a tuple is in parentheses.
    result: str
    opcode: str
    # Names of the instructions that it reads, in order.
    operands: tuple[str, ...]
    # The full text, on one line.
    text: str

    @property
    def calls(self) -> list[str]:
        """Names of the computations that it runs, except for the condition of a loop."""
        called = _CALLS.findall(self.text)
        for group in _MANY_CALLS.findall(self.text):
            called += [part.strip().lstrip("%") for part in group.split(",")]
        return called


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name. Each maps names to instructions, in order; the last instruction is the root."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Returns the instructions that `instruction` reads."""
        return [self.computations[instruction.computation][name] for name in instruction.operands]


def parse(text: str) -> Program:
    """Parses the text of `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: if it is not an HLO module.
    """
    blocks: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            lines = blocks.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif lines is None:
            continue
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif line.startswith("}") and not line.startswith("}}"):
            lines = None
        elif lines:
            # Metadata of a kernel may contain line breaks.
            lines[-1] += line
    if not entry:
        raise ValueError("the text is not an HLO module: it has no ENTRY computation")
    computations = {
        name: {found.name: found for found in (_instruction(line, name) for line in lines)}
        for name, lines in blocks.items()
    }
    return Program(computations, entry)


def _instruction(line: str, computation: str) -> Instruction:
    name = _INSTRUCTION.match(line)
    start = name.end()
    stop = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opcode = _OPCODE.match(line, stop)
    operands = _NAME.findall(line, opcode.end(), _closing(line, opcode.end()))
    return Instruction(name[1], computation, line[start:stop], opcode[1], tuple(operands), line.strip())


def _closing(line: str, start: int) -> int:
    """Returns the position at which the parenthesis that opens at `start` closes."""
    depth = 0
    for position in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[position], 0)
        if not depth:
            return position
    raise ValueError(f"a parenthesis is not closed in: {line.strip()[:200]}")


def executed(
    program: Program, enter: Callable[[Instruction], bool] = lambda instruction: True
) -> Iterator[tuple[Instruction, int | None]]:
    """Yields every instruction that a run executes, and how often.

    The number is None inside a loop whose number of iterations is unknown. All branches of a conditional
    count.

    Args:
      program: compiled program.
      enter: returns whether to continue into the computations that an instruction calls.
    """
    stack: list[tuple[str, int | None]] = [(program.entry, 1)]
    while stack:
        name, times = stack.pop()
        for instruction in program.computations[name].values():
            yield instruction, times
            called = [callee for callee in instruction.calls if callee in program.computations]
            if not called or not enter(instruction):
                continue
            turns = _turns(instruction, program) if instruction.opcode == "while" else 1
            inner = times * turns if times and turns else None
            stack += [(callee, inner) for callee in called]


def _turns(loop: Instruction, program: Program) -> int | None:
    """Returns the number of iterations of a while loop, or None if it is unknown.

    It is the trip count annotated by the compiler or else the only constant in the condition.
    """
    known = _TRIPS.search(loop.text)
    if known:
        return int(known[1])
    condition = program.computations[_CONDITION.search(loop.text)[1]]
    bounds = [int(n) for part in condition.values() for n in _BOUND.findall(part.text)]
    return bounds[0] if len(bounds) == 1 else None


def shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Returns (dtype, shape) of all arrays in a type."""
    return [
        (dtype, tuple(int(side) for side in sides.split(",") if side))
        for dtype, sides in _SHAPE.findall(text)
    ]


def type_bytes(text: str) -> int:
    """Returns the bytes of all arrays in a type, without padding."""
    return sum(array_bytes(*array) for array in shapes(text))


def array_bytes(dtype: str, sides: tuple[int, ...]) -> int:
    """Returns the bytes of an array, without padding."""
    bits = _BITS[dtype] if dtype in _BITS else int(re.search(r"\d+", dtype)[0])
    return math.prod(sides) * bits // 8
