"""The collectives of a compiled program: their kind, size, and what they carry."""

import collections
import dataclasses
import math
import re
from collections.abc import Collection

from ftwt_jax.gating.norms import BATCH_NORM
from ftwt_jax.plan.hlo import Array, Instruction, Program

KINDS = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
GRADIENTS, STATISTICS, PARAMETERS, METRICS = "gradients", "batch statistics", "parameters", "metrics"
OTHER = "other"


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective as one device sees it.

    Attributes:
      kind: one of `KINDS`.
      arrays: its results.
      devices: number of devices in a group.
      times: how often it runs in one call of the program.
      hidden: whether the device can do other work in the meantime.
      op_name, source: its origin: the path in the traced function, and "file:line".
    """

    kind: str
    arrays: tuple[Array, ...]
    devices: int
    times: int
    hidden: bool
    op_name: str
    source: str

    def carries(self, parameters: Collection[int]) -> dict[str, tuple[Array, ...]]:
        """Its arrays by content: gradients, batch statistics, parameters, metrics or other.

        XLA merges collectives and names the result after one of them, so sizes decide where names cannot.

        Args:
          parameters: number of elements of each parameter.
        """
        by_content = collections.defaultdict(list)
        for array in self.arrays:
            by_content[self._classify(array, parameters)].append(array)
        return {content: tuple(arrays) for content, arrays in by_content.items()}

    def _classify(self, array: Array, parameters: Collection[int]) -> str:
        vector = max(array.shape, default=1) == array.size
        # JAX marks the forward pass "jvp(VGG)" and the backward pass "transpose(jvp(VGG))".
        forward = "jvp(" in self.op_name and "transpose(" not in self.op_name
        if array.size == 1:
            return METRICS
        # Those of subnets are [K, C]; so may be a gradient that XLA merged with them, but not in the forward pass.
        if f"/{BATCH_NORM}/" in self.op_name and (vector or (forward and len(array.shape) == 2)):
            return STATISTICS
        if forward:
            return OTHER
        if self.kind == "all-gather" and array.size in parameters:
            return PARAMETERS
        whole = array.size * (self.devices if self.kind == "reduce-scatter" else 1)
        return GRADIENTS if self.kind in ("all-reduce", "reduce-scatter") and whole in parameters else OTHER


def find_collectives(program: Program) -> list[Collective]:
    """All collectives that run, in the order in which the program prints them."""
    scheduled = list(program.scheduled())
    wrapped = {called for one, _, _ in scheduled if one.opcode == "async-start" for called in one.called}
    found = []
    for instruction, name, times in scheduled:
        kind = instruction.opcode.removesuffix("-start").removesuffix("-done")
        # Of an asynchronous pair, "-done" has the type of the result, and "-start" all attributes.
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
    """Number of devices in the first group, in each of the three forms in which XLA prints groups."""
    groups = instruction.attribute("replica_groups", r"(.*)") or ""
    # Lists: {{0,1},{2,3}}
    if found := re.match(r"\{\{([\d,]+)\}", groups):
        return len(found[1].split(","))
    # Number of groups and their size: [2,4]<=[8]
    if found := re.match(r"\[\d+,(\d+)\]", groups):
        return int(found[1])
    # Axes of a mesh: mesh['rows'=2,'columns'=4] {'columns'}
    if found := re.match(r"mesh\[(.*?)\] \{(.*?)\}", groups):
        sides = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sides[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return partitions
