"""Vision transformer ViT-S/16, with a class token. https://arxiv.org/abs/2010.11929, https://arxiv.org/abs/2012.12877"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ftwt_jax.errors import UserError
from ftwt_jax.gating.activations import Activations, LayerRecord, Layers
from ftwt_jax.gating.composition import residual_add
from ftwt_jax.gating.gates import GateConfig, GateControl
from ftwt_jax.gating.units import Classifier, GatedDense, Outputs, PlainConv
from ftwt_jax.models.common import GELU, normed, scaled, start

# Numbers of a head for each token.
HEAD = 64


def attend(qkv: Activations, heads: int, name: str) -> Activations:
    """Attention of each token to all: queries, keys and values [N, T, 3 C], in this order, to [N, T, C].

    Args:
      name: of the layer, under which its two products are counted, T * T * C MACs each.
    """

    def products(v: Float[Array, "N T three_C"]) -> Float[Array, "N T C"]:
        q, k, values = jnp.moveaxis(v.reshape(*v.shape[:2], 3, heads, -1), 2, 0)
        return jax.nn.dot_product_attention(q, k, values).reshape(*v.shape[:2], -1)

    x = qkv.map(products)
    _, tokens, features = x.shape
    sizes = {"scores": (features, tokens), "mixture": (tokens, features)}
    records = [
        LayerRecord(f"{name}/{product}", tokens, 1, inputs, outputs, call=x.trail)
        for product, (inputs, outputs) in sizes.items()
    ]
    return x.replace(layers=Layers((*x.layers, *records)))


class TransformerBlock(nn.Module):
    """Attention, and a feed-forward layer whose hidden neurons are the gated filters, each behind a layer norm."""

    gates: GateConfig | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Activations, train: bool = False) -> Activations:
        features = x.shape[-1]
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        linear = functools.partial(PlainConv, kernel_size=None, use_bias=True, norm=None, dtype=self.dtype)
        y = linear(3 * features, name="qkv")(normed(x, norm(name="norm1")), train)
        y = attend(y, features // HEAD, "/".join((*self.path, "attention")))
        x = residual_add(linear(features, name="attended")(y, train), x)
        y = normed(x, norm(name="norm2"))
        y = GatedDense(4 * features, act=GELU, gates=self.gates, dtype=self.dtype, name="hidden")(y, train)
        return residual_add(linear(features, name="project")(y, train), x)


def resized_positions(positions: Float[Array, "1 T C"], grid: tuple[int, ...]) -> Float[Array, "1 t C"]:
    """Embeddings for another grid of patches, bicubically, from those of a square one; the class token's is first."""
    _, tokens, features = positions.shape
    side = math.isqrt(tokens - 1)
    if grid == (side, side):
        return positions
    maps = positions[:, 1:].reshape(1, side, side, features)
    resized = jax.image.resize(maps, (1, *grid, features), "cubic")
    return jnp.concatenate([positions[:, :1], resized.reshape(1, -1, features)], axis=1)


class ViT(nn.Module):
    """A vision transformer on patches of 16x16 pixels.

    Embeddings of positions are those of the square images that the variables were made for; other sizes take them
    resized bicubically.

    Attributes:
      depth: number of blocks.
      width: of 6 heads with 64 numbers each; at 0.5 this is ViT-Ti, at 2 ViT-B.
    """

    num_classes: int
    depth: int = 12
    gates: GateConfig | None = None
    width: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array, train: bool = False, control: GateControl | None = None) -> Outputs:
        """Classifies images [N, H, W, channels]; see `ftwt_jax.models.create_model`.

        Raises:
          UserError: a side of the images is not a multiple of 16.
        """
        x = start(images, control, smallest=16)
        features = HEAD * scaled(6, self.width)
        if any(side % 16 for side in images.shape[1:3]):
            raise UserError(
                "this network cuts images into patches of 16x16 pixels, so their sides are multiples of 16; got "
                f"{images.shape[1]}x{images.shape[2]}"
            )
        patches = PlainConv(
            features, 16, kernel_size=16, padding=0, use_bias=True, norm=None, dtype=self.dtype, name="stem"
        )(x, train)
        class_token = self.param("class_token", nn.initializers.normal(1e-6), (1, 1, features))
        positions = self._positions(patches.shape[1:3], features)

        def embedded(v: Float[Array, "N h w C"]) -> Float[Array, "N T C"]:
            first = jnp.broadcast_to(class_token.astype(v.dtype), (v.shape[0], 1, features))
            return jnp.concatenate([first, v.reshape(v.shape[0], -1, features)], axis=1) + positions.astype(v.dtype)

        x = patches.map(embedded)
        for block in range(self.depth):
            x = TransformerBlock(gates=self.gates, dtype=self.dtype, name=f"block{block}")(x, train)
        x = normed(x.map(lambda v: v[:, 0]), nn.LayerNorm(dtype=self.dtype, name="last_norm"))
        return Classifier(self.num_classes, counted_pool=False, dtype=self.dtype, name="classifier")(x)

    def _positions(self, grid: tuple[int, ...], features: int) -> Float[Array, "1 T C"]:
        """The embedding of each position, that of the class token first; `grid`: patches along both sides."""
        held = {} if self.is_initializing() else self.variables["params"]
        if not held and grid[0] != grid[1]:
            raise UserError(f"variables of this network are made for square images; got {grid[0]}x{grid[1]} patches")
        tokens = held["positions"].shape[1] if held else 1 + math.prod(grid)
        positions = self.param("positions", nn.initializers.normal(0.02), (1, tokens, features))
        return resized_positions(positions, grid)
