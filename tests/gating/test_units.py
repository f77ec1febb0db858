"""The gated unit against plain Flax, and what travels with the activations."""

import dataclasses
import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ftwt_jax as ftwt
from ftwt_jax.gating.activations import merge_layers
from ftwt_jax.models.resnet import Block
from tests.conftest import random_like

KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (3, 8, 8, 4))
GATES = ftwt.GateConfig.paper(r=0.7)


def random_variables(model, images, seed=0):
    """Variables of the right shapes with nothing left at its first value, gate heads included."""
    return random_like(jax.eval_shape(model.init, KEY, images), seed)


def paths(tree):
    return {"/".join(path): leaf.shape for path, leaf in flax.traverse_util.flatten_dict(tree).items()}


def without_heads(variables):
    """The variables of the dense network that a gated one was made from."""
    flat = flax.traverse_util.flatten_dict(variables)
    return flax.traverse_util.unflatten_dict({path: leaf for path, leaf in flat.items() if "gate_head" not in path})


def only_heads(variables):
    flat = flax.traverse_util.flatten_dict(variables)
    return {path: leaf for path, leaf in flat.items() if "gate_head" in path}


class PlainUnit(nn.Module):
    """What a unit replaces, written with Flax's own layers."""

    features: int
    kernel_size: int = 3
    strides: int = 1
    groups: int = 1
    padding: int | str = 1
    use_bias: bool = False
    act: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            strides=self.strides,
            padding=self.padding,
            feature_group_count=self.groups,
            use_bias=self.use_bias,
            name="conv",
        )(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name="bn")(x)
        return nn.relu(x) if self.act else x


# Convolutions are lowered in ways that add up in another order.
same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)

UNITS = {
    "plain": ({}, {}),
    "strided": ({"strides": 2}, {"strides": 2}),
    "pointwise": ({"kernel_size": 1}, {"kernel_size": 1, "padding": 0}),
    "large kernel": ({"kernel_size": 5}, {"kernel_size": 5, "padding": 2}),
    "depthwise": ({"features": 4, "groups": 4}, {"features": 4, "groups": 4}),
    "grouped": ({"groups": 2, "use_bias": True}, {"groups": 2, "use_bias": True}),
    "no activation": ({"act": None}, {"act": False}),
    "no padding": ({"padding": 0}, {"padding": "VALID"}),
}


@pytest.mark.parametrize(("ours", "flaxs"), UNITS.values(), ids=UNITS)
def test_a_dense_unit_is_convolution_batch_norm_and_activation(ours, flaxs):
    unit = ftwt.GatedUnit(**{"features": 6, **ours})
    plain = PlainUnit(**{"features": 6, **flaxs})
    variables = random_variables(unit, IMAGES)
    assert paths(variables) == paths(jax.eval_shape(plain.init, KEY, IMAGES))
    output = unit.apply(variables, IMAGES)
    same(output.values, plain.apply(variables, IMAGES))
    assert output.active is None
    assert output.layers[-1].gate is None


@pytest.mark.device
def test_a_unit_trains_its_batch_statistics_as_flax_does():
    unit, plain = ftwt.GatedUnit(6, gates=GATES), PlainUnit(6)
    variables = random_variables(unit, IMAGES)
    _, ours = unit.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    _, flaxs = plain.apply(without_heads(variables), IMAGES, train=True, mutable=["batch_stats"])
    jax.tree.map(same, ours, flaxs)
    before = variables["batch_stats"]["bn"]["mean"]
    assert np.any(ours["batch_stats"]["bn"]["mean"] != before)


@pytest.mark.newest
@pytest.mark.device
@pytest.mark.parametrize(("ours", "flaxs"), UNITS.values(), ids=UNITS)
def test_filters_that_are_on_are_the_dense_ones_and_those_off_are_zero(ours, flaxs):
    unit = ftwt.GatedUnit(**{"features": 6, **ours}, gates=GATES)
    variables = random_variables(unit, IMAGES)
    dense = np.asarray(PlainUnit(**{"features": 6, **flaxs}).apply(without_heads(variables), IMAGES))
    output = unit.apply(variables, IMAGES)
    gate = output.layers[-1].gate
    np.testing.assert_array_equal(gate.mask, gate.logits > 0)
    assert 0 < gate.mask.mean() < 1
    off = ~np.asarray(gate.mask)[:, None, None, :]
    same(output.values, np.where(off, 0, dense))
    assert np.all(np.asarray(output.values)[np.broadcast_to(off, dense.shape)] == 0)
    np.testing.assert_array_equal(gate.target, ftwt.topk_mass_mask(dense, 0.7))
    np.testing.assert_array_equal(output.active, gate.mask)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_filter_that_is_off_leaks_neither_nan_nor_infinity(value):
    unit = ftwt.GatedUnit(6, act=None, gates=GATES)
    variables = random_variables(unit, IMAGES)
    variables["params"]["bn"]["bias"][2] = value
    variables["params"]["gate_head"]["dense"]["kernel"][:] = 0
    variables["params"]["gate_head"]["dense"]["bias"][:] = [1, 1, -1, 1, 1, 1]
    output = np.asarray(unit.apply(variables, IMAGES).values)
    assert np.all(output[..., 2] == 0)
    assert np.all(np.isfinite(output))
    assert np.all(np.any(output[..., [0, 1, 3, 4, 5]] != 0, axis=(1, 2)))


def test_the_record_of_a_unit_holds_what_counting_needs():
    unit = ftwt.GatedUnit(6, kernel_size=5, strides=2, groups=2, use_bias=True, gates=GATES)
    active = jnp.asarray(np.random.default_rng(0).random((3, 4)) < 0.5)
    output = unit.apply(random_variables(unit, IMAGES), ftwt.Activations(IMAGES, active))
    (record,) = output.layers
    assert (record.positions, record.kernel_area, record.groups) == (16, 25, 2)
    assert (record.in_features, record.out_features, record.bias_terms) == (4, 6, 6)
    assert record.unit
    np.testing.assert_array_equal(record.active_in, active)
    np.testing.assert_array_equal(record.active_out, record.gate.mask)


def test_without_targets_there_is_no_target_and_the_rest_stays():
    unit = ftwt.GatedUnit(6, gates=GATES)
    variables = random_variables(unit, IMAGES)
    bare = unit.apply(variables, ftwt.Activations(IMAGES, control=ftwt.GateControl(targets=False)))
    full = unit.apply(variables, IMAGES)
    assert bare.layers[-1].gate.target is None
    np.testing.assert_array_equal(bare.values, full.values)
    np.testing.assert_array_equal(bare.layers[-1].gate.logits, full.layers[-1].gate.logits)


def test_masks_from_targets_are_the_targets_and_need_dense_variables_alone():
    model = ftwt.create_model("vgg_bn", 5, plan=(6, "M", 8), gates=GATES)
    variables = without_heads(random_variables(model, IMAGES))
    outputs = model.apply(variables, IMAGES, control=ftwt.GateControl(masks="targets"))
    assert len(outputs.gates) == 2
    for gate in outputs.gates:
        assert gate.logits is None
        np.testing.assert_array_equal(gate.mask, gate.target)
        assert 0 < gate.mask.mean() < 1
    with pytest.raises(flax.errors.ScopeParamNotFoundError):
        model.apply(variables, IMAGES)


def test_initialising_makes_the_heads_whatever_the_control_says():
    unit = ftwt.GatedUnit(6, gates=GATES)
    expected = paths(jax.eval_shape(unit.init, KEY, IMAGES))
    assert "params/gate_head/dense/kernel" in expected
    for control in (ftwt.GateControl(masks="targets"), ftwt.GateControl(masks="open", targets=False)):
        assert paths(jax.eval_shape(unit.init, KEY, ftwt.Activations(IMAGES, control=control))) == expected


NETWORKS = {
    "vgg": ("vgg_bn", {"plan": (6, 8, "M", 8)}, {}),
    "resnet8": ("resnet8", {"width": 0.25}, {}),
    "resnet8 after block": ("resnet8", {"width": 0.25}, {"after_block": True}),
    "resnet18": ("resnet18", {"width": 0.0625, "stem": "cifar"}, {}),
    "resnet18 after block": ("resnet18", {"width": 0.0625, "stem": "cifar"}, {"after_block": True}),
}


@pytest.mark.parametrize("network", ["vgg", "resnet8", "resnet8 after block"])
def test_a_dense_checkpoint_starts_a_gated_network_that_answers_as_the_dense_one(network):
    name, arch, settings = NETWORKS[network]
    dense = ftwt.create_model(name, 5, **arch)
    gated = ftwt.create_model(name, 5, gates=ftwt.GateConfig.paper(r=0.7, **settings), **arch)
    checkpoint = random_variables(dense, IMAGES)
    ours, theirs = paths(jax.eval_shape(gated.init, KEY, IMAGES)), paths(checkpoint)
    assert theirs.items() <= ours.items()
    assert all("/gate_head/" in path for path in ours.keys() - theirs.keys())

    fresh_heads = jax.jit(lambda: only_heads(gated.init(KEY, IMAGES)))()
    variables = flax.traverse_util.unflatten_dict(flax.traverse_util.flatten_dict(checkpoint) | fresh_heads)
    outputs = jax.jit(gated.apply)(variables, IMAGES)
    assert all(gate.mask.all() for gate in outputs.gates)
    expected = jax.jit(dense.apply)(checkpoint, IMAGES).logits
    np.testing.assert_allclose(outputs.logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", ["resnet18", "resnet18 after block"])
def test_with_every_gate_open_a_network_answers_as_the_dense_one(network):
    name, arch, settings = NETWORKS[network]
    dense = ftwt.create_model(name, 5, **arch)
    gated = ftwt.create_model(name, 5, gates=ftwt.GateConfig.paper(r=0.7, **settings), **arch)
    variables = random_variables(dense, IMAGES)
    control = ftwt.GateControl(masks="open", targets=False)
    outputs = jax.jit(gated.apply)(variables, IMAGES, control=control)
    expected = jax.jit(dense.apply)(variables, IMAGES).logits
    np.testing.assert_allclose(outputs.logits, expected, rtol=1e-4, atol=1e-5)


def residual_block(after_block, strides=1, features=4):
    """A block of a CIFAR ResNet on a stream of which some channels are known to be zero, and its dense branch."""
    block = Block(features, strides, projection=False, gates=ftwt.GateConfig.paper(r=0.7, after_block=after_block))
    variables = random_variables(block, ftwt.Activations(IMAGES), seed=3)
    head = variables["params"]["conv2"]["gate_head"]["dense"]
    head["kernel"][:] = 0
    head["bias"][:] = np.where(np.arange(features) % 2, 1, -1)
    active = np.asarray([[True, True, False, False], [False, False, False, False], [True, False, True, False]])
    x = ftwt.Activations(jnp.where(active[:, None, None, :], IMAGES, 0), jnp.asarray(active))
    output = block.apply(variables, x)
    params, stats = variables["params"], variables["batch_stats"]

    def unit(name, features, strides, values):
        module = PlainUnit(features, strides=strides, act=name == "conv1")
        inner = {"params": without_heads(params[name]), "batch_stats": stats[name]}
        return np.asarray(module.apply(inner, values))

    first, second = (np.asarray(layer.gate.mask)[:, None, None, :] for layer in output.layers)
    hidden = np.where(first, unit("conv1", features, strides, x.values), 0)
    return output, np.asarray(x.values), active, unit("conv2", features, 1, hidden), second


def test_a_block_masks_before_the_addition_and_its_stream_is_the_union():
    output, stream, active, branch, mask = residual_block(after_block=False)
    np.testing.assert_allclose(output.values, np.maximum(np.where(mask, branch, 0) + stream, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(output.layers[1].gate.target, ftwt.topk_mass_mask(branch, 0.7))
    np.testing.assert_array_equal(output.active, mask[:, 0, 0] | active)
    assert np.any(np.asarray(output.active) != active)
    assert np.any(np.asarray(output.active) != mask[:, 0, 0])


def test_after_block_ranks_and_masks_after_the_addition():
    output, stream, active, branch, mask = residual_block(after_block=True)
    summed = np.maximum(branch + stream, 0)
    np.testing.assert_allclose(output.values, np.where(mask, summed, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(output.layers[1].gate.target, ftwt.topk_mass_mask(summed, 0.7))
    np.testing.assert_array_equal(output.active, mask[:, 0, 0])
    assert np.any(active & ~mask[:, 0, 0])


def test_a_shortcut_without_parameters_pools_and_appends_zero_channels():
    output, stream, active, branch, mask = residual_block(after_block=False, strides=2, features=10)
    pooled = stream.reshape(3, 4, 2, 4, 2, 4).mean(axis=(2, 4))
    shortcut = np.concatenate([pooled, np.zeros((3, 4, 4, 6), np.float32)], axis=-1)
    np.testing.assert_allclose(output.values, np.maximum(np.where(mask, branch, 0) + shortcut, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(output.active, mask[:, 0, 0] | np.pad(active, ((0, 0), (0, 6))))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_channel_that_is_not_active_is_zero_wherever_it_is_read(network):
    name, arch, settings = NETWORKS[network]
    model = ftwt.create_model(name, 5, gates=ftwt.GateConfig.paper(r=0.7, **settings), **arch)
    variables = random_variables(model, IMAGES, seed=1)
    read = []

    def watch(next_fun, args, kwargs, context):
        if isinstance(context.module, ftwt.GatedUnit) and context.method_name == "__call__":
            read.append((args[0].values, args[0].active))
        return next_fun(*args, **kwargs)

    @jax.jit
    def inputs_of_units():
        read.clear()
        with nn.intercept_methods(watch):
            model.apply(variables, IMAGES)
        return read[:]

    seen_off = 0
    for values, active in inputs_of_units():
        if active is not None:
            off = ~np.asarray(active)
            assert not np.any(np.any(np.asarray(values) != 0, axis=(1, 2)) & off)
            seen_off += off.sum()
    assert seen_off > 0


def record(name):
    return ftwt.LayerRecord(name, positions=1, kernel_area=1, in_features=1, out_features=1)


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        ("ab", "ab", "ab"),
        ("abc", "ab", "abc"),
        ("ab", "abc", "abc"),
        ("abc", "abd", "abcd"),
        ("ax", "by", "axby"),
        ("", "a", "a"),
    ],
)
def test_merging_branches_counts_what_they_share_once(first, second, merged):
    layers = merge_layers([record(n) for n in first], [record(n) for n in second])
    assert "".join(layer.name for layer in layers) == merged


def test_a_residual_sum_with_a_fully_active_side_is_fully_active():
    active = jnp.asarray([[True, False]])
    some = ftwt.Activations(jnp.ones((1, 2, 2, 2)), active)
    every = ftwt.Activations(jnp.ones((1, 2, 2, 2)))
    for branch, shortcut in ((some, every), (every, some), (every, every)):
        assert ftwt.residual_add(branch, shortcut).active is None
    np.testing.assert_array_equal(ftwt.residual_add(some, some.replace(active=~active)).active, [[True, True]])
    np.testing.assert_array_equal(ftwt.residual_add(some, some).values, 2 * np.ones((1, 2, 2, 2)))


def test_map_changes_the_values_and_keeps_what_is_known_of_them():
    x = ftwt.Activations(IMAGES, jnp.ones((3, 4), bool), (record("a"),), ftwt.GateControl(r=0.5))
    y = x.map(lambda v: nn.max_pool(v, (2, 2), strides=(2, 2)))
    assert y.values.shape == (3, 4, 4, 4)
    assert (y.active is x.active, y.layers, y.control) == (True, x.layers, x.control)


def test_a_shortcut_used_twice_is_counted_once():
    x = ftwt.Activations(IMAGES, layers=(record("x"),))
    branch = x.replace(layers=(*x.layers, record("f")))
    shortcut = x.replace(layers=(*x.layers, record("s")))
    once = ftwt.residual_add(branch, shortcut)
    further = once.replace(layers=(*once.layers, record("g")))
    twice = ftwt.residual_add(further, shortcut)
    assert [layer.name for layer in twice.layers] == ["x", "f", "s", "g"]


def test_a_plain_array_can_be_a_shortcut():
    control = ftwt.GateControl(r=0.5)
    branch = ftwt.Activations(IMAGES, jnp.zeros((3, 4), bool), (record("f"),), control)
    for pair in ((branch, IMAGES), (IMAGES, branch)):
        total = ftwt.residual_add(*pair)
        np.testing.assert_array_equal(total.values, 2 * IMAGES)
        assert (total.active, total.layers, total.control) == (None, branch.layers, control)


class TestMaxima:
    """What a unit knows of its output's largest values, which the next head reads in place of the maps."""

    @pytest.mark.parametrize("act", [nn.relu, nn.relu6, nn.tanh, None], ids=["relu", "relu6", "tanh", "none"])
    @pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize("masks", ["heads", "targets", "open"])
    def test_are_those_of_the_values(self, act, dtype, masks):
        unit = ftwt.GatedUnit(6, act=act, dtype=dtype, gates=ftwt.GateConfig(r=0.7))
        inputs = ftwt.Activations(IMAGES, control=ftwt.GateControl(masks=masks))
        output = unit.apply(random_variables(unit, IMAGES), inputs)
        assert output.maxima.dtype == jnp.float32
        np.testing.assert_array_equal(output.maxima, output.values.astype(jnp.float32).max((1, 2)))

    def test_what_is_made_from_them_has_none(self):
        unit = ftwt.GatedUnit(6, gates=ftwt.GateConfig(r=0.7))
        output = unit.apply(random_variables(unit, IMAGES), IMAGES)
        made = [
            output.replace(values=output.values + 1),
            dataclasses.replace(output, values=output.values + 1),
            output.map(lambda values: values[:, ::2, ::2]),
            output.add(output),
            output.append_zeros(2),
            jax.tree.map(lambda leaf: leaf[:1], output),
            jax.jit(lambda x: x)(output),
        ]
        assert [other.maxima for other in made] == [None] * len(made)

    @pytest.mark.parametrize("pool", ["max", "mean"])
    def test_a_head_decides_the_same_with_and_without_them(self, pool, monkeypatch):
        gates = ftwt.GateConfig(r=0.7, pool=pool)
        model = ftwt.create_model("vgg_bn", 10, gates=gates, plan=(6, 6, "M", 7, 7))
        variables = random_variables(model, IMAGES[..., :3])
        known = model.apply(variables, IMAGES[..., :3])
        monkeypatch.setattr(ftwt.Activations, "with_maxima", lambda self, maxima: self)
        sought = model.apply(variables, IMAGES[..., :3])
        for gate, other in zip(known.gates, sought.gates, strict=True):
            np.testing.assert_array_equal(gate.logits, other.logits)
