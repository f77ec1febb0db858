"""Compact execution returns what the masked network returns, whatever its gates say, and notices what it left out."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ftwt_jax as ftwt
from ftwt_jax import native
from ftwt_jax.activations import Packed
from ftwt_jax.calibration import choose_kept
from ftwt_jax.compact import CompactNetwork
from ftwt_jax.models.resnet import ResNet
from tests.conftest import random_like

KEY = jax.random.key(0)
BARE = ftwt.GateControl(targets=False)
GATES = ftwt.GateConfig()
PLAIN_HEADS = ftwt.GateConfig(softmax=False)
NEVER = -1e3
few_examples = functools.partial(settings, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Compiling is most of the time here, and how hard XLA tries changes nothing but rounding."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def pictures(samples, side=8, channels=3, seed=0):
    return np.random.default_rng(seed).normal(size=(samples, side, side, channels)).astype(np.float32)


def heads_of(variables):
    """The gate heads, in the order of their units' names."""

    def is_unit(tree):
        return isinstance(tree, dict) and "gate_head" in tree

    flat = jax.tree.leaves(variables["params"], is_leaf=is_unit)
    return [unit["gate_head"]["dense"] for unit in flat if is_unit(unit)]


def random_variables(model, images, seed=0, never=0.0, **options):
    """Variables with nothing left at its first value; a share of all filters is never on."""
    shapes = jax.eval_shape(lambda x: model.init(KEY, x, **options), images[:1])
    variables = random_like(shapes, seed)
    rng = np.random.default_rng(seed)
    for head in heads_of(variables):
        head["bias"][rng.random(head["bias"].shape) < never] = NEVER
    return variables


@pytest.fixture(scope="module", params=["XLA's operations", "a kernel of our own"])
def prepare(request, quick_compilation):
    """`compact`, without the choice by timing between its two ways to run."""

    def compacted(model, variables, calibration=None, **options):
        network = ftwt.compact(model, variables, calibration, portable=True, **options)
        if request.param == "XLA's operations":
            return network
        if not native.available():
            pytest.skip("no C++ compiler")
        return CompactNetwork(network._forward, dataclasses.replace(network.plan, per_sample=True))

    return compacted


def masked(model, variables, images, **options):
    """What the network itself returns."""
    return jax.jit(lambda v, x: model.apply(v, x, **options))(variables, images)


def assert_close(actual, expected, share=1e-4):
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=share * np.abs(expected).max())


def assert_same(actual, expected):
    """Logits to rounding, masks and counted work exactly."""
    assert_close(actual.logits, expected.logits)
    assert actual.gate_names == expected.gate_names
    for ours, theirs in zip(actual.gates, expected.gates, strict=True):
        np.testing.assert_array_equal(ours.mask, theirs.mask)
        assert_close(ours.logits, theirs.logits)
    for convention in ("exact", "published"):
        np.testing.assert_array_equal(ftwt.macs(actual, convention), ftwt.macs(expected, convention))
    assert ftwt.dense_macs(actual) == ftwt.dense_macs(expected)


def sample(outputs, index):
    """The outputs of one sample, as a batch of one."""
    return jax.tree.map(lambda leaf: leaf[index : index + 1], outputs)


def network_of(name, gates, arch):
    return ResNet(7, gates=gates, **arch) if name == "resnet" else ftwt.create_model(name, 7, gates=gates, **arch)


SMALL_RESNET = {"features": 8, "stage_sizes": (1, 2)}
AFTER_BLOCK = ftwt.GateConfig(after_block=True)
MEAN = ftwt.GateConfig(pool="mean")
MEAN_PLAIN = ftwt.GateConfig(pool="mean", softmax=False)
NETWORKS = {
    "vgg": ("vgg_bn", GATES, {"plan": (24, "M", 40, 8)}, 8),
    "vgg mean": ("vgg_bn", MEAN, {"plan": (24, "M", 40, 8)}, 8),
    "vgg plain heads": ("vgg_bn", PLAIN_HEADS, {"plan": (24, "M", 40, 8)}, 8),
    "vgg mean plain heads": ("vgg_bn", MEAN_PLAIN, {"plan": (24, "M", 40, 8)}, 8),
    "resnet8": ("resnet8", GATES, {}, 8),
    "resnet8 after block": ("resnet8", AFTER_BLOCK, {}, 8),
    "projection after block": ("resnet", AFTER_BLOCK, SMALL_RESNET, 16),
    "bottleneck": ("resnet", PLAIN_HEADS, {"bottleneck": True, **SMALL_RESNET}, 16),
    "mobilenet_v1": ("mobilenet_v1", PLAIN_HEADS, {"width": 0.25}, 16),
    "mobilenet_v2": ("mobilenet_v2", PLAIN_HEADS, {"width": 0.125, "stem": "published"}, 8),
}
LARGE = {
    "resnet18": ("resnet18", GATES, {"width": 0.125}, 64),
    "resnet18 after block": ("resnet18", AFTER_BLOCK, {"width": 0.125}, 64),
    "resnet50": ("resnet50", MEAN, {"width": 0.125}, 64),
    "mobilenet_v1 imagenet": ("mobilenet_v1", PLAIN_HEADS, {"width": 0.25, "stem": "imagenet"}, 64),
    "mobilenet_v2 imagenet": ("mobilenet_v2", GATES, {"width": 0.25, "stem": "imagenet"}, 32),
    "mobilenet_v2 projections": ("mobilenet_v2", GATES, {"width": 0.25}, 16),
}
# A second shape of images is as long to compile as the first.
ALONE = ("vgg", "vgg plain heads", "resnet8 after block", "bottleneck", "mobilenet_v1", "mobilenet_v2", *LARGE)
IN_BATCHES = (*(name for name in NETWORKS if not name.startswith("mobilenet")), *LARGE)


@pytest.mark.parametrize(
    "name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow, id=name) for name in LARGE)], ids=str
)
def test_a_calibrated_network_answers_as_the_masked_one(prepare, name):
    network, gates, arch, side = (NETWORKS | LARGE)[name]
    model = network_of(network, gates, arch)
    images = pictures(5, side, seed=1)
    # With more filters off, the pictures never reach the end of a deep network.
    variables = random_variables(model, images, never=0.1 if name.startswith("mobilenet") else 0.2)
    expected = masked(model, variables, images, control=BARE)
    assert np.ptp(expected.logits, axis=0).max() > 1e-3 * np.abs(expected.logits).max()
    on = np.concatenate([np.asarray(gate.mask) for gate in expected.gates], axis=1)
    assert 0.1 < on.mean() < 0.9
    assert np.any(on != on[0])

    compact = prepare(model, variables, pictures(6, side, seed=2))
    assert len(compact.plan.kept) > len(expected.gates) / 2
    if name in IN_BATCHES:
        outputs, outside = compact.run(images)
        assert_same(outputs, expected)
        assert all(gate.target is None for gate in outputs.gates)
        assert outside.shape == (5,)
    if name in ALONE:
        outputs, outside = compact.run(images[3:4])
        assert_same(outputs, sample(expected, 3))
        assert outside.shape == (1,)


@pytest.mark.parametrize("name", ["vgg", "projection after block", "bottleneck"])
def test_without_calibration_nothing_is_left_out_and_no_sample_is_outside(prepare, name):
    network, gates, arch, side = NETWORKS[name]
    model = network_of(network, gates, arch)
    images = pictures(5, side, seed=1)
    variables = random_variables(model, images, seed=1)
    compact = prepare(model, variables)
    assert not compact.plan.kept
    outputs, outside = compact.run(images)
    assert_same(outputs, masked(model, variables, images, control=BARE))
    assert not np.any(outside)


@few_examples(max_examples=5)
@given(
    plan=st.lists(st.sampled_from([1, 3, 8, 24, 40]), min_size=1, max_size=3),
    gates=st.builds(ftwt.GateConfig, pool=st.sampled_from(["max", "mean"]), softmax=st.booleans()),
    samples=st.sampled_from([1, 2, 5, 9]),
    never=st.sampled_from([0, 0.5, 0.9, 1]),
    seed=st.integers(0, 1000),
)
def test_any_stack_of_units_answers_as_the_masked_one(prepare, plan, gates, samples, never, seed):
    model = ftwt.create_model("vgg_bn", 3, plan=plan, gates=gates)
    images = pictures(samples, 4, seed=seed)
    variables = random_variables(model, images, seed, never)
    compact = prepare(model, variables, pictures(2, 4, seed=seed + 1))
    assert_same(compact(images), masked(model, variables, images, control=BARE))


# A network whose masks are drawn in the pictures. A channel of one colour is off in both units (-1), on in the first
# alone (1), or on in both (2): the first unit passes its input on, and the second one's gate asks for more than 1.5.
FILTERS = 64
PREPARED = 40  # Filters that calibration turns on in the first unit; half of them in the second.


def drawn(levels, side=4):
    levels = np.asarray(levels, np.float32)
    noise = 1 + 0.05 * np.random.default_rng(0).random((len(levels), side, side, FILTERS), np.float32)
    return levels[:, None, None, :] * noise


def levels_of(first, second=0, shift=0):
    """One sample with so many filters on in the first unit and, of those, in the second."""
    levels = np.full(FILTERS, -1)
    levels[:first] = 1
    levels[:second] = 2
    return np.roll(levels, shift)


@pytest.fixture(scope="module")
def drawable(prepare):
    """(masked network as a function, calibrated compact network)."""
    model = ftwt.create_model("vgg_bn", 5, plan=(FILTERS, FILTERS), gates=PLAIN_HEADS)
    variables = random_variables(model, drawn([levels_of(0)]))
    first = variables["params"]["unit0"]
    first["conv"]["kernel"][:] = 0
    first["conv"]["kernel"][1, 1] = np.eye(FILTERS)
    first["conv"]["bias"][:] = first["bn"]["bias"][:] = variables["batch_stats"]["unit0"]["bn"]["mean"][:] = 0
    first["bn"]["scale"][:] = variables["batch_stats"]["unit0"]["bn"]["var"][:] = 1
    for head, threshold in zip(heads_of(variables), (0, 1.5), strict=True):
        head["kernel"][:] = np.eye(FILTERS)
        head["bias"][:] = -threshold
    calibration = [levels_of(count, count // 2) for count in range(PREPARED + 1)]
    compact = prepare(model, variables, drawn(calibration))
    apply = jax.jit(lambda images: model.apply(variables, images, control=BARE))
    return apply, compact


def wants_more(levels):
    """Samples that want a filter that no calibration sample turned on."""
    levels = np.asarray(levels)
    return np.any(levels[:, PREPARED:] > 0, axis=1) | np.any(levels[:, PREPARED // 2 :] > 1, axis=1)


def test_filters_never_on_in_calibration_leave_and_all_others_stay(drawable):
    kept = drawable[1].plan.kept
    assert kept == {"unit0": tuple(range(PREPARED)), "unit1": tuple(range(PREPARED // 2))}


@pytest.mark.parametrize("strangers", [[], [4], [0, 15], [1, 2, 3], list(range(1, 16)), list(range(16))], ids=len)
def test_samples_outside_calibration_are_noticed_and_computed_rightly_all_the_same(drawable, strangers):
    apply, compact = drawable
    levels = np.stack([levels_of(5 + index, 3) for index in range(16)])
    for index in strangers:
        levels[index, PREPARED + index] = 1 + index % 2
    outputs, outside = compact.run(drawn(levels))
    assert np.flatnonzero(outside).tolist() == strangers
    assert_same(outputs, apply(drawn(levels)))


@few_examples(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0, 0.02, 0.5, 1]),
    only=st.sampled_from([PREPARED // 2, PREPARED, FILTERS]),
)
def test_any_pictures_are_answered_as_by_the_masked_network(drawable, seed, share, only):
    apply, compact = drawable
    rng = np.random.default_rng(seed)
    levels = np.where(rng.random((16, FILTERS)) < share, rng.integers(1, 3, (16, FILTERS)), -1)
    levels[:, only:] = -1
    outputs, outside = compact.run(drawn(levels))
    np.testing.assert_array_equal(outside, wants_more(levels))
    assert_same(outputs, apply(drawn(levels)))


def test_a_network_is_compiled_once_for_each_shape_of_images(drawable):
    compact = CompactNetwork(drawable[1]._forward, drawable[1].plan)
    for shapes, samples in enumerate((3, 1), start=1):
        for count in (0, 5, PREPARED, FILTERS):
            for shift in (0, 9):
                compact(drawn([levels_of(count, count // 3, shift)] * samples))
        assert compact._jitted._cache_size() == shapes


def test_a_network_runs_within_a_function_that_is_compiled_and_outside_it_again(drawable):
    apply, prepared = drawable
    compact = CompactNetwork(prepared._forward, prepared.plan)
    images = drawn([levels_of(10, 5), levels_of(FILTERS)])
    expected = apply(images).logits
    assert_close(jax.jit(lambda x: compact(x).logits)(images), expected)
    assert_close(compact(images).logits, expected)
    assert_close(jax.jit(lambda x: 2 * compact(x).logits)(images), 2 * expected)


@pytest.mark.parametrize("never", [0, 0.5], ids=["all filters in use", "some never on"])
def test_all_ways_to_run_are_timed_and_one_is_taken(monkeypatch, never):
    timed = []
    monkeypatch.setattr(CompactNetwork, "__call__", lambda self, images: timed.append(self.plan) or 0)
    model = ftwt.create_model("vgg_bn", 5, plan=(8,), gates=GATES)
    variables = random_variables(model, pictures(1), never=never)
    for head in heads_of(variables):
        head["kernel"][:] = 0
        head["bias"][:] = np.where(head["bias"] == NEVER, NEVER, 1)
    compact = ftwt.compact(model, variables, pictures(9))
    ways = {(bool(plan.kept), plan.per_sample) for plan in timed}
    if native.available():
        assert ways == ({(True, False), (True, True), (False, True)} if never else {(False, False), (False, True)})
        assert len(timed) == 10 * len(ways)
    assert compact.plan in timed or not native.available()


def test_logits_alone_are_the_same_logits():
    model = ftwt.create_model("vgg_bn", 5, plan=(8, 8), gates=GATES)
    images = pictures(3, 4)
    compact = ftwt.compact(model, random_variables(model, images))
    np.testing.assert_array_equal(compact.logits(images), compact(images).logits)
    np.testing.assert_array_equal(jax.jit(compact.logits)(images), compact(images).logits)


@pytest.mark.parametrize("bias", [NEVER, 1e3], ids=["none on", "all on"])
def test_a_unit_with_no_filter_on_or_all(prepare, bias):
    model = ftwt.create_model("vgg_bn", 3, plan=(8, 12, "M", 8), gates=GATES)
    images = pictures(2, 4)
    variables = random_variables(model, images)
    variables["params"]["unit1"]["gate_head"]["dense"]["bias"][:] = bias
    compact = prepare(model, variables, images)
    outputs, outside = compact.run(images)
    assert_same(outputs, masked(model, variables, images, control=BARE))
    assert np.all(np.asarray(outputs.gates[1].mask) == (bias > 0))
    assert not np.any(outside)
    assert ("unit1" in compact.plan.kept) == (bias < 0)


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_dense_network_keeps_its_logits(calibrated):
    model = ftwt.create_model("resnet8", 5, width=0.25)
    images = pictures(3)
    variables = random_variables(model, images)
    compact = ftwt.compact(model, variables, images if calibrated else None)
    outputs, outside = compact.run(images)
    assert_same(outputs, masked(model, variables, images))
    assert not np.any(outside)
    assert not compact.plan.kept


def test_a_network_in_bfloat16_answers_within_its_rounding(prepare):
    model = ftwt.create_model("vgg_bn", 5, plan=(24, "M", 40), gates=PLAIN_HEADS, dtype=jnp.bfloat16)
    images = pictures(5)
    variables = random_variables(model, images)
    for head in heads_of(variables):  # No gate logit that rounding could carry over zero.
        head["kernel"][:] = 0
    compact = prepare(model, variables, images)
    outputs = compact(images)
    expected = masked(model, variables, images, control=BARE)
    assert outputs.logits.dtype == jnp.float32
    assert len(compact.plan.kept) == 2
    assert_close(outputs.logits, expected.logits, share=0.03)


NO_PICTURES = np.zeros((0, 8, 8, 3), np.float32)


@pytest.mark.parametrize(
    "empty", [NO_PICTURES, [], iter(()), [NO_PICTURES]], ids=["array", "list", "iterator", "batch"]
)
def test_a_calibration_without_pictures_is_refused(empty):
    model = ftwt.create_model("vgg_bn", 5, plan=(6,), gates=GATES)
    with pytest.raises(ftwt.UserError) as error:
        ftwt.compact(model, random_variables(model, pictures(1)), empty)
    assert "\n" not in str(error.value)


def test_a_network_without_units_is_refused():
    model = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu])
    variables = model.init(KEY, pictures(1))
    for calibration in (None, pictures(2)):
        with pytest.raises(ftwt.UserError) as error:
            ftwt.compact(model, variables, calibration)(pictures(1))
        assert "\n" not in str(error.value)


def test_a_single_picture_is_a_calibration():
    model = ftwt.create_model("vgg_bn", 5, plan=(8,), gates=GATES)
    images = pictures(3, 4)
    variables = random_variables(model, images, never=0.5)
    compact = ftwt.compact(model, variables, images[:1])
    outputs, outside = compact.run(images)
    assert not outside[0]
    assert_same(outputs, masked(model, variables, images, control=BARE))


def test_calibration_in_batches_of_any_size_is_the_same_calibration():
    model = ftwt.create_model("vgg_bn", 5, plan=(24, 8), gates=GATES)
    images = pictures(70, 4)
    variables = random_variables(model, images, never=0.3)
    whole = ftwt.compact(model, variables, images, portable=True).plan
    batches = (images[start:stop] for start, stop in ((0, 6), (6, 6), (6, 70)))
    assert ftwt.compact(model, variables, batches, portable=True).plan.kept == whole.kept
    assert whole.kept


@pytest.mark.parametrize("masks", ["open", "targets"])
def test_masks_that_do_not_come_from_the_heads_are_obeyed_or_refused(masks):
    control = ftwt.GateControl(masks=masks)
    model = ftwt.create_model("vgg_bn", 5, plan=(8, 8), gates=GATES)
    images = pictures(2, 4)
    variables = random_variables(model, images, never=0.5)
    try:
        logits = ftwt.compact(model, variables, images, control=control)(images).logits
    except ftwt.UserError:
        return
    assert_close(logits, masked(model, variables, images, control=control).logits)


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
    images = pictures(5, seed=3)
    variables = random_variables(model, images, never=0.4, **options)
    expected = masked(model, variables, images, **options)
    compact = prepare(model, variables, pictures(8), **options)
    assert compact.plan.kept
    actual = compact(images)
    assert type(actual) is type(expected)
    for field in ("logits", "values"):
        if hasattr(expected, field) and not isinstance(expected, jax.Array):
            actual, expected = getattr(actual, field), getattr(expected, field)
    assert_close(actual, expected)


@few_examples(max_examples=40)
@given(seed=st.integers(0, 10_000), samples=st.integers(1, 9), filters=st.integers(1, 20))
def test_whatever_calibration_turned_on_is_kept(seed, samples, filters):
    rng = np.random.default_rng(seed)
    logits = {f"unit{i}": rng.normal(size=(samples, filters)) + rng.normal(size=filters) - 1 for i in range(2)}

    def share_of_work(kept):
        return sum(len(kept.get(name, range(filters))) for name in logits) / (2 * filters)

    kept = choose_kept(logits, share_of_work)
    for name, values in logits.items():
        ready = kept.get(name, tuple(range(filters)))
        assert ready
        assert list(ready) == sorted(set(ready))
        assert set(np.flatnonzero(np.any(values > 0, axis=0))) <= set(ready)
        assert name not in kept or len(ready) < filters


@few_examples(max_examples=40)
@given(data=st.data())
def test_packed_values_are_found_under_any_other_channels(data):
    channel_sets = st.sets(st.integers(0, 9), min_size=1).map(lambda s: tuple(sorted(s)))
    channels, wanted = data.draw(channel_sets), data.draw(channel_sets)
    values = np.random.default_rng(0).normal(size=(1, 2, 2, len(channels))).astype(np.float32)
    whole = np.zeros((1, 2, 2, 10), np.float32)
    whole[..., list(channels)] = values
    packed = Packed(jnp.asarray(values), channels)
    np.testing.assert_array_equal(packed.aligned(wanted), whole[..., list(wanted)])
