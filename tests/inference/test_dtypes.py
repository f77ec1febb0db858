"""Compact execution of variables and images in other dtypes than float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ftwt_jax as ftwt
from tests.helpers.compact import KEY, assert_close, every_way, masked, random_images, random_variables

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("quick_compilation")]
GATES = ftwt.GateConfig()


class Net(nn.Module):
    """Two units, the second with a shortcut of a dtype of its own."""

    shortcut: str = "float32"
    dtype: str | None = None

    @nn.compact
    def __call__(self, images):
        x = ftwt.GatedUnit(8, gates=GATES, dtype=self.dtype)(images)
        added = x.map(lambda v: v.astype(self.shortcut))
        return ftwt.Classifier(5)(ftwt.GatedUnit(8, gates=GATES)(x, shortcut=added))


def cast(variables, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), variables)


@pytest.mark.parametrize("of", ["variables", "images", "both", "shortcut", "unit"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes_are_right_by_another_way(dtype, of):
    share = {"bfloat16": 0.05, "float16": 0.01, "float64": 1e-4}[dtype]
    with jax.enable_x64(dtype == "float64"):
        model = Net(dtype if of == "shortcut" else "float32", dtype if of == "unit" else None)
        images = random_images(4)
        variables = random_variables(model, images, never=0.3)
        if of in ("variables", "both"):
            variables = cast(variables, dtype)
        images = jnp.asarray(images, dtype if of in ("images", "both") else "float32")
        expected = masked(model, variables, images)
        for network in every_way(model, variables, images):
            actual = network(images)
            assert actual.logits.dtype == jnp.float32
            # A gate logit within rounding of zero may fall on either side.
            same = [np.all(np.asarray(a.mask == b.mask)) for a, b in zip(actual.gates, expected.gates, strict=True)]
            if all(same):
                assert_close(actual.logits, expected.logits, share)
            assert np.mean([np.mean(a.mask == b.mask) for a, b in zip(actual.gates, expected.gates, strict=True)]) > 0.9


def test_half_precision_variables_train_and_initialise_in_double():
    with jax.enable_x64(True):
        model, images = Net(), random_images(2).astype(np.float64)
        out = model.apply(model.init(KEY, images), images)
        assert np.isfinite(out.logits).all()
