"""Inception-v3 (https://arxiv.org/abs/1512.00567) and v4 (https://arxiv.org/abs/1602.07261), for images of 299x299."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
from jaxtyping import Array

from ftwt_jax.gating.activations import Activations
from ftwt_jax.gating.composition import concatenate
from ftwt_jax.gating.gates import GateConfig, GateControl
from ftwt_jax.gating.units import Classifier, GatedUnit, Outputs
from ftwt_jax.models.common import scaled, start
from ftwt_jax.ops.batch_norm import MOMENTUM

MAX, AVERAGE = "max", "average"


@dataclasses.dataclass(frozen=True)
class Conv:
    """A unit of a block; fields as of `GatedUnit`."""

    name: str
    features: int
    kernel_size: int | tuple[int, int] = 1
    strides: int = 1
    padding: int | None = None


# One after the other: units, pools by name, and units side by side, whose outputs are concatenated.
Branch = tuple[Conv | str | tuple[Conv, ...], ...]
Branches = tuple[Branch, ...]


def shrinking(name: str, features: int) -> Conv:
    """The 3x3 unit at stride 2 of a block that makes maps smaller."""
    return Conv(name, features, 3, strides=2, padding=0)


class Mixed(nn.Module):
    """Branches from the same maps, concatenated.

    Attributes:
      branches: their steps.
      pads_count: whether zeros beyond the edges count in an average pool, 3x3 at stride 1.
    """

    branches: Branches
    pads_count: bool
    gates: GateConfig | None = None
    width: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Activations, train: bool = False) -> Activations:
        return concatenate([_run(self, branch, x, train, self.pads_count) for branch in self.branches])


def _run(module: Any, branch: Branch, x: Activations, train: bool, pads_count: bool = True) -> Activations:
    """A branch of a module, with its gates, width and dtype; call it inside a method with `nn.compact`."""
    for step in branch:
        if isinstance(step, tuple):
            x = concatenate([_run(module, (each,), x, train, pads_count) for each in step])
        elif step == MAX:
            x = x.map(lambda v: nn.max_pool(v, (3, 3), strides=(2, 2)))
        elif step == AVERAGE:
            pads = ((1, 1), (1, 1))
            x = x.map(functools.partial(nn.avg_pool, window_shape=(3, 3), padding=pads, count_include_pad=pads_count))
        elif isinstance(step, Conv):
            x = GatedUnit(
                scaled(step.features, module.width),
                step.kernel_size,
                step.strides,
                padding=step.padding,
                # Without a parent, so that the unit adopts it.
                norm=nn.BatchNorm(momentum=MOMENTUM, epsilon=1e-3, dtype=module.dtype, parent=None),
                gates=module.gates,
                dtype=module.dtype,
                name=step.name,
            )(x, train)
    return x


def _v3_a(pooled: int) -> Branches:
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, 5)),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3)),
        (AVERAGE, Conv("branch_pool", pooled)),
    )


V3_B: Branches = (
    (shrinking("branch3x3", 384),),
    (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, 3), shrinking("branch3x3dbl_3", 96)),
    (MAX,),
)


def _v3_c(narrow: int) -> Branches:
    return (
        (Conv("branch1x1", 192),),
        (
            Conv("branch7x7_1", narrow),
            Conv("branch7x7_2", narrow, (1, 7)),
            Conv("branch7x7_3", 192, (7, 1)),
        ),
        (
            Conv("branch7x7dbl_1", narrow),
            Conv("branch7x7dbl_2", narrow, (7, 1)),
            Conv("branch7x7dbl_3", narrow, (1, 7)),
            Conv("branch7x7dbl_4", narrow, (7, 1)),
            Conv("branch7x7dbl_5", 192, (1, 7)),
        ),
        (AVERAGE, Conv("branch_pool", 192)),
    )


V3_D: Branches = (
    (Conv("branch3x3_1", 192), shrinking("branch3x3_2", 320)),
    (
        Conv("branch7x7x3_1", 192),
        Conv("branch7x7x3_2", 192, (1, 7)),
        Conv("branch7x7x3_3", 192, (7, 1)),
        shrinking("branch7x7x3_4", 192),
    ),
    (MAX,),
)
V3_E: Branches = (
    (Conv("branch1x1", 320),),
    (Conv("branch3x3_1", 384), (Conv("branch3x3_2a", 384, (1, 3)), Conv("branch3x3_2b", 384, (3, 1)))),
    (
        Conv("branch3x3dbl_1", 448),
        Conv("branch3x3dbl_2", 384, 3),
        (Conv("branch3x3dbl_3a", 384, (1, 3)), Conv("branch3x3dbl_3b", 384, (3, 1))),
    ),
    (AVERAGE, Conv("branch_pool", 192)),
)
# Filters of the pooled branch of each block at 35x35, and inside the blocks at 17x17.
V3_POOLED, V3_NARROW = (32, 64, 64), (128, 160, 160, 192)


class InceptionV3(nn.Module):
    """Inception-v3 as torchvision has it, without the auxiliary classifier; every convolution is a unit.

    Attributes:
      stage_sizes: blocks at 35x35, 17x17 and 8x8 pixels, at most as many as published.
    """

    num_classes: int
    stage_sizes: tuple[int, int, int] = (3, 4, 2)
    gates: GateConfig | None = None
    width: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array, train: bool = False, control: GateControl | None = None) -> Outputs:
        """Classifies images [N, H, W, channels]; see `ftwt_jax.models.create_model`."""
        first, second, third = self.stage_sizes
        stem: Branch = (
            Conv("stem", 32, 3, strides=2, padding=0),
            Conv("conv2d_2a_3x3", 32, 3, padding=0),
            Conv("conv2d_2b_3x3", 64, 3),
            MAX,
            Conv("conv2d_3b_1x1", 80),
            Conv("conv2d_4a_3x3", 192, 3, padding=0),
            MAX,
        )
        blocks = {
            **{f"mixed_5{'bcd'[i]}": _v3_a(V3_POOLED[i]) for i in range(first)},
            "mixed_6a": V3_B,
            **{f"mixed_6{'bcde'[i]}": _v3_c(V3_NARROW[i]) for i in range(second)},
            "mixed_7a": V3_D,
            **{f"mixed_7{'bc'[i]}": V3_E for i in range(third)},
        }
        return _inception(self, images, train, control, stem, blocks, pads_count=True)


V4_A: Branches = (
    (Conv("branch0", 96),),
    (Conv("branch1_0", 64), Conv("branch1_1", 96, 3)),
    (Conv("branch2_0", 64), Conv("branch2_1", 96, 3), Conv("branch2_2", 96, 3)),
    (AVERAGE, Conv("branch3_1", 96)),
)
V4_REDUCTION_A: Branches = (
    (shrinking("branch0", 384),),
    (Conv("branch1_0", 192), Conv("branch1_1", 224, 3), shrinking("branch1_2", 256)),
    (MAX,),
)
V4_B: Branches = (
    (Conv("branch0", 384),),
    (Conv("branch1_0", 192), Conv("branch1_1", 224, (1, 7)), Conv("branch1_2", 256, (7, 1))),
    (
        Conv("branch2_0", 192),
        Conv("branch2_1", 192, (7, 1)),
        Conv("branch2_2", 224, (1, 7)),
        Conv("branch2_3", 224, (7, 1)),
        Conv("branch2_4", 256, (1, 7)),
    ),
    (AVERAGE, Conv("branch3_1", 128)),
)
V4_REDUCTION_B: Branches = (
    (Conv("branch0_0", 192), shrinking("branch0_1", 192)),
    (
        Conv("branch1_0", 256),
        Conv("branch1_1", 256, (1, 7)),
        Conv("branch1_2", 320, (7, 1)),
        shrinking("branch1_3", 320),
    ),
    (MAX,),
)
V4_C: Branches = (
    (Conv("branch0", 256),),
    (Conv("branch1_0", 384), (Conv("branch1_1a", 256, (1, 3)), Conv("branch1_1b", 256, (3, 1)))),
    (
        Conv("branch2_0", 384),
        Conv("branch2_1", 448, (3, 1)),
        Conv("branch2_2", 512, (1, 3)),
        (Conv("branch2_3a", 256, (1, 3)), Conv("branch2_3b", 256, (3, 1))),
    ),
    (AVERAGE, Conv("branch3_1", 256)),
)
V4_STEM: tuple[Branches, ...] = (
    ((MAX,), (shrinking("conv", 96),)),
    (
        (Conv("branch0_0", 64), Conv("branch0_1", 96, 3, padding=0)),
        (
            Conv("branch1_0", 64),
            Conv("branch1_1", 64, (1, 7)),
            Conv("branch1_2", 64, (7, 1)),
            Conv("branch1_3", 96, 3, padding=0),
        ),
    ),
    ((shrinking("conv", 192),), (MAX,)),
)


class InceptionV4(nn.Module):
    """Inception-v4 as timm has it; every convolution is a unit.

    Attributes:
      stage_sizes: blocks at 35x35, 17x17 and 8x8 pixels.
    """

    num_classes: int
    stage_sizes: tuple[int, int, int] = (4, 7, 3)
    gates: GateConfig | None = None
    width: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array, train: bool = False, control: GateControl | None = None) -> Outputs:
        """Classifies images [N, H, W, channels]; see `ftwt_jax.models.create_model`."""
        first, second, third = self.stage_sizes
        stem: Branch = (
            Conv("stem", 32, 3, strides=2, padding=0),
            Conv("conv1", 32, 3, padding=0),
            Conv("conv2", 64, 3),
        )
        blocks = [*V4_STEM, *[V4_A] * first, V4_REDUCTION_A, *[V4_B] * second, V4_REDUCTION_B, *[V4_C] * third]
        named = {f"block{index}": block for index, block in enumerate(blocks, start=len(stem))}
        return _inception(self, images, train, control, stem, named, pads_count=False)


def _inception(
    model: InceptionV3 | InceptionV4,
    images: Array,
    train: bool,
    control: GateControl | None,
    stem: Branch,
    blocks: dict[str, Branches],
    pads_count: bool,
) -> Outputs:
    """Stem, blocks and classifier; call it inside a method with `nn.compact`."""
    x = _run(model, stem, start(images, control, smallest=75), train)
    for name, branches in blocks.items():
        x = Mixed(branches, pads_count, model.gates, model.width, model.dtype, name=name)(x, train)
    return Classifier(model.num_classes, counted_pool=False, dtype=model.dtype, name="classifier")(x)
