"""The cost of a compiled program on one device: floating point operations, and bytes to and from its memory.

XLA's own cost analysis does not serve: it counts the body of a loop once, and counts accesses to a TPU's VMEM as
accesses to HBM.
"""

import math
import re

from ftwt_jax.plan.hlo import Array, Instruction, Program

# Instructions that access no array data, or whose cost is that of the computations they run.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"),
    *("while", "conditional", "call"),
)
# Custom calls that only reinterpret or reserve memory.
_FREE_TARGETS = ("ConcatBitcast", "AllocateBuffer")
# Instructions that read or change only a part of their first operand.
_SLICES, _UPDATE = ("dynamic-slice", "slice", "gather"), "dynamic-update-slice"


def count_flops(program: Program) -> int:
    """Floating point operations of all convolutions and matrix products in a call, two per multiply-accumulate."""
    total = 0
    for name, instructions in program.computations.items():
        types = {one.name: one.arrays for one in instructions}
        for one in instructions:
            if one.opcode in ("convolution", "dot") and program.runs[name]:
                left, right = (types[operand][0] for operand in one.operands)
                count = _count_dot_macs if one.opcode == "dot" else _count_convolution_macs
                total += 2 * program.runs[name] * count(one, left, right)
    return total


def _count_dot_macs(one: Instruction, left: Array, right: Array) -> int:
    # dot(f32[4,1152] %x, f32[1152,10] %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    contracted = one.attribute("lhs_contracting_dims", r"\{([\d,]*)\}") or ""
    return one.arrays[0].size * math.prod(left.shape[int(axis)] for axis in contracted.split(",") if axis)


def _count_convolution_macs(one: Instruction, left: Array, right: Array) -> int:
    """Multiply-accumulates, without those on padding or on the zeros between the elements of a dilated input."""
    # window={size=3x3 stride=2x2 pad=0_1x0_1}, dim_labels=b01f_01io->b01f, feature_group_count=4
    labels = (one.attribute("dim_labels", r"([\w>\-]+)") or "").replace("->", "_").split("_")
    window = dict(part.split("=") for part in (one.attribute("window", r"\{([^}]*)\}") or "").split())
    axes = [label for label in labels[0] if label.isdecimal()]

    def numbers(name: str, usual: str) -> list[str]:
        return window.get(name, "x".join([usual] * len(axes))).split("x")

    pairs = 1
    strides, dilations, spreads = (numbers(name, "1") for name in ("stride", "lhs_dilate", "rhs_dilate"))
    for index, axis in enumerate(axes):
        inputs, taps, outputs = (
            array.shape[label.index(axis)] for array, label in zip((left, right, one.arrays[0]), labels, strict=True)
        )
        before = int(numbers("pad", "0_0")[index].split("_")[0])
        pairs *= _count_pairs(
            inputs, taps, outputs, int(strides[index]), int(dilations[index]), int(spreads[index]), before
        )
    groups = int(one.attribute("feature_group_count", r"(\d+)") or 1)
    batches = int(one.attribute("batch_group_count", r"(\d+)") or 1)
    depth = left.shape[labels[0].index("f")] // groups
    return pairs * depth * right.shape[labels[1].index("o")] * (left.shape[labels[0].index("b")] // batches)


def _count_pairs(inputs: int, taps: int, outputs: int, stride: int, dilation: int, spread: int, before: int) -> int:
    """Pairs of an output and a tap of the window that fall on an element of the input, along one axis.

    Args:
      dilation: distance of the input's elements (`lhs_dilate`), with zeros between them.
      spread: distance of the window's taps (`rhs_dilate`).
      before: padding before the first element.
    """
    count = 0
    for tap in range(taps):
        first = tap * spread - before
        # Outputs o with 0 <= first + o * stride <= (inputs - 1) * dilation, where that is a multiple of `dilation`.
        low = max(0, -(first // stride))
        high = min(outputs - 1, ((inputs - 1) * dilation - first) // stride)
        if dilation == 1:
            count += max(0, high - low + 1)
        else:
            count += sum((first + output * stride) % dilation == 0 for output in range(low, high + 1))
    return count


def count_traffic(program: Program, on_chip: bool = False) -> int:
    """Bytes read from and written to a device's memory in a call; arrays count with their padding.

    Each operand and result of an instruction counts once. Results inside a fusion do not count, nor does the rest of
    an array of which only a slice is read or changed.

    Args:
      on_chip: also count arrays in a TPU's on-chip memory (VMEM).
    """
    types = {
        name: {one.name: one.arrays for one in instructions} for name, instructions in program.computations.items()
    }
    total = 0
    for one, name, times in program.scheduled():
        # %y = f32[8]{0} custom-call(%x), custom_call_target="ConcatBitcast"
        target = one.attribute("custom_call_target", '"(.*?)"')
        if one.opcode in _FREE or one.opcode.endswith("-done") or target in _FREE_TARGETS:
            continue
        if re.fullmatch(r"(copy|slice)-start", one.opcode):
            # Its type lists source and destination; of a slice, the smaller one is what is moved.
            moved = min(end.padded_bytes for end in one.arrays[:2])
            touched = [(end, moved) for end in one.arrays[:2]]
        else:
            touched = _touched(program, one, types[name])
        total += times * sum(size for array, size in touched if on_chip or not array.on_chip)
    return total


def _touched(program: Program, one: Instruction, types: dict[str, tuple[Array, ...]]) -> list[tuple[Array, int]]:
    """Every array that an instruction reads or writes, and the number of bytes accessed."""
    body = program.computations[one.called[0]] if one.opcode == "fusion" else (one,)
    inner = {each.name: each for each in body}
    # Inside a fusion, operand 0 is %a = f32[100,8]{1,0} parameter(0).
    names = {int(each.operands[0]): each.name for each in body if each.opcode == "parameter"}
    found = []
    for place, operand in enumerate(one.operands):
        name = names.get(place, operand)
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
