"""The text of a compiled program: its instructions, and how often each runs in a call.

XLA prints a program for one of the devices that run it together; see https://openxla.org/xla/hlo_dumps. The text is no
stable format, so only what is needed is read, and both forms of what differs between backends and releases.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Instructions that hand on to the instructions of another computation; the others, such as a fusion, are done at once.
_CONTROL = ("while", "conditional", "call", "async-start", "call-start")

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_TABLE_LINE = re.compile(r"^(\d+) (.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)=")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array as the program lays it out.

    Attributes:
      dtype: as XLA calls it: f32, bf16, pred.
      layout: order of the axes, tiles and memory, as printed; may be empty.
    """

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of the elements."""
        return self._bytes(self.size)

    @property
    def padded_bytes(self) -> int:
        """Bytes in memory: a TPU rounds the minor axes up to whole tiles of, for example, 8 by 128 elements."""
        found = re.match(r"([\d,]+):T\(([\d,]+)\)", self.layout)
        if not found:
            return self.bytes
        order, tile = ([int(number) for number in part.split(",")] for part in found.groups())
        sides = [self.shape[axis] for axis in order]
        for place, side in enumerate(tile[::-1][: len(sides)]):
            sides[place] = -(-sides[place] // side) * side
        return self._bytes(math.prod(sides))

    @property
    def on_chip(self) -> bool:
        """Whether it lies in a TPU's own memory (VMEM, SMEM) instead of its HBM."""
        return re.search(r"S\([1-9]", self.layout) is not None

    def _bytes(self, elements: int) -> int:
        bits = re.match(r"[a-z]+(\d+)", self.dtype)
        return math.ceil(elements * int(bits[1]) / 8) if bits else elements * (self.dtype == "pred")


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a printed type, in order."""
    return tuple(
        Array(dtype, tuple(int(side) for side in shape.split(",") if side), layout or "")
        for dtype, shape, layout in _ARRAY.findall(text)
    )


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction; `attributes` is all that follows its operands."""

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """What it results in."""
        return arrays(self.result)

    def attribute(self, name: str, pattern: str) -> str | None:
        """The part of `NAME=...` that matches; None if it has no such attribute."""
        found = re.search(rf"\b{name}={pattern}", self.attributes)
        return found[1] if found else None

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from, such as `jit(step)/jvp(VGG)/unit0/bn/reduce_sum`."""
        return self.attribute("op_name", '"([^"]*)"') or ""

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs."""
        found = []
        for match in _CALLED.finditer(self.attributes):
            rest = self.attributes[match.end() :]
            names = rest[1 : rest.index("}")] if rest.startswith("{") else rest.split(",")[0]
            found += [name.strip().lstrip("%") for name in names.split(",")]
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: instructions of each, by its name.
      entry: name of the first.
      partitions: number of devices.
      tables: XLA's lists of files, functions, lines and call stacks, as printed, by name and number.
    """

    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    partitions: int
    tables: dict[str, dict[str, str]]

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs in a call; of a loop, as often as its bound says."""
        found = {name: 0 for name in self.computations}

        def visit(name: str, times: int) -> None:
            found[name] += times
            for instruction in self.computations[name]:
                inner = times * (self._trips(instruction) if instruction.opcode == "while" else 1)
                for called in instruction.called:
                    if called in found:
                        visit(called, inner)

        visit(self.entry, 1)
        return found

    def scheduled(self) -> Iterator[tuple[Instruction, str, int]]:
        """Every instruction that a device is given to do, its computation, and how often it runs in a call.

        What is done within one, as in a fusion, is left out; both branches of a conditional are there.
        """
        waiting, seen = [self.entry], {self.entry}
        for name in waiting:
            for instruction in self.computations[name]:
                yield instruction, name, self.runs[name]
                if instruction.opcode in _CONTROL:
                    inner = [one for one in instruction.called if one in self.computations and one not in seen]
                    waiting += inner
                    seen |= set(inner)

    def source(self, instruction: Instruction) -> str:
        """The line of Python that an instruction comes from, as "file:line"; empty if the text does not say."""
        file, line = instruction.attribute("source_file", '"([^"]*)"'), instruction.attribute("source_line", r"(\d+)")
        if file is None:
            frame = self._entry("StackFrames", instruction.attribute("stack_frame_id", r"(\d+)"))
            place = self._entry("FileLocations", _number(frame, "file_location_id"))
            file = self._entry("FileNames", _number(place, "file_name_id")).strip('"')
            line = _number(place, "line")
        return f"{file}:{line}" if file else ""

    def _entry(self, table: str, number: str | None) -> str:
        return self.tables.get(table, {}).get(number or "", "")

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs: what XLA notes, or the constant that its condition compares the counter with."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations.get(loop.attribute("condition", r"%?([\w.\-]+)") or "", ())
        bounds = [one.operands[0] for one in condition if one.opcode == "constant" and one.operands[0].isdecimal()]
        return int(bounds[0]) if len(bounds) == 1 else 1


def parse(text: str) -> Program:
    """Reads what `compiled.as_text()` of a jitted function returns."""
    computations: dict[str, list[Instruction]] = {}
    tables: dict[str, dict[str, str]] = collections.defaultdict(dict)
    entry, name, table = "", "", ""
    for line in text.splitlines():
        header, row = _COMPUTATION.match(line), _TABLE_LINE.match(line)
        found = None if header else _INSTRUCTION.match(line)
        if header:
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif found and name:
            inside, attributes = _split_operands(found[4])
            operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(filter(None, [inside.strip()]))
            computations[name].append(Instruction(found[1], found[2], found[3], operands, attributes))
        elif row and table:
            tables[table][row[1]] = row[2]
        elif re.fullmatch(r"[A-Z]\w+", line):
            table = line
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    return Program(
        {name: tuple(found) for name, found in computations.items()},
        entry,
        int(partitions[1]) if partitions else 1,
        dict(tables),
    )


def _split_operands(text: str) -> tuple[str, str]:
    """What comes before the closing parenthesis, and what after it."""
    depth = 1
    for place, sign in enumerate(text):
        depth += (sign == "(") - (sign == ")")
        if not depth:
            return text[:place], text[place + 1 :]
    return text, ""


def _number(text: str, name: str) -> str | None:
    found = re.search(rf"\b{name}=(\d+)", text)
    return found[1] if found else None
