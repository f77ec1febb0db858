"""TPU slices by name, and the shortest time that a program can take on one.

Peaks are those that Google publishes, https://cloud.google.com/tpu/docs/v4 (v5e, v5p, v6e): FLOP/s in bfloat16,
bandwidth of the HBM, and bidirectional bandwidth of a chip's interconnect (ICI), of which half goes each way, over 4
links (v5e, v6e) or 6 (v4, v5p). For v4 only a pod's all-reduce bandwidth is published; its link, which axes close to
rings, and the time of a hop are from "How to Scale Your Model" (Austin et al. 2025,
https://jax-ml.github.io/scaling-book/tpus). Memory is what the compiler lets a program use, a little less than all.

The peak in bfloat16 holds for float32 as well: by default a TPU's matrix unit rounds the inputs of a float32
convolution or matrix product to bfloat16, and adds up in float32.
"""

import dataclasses
import math
import re

from ftwt_jax.errors import UserError, unknown_name
from ftwt_jax.plan.collectives import Collective

GIB = 2**30
# Seconds from a chip to its neighbour, however little is sent.
HOP = 1e-6
_LITE_SHAPES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE_SHAPES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU; all figures are of one chip.

    Attributes:
      flops: bfloat16, a second.
      memory: HBM that a program can use, bytes.
      bandwidth: of the HBM, bytes a second.
      link: of one link of the interconnect in one direction, bytes a second.
      shapes: slices in ascending order; of three axes there are larger ones besides.
      most: chips of the largest slice.
      options: what XLA must be told to have one device a chip.
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
    """Chips that an interconnect joins in a grid of two or three axes.

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
        """What its chips can do."""
        return CHIPS[self.kind]

    @property
    def size(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def rings(self) -> tuple[bool, ...]:
        """Which axes close to rings: of two, those of 16 chips; of three, all, if each is a multiple of 4."""
        if len(self.shape) == 2:
            return tuple(side == 16 for side in self.shape)
        return (all(side % 4 == 0 for side in self.shape),) * len(self.shape)

    @property
    def links(self) -> int:
        """Links in all, each direction by itself."""
        return sum(
            self.size // side * (2 * side if ring else 2 * (side - 1))
            for side, ring in zip(self.shape, self.rings, strict=True)
        )

    @property
    def fewest_links(self) -> int:
        """Links of a chip in a corner."""
        return sum(2 if ring else int(side > 1) for side, ring in zip(self.shape, self.rings, strict=True))

    @property
    def diameter(self) -> int:
        """Hops between the two chips that lie farthest apart."""
        return sum(side // 2 if ring else side - 1 for side, ring in zip(self.shape, self.rings, strict=True))


def parse_slice(text: str) -> Slice:
    """Reads a name such as v5e:16x16; raises `UserError` for a slice that there is not."""
    kind, _, shape = text.partition(":")
    if kind not in CHIPS:
        raise unknown_name("TPU", kind, CHIPS)
    chip = CHIPS[kind]
    axes = chip.shapes[0].count("x") + 1
    found = Slice(kind, tuple(map(int, shape.split("x")))) if re.fullmatch(r"\d+(x\d+)+", shape) else None
    # Beyond a cube of 4x4x4, slices are made of cubes.
    cubes = axes == 3 and found is not None and len(found.shape) == 3 and all(n and n % 4 == 0 for n in found.shape)
    if found is None or not (shape in chip.shapes or cubes) or found.size > chip.most:
        more = f", and multiples of 4 up to {chip.most} chips" if axes == 3 else ""
        raise UserError(f"--topology={text} is no slice of {kind}: known are {', '.join(chip.shapes)}{more}")
    return found


def slices_up_to(wanted: Slice, fewest: int = 8, most: int = 256) -> list[Slice]:
    """The slices of the same chips from `fewest` to `most` chips, and the wanted one, by size."""
    known = [Slice(wanted.kind, tuple(map(int, shape.split("x")))) for shape in wanted.chip.shapes]
    found = {str(one): one for one in (*known, wanted) if one == wanted or fewest <= one.size <= most}
    return sorted(found.values(), key=lambda one: one.size)


def seconds_of(collective: Collective, where: Slice) -> float:
    """The least time of one run of a collective over a whole slice.

    Whatever the algorithm, of n chips each sends what it contributes over its own links, all links together carry an
    all-reduced array 2 (n - 1) times, and the last chip hears of the first after as many hops as lie between them.
    """
    n = where.size
    if n == 1:
        return 0.0
    size = sum(array.bytes for array in collective.arrays)
    each, all_together = {
        "all-reduce": (size, 2 * (n - 1) * size),
        # Results are the whole array and one chip's part of it.
        "all-gather": (size * (n - 1) / n, size * (n - 1)),
        "reduce-scatter": (size * (n - 1), size * n * (n - 1)),
    }.get(collective.kind, (size * (n - 1) / n, size * (n - 1)))
    return max(each / where.fewest_links, all_together / where.links) / where.chip.link + where.diameter * HOP


@dataclasses.dataclass(frozen=True)
class Bound:
    """The shortest that a step can take, in seconds.

    Attributes:
      compute: floating point operations at the chip's peak.
      memory: bytes to and from HBM at its bandwidth.
      waiting: collectives during which the program does nothing else.
      hidden: collectives during which it may.
    """

    compute: float
    memory: float
    waiting: float
    hidden: float

    @property
    def step(self) -> float:
        """What can go on at the same time counts as the longest of it."""
        return max(self.compute, self.memory, self.hidden) + self.waiting

    @property
    def interconnect(self) -> float:
        """All collectives."""
        return self.waiting + self.hidden

    @property
    def limit(self) -> str:
        """Which of the three takes longest."""
        times = {"compute": self.compute, "HBM": self.memory, "interconnect": self.interconnect}
        return max(times, key=lambda name: times[name])

    @property
    def efficiency(self) -> float:
        """The step without any interconnect over the step with it."""
        return max(self.compute, self.memory) / self.step


def bound(flops: float, traffic: float, collectives: list[Collective], where: Slice) -> Bound:
    """The least time of a program that runs on every chip of a slice.

    Args:
      flops, traffic: floating point operations and bytes to and from HBM, on one chip.
      collectives: see `collectives.collectives`; taken to run over all chips of `where`, however many compiled them.
    """
    times = {True: 0.0, False: 0.0}
    for one in collectives:
        times[one.hidden] += one.times * seconds_of(one, where)
    return Bound(flops / where.chip.flops, traffic / where.chip.bandwidth, times[False], times[True])
