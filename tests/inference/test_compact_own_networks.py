"""Compact execution of what users build themselves: their own layers, transformations, functions under `map`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import ftwt_jax as ftwt
from tests.helpers.compact import (
    KEY,
    NEVER,
    PLAIN_HEADS,
    assert_close,
    assert_same,
    every_way,
    masked,
    random_images,
    random_variables,
)

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("quick_compilation")]


def unit(features=12, **options):
    return ftwt.GatedUnit(features, **{"gates": PLAIN_HEADS, **options})


class Own(nn.Module):
    """What users do between units: their own layers, a constant for each channel, plain values, a residual sum."""

    @nn.compact
    def __call__(self, images, train):
        scale = jnp.linspace(0.5, 2, 12)
        x = unit()(images, train)
        stream = x.map(lambda v: v * scale)
        x = unit(kernel_size=1)(stream, train)
        x = ftwt.residual_add(unit(act=None)(x, train), stream).map(nn.relu)
        own = nn.Conv(6, (3, 3))(x.values)
        own = nn.relu(nn.BatchNorm(use_running_average=not train)(own))
        y = unit(8, strides=2, act=nn.leaky_relu)(own, train)
        y = y.replace(values=jnp.tanh(y.values))
        y = unit(16, groups=2)(y, train)
        y = unit(16, groups=16)(y.map(lambda v: nn.avg_pool(v, (2, 2))), train)
        return nn.Dense(5)(y.values.mean((1, 2)))


class Twice(nn.Module):
    """One unit called twice."""

    @nn.compact
    def __call__(self, images):
        shared = unit(name="shared")
        return ftwt.Classifier(5)(shared(shared(unit()(images))))


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return unit()(unit()(x))


class RematUnit(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.remat(ftwt.GatedUnit)(12, gates=PLAIN_HEADS)(images)
        return ftwt.Classifier(5)(nn.remat(ftwt.GatedUnit)(12, gates=PLAIN_HEADS)(x))


class RematBlock(nn.Module):
    @nn.compact
    def __call__(self, images):
        return ftwt.Classifier(5)(nn.remat(Pair)()(unit()(images)))


class JitBlock(nn.Module):
    @nn.compact
    def __call__(self, images):
        return ftwt.Classifier(5)(nn.jit(Pair)()(unit()(images)))


class ChannelScale(nn.Module):
    @nn.compact
    def __call__(self, v):
        return v * self.param("scale", nn.initializers.ones, (v.shape[-1],))


class Mapped(nn.Module):
    """A layer with parameters as the function that `map` applies: made before, within it, or without a module."""

    how: str

    @nn.compact
    def __call__(self, images):
        x = unit(act=None)(images)
        functions = {
            "PReLU": lambda: nn.PReLU(),
            "PReLU made within": lambda: lambda v: nn.PReLU()(v),
            "scale": lambda: ChannelScale(),
            "scale of its own": lambda: lambda v: v * self.param("scale", nn.initializers.ones, (12,)),
            "depthwise": lambda: nn.Conv(12, (3, 3), feature_group_count=12, use_bias=False),
        }
        return ftwt.Classifier(5)(unit()(x.map(functions[self.how]())))


OWN = {
    "own layers": (Own(), {"train": False}),
    "called twice": (Twice(), {}),
    "unit alone": (unit(), {}),
    "remat of a unit": (RematUnit(), {}),
    "remat of a block": (RematBlock(), {}),
    "jit of a block": (JitBlock(), {}),
    **{f"map: {how}": (Mapped(how), {}) for how in ("PReLU", "PReLU made within")},
    **{f"map: {how}": (Mapped(how), {}) for how in ("scale", "scale of its own", "depthwise")},
}


@pytest.mark.parametrize("name", OWN)
def test_a_users_own_network_answers_as_it_does_itself(prepare, name):
    model, options = OWN[name]
    images = random_images(5, seed=3)
    variables = random_variables(model, images, never=0.4, **options)
    expected = masked(model, variables, images, **options)
    compact = prepare(model, variables, random_images(8), **options)
    assert compact.execution.kept
    actual = compact(images)
    assert type(actual) is type(expected)
    for field in ("logits", "values"):
        if hasattr(expected, field) and not isinstance(expected, jax.Array):
            actual, expected = getattr(actual, field), getattr(expected, field)
    assert_close(actual, expected)


class ReadersOfNothing(nn.Module):
    """Every kind of layer, on two channels that calibration leaves out."""

    @nn.compact
    def __call__(self, images):
        x = ftwt.permute_channels(unit(8, name="first")(images), [5, 2])
        ends = [
            unit(5)(x),
            unit(2, groups=2)(x),
            ftwt.GatedDense(4, gates=PLAIN_HEADS)(x),
            ftwt.PlainConv(3, use_bias=True)(x),
            ftwt.PlainConv(3, kernel_size=None, norm=None, use_bias=True)(x),
            ftwt.residual_add(x, ftwt.permute_channels(x, [1, 0])),
        ]
        return ftwt.Classifier(5)(ftwt.flatten(ftwt.concatenate(ends)))


def test_layers_may_read_only_channels_that_are_left_out(quick_compilation):
    model, images = ReadersOfNothing(), random_images(4)
    variables = random_variables(model, images)
    bias = variables["params"]["first"]["gate_head"]["dense"]["bias"]
    bias[:] = 9
    bias[[2, 5]] = NEVER
    expected = masked(model, variables, images)
    for network in every_way(model, variables, random_images(8, seed=1)):
        assert_same(network(images), expected)


def test_a_network_without_units_is_refused():
    model = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu])
    variables = model.init(KEY, random_images(1))
    for calibration in (None, random_images(2)):
        with pytest.raises(ftwt.UserError) as error:
            ftwt.compact(model, variables, calibration)(random_images(1))
        assert "\n" not in str(error.value)
