"""What the devices of a compiled program tell each other: kind, size and purpose of its collectives."""

import collections
import dataclasses
import math
import re
from collections.abc import Collection

from ftwt_jax.plan.hlo import Array, Instruction, Program

KINDS = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
GRADIENTS, STATISTICS, PARAMETERS, METRICS = "gradients", "batch statistics", "parameters", "metrics"
OTHER = "other"


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective, as one device sees it.

    Attributes:
      kind: one of `KINDS`.
      arrays: its results.
      devices: how many take part together.
      times: how often it runs in a call of the program.
      hidden: whether the device may do other work meanwhile.
      op_name, source: where it comes from, the latter as "file:line".
    """

    kind: str
    arrays: tuple[Array, ...]
    devices: int
    times: int
    hidden: bool
    op_name: str
    source: str

    def carries(self, parameters: Collection[int]) -> dict[str, tuple[Array, ...]]:
        """Its arrays by what they are: gradients, batch statistics, parameters, metrics or other.

        XLA joins collectives and then names them after one, so that sizes decide where names cannot.

        Args:
          parameters: number of elements of each parameter.
        """
        found = collections.defaultdict(list)
        for array in self.arrays:
            found[self._what(array, parameters)].append(array)
        return {what: tuple(found[what]) for what in found}

    def _what(self, array: Array, parameters: Collection[int]) -> str:
        vector = max(array.shape, default=1) == array.size
        forward = "jvp(" in self.op_name and "transpose(" not in self.op_name
        if array.size == 1:
            return METRICS
        if "/bn/" in self.op_name and vector:
            return STATISTICS
        if forward:
            return OTHER
        if self.kind == "all-gather" and array.size in parameters:
            return PARAMETERS
        whole = array.size * (self.devices if self.kind == "reduce-scatter" else 1)
        return GRADIENTS if self.kind in ("all-reduce", "reduce-scatter") and whole in parameters else OTHER


def collectives(program: Program) -> list[Collective]:
    """All collectives that run, in the order of the text."""
    scheduled = list(program.scheduled())
    wrapped = {called for one, _, _ in scheduled if one.opcode == "async-start" for called in one.called}
    found = []
    for instruction, name, times in scheduled:
        kind = instruction.opcode.removesuffix("-start").removesuffix("-done")
        # Of a pair, the end has the result as its type, and the start everything else.
        if kind not in KINDS or instruction.opcode.endswith("-start"):
            continue
        start = instruction
        if instruction.opcode.endswith("-done"):
            start = next(one for one in program.computations[name] if one.name == instruction.operands[0])
        found.append(
            Collective(
                kind,
                instruction.arrays,
                _group_size(start, program.partitions),
                times,
                start is not instruction or name in wrapped,
                start.op_name,
                program.source(start),
            )
        )
    return found


def _group_size(instruction: Instruction, partitions: int) -> int:
    """Devices of the first group: printed as lists, as a shape of all of them, or as axes of a mesh."""
    groups = instruction.attribute("replica_groups", r"(.*)") or ""
    if found := re.match(r"\{\{([\d,]+)\}", groups):
        return len(found[1].split(","))
    if found := re.match(r"\[\d+,(\d+)\]", groups):
        return int(found[1])
    if found := re.match(r"mesh\[(.*?)\] \{(.*?)\}", groups):
        sides = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sides[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return partitions
