"""DenseNet-121: every layer reads the outputs of all layers before it in its block. https://arxiv.org/abs/1608.06993"""

import functools
from typing import Any

import flax.linen as nn
from jaxtyping import Array

from ftwt_jax.gating.activations import Activations
from ftwt_jax.gating.composition import concatenate
from ftwt_jax.gating.gates import GateConfig, GateControl
from ftwt_jax.gating.units import Classifier, GatedUnit, Outputs
from ftwt_jax.models.common import normed, scaled, start
from ftwt_jax.ops.batch_norm import BatchNorm


class DenseLayer(nn.Module):
    """Batch norm and ReLU, a narrowing 1x1 unit, and a 3x3 unit without norm whose maps are added to the channels.

    The norm before the first convolution is of all channels so far, and makes non-zero what gates before it turned off.

    Attributes:
      growth: filters of the 3x3 convolution; the 1x1 convolution has four times as many.
    """

    growth: int
    gates: GateConfig | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Activations, train: bool = False) -> Activations:
        unit = functools.partial(GatedUnit, gates=self.gates, dtype=self.dtype)
        y = normed(x, BatchNorm(not train, dtype=self.dtype, name="norm1"), nn.relu)
        y = unit(4 * self.growth, kernel_size=1, name="conv1")(y, train)
        return concatenate([x, unit(self.growth, norm=None, act=None, name="conv2")(y, train)])


class DenseNet(nn.Module):
    """Densely connected blocks, with a 1x1 unit and an average pool that halve channels and sides between them.

    Attributes:
      stage_sizes: layers in each block.
    """

    num_classes: int
    stage_sizes: tuple[int, ...] = (6, 12, 24, 16)
    gates: GateConfig | None = None
    width: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array, train: bool = False, control: GateControl | None = None) -> Outputs:
        """Classifies images [N, H, W, channels]; see `ftwt_jax.models.create_model`."""
        x = start(images, control, smallest=2 ** (len(self.stage_sizes) + 1))
        unit = functools.partial(GatedUnit, gates=self.gates, dtype=self.dtype)
        norm = functools.partial(BatchNorm, not train, dtype=self.dtype)
        x = unit(scaled(64, self.width), kernel_size=7, strides=2, name="stem")(x, train)
        x = x.map(lambda v: nn.max_pool(v, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1))))
        for stage, layers in enumerate(self.stage_sizes, start=1):
            if stage > 1:
                x = normed(x, norm(name=f"transition{stage - 1}_norm"), nn.relu)
                name = f"transition{stage - 1}"
                x = unit(x.shape[-1] // 2, kernel_size=1, norm=None, act=None, name=name)(x, train)
                x = x.map(lambda v: nn.avg_pool(v, (2, 2), strides=(2, 2)))
            for layer in range(1, layers + 1):
                growth = scaled(32, self.width)
                name = f"block{stage}_layer{layer}"
                x = DenseLayer(growth, gates=self.gates, dtype=self.dtype, name=name)(x, train)
        x = normed(x, norm(name="last_norm"), nn.relu)
        return Classifier(self.num_classes, counted_pool=False, dtype=self.dtype, name="classifier")(x)
