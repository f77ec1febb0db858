"""MobileNetV1 (https://arxiv.org/abs/1704.04861) and V2 (https://arxiv.org/abs/1801.04381), for CIFAR and ImageNet."""

import functools
from typing import Any

import flax.linen as nn
from jaxtyping import Array

from ftwt_jax.gating.activations import Activations
from ftwt_jax.gating.composition import residual_add
from ftwt_jax.gating.gates import GateConfig, GateControl
from ftwt_jax.gating.units import Classifier, GatedUnit, Outputs, PlainConv
from ftwt_jax.models.common import scaled, start

# (filters, stride) of each depthwise-separable pair.
V1_PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
# (expansion, filters, blocks, stride) of each stage on ImageNet.
V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def divisible(features: float, divisor: int = 8) -> int:
    """Nearest multiple of `divisor` that loses at most a tenth: how ImageNet's MobileNetV2 rounds its widths."""
    rounded = max(divisor, int(features + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * features else rounded


class MobileNetV1(nn.Module):
    """Depthwise-separable pairs; every convolution is a unit. ImageNet's network starts with stride 2 and has ReLU6."""

    num_classes: int
    gates: GateConfig | None = None
    stem: str = "cifar"
    width: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array, train: bool = False, control: GateControl | None = None) -> Outputs:
        """Classifies images [N, H, W, channels]; see `ftwt_jax.models.create_model`."""
        imagenet = self.stem == "imagenet"
        x = start(images, control, smallest=32 if imagenet else 16)
        act = nn.relu6 if imagenet else nn.relu
        unit = functools.partial(GatedUnit, act=act, gates=self.gates, dtype=self.dtype)
        x = unit(scaled(32, self.width), strides=2 if imagenet else 1, name="stem")(x, train)
        for index, (features, strides) in enumerate(V1_PAIRS):
            inputs = x.shape[-1]
            x = unit(inputs, strides=strides, groups=inputs, name=f"pair{index}_depthwise")(x, train)
            x = unit(scaled(features, self.width), kernel_size=1, name=f"pair{index}_pointwise")(x, train)
        return Classifier(self.num_classes, dtype=self.dtype, name="classifier")(x)


class InvertedResidual(nn.Module):
    """Expand (1x1), filter (depthwise 3x3), project (1x1, no activation).

    Attributes:
      features: filters of the projection.
      expansion: filters of the first two, as a multiple of the input's channels.
      skip_unit_expansion: leave out the first convolution when it would not expand, as ImageNet's network does.
      projection: shortcut through a 1x1 convolution where stride is 1 and the number of channels changes (CIFAR).
    """

    features: int
    expansion: int
    strides: int
    skip_unit_expansion: bool
    projection: bool
    gates: GateConfig | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Activations, train: bool = False) -> Activations:
        unit = functools.partial(GatedUnit, act=nn.relu6, gates=self.gates, dtype=self.dtype)
        inputs = x.shape[-1]
        hidden = inputs * self.expansion
        y = x
        if not (self.skip_unit_expansion and self.expansion == 1):
            y = unit(hidden, kernel_size=1, name="expand")(y, train)
        y = unit(hidden, strides=self.strides, groups=hidden, name="depthwise")(y, train)
        y = unit(self.features, kernel_size=1, act=None, name="project")(y, train)
        if self.strides != 1:
            return y
        if inputs == self.features:
            return residual_add(y, x)
        if self.projection:
            return residual_add(y, PlainConv(self.features, dtype=self.dtype, name="shortcut")(x, train))
        return y


class MobileNetV2(nn.Module):
    """Inverted residuals with ReLU6.

    Attributes:
      stem: `imagenet`; `cifar`: fewer strides, and projection shortcuts where only the number of channels changes: the
        network of the authors' published total at width 1; `published`: the CIFAR network of the authors' code, without
        those shortcuts and with one stride fewer, which has their total at width .5. Parameters distinguish the last
        two as well: `cifar` runs variables that hold no projection as `published`.
    """

    num_classes: int
    gates: GateConfig | None = None
    stem: str = "cifar"
    width: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array, train: bool = False, control: GateControl | None = None) -> Outputs:
        """Classifies images [N, H, W, channels]; see `ftwt_jax.models.create_model`."""
        imagenet = self.stem == "imagenet"
        projection = self.stem == "cifar" and self._has_projections()
        x = start(images, control, smallest=32 if imagenet else 8 if projection else 4)
        unit = functools.partial(GatedUnit, act=nn.relu6, gates=self.gates, dtype=self.dtype)

        def filters(features: int) -> int:
            return divisible(features * self.width) if imagenet else scaled(features, self.width)

        x = unit(filters(32), strides=2 if imagenet else 1, name="stem")(x, train)
        index = 0
        unstrided = () if imagenet else (1,) if projection else (1, 2)
        for stage, (expansion, features, blocks, strides) in enumerate(V2_STAGES):
            if stage in unstrided:
                strides = 1
            for block in range(blocks):
                x = InvertedResidual(
                    filters(features),
                    expansion,
                    1 if block else strides,
                    skip_unit_expansion=imagenet,
                    projection=projection,
                    gates=self.gates,
                    dtype=self.dtype,
                    name=f"block{index}",
                )(x, train)
                index += 1
        last = max(1280, filters(1280)) if imagenet else filters(1280)
        x = unit(last, kernel_size=1, name="last")(x, train)
        return Classifier(self.num_classes, counted_pool=False, dtype=self.dtype, name="classifier")(x)

    def _has_projections(self) -> bool:
        """Whether the variables are those of the CIFAR network with projection shortcuts; fresh ones are."""
        if self.is_initializing() or scaled(32, self.width) == scaled(16, self.width):
            return True
        return "shortcut" in self.variables["params"].get("block0", {})
