"""EfficientNet-B0: inverted residuals with squeeze-and-excitation. https://arxiv.org/abs/1905.11946"""

import functools
from typing import Any

import flax.linen as nn
from jaxtyping import Array

from ftwt_jax.gating.activations import Activations
from ftwt_jax.gating.composition import residual_add
from ftwt_jax.gating.gates import GateConfig, GateControl
from ftwt_jax.gating.units import Classifier, GatedUnit, Outputs, PlainConv
from ftwt_jax.models.common import start
from ftwt_jax.models.mobilenet import divisible

# (expansion, side of the depthwise kernel, filters, blocks, stride) of each stage.
STAGES = (
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 2),
    (6, 5, 40, 2, 2),
    (6, 3, 80, 3, 2),
    (6, 5, 112, 3, 1),
    (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
)


class SqueezedResidual(nn.Module):
    """Expand (1x1), filter (depthwise), weigh each channel by squeeze-and-excitation, project (1x1, no activation).

    Attributes:
      features: filters of the projection.
      expansion: filters of the first two, as a multiple of the input's channels; at 1 there is no first one.
      kernel: side of the depthwise kernel.
    """

    features: int
    expansion: int
    kernel: int
    strides: int
    gates: GateConfig | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Activations, train: bool = False) -> Activations:
        unit = functools.partial(GatedUnit, act=nn.silu, gates=self.gates, dtype=self.dtype)
        plain = functools.partial(PlainConv, use_bias=True, norm=None, dtype=self.dtype)
        inputs = x.shape[-1]
        hidden = inputs * self.expansion
        y = unit(hidden, kernel_size=1, name="expand")(x, train) if self.expansion > 1 else x
        y = unit(hidden, self.kernel, self.strides, groups=hidden, name="depthwise")(y, train)
        weight = y.map(lambda v: v.mean(axis=(1, 2), keepdims=True))
        weight = plain(max(1, inputs // 4), act=nn.silu, name="squeeze")(weight, train)
        weight = plain(hidden, act=nn.sigmoid, name="excite")(weight, train)
        y = y.map(lambda v: v * weight.values).replace(layers=weight.layers)
        y = unit(self.features, kernel_size=1, act=None, name="project")(y, train)
        return residual_add(y, x) if self.strides == 1 and inputs == self.features else y


class EfficientNet(nn.Module):
    """Inverted residuals with SiLU; every convolution is a unit but those of squeeze-and-excitation.

    Attributes:
      stages: (expansion, side of the depthwise kernel, filters, blocks, stride) of each stage.
    """

    num_classes: int
    stages: tuple[tuple[int, int, int, int, int], ...] = STAGES
    gates: GateConfig | None = None
    width: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array, train: bool = False, control: GateControl | None = None) -> Outputs:
        """Classifies images [N, H, W, channels]; see `ftwt_jax.models.create_model`."""
        x = start(images, control, smallest=32)
        unit = functools.partial(GatedUnit, act=nn.silu, gates=self.gates, dtype=self.dtype)
        x = unit(divisible(32 * self.width), strides=2, name="stem")(x, train)
        index = 0
        for expansion, kernel, features, blocks, strides in self.stages:
            for block in range(blocks):
                x = SqueezedResidual(
                    divisible(features * self.width),
                    expansion,
                    kernel,
                    1 if block else strides,
                    gates=self.gates,
                    dtype=self.dtype,
                    name=f"block{index}",
                )(x, train)
                index += 1
        x = unit(4 * x.shape[-1], kernel_size=1, name="last")(x, train)
        return Classifier(self.num_classes, counted_pool=False, dtype=self.dtype, name="classifier")(x)
