"""A trained Flax network of one's own in its gated form, whose layers have other names."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import ftwt_jax as ftwt
from ftwt_jax.gating.naming import renamed
from tests.conftest import random_like

IMAGES = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
pytestmark = pytest.mark.usefixtures("quick_compilation")


class Plain(nn.Module):
    """Two stages of two convolutions, the second of equal shapes; `blocks`: in a block each."""

    blocks: bool = False

    @nn.compact
    def __call__(self, x):
        for features in (8, 8):
            x = Block(features)(x) if self.blocks else layers(x, features)
        return nn.Dense(4, name="out")(x.mean((1, 2)))


def layers(x, features):
    for _ in range(6):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(features, (3, 3), use_bias=False)(x)))
    return x


class Block(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        return layers(x, self.features)


class GatedBlock(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        for _ in range(6):
            x = ftwt.GatedUnit(self.features, gates=ftwt.GateConfig())(x)
        return x


class Gated(nn.Module):
    """`blocks`: with the gated blocks under names of their own, which do not sort as they are called."""

    blocks: bool = False

    @nn.compact
    def __call__(self, x):
        for name in ("second", "first"):
            x = GatedBlock(8, name=name)(x) if self.blocks else ftwt.GatedUnit(8, gates=ftwt.GateConfig())(x)
        for _ in range(0 if self.blocks else 10):
            x = ftwt.GatedUnit(8, gates=ftwt.GateConfig())(x)
        return ftwt.Classifier(4, name="head")(x)


@pytest.fixture(scope="module", params=[False, True], ids=["flat", "blocks"])
def networks(request):
    """Twelve convolutions, all but the first alike: Conv_10 sorts before Conv_2, and JAX sorts."""
    dense, gated = Plain(request.param), Gated(request.param)
    return dense, random_like(jax.eval_shape(dense.init, jax.random.key(0), IMAGES)), gated


def init(networks, variables=None, **options):
    _, plain, gated = networks
    return ftwt.init_from_dense(gated, variables or plain, IMAGES, jax.random.key(1), **options)


def test_suggested_names_give_the_same_logits(networks):
    dense, plain, gated = networks
    names = ftwt.suggest_names(gated, plain, IMAGES)
    assert len(names) == 25
    variables = init(networks, names=names)
    np.testing.assert_allclose(gated.apply(variables, IMAGES).logits, dense.apply(plain, IMAGES), rtol=1e-4, atol=1e-5)


def test_names_that_are_missing_are_suggested_in_the_message(networks):
    _, plain, gated = networks
    old, new = next(iter(ftwt.suggest_names(gated, plain, IMAGES).items()))
    with pytest.raises(
        ftwt.UserError, match=r"^the dense variables do not fit: .*; by order and shape, names="
    ) as told:
        init(networks)
    assert f"names={{{old!r}: {new!r}, " in str(told.value)
    assert len(str(told.value).splitlines()) == 1


def test_wrong_names_are_told(networks):
    _, plain, gated = networks
    names = ftwt.suggest_names(gated, plain, IMAGES)
    with pytest.raises(ftwt.UserError, match="the dense variables have no 'Conv_99', 'Con'"):
        init(networks, names=names | {"Conv_99": "there", "Con": "here"})
    first, second, *_ = names
    with pytest.raises(ftwt.UserError, match="two arrays of the dense variables would be params/"):
        init(networks, names=names | {first: names[second]})
    with pytest.raises(ftwt.UserError, match=r"elsewhere/.* is not in this network.*by order and shape"):
        init(networks, names=names | {first: "elsewhere"})


def test_layers_that_have_no_counterpart_are_named_and_nothing_is_suggested(networks):
    _, plain, gated = networks
    params = plain["params"] | {"out": {"kernel": np.ones((9, 4), np.float32), "bias": np.ones(4, np.float32)}}
    variables = plain | {"params": params}
    with pytest.raises(ftwt.UserError, match=r"bias 4, kernel 9x4 the dense one has out, the gated one none"):
        ftwt.suggest_names(gated, variables, IMAGES)
    with pytest.raises(ftwt.UserError) as told:
        init(networks, variables)
    assert "by order" not in str(told.value)


def test_a_name_may_be_that_of_a_block():
    dense, gated = Plain(blocks=True), Gated(blocks=True)
    plain = random_like(jax.eval_shape(dense.init, jax.random.key(0), IMAGES))
    inner = {
        f"{block}/{kind}_{index}": f"{name}/GatedUnit_{index}/{part}"
        for block, name in (("Block_0", "second"), ("Block_1", "first"))
        for kind, part in (("Conv", "conv"), ("BatchNorm", "bn"))
        for index in range(6)
    }
    assert ftwt.suggest_names(gated, plain, IMAGES) == inner | {"out": "head/dense"}
    same = {"params": {"a": plain["params"]}, "batch_stats": {"a": plain["batch_stats"]}}
    assert renamed(flatten_dict(same, sep="/"), {"a": "b/c"}).keys() == {
        f"{kind}/b/c/{rest}" for kind in plain for rest in flatten_dict(plain[kind], sep="/")
    }
