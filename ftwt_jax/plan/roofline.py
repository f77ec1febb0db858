"""TPU slices by name, and a lower bound on the time of a program on one.

Peaks are those that Google publishes, https://cloud.google.com/tpu/docs/v4 (v5e, v5p, v6e): FLOP/s in bfloat16,
bandwidth of the HBM, and bidirectional bandwidth of a chip's interconnect (ICI), half of it in each direction, over 4
links (v5e, v6e) or 6 (v4, v5p). For v4 only a pod's all-reduce bandwidth is published; the bandwidth of its links,
which axes form rings, and the latency of a hop are from "How to Scale Your Model" (Austin et al. 2025,
https://jax-ml.github.io/scaling-book/tpus). Memory is what the compiler lets a program use, a little less than all.

The bfloat16 peak applies to float32 too: by default a TPU's matrix unit rounds the inputs of a float32 convolution or
matrix product to bfloat16, and accumulates in float32.
"""

import dataclasses
import math
import re

from ftwt_jax.errors import UserError, unknown_name
from ftwt_jax.plan.collectives import Collective

GIB = 2**30
# Latency in seconds from a chip to its neighbor.
HOP = 1e-6
_LITE_SHAPES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE_SHAPES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU; all figures are per chip.

    Attributes:
      flops: peak FLOP/s in bfloat16.
      memory: bytes of HBM that a program can use.
      bandwidth: of the HBM, bytes per second.
      link: bandwidth of one link of the interconnect in one direction, bytes per second.
      shapes: slices in ascending order; kinds with three axes have larger ones too.
      most: chips of the largest slice.
      options: compiler options that make each chip one device.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    shapes: tuple[str, ...]
    most: int
    options: dict[str, str] = dataclasses.field(default_factory=dict)


_MEGACORE = {"chip_config_name": "megacore"}
CHIPS = {
    "v4": Chip(275e12, 30.75 * GIB, 1200e9, 45e9, _CUBE_SHAPES, 4096, _MEGACORE),
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 50e9, _LITE_SHAPES, 256),
    "v5p": Chip(459e12, 95.73 * GIB, 2765e9, 100e9, _CUBE_SHAPES, 6144, _MEGACORE),
    "v6e": Chip(918e12, 31.24 * GIB, 1638e9, 100e9, _LITE_SHAPES, 256),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that an interconnect connects in a grid of two or three axes.

    Attributes:
      kind: name of the chip, such as v5e.
      shape: chips along each axis.
    """

    kind: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        """The figures of its kind of chip."""
        return CHIPS[self.kind]

    @property
    def size(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def rings(self) -> tuple[bool, ...]:
        """Which axes form rings: of two, those of 16 chips; of three, all if each is a multiple of 4."""
        if len(self.shape) == 2:
            return tuple(side == 16 for side in self.shape)
        return (all(side % 4 == 0 for side in self.shape),) * len(self.shape)

    @property
    def links(self) -> int:
        """Total number of links; each direction counts."""
        return sum(
            self.size // side * (2 * side if ring else 2 * (side - 1))
            for side, ring in zip(self.shape, self.rings, strict=True)
        )

    @property
    def fewest_links(self) -> int:
        """Number of links of a corner chip."""
        return sum(2 if ring else int(side > 1) for side, ring in zip(self.shape, self.rings, strict=True))

    @property
    def diameter(self) -> int:
        """Largest number of hops between two chips."""
        return sum(side // 2 if ring else side - 1 for side, ring in zip(self.shape, self.rings, strict=True))


def parse_slice(text: str) -> Slice:
    """Parses a name such as v5e:16x16; raises `UserError` if no such slice exists."""
    kind, _, shape = text.partition(":")
    if kind not in CHIPS:
        raise unknown_name("TPU", kind, CHIPS)
    chip = CHIPS[kind]
    axes = chip.shapes[0].count("x") + 1
    found = Slice(kind, tuple(map(int, shape.split("x")))) if re.fullmatch(r"\d+(x\d+)+", shape) else None
    # Slices larger than 4x4x4 consist of such cubes.
    cubes = axes == 3 and found is not None and len(found.shape) == 3 and all(n and n % 4 == 0 for n in found.shape)
    if found is None or not (shape in chip.shapes or cubes) or found.size > chip.most:
        more = f", or a multiple of 4 along each axis, up to {chip.most} chips" if axes == 3 else ""
        wrong = (
            f"{text}: {kind} has no slice of size {shape}; use"
            if shape
            else f"{text} names no slice size; for {kind} use"
        )
        raise UserError(f"--topology={wrong} {', '.join(chip.shapes)}{more}")
    return found


def list_slices(wanted: Slice, fewest: int = 8, most: int = 256) -> list[Slice]:
    """The slices of the same kind with `fewest` to `most` chips, and the wanted one, by size."""
    known = [Slice(wanted.kind, tuple(map(int, shape.split("x")))) for shape in wanted.chip.shapes]
    found = {str(one): one for one in (*known, wanted) if one == wanted or fewest <= one.size <= most}
    return sorted(found.values(), key=lambda one: one.size)


def compute_seconds(collective: Collective, tpu_slice: Slice) -> float:
    """Lower bound on the seconds that one run of a collective over a whole slice takes.

    Whatever the algorithm, each of n chips sends its contribution over its own links; all links together carry an
    all-reduced array 2 (n - 1) times; and data crosses the diameter of the slice.
    """
    n = tpu_slice.size
    if n == 1:
        return 0.0
    size = sum(array.bytes for array in collective.arrays)
    each, all_together = {
        "all-reduce": (size, 2 * (n - 1) * size),
        # `size` is that of the result: the whole array of an all-gather, one chip's part of a reduce-scatter.
        "all-gather": (size * (n - 1) / n, size * (n - 1)),
        "reduce-scatter": (size * (n - 1), size * n * (n - 1)),
    }.get(collective.kind, (size * (n - 1) / n, size * (n - 1)))
    return (
        max(each / tpu_slice.fewest_links, all_together / tpu_slice.links) / tpu_slice.chip.link
        + tpu_slice.diameter * HOP
    )


@dataclasses.dataclass(frozen=True)
class Bound:
    """Lower bounds on the parts of a step, in seconds.

    Attributes:
      compute: floating point operations at the chip's peak.
      memory: bytes to and from HBM at its bandwidth.
      waiting: collectives during which the chip does nothing else.
      hidden: collectives during which it can compute.
    """

    compute: float
    memory: float
    waiting: float
    hidden: float

    @property
    def step(self) -> float:
        """The whole step; of what can run at the same time, the longest counts."""
        return max(self.compute, self.memory, self.hidden) + self.waiting

    @property
    def interconnect(self) -> float:
        """All collectives."""
        return self.waiting + self.hidden

    @property
    def limit(self) -> str:
        """The one of the three that takes longest."""
        times = {"compute": self.compute, "HBM": self.memory, "interconnect": self.interconnect}
        return max(times, key=lambda name: times[name])

    @property
    def efficiency(self) -> float:
        """Time of a step without collectives, as a share of the time with them."""
        return max(self.compute, self.memory) / self.step


def compute_bound(flops: float, traffic: float, collectives: list[Collective], tpu_slice: Slice) -> Bound:
    """Lower bound on the time of a program that runs on every chip of a slice.

    Args:
      flops, traffic: floating point operations, and bytes to and from HBM, per chip.
      collectives: from `collectives.find_collectives`; assumed to run over all chips of `tpu_slice`, even if
        the program was compiled for fewer.
    """
    times = {True: 0.0, False: 0.0}
    for one in collectives:
        times[one.hidden] += one.times * compute_seconds(one, tpu_slice)
    return Bound(flops / tpu_slice.chip.flops, traffic / tpu_slice.chip.bandwidth, times[False], times[True])
