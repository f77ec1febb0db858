"""What a compiled program makes a device do: floating point operations, and bytes moved to and from its memory.

XLA's own analysis counts the body of a loop once, and what a TPU keeps in its VMEM like what it fetches from HBM.
"""

import math
import re

from ftwt_jax.plan.hlo import Array, Instruction, Program

# What needs no access to the arrays themselves, or is counted by what it runs.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"),
    *("while", "conditional", "call"),
)
# Custom calls that only put arrays side by side which were written there.
_FREE_TARGETS = ("ConcatBitcast", "AllocateBuffer")
# What reads, or changes, only some of its first operand.
_SLICES, _UPDATE = ("dynamic-slice", "slice", "gather"), "dynamic-update-slice"


def flops(program: Program) -> int:
    """Floating point operations of the convolutions and matrix products in a call, two for a multiply-accumulate."""
    total = 0
    for name, instructions in program.computations.items():
        types = {one.name: one.arrays for one in instructions}
        for one in instructions:
            if one.opcode in ("convolution", "dot") and program.runs[name]:
                left, right = (types[operand][0] for operand in one.operands)
                count = _dot if one.opcode == "dot" else _convolution
                total += 2 * program.runs[name] * count(one, left, right)
    return total


def _dot(one: Instruction, left: Array, right: Array) -> int:
    contracted = one.attribute("lhs_contracting_dims", r"\{([\d,]*)\}") or ""
    return one.arrays[0].size * math.prod(left.shape[int(axis)] for axis in contracted.split(",") if axis)


def _convolution(one: Instruction, left: Array, right: Array) -> int:
    """Multiply-accumulates, without those that meet padding or the holes of a dilated input."""
    labels = (one.attribute("dim_labels", r"([\w>\-]+)") or "").replace("->", "_").split("_")
    window = dict(part.split("=") for part in (one.attribute("window", r"\{([^}]*)\}") or "").split())
    axes = [label for label in labels[0] if label.isdecimal()]

    def numbers(name: str, usual: str) -> list[str]:
        return window.get(name, "x".join([usual] * len(axes))).split("x")

    pairs = 1
    strides, holes, spreads = (numbers(name, "1") for name in ("stride", "lhs_dilate", "rhs_dilate"))
    for index, axis in enumerate(axes):
        inputs, places, outputs = (
            array.shape[label.index(axis)] for array, label in zip((left, right, one.arrays[0]), labels, strict=True)
        )
        before = int(numbers("pad", "0_0")[index].split("_")[0])
        pairs *= _pairs(inputs, places, outputs, int(strides[index]), int(holes[index]), int(spreads[index]), before)
    groups = int(one.attribute("feature_group_count", r"(\d+)") or 1)
    batches = int(one.attribute("batch_group_count", r"(\d+)") or 1)
    depth = left.shape[labels[0].index("f")] // groups
    return pairs * depth * right.shape[labels[1].index("o")] * (left.shape[labels[0].index("b")] // batches)


def _pairs(inputs: int, places: int, outputs: int, stride: int, holes: int, spread: int, before: int) -> int:
    """Along one axis, how many places of a window meet an element of the input, over all outputs."""
    found = 0
    for place in range(places):
        first = place * spread - before
        # Outputs o with 0 <= first + o * stride <= (inputs - 1) * holes, and a multiple of `holes` there.
        low = max(0, -(first // stride))
        high = min(outputs - 1, ((inputs - 1) * holes - first) // stride)
        if holes == 1:
            found += max(0, high - low + 1)
        else:
            found += sum((first + output * stride) % holes == 0 for output in range(low, high + 1))
    return found


def traffic(program: Program, on_chip: bool = False) -> int:
    """Bytes read from and written to a device's memory in a call, arrays in their padded size.

    What an instruction reads and writes is counted once each; a fusion's inner results are not, nor what is left alone
    of an array of which it takes or changes a slice.

    Args:
      on_chip: count what lies in a TPU's own memory (VMEM) too.
    """
    types = {
        name: {one.name: one.arrays for one in instructions} for name, instructions in program.computations.items()
    }
    total = 0
    for one, name, times in program.scheduled():
        target = one.attribute("custom_call_target", '"(.*?)"')
        if one.opcode in _FREE or one.opcode.endswith("-done") or target in _FREE_TARGETS:
            continue
        if re.fullmatch(r"(copy|slice)-start", one.opcode):
            # Its type lists both ends, of which the smaller is what is moved.
            moved = min(end.padded_bytes for end in one.arrays[:2])
            touched = [(end, moved) for end in one.arrays[:2]]
        else:
            touched = _touched(program, one, types[name])
        total += times * sum(size for array, size in touched if on_chip or not array.on_chip)
    return total


def _touched(program: Program, one: Instruction, types: dict[str, tuple[Array, ...]]) -> list[tuple[Array, int]]:
    """Every array that an instruction reads or writes, with how many bytes of it."""
    body = program.computations[one.called[0]] if one.opcode == "fusion" else (one,)
    inner = {each.name: each for each in body}
    places = {int(each.operands[0]): each.name for each in body if each.opcode == "parameter"}
    found = []
    for place, operand in enumerate(one.operands):
        name = places.get(place, operand)
        users = [each for each in body if name in each.operands]
        part = None
        if users and all(each.opcode in _SLICES and each.operands.index(name) == 0 for each in users):
            part = sum(each.arrays[0].padded_bytes for each in users)
        elif users and all(each.opcode == _UPDATE and each.operands.index(name) == 0 for each in users):
            part = 0
        found += [(array, array.padded_bytes if part is None else part) for array in types.get(operand, ())]
    written = None
    if body[-1].opcode == _UPDATE:
        update = body[-1].operands[1]
        arrays = inner[update].arrays if update in inner else types.get(update, ())
        written = sum(array.padded_bytes for array in arrays)
    return found + [(array, array.padded_bytes if written is None else written) for array in one.arrays]
