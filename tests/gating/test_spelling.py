"""Units in every spelling that Flax's own layers have, against those layers; and in compact execution."""

import functools
import itertools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ftwt_jax as ftwt
from tests.helpers.compact import KEY, assert_close, every_way, masked, random_images, random_variables

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("quick_compilation")]
GATES = ftwt.GateConfig()
MAPS = random_images(3, channels=4, seed=1)
SIGNAL = MAPS.reshape(3, 64, 4)
VOLUME = MAPS.reshape(3, 4, 4, 4, 4)


def conv(kernel_size=(3, 3), **options):
    return functools.partial(nn.Conv, 6, kernel_size, use_bias=False, name="conv", **options)


def transposed(kernel_size, **options):
    return functools.partial(nn.ConvTranspose, 6, kernel_size, use_bias=False, name="conv", **options)


# The unit's settings, the layer that it is, and maps; in each, batch norm and ReLU follow.
SPELLINGS = {
    "a pair": ({"kernel_size": (3, 3)}, conv(padding=1), MAPS),
    "a list": ({"kernel_size": [3, 1], "padding": [1, 0]}, conv((3, 1), padding=(1, 0)), MAPS),
    "1x7": ({"kernel_size": (1, 7)}, conv((1, 7), padding=(0, 3)), MAPS),
    "even": ({"kernel_size": 2}, conv((2, 2), padding="VALID"), MAPS),
    "even, SAME": ({"kernel_size": (4, 4), "padding": "SAME"}, conv((4, 4), padding="SAME"), MAPS),
    "strides": ({"strides": (2, 2)}, conv(strides=2, padding=1), MAPS),
    "strides by axis": ({"strides": (2, 1)}, conv(strides=(2, 1), padding=1), MAPS),
    "SAME at stride 2": ({"strides": 2, "padding": "SAME"}, conv(strides=2, padding="SAME"), MAPS),
    "SAME_LOWER": ({"strides": 2, "padding": "SAME_LOWER"}, conv(strides=2, padding="SAME_LOWER"), MAPS),
    "VALID": ({"padding": "VALID"}, conv(padding="VALID"), MAPS),
    "CIRCULAR": ({"padding": "CIRCULAR"}, conv(padding="CIRCULAR"), MAPS),
    "REFLECT": ({"padding": "REFLECT"}, conv(padding="REFLECT"), MAPS),
    "pairs": ({"padding": ((0, 2), (1, 0))}, conv(padding=((0, 2), (1, 0))), MAPS),
    "cropping": ({"padding": -1}, conv(padding=-1), MAPS),
    "dilated": ({"kernel_dilation": 2}, conv(kernel_dilation=2, padding=2), MAPS),
    "dilated by axis": (
        {"kernel_dilation": (1, 2), "padding": "SAME"}, conv(kernel_dilation=(1, 2), padding="SAME"), MAPS,
    ),
    "groups": ({"feature_group_count": 2}, conv(feature_group_count=2, padding=1), MAPS),
    "transposed": ({"transpose": True, "strides": 2}, transposed((3, 3), strides=(2, 2)), MAPS),
    "transposed, VALID": (
        {"transpose": True, "strides": (2, 1), "kernel_size": (2, 3), "padding": "VALID"},
        transposed((2, 3), strides=(2, 1), padding="VALID"),
        MAPS,
    ),
    "one axis": ({"kernel_size": (5,), "strides": 2}, conv((5,), strides=2, padding=2), SIGNAL),
    "one axis, causal": ({"kernel_size": (3,), "padding": "CAUSAL"}, conv((3,), padding="CAUSAL"), SIGNAL),
    "three axes": ({"kernel_size": (3, 1, 2), "padding": "SAME"}, conv((3, 1, 2), padding="SAME"), VOLUME),
    "dense": ({"kernel_size": None}, functools.partial(nn.Dense, 6, use_bias=False, name="dense"), SIGNAL),
}  # fmt: skip


class Plain(nn.Module):
    make: Callable

    @nn.compact
    def __call__(self, x):
        x = self.make()(x)
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-5, name="bn")(x))


def check(unit, plain, maps):
    """A gated unit is the plain layers under its mask, is counted, and runs compact within a network."""
    variables = random_variables(unit, maps)
    out = unit.apply(variables, maps)
    params = {name: tree for name, tree in variables["params"].items() if name != "gate_head"}
    dense = plain.apply({**variables, "params": params}, maps)
    mask = np.asarray(out.active).reshape(3, *[1] * (dense.ndim - 2), -1)
    assert 0 < mask.mean() < 1
    assert_close(out.values, np.where(mask, dense, 0))
    assert np.all(np.asarray(out.values)[np.broadcast_to(~mask, dense.shape)] == 0)
    model = nn.Sequential([unit.clone(), ftwt.Classifier(5)])
    variables = random_variables(model, maps, never=0.3)
    expected = masked(model, variables, maps)
    kernel = variables["params"]["layers_0"]["conv" if "conv" in params else "dense"]["kernel"]
    pixels = maps if unit.transpose else dense
    assert ftwt.dense_macs(expected) == np.prod(pixels.shape[1:-1]) * kernel.size + 30
    for network in itertools.islice(every_way(model, variables, maps), 2):
        assert_close(network(maps).logits, expected.logits)


@pytest.mark.parametrize(("settings", "layer", "maps"), SPELLINGS.values(), ids=SPELLINGS)
def test_a_unit_is_spelled_as_flax_spells_its_layers(settings, layer, maps):
    check(ftwt.GatedUnit(6, gates=GATES, **settings), Plain(layer), maps)


class Normed(nn.Module):
    make_norm: Callable | None
    function: Callable | None = nn.relu

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), padding=1, use_bias=True, name="conv")(x)
        x = x if self.make_norm is None else self.make_norm()(x)
        return nn.PReLU(name="act")(x) if self.function is None else self.function(x)


running = functools.partial(nn.BatchNorm, use_running_average=True)
NORMS = {
    "none": ({"norm": None}, None),
    "layer": ({"norm": "layer"}, lambda: nn.LayerNorm(name="layer_norm")),
    "group": ({"norm": "group"}, lambda: nn.GroupNorm(2, name="group_norm")),
    "Flax's group norm": ({"norm": nn.GroupNorm(3)}, lambda: nn.GroupNorm(3, name="norm")),
    "a class": ({"norm": nn.LayerNorm}, lambda: nn.LayerNorm(name="own_norm")),
    "Flax's batch norm": ({"norm": nn.BatchNorm(epsilon=0.1)}, lambda: running(epsilon=0.1, name="norm")),
    "Flax's batch norm, bare": (
        {"norm": nn.BatchNorm(use_scale=False, use_bias=False)},
        lambda: running(use_scale=False, use_bias=False, name="norm"),
    ),
    "made by a function": (
        {"norm": functools.partial(nn.BatchNorm, epsilon=0.2)},
        lambda: running(epsilon=0.2, name="own_norm"),
    ),
}
ACTS = {
    "f(0) = 1": jnp.cos,
    "sigmoid": nn.sigmoid,
    "learned": nn.PReLU(),
    "by filter": lambda v: v * jnp.linspace(-1, 1, v.shape[-1]) + 1,
    "over filters": nn.softmax,
    "none": lambda v: v,
}


@pytest.mark.parametrize(("settings", "norm"), NORMS.values(), ids=NORMS)
def test_a_unit_takes_any_norm(settings, norm):
    check(ftwt.GatedUnit(6, gates=GATES, use_bias=True, **settings), Normed(norm), MAPS)


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_a_unit_takes_any_activation(act):
    check(
        ftwt.GatedUnit(6, gates=GATES, use_bias=True, norm=None, act=act),
        Normed(None, None if isinstance(act, nn.Module) else act),
        MAPS,
    )


def test_filters_that_a_norm_mixes_are_all_computed_and_counted_as_such():
    for options in ({"norm": "layer"}, {"act": nn.softmax}):
        unit = ftwt.GatedUnit(6, gates=GATES, **options)
        record = unit.apply(random_variables(unit, MAPS), MAPS).layers[0]
        assert record.active_out is None
        assert record.gate.mask.shape == (3, 6)


def test_training_statistics_of_users_norms_are_updated():
    unit = ftwt.GatedUnit(6, gates=GATES, norm=nn.BatchNorm())
    variables = random_variables(unit, MAPS)
    _, changed = unit.apply(variables, MAPS, train=True, mutable=["batch_stats"])
    assert np.any(changed["batch_stats"]["norm"]["mean"] != variables["batch_stats"]["norm"]["mean"])


MISTAKES = {
    "bool": (ftwt.GatedUnit(8, True), MAPS, "kernel_size"),
    "zero": (ftwt.GatedUnit(8, 0), MAPS, "kernel_size"),
    "fraction": (ftwt.GatedUnit(8, 1.5), MAPS, "kernel_size"),
    "no filters": (ftwt.GatedUnit(0), MAPS, "features"),
    "strides": (ftwt.GatedUnit(8, strides=(2, 2, 2)), MAPS, "strides"),
    "stride of 0": (ftwt.GatedUnit(8, strides=0), MAPS, "strides"),
    "padding": (ftwt.GatedUnit(8, padding="same"), MAPS, "SAME"),
    "pads": (ftwt.GatedUnit(8, padding=((1, 1, 1), 0)), MAPS, "padding"),
    "groups": (ftwt.GatedUnit(8, groups=3), MAPS, "groups"),
    "groups transposed": (ftwt.GatedUnit(8, groups=2, transpose=True), MAPS, "groups"),
    "groups of a dense unit": (ftwt.GatedDense(8, groups=2), MAPS, "dense unit"),
    "strides of a dense unit": (ftwt.GatedDense(8, strides=2), MAPS, "dense unit"),
    "axes": (ftwt.GatedUnit(8), SIGNAL, "kernel_size"),
    "an image alone": (ftwt.GatedUnit(8), MAPS[0], "kernel_size"),
    "too large": (ftwt.GatedUnit(8, kernel_size=9, padding=0), MAPS, "does not fit"),
    "norm": (ftwt.GatedUnit(8, norm="instance"), MAPS, "batch"),
    "a class as activation": (ftwt.GatedUnit(8, act=nn.PReLU), MAPS, "nn.PReLU()"),
    "an activation of another shape": (ftwt.GatedUnit(8, act=nn.glu), MAPS, "activation"),
}


@pytest.mark.parametrize(("unit", "maps", "named"), MISTAKES.values(), ids=MISTAKES)
def test_sizes_that_do_not_fit_are_refused_on_one_line(unit, maps, named):
    with pytest.raises(ftwt.UserError) as error:
        jax.eval_shape(unit.init, KEY, maps)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
