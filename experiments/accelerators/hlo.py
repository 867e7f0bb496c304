"""What a compiled program does in its loops over time, read from its HLO text.

A kernel is an instruction that the device runs as a launch of its own: a fusion, a copy, a call of a library, or an operation
that was not fused. The counter of a loop is one of them on a GPU. A TPU computes single numbers on its scalar core, beside its
kernels, so an operation on numbers counts only if it is a fusion or a copy.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# What costs no launch: names, views and constants, and the loops themselves, whose bodies are counted instead.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call", "after-all"}
_FREE |= {"copy-done", "async-done", "slice-done", "partition-id", "replica-id", "opt-barrier"}


class Instruction(NamedTuple):
    """One line of a computation. `shape` is that of its result, as text."""

    name: str
    shape: str
    opcode: str
    line: str

    def attribute(self, name: str) -> str | None:
        """Return the name of a computation that the instruction calls as `name`."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.line)
        return found and found[1]


class Loop(NamedTuple):
    """A loop over time.

    Attributes:
        backward: whether it belongs to a gradient.
        kernels: the kernels of one iteration.
        copies: those of them that copy an array of all time steps.
    """

    backward: bool
    kernels: list[Instruction]
    copies: list[Instruction]


Computations = dict[str, list[Instruction]]
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")


def parse(text: str) -> Computations:
    """Return the instructions of every computation of a program."""
    # A tuple of many shapes contains comments with the index of each fifth one.
    text = re.sub(r"/\*index=\d+\*/", "", text)
    found: Computations = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if begins := re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = found[begins[1]] = []
        elif instruction := _INSTRUCTION.match(line):
            current.append(Instruction(*instruction.groups(), line))
    return found


def loops(text: str, steps: int) -> list[Loop]:
    """Return the loops with this number of iterations."""
    computations = parse(text)
    found = []
    for whole in (each for instructions in computations.values() for each in instructions):
        if whole.opcode != "while" or _trips(computations, whole) != steps:
            continue
        operation = re.search(r'op_name="([^"]*)"', whole.line)
        kernels = list(_kernels(computations, whole.attribute("body")))
        copies = [each for each in kernels if each.opcode.startswith("copy") and _leading(each.shape) in (steps, steps + 1)]
        found.append(Loop("transpose(" in (operation[1] if operation else ""), kernels, copies))
    return found


def _trips(computations: Computations, loop: Instruction) -> int | None:
    """Return the number of iterations of a loop; None if it is not a constant."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.line):
        return int(known[1])
    # The compiler of a TPU does not write the number down. The condition compares the counter with it.
    found = [re.search(r" constant\((\d+)\)", each.line) for each in computations[loop.attribute("condition")]]
    numbers = [int(each[1]) for each in found if each]
    return numbers[0] if len(numbers) == 1 else None


def _kernels(computations: Computations, name: str) -> Iterator[Instruction]:
    for each in computations[name]:
        if each.opcode == "call":
            yield from _kernels(computations, each.attribute("to_apply"))
        elif each.opcode not in _FREE and (_dimensions(each.shape) or each.opcode in ("fusion", "copy")):
            yield each


def _leading(shape: str) -> int | None:
    """Return the size of the first axis of an array of at least three axes."""
    sizes = _dimensions(shape)
    return sizes[0] if len(sizes) > 2 else None


def flops(text: str) -> float:
    """Return the floating-point operations of all matrix products of a program.

    The body of a loop counts as often as it runs. A loop whose number of iterations is an argument counts once.
    """
    computations = parse(text)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)[1]
    return _flops(computations, entry)


def _flops(computations: Computations, name: str) -> float:
    total = 0.0
    shapes = {each.name: each.shape for each in computations[name]}
    for each in computations[name]:
        if each.opcode == "while":
            total += (_trips(computations, each) or 1) * _flops(computations, each.attribute("body"))
        elif each.opcode in ("fusion", "call", "async-start"):
            called = each.attribute("calls") or each.attribute("to_apply")
            total += _flops(computations, called) if called else 0
        elif each.opcode in ("dot", "convolution") or "__cublas" in each.line:
            operands = re.search(rf" {each.opcode}\((.*?)\)", each.line)[1]
            sizes = [_size(shapes[found]) for found in re.findall(r"%?([\w.\-]+)", operands) if found in shapes][:2]
            batch = re.search(r'lhs_batch_dim(?:s=\{|ensions":\[)([\d,"]+)', each.line)
            products = math.prod(_dimensions(each.shape)[: len(batch[1].split(","))]) if batch else 1
            # M K, K N and M N elements: the square root of their product is M K N.
            total += 2 * math.sqrt(math.prod(sizes) * _size(each.shape) / products)
    return total


def _dimensions(shape: str) -> list[int]:
    """Return the sizes of the axes of the first array of a shape."""
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(size) for size in found[1].split(",") if size] if found else []


def _size(shape: str) -> int:
    return math.prod(_dimensions(shape))
