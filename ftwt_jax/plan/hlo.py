"""Parses the text of a compiled program (HLO): its instructions, and how often each runs in a call.

XLA prints the program of one device; see https://openxla.org/xla/hlo_dumps. The format is not stable, so only what is
needed is parsed, in every form in which backends and releases print it.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Instructions that run the instructions of another computation one by one; a fusion runs its own as one kernel.
_CONTROL = ("while", "conditional", "call", "async-start", "call-start")

# An array in a type, with its layout: bf16[4,1024,512]{2,1,0:T(8,128)(2,1)S(1)}, or f32[]
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
# The first line of a computation: ENTRY %main (p: f32[4]) -> f32[8] {
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# An instruction, read as name, type, opcode and the rest:   ROOT %sum = f32[4]{0} add(%a, %b), metadata={...}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
# A row of a table of files, functions or stack frames: 3 "/src/step.py"
_TABLE_LINE = re.compile(r"^(\d+) (.*)$")
# Before the computations that an instruction runs: calls=%fused, or branch_computations={%yes, %no}
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)=")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array and its layout.

    Attributes:
      dtype: in XLA's terms: f32, bf16, pred.
      layout: as printed, such as "2,1,0:T(8,128)S(1)": order of the axes from the minor one, tiles, and memory space.
        May be empty.
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
        """Bytes of its elements, without padding."""
        return self._bytes(self.size)

    @property
    def padded_bytes(self) -> int:
        """Bytes in memory: a TPU pads the minor axes to whole tiles, for example of 8 by 128 elements."""
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
        """Whether it lies in a TPU's on-chip memory (VMEM, SMEM), not in HBM."""
        return re.search(r"S\([1-9]", self.layout) is not None

    def _bytes(self, elements: int) -> int:
        bits = re.match(r"[a-z]+(\d+)", self.dtype)
        return math.ceil(elements * int(bits[1]) / 8) if bits else elements * (self.dtype == "pred")


def parse_arrays(text: str) -> tuple[Array, ...]:
    """The arrays in a printed type, in order."""
    return tuple(
        Array(dtype, tuple(int(side) for side in shape.split(",") if side), layout or "")
        for dtype, shape, layout in _ARRAY.findall(text)
    )


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction; `attributes` is the text after its operands."""

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """Its results."""
        return parse_arrays(self.result)

    def attribute(self, name: str, pattern: str) -> str | None:
        """The group that `pattern` captures after `NAME=`; None without such an attribute."""
        found = re.search(rf"\b{name}={pattern}", self.attributes)
        return found[1] if found else None

    @property
    def op_name(self) -> str:
        """Its path in the traced function, such as `jit(step)/jvp(VGG)/unit0/bn/reduce_sum`."""
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
      computations: the instructions of each computation, by its name.
      entry: name of the computation that a call starts with.
      partitions: number of devices.
      tables: rows of the tables of files, functions, lines and stack frames: tables[NAME][NUMBER], as printed.
    """

    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    partitions: int
    tables: dict[str, dict[str, str]]

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs in a call; the body of a loop, as often as its trip count says."""
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
        """Every instruction that a device is given, its computation, and how often it runs in a call.

        Instructions inside a fusion are left out; both branches of a conditional are included.
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
        """The line of Python that an instruction comes from, as "file:line"; empty if unknown."""
        file, line = instruction.attribute("source_file", '"([^"]*)"'), instruction.attribute("source_line", r"(\d+)")
        if file is None:
            # Newer releases: stack_frame_id=3, and tables at the top that lead from there to a file and a line.
            frame = self._entry("StackFrames", instruction.attribute("stack_frame_id", r"(\d+)"))
            place = self._entry("FileLocations", _number(frame, "file_location_id"))
            file = self._entry("FileNames", _number(place, "file_name_id")).strip('"')
            line = _number(place, "line")
        return f"{file}:{line}" if file else ""

    def _entry(self, table: str, number: str | None) -> str:
        return self.tables.get(table, {}).get(number or "", "")

    def _trips(self, loop: Instruction) -> int:
        """Trip count of a loop: as XLA notes it, or the only constant in its condition; 1 if neither is there."""
        # backend_config={"known_trip_count":{"n":"5"}}
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations.get(loop.attribute("condition", r"%?([\w.\-]+)") or "", ())
        bounds = [one.operands[0] for one in condition if one.opcode == "constant" and one.operands[0].isdecimal()]
        return int(bounds[0]) if len(bounds) == 1 else 1


def parse(text: str) -> Program:
    """Parses the result of `jax.jit(f).lower(...).compile().as_text()`."""
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
        # The heading of a table: FileNames
        elif re.fullmatch(r"[A-Z]\w+", line):
            table = line
    # HloModule jit_step, is_scheduled=true, num_partitions=4
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    return Program(
        {name: tuple(found) for name, found in computations.items()},
        entry,
        int(partitions[1]) if partitions else 1,
        dict(tables),
    )


def _split_operands(text: str) -> tuple[str, str]:
    """Splits `%a, f(%b)), attribute=...` at the parenthesis that closes the operands."""
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[:position], text[position + 1 :]
    return text, ""


def _number(text: str, name: str) -> str | None:
    """The number after NAME= in a row such as `file_name_id=1 function_name_id=2 line=40`."""
    found = re.search(rf"\b{name}=(\d+)", text)
    return found[1] if found else None
