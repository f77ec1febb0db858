"""Residual networks: CIFAR's 6n+2 with parameter-free shortcuts, and ImageNet's. https://arxiv.org/abs/1512.03385"""

import functools
from typing import Any

import flax.linen as nn
from jaxtyping import Array

from ftwt_jax.gating.activations import Activations
from ftwt_jax.gating.composition import residual_add
from ftwt_jax.gating.gates import GateConfig, GateControl
from ftwt_jax.gating.units import Classifier, GatedUnit, Outputs, PlainConv
from ftwt_jax.models.common import scaled, start


def pooled_shortcut(x: Activations, features: int, strides: int) -> Activations:
    """Shortcut without parameters: average pool to the new size, zero channels behind the old ones up to `features`."""
    if strides > 1:
        # Odd sizes round up, as in the branch; the last window is smaller then.
        rest = [(0, -size % strides) for size in x.shape[1:3]]
        window = (strides, strides)
        x = x.map(lambda v: nn.avg_pool(v, window, strides=window, padding=rest, count_include_pad=False))
    channels = x.shape[-1]
    return x.append_zeros(features - channels) if features > channels else x


class Block(nn.Module):
    """Residual block: two 3x3 units, or the three convolutions of a bottleneck of which the first two are gated.

    Attributes:
      features: filters of the 3x3 convolution (the output has four times as many in a bottleneck).
      projection: a 1x1 convolution where the shortcut changes shape; off: average pool and zero channels.
    """

    features: int
    strides: int = 1
    bottleneck: bool = False
    projection: bool = True
    gates: GateConfig | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Activations, train: bool = False) -> Activations:
        unit = functools.partial(GatedUnit, gates=self.gates, dtype=self.dtype)
        plain = functools.partial(PlainConv, dtype=self.dtype)
        features = self.features * (4 if self.bottleneck else 1)

        shortcut = x
        if self.strides != 1 or x.shape[-1] != features:
            if self.projection:
                shortcut = plain(features, strides=self.strides, name="shortcut")(x, train)
            else:
                shortcut = pooled_shortcut(x, features, self.strides)

        if self.bottleneck:
            y = unit(self.features, kernel_size=1, name="conv1")(x, train)
            y = unit(self.features, strides=self.strides, name="conv2")(y, train)
            y = plain(features, name="conv3")(y, train)
            return residual_add(y, shortcut).map(nn.relu)

        y = unit(features, strides=self.strides, name="conv1")(x, train)
        if self.gates is not None and self.gates.after_block:
            return unit(features, name="conv2")(y, train, shortcut=shortcut)
        y = unit(features, act=None, name="conv2")(y, train)
        return residual_add(y, shortcut).map(nn.relu)


class ResNet(nn.Module):
    """Residual network.

    Attributes:
      stage_sizes: blocks in each stage; a stage has twice the filters of the one before and starts with stride 2.
      features: filters of the first stage.
      stem: `cifar`: 3x3, stride 1; `imagenet`: 7x7, stride 2, and a 3x3 max pool.
    """

    num_classes: int
    stage_sizes: tuple[int, ...]
    features: int = 64
    bottleneck: bool = False
    projection: bool = True
    stem: str = "imagenet"
    gates: GateConfig | None = None
    width: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array, train: bool = False, control: GateControl | None = None) -> Outputs:
        """Classifies images [N, H, W, channels]; see `ftwt_jax.models.create_model`."""
        imagenet = self.stem == "imagenet"
        x = start(images, control, smallest=2 ** (len(self.stage_sizes) - 1) * (4 if imagenet else 1))
        unit = functools.partial(GatedUnit, gates=self.gates, dtype=self.dtype, name="stem")
        features = scaled(self.features, self.width)
        if imagenet:
            x = unit(features, kernel_size=7, strides=2)(x, train)
            x = x.map(lambda v: nn.max_pool(v, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1))))
        else:
            x = unit(features)(x, train)
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                x = Block(
                    scaled(self.features * 2**stage, self.width),
                    strides=2 if stage and not block else 1,
                    bottleneck=self.bottleneck,
                    projection=self.projection,
                    gates=self.gates,
                    dtype=self.dtype,
                    name=f"stage{stage + 1}_block{block}",
                )(x, train)
        return Classifier(self.num_classes, dtype=self.dtype, name="classifier")(x)
