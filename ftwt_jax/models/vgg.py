"""VGG with batch norm and one linear classifier, the CIFAR form of the paper. https://arxiv.org/abs/1409.1556"""

from typing import Any

import flax.linen as nn
from jaxtyping import Array

from ftwt_jax.gating.gates import GateConfig, GateControl
from ftwt_jax.gating.units import Classifier, GatedUnit, Outputs
from ftwt_jax.models.common import scaled, start

Plan = tuple[int | str, ...]
POOL = "M"

PLANS: dict[str, Plan] = {
    "vgg11_bn": (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL),
    "vgg13_bn": (64, 64, POOL, 128, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL),
    "vgg16_bn": (64, 64, POOL, 128, 128, POOL, *[256] * 3, POOL, *[512] * 3, POOL, *[512] * 3, POOL),
    "vgg19_bn": (64, 64, POOL, 128, 128, POOL, *[256] * 4, POOL, *[512] * 4, POOL, *[512] * 4, POOL),
}


class VGG(nn.Module):
    """Plain stack of 3x3 units.

    Attributes:
      plan: number of filters of each unit, "M" for a 2x2 max pool.
    """

    num_classes: int
    plan: Plan
    gates: GateConfig | None = None
    width: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Array, train: bool = False, control: GateControl | None = None) -> Outputs:
        """Classifies images [N, H, W, channels]; see `ftwt_jax.models.create_model`."""
        x = start(images, control, smallest=2 ** self.plan.count(POOL))
        index = 0
        for features in self.plan:
            if features == POOL:
                x = x.map(lambda v: nn.max_pool(v, (2, 2), strides=(2, 2)))
                continue
            unit = GatedUnit(
                scaled(int(features), self.width),
                use_bias=True,
                gates=self.gates,
                dtype=self.dtype,
                name=f"unit{index}",
            )
            x = unit(x, train)
            index += 1
        return Classifier(self.num_classes, counted_pool=False, dtype=self.dtype, name="classifier")(x)
