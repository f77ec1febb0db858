"""ConvNeXt-T: depthwise convolutions, and a feed-forward layer at every pixel. https://arxiv.org/abs/2201.03545"""

from typing import Any

import flax.linen as nn
from jaxtyping import Array

from ftwt_jax.gating.activations import Activations
from ftwt_jax.gating.composition import residual_add
from ftwt_jax.gating.gates import GateConfig, GateControl
from ftwt_jax.gating.units import Classifier, GatedDense, Outputs, PlainConv
from ftwt_jax.models.common import GELU, normed, scaled, start


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution, layer norm, and a feed-forward layer whose hidden neurons are the gated filters."""

    gates: GateConfig | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Activations, train: bool = False) -> Activations:
        features = x.shape[-1]
        y = PlainConv(
            features,
            kernel_size=7,
            groups=features,
            use_bias=True,
            norm="layer",
            dtype=self.dtype,
            name="depthwise",
        )(x, train)
        y = GatedDense(4 * features, act=GELU, gates=self.gates, dtype=self.dtype, name="hidden")(y, train)
        y = PlainConv(features, kernel_size=None, use_bias=True, norm=None, dtype=self.dtype, name="project")(y, train)
        scale = self.param("layer_scale", nn.initializers.constant(1e-6), (features,))
        return residual_add(y.map(lambda v: v * scale.astype(v.dtype)), x)


class ConvNeXt(nn.Module):
    """Four stages of blocks; between them, a layer norm and a 2x2 convolution at stride 2.

    Attributes:
      stage_sizes: blocks in each stage; a stage has twice the channels of the one before.
    """

    num_classes: int
    stage_sizes: tuple[int, ...] = (3, 3, 9, 3)
    gates: GateConfig | None = None
    width: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array, train: bool = False, control: GateControl | None = None) -> Outputs:
        """Classifies images [N, H, W, channels]; see `ftwt_jax.models.create_model`."""
        x = start(images, control, smallest=2 ** (len(self.stage_sizes) + 1))
        for stage, blocks in enumerate(self.stage_sizes, start=1):
            features = scaled(96 * 2 ** (stage - 1), self.width)
            name, side = ("stem", 4) if stage == 1 else (f"stage{stage}_downsample", 2)
            if stage > 1:
                x = normed(x, nn.LayerNorm(dtype=self.dtype, name=f"{name}_norm"))
            norm = "layer" if stage == 1 else None
            x = PlainConv(
                features, side, kernel_size=side, padding=0, use_bias=True, norm=norm, dtype=self.dtype, name=name
            )(x, train)
            for block in range(blocks):
                x = ConvNeXtBlock(gates=self.gates, dtype=self.dtype, name=f"stage{stage}_block{block}")(x, train)
        x = normed(x.map(lambda v: v.mean(axis=(1, 2))), nn.LayerNorm(dtype=self.dtype, name="last_norm"))
        return Classifier(self.num_classes, counted_pool=False, dtype=self.dtype, name="classifier")(x)
