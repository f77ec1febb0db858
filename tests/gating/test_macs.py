"""MAC counts against published totals and against a second counter that walks each architecture with its masks."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ftwt_jax as ftwt

KEY = jax.random.key(0)


class Walk:
    """Counts one sample by walking an architecture written down here, with nothing but the gates' masks at hand.

    `exact` and `heads` are MACs of the exact convention, without heads and of heads alone; `published` the other's.
    A stream of activations is (which channels can be non-zero, side of the maps).
    """

    def __init__(self, masks, classes):
        self.masks = iter(masks)
        self.classes = classes
        self.exact = self.heads = self.published = 0
        self.previous = None

    def unit(self, stream, kernel=3, stride=1, depthwise=False):
        active, side = stream
        mask = next(self.masks)
        side = -(-side // stride)
        window = side * side * kernel * kernel
        channels, filters = len(active), len(mask)
        if depthwise:
            assert channels == filters
            self.exact += window * sum(1 for i, o in zip(active, mask, strict=True) if i and o)
        else:
            self.exact += window * sum(active) * sum(mask)
        self.heads += channels * filters
        before = channels if self.previous is None else self.previous
        self.published += window * sum(mask) * (before // channels if depthwise else before)
        self.previous = sum(mask)
        return mask, side

    def plain(self, stream, filters, stride=1):
        active, side = stream
        side = -(-side // stride)
        self.exact += side * side * sum(active) * filters
        return [True] * filters, side

    def finish(self, stream):
        self.exact += sum(stream[0]) * self.classes
        assert next(self.masks, None) is None


def union(first, second):
    assert first[1] == second[1]
    return [a or b for a, b in zip(first[0], second[0], strict=True)], first[1]


def walk_vgg(walk, x, plan):
    for step in plan:
        x = (x[0], x[1] // 2) if step == "M" else walk.unit(x)
    walk.finish(x)


def walk_cifar_resnet(walk, x, blocks, after_block=False):
    x = walk.unit(x)
    for stage, block in itertools.product(range(3), range(blocks)):
        stride = 2 if stage and not block else 1
        branch = walk.unit(walk.unit(x, stride=stride))
        shortcut = x[0] + [False] * (len(branch[0]) - len(x[0])), x[1] // stride
        x = branch if after_block else union(branch, shortcut)
    walk.finish(x)


def walk_resnet(walk, x, stages, bottleneck=False, after_block=False, small_stem=False):
    x = walk.unit(x) if small_stem else walk.unit(x, kernel=7, stride=2)
    if not small_stem:
        x = x[0], -(-x[1] // 2)
    for stage, blocks in enumerate(stages):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            branch = walk.unit(x, kernel=1 if bottleneck else 3, stride=1 if bottleneck else stride)
            branch = walk.unit(branch, stride=stride if bottleneck else 1)
            if bottleneck:
                branch = walk.plain(branch, 4 * len(branch[0]))
            projected = not block and (stage or bottleneck)
            shortcut = walk.plain(x, len(branch[0]), stride) if projected else x
            x = branch if after_block else union(branch, shortcut)
    walk.finish(x)


def walk_mobilenet_v1(walk, x, imagenet=False):
    x = walk.unit(x, stride=2 if imagenet else 1)
    for stride in (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1):
        x = walk.unit(walk.unit(x, stride=stride, depthwise=True), kernel=1)
    walk.finish(x)


def walk_mobilenet_v2(walk, x, imagenet=False):
    x = walk.unit(x, stride=2 if imagenet else 1)
    strides = (1, 2 if imagenet else 1, 2, 2, 1, 2, 1)
    for stage, (blocks, stride) in enumerate(zip((1, 2, 3, 4, 3, 3, 1), strides, strict=True)):
        for block in range(blocks):
            stride = 1 if block else stride
            y = x if imagenet and not stage else walk.unit(x, kernel=1)
            y = walk.unit(walk.unit(y, stride=stride, depthwise=True), kernel=1)
            if stride == 1 and len(x[0]) == len(y[0]):
                x = union(y, x)
            elif stride == 1 and not imagenet:
                x = union(y, walk.plain(x, len(y[0])))
            else:
                x = y
    walk.finish(walk.unit(x, kernel=1))


GATES = ftwt.GateConfig.paper(r=0.7)
AFTER_BLOCK = ftwt.GateConfig.paper(r=0.7, after_block=True)
PLAN = (6, 8, "M", 12, "M", 10)
VGG16 = (64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M")
IMAGENET = {"stem": "imagenet"}

# (model, side of its images, walker, what the walker has to know)
NETWORKS = {
    "vgg": (ftwt.create_model("vgg_bn", 10, GATES, plan=PLAN), 9, walk_vgg, {"plan": PLAN}),
    "vgg16_bn": (ftwt.create_model("vgg16_bn", 10, GATES), 32, walk_vgg, {"plan": VGG16}),
    "resnet14": (ftwt.create_model("resnet14", 10, GATES, width=0.5), 8, walk_cifar_resnet, {"blocks": 2}),
    "resnet14 after block": (
        ftwt.create_model("resnet14", 10, AFTER_BLOCK, width=0.5),
        8,
        walk_cifar_resnet,
        {"blocks": 2, "after_block": True},
    ),
    "resnet56": (ftwt.create_model("resnet56", 10, GATES), 32, walk_cifar_resnet, {"blocks": 9}),
    "resnet18": (ftwt.create_model("resnet18", 1000, GATES), 224, walk_resnet, {"stages": (2, 2, 2, 2)}),
    "resnet18 odd after block": (
        ftwt.create_model("resnet18", 10, AFTER_BLOCK, stem="cifar", width=0.5),
        37,
        walk_resnet,
        {"stages": (2, 2, 2, 2), "small_stem": True, "after_block": True},
    ),
    "resnet34": (ftwt.create_model("resnet34", 1000, GATES), 224, walk_resnet, {"stages": (3, 4, 6, 3)}),
    "resnet50": (
        ftwt.create_model("resnet50", 1000, GATES),
        224,
        walk_resnet,
        {"stages": (3, 4, 6, 3), "bottleneck": True},
    ),
    "mobilenet_v1": (ftwt.create_model("mobilenet_v1", 10, GATES), 32, walk_mobilenet_v1, {}),
    "mobilenet_v1 imagenet": (
        ftwt.create_model("mobilenet_v1", 1000, GATES, **IMAGENET),
        224,
        walk_mobilenet_v1,
        {"imagenet": True},
    ),
    "mobilenet_v2": (ftwt.create_model("mobilenet_v2", 10, GATES), 32, walk_mobilenet_v2, {}),
    "mobilenet_v2 imagenet": (
        ftwt.create_model("mobilenet_v2", 1000, GATES, **IMAGENET),
        224,
        walk_mobilenet_v2,
        {"imagenet": True},
    ),
}


def walked(network, masks):
    """A finished `Walk` for each sample of `masks`, one [N, C] for each unit."""
    model, side, walker, about = NETWORKS[network]
    walks = []
    for n in range(len(masks[0])):
        walks.append(Walk([mask[n].tolist() for mask in masks], model.num_classes))
        walker(walks[-1], ([True] * 3, side), **about)
    return walks


@functools.cache
def shapes_of(model, side, samples=1):
    """(outputs, variables) as shapes, without running or allocating anything."""
    images = jax.ShapeDtypeStruct((samples, side, side, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init_with_output(KEY, x), images)


def filters_of(network):
    model, side, _, _ = NETWORKS[network]
    return [gate.mask.shape[1] for gate in shapes_of(model, side)[0].gates]


def with_masks(network, masks):
    """Outputs as if the heads had decided `masks`, and what both conventions count inside the same jit.

    Nothing counted depends on a feature map, so XLA drops every convolution and full-sized networks are quick.
    """
    model, side, _, _ = NETWORKS[network]
    variables = shapes_of(model, side)[1]

    @jax.jit
    def run(masks):
        decided = iter(masks)

        def decide(head, args, kwargs, context):
            if isinstance(context.module, ftwt.GateHead):
                return jnp.where(next(decided), 1.0, -1.0)
            return head(*args, **kwargs)

        images = jnp.zeros((len(masks[0]), side, side, 3))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables)
        with nn.intercept_methods(decide):
            outputs = model.apply(zeros, images, control=ftwt.GateControl(targets=False))
        counts = {convention: ftwt.macs(outputs, convention) for convention in ("exact", "published")}
        return outputs.replace(logits=jnp.zeros((len(images), 1))), counts

    outputs, counts = run(masks)
    for gate, mask in zip(outputs.gates, masks, strict=True):
        np.testing.assert_array_equal(gate.mask, mask)
    return outputs, counts


WALKED = 4
PAIRS = 30


@functools.cache
def counted(network):
    """`with_masks` for three groups of samples, and `walked` for the first of them.

    The first `WALKED` samples have every filter on, then 85 %, 50 % and 15 % of them at random; then come `PAIRS`
    samples with random masks, and the same again, each with one more filter closed.
    """
    rng = np.random.default_rng(0)
    shares = np.asarray([1, 0.85, 0.5, 0.15])[:, None]
    first = [rng.random((WALKED, size)) < shares for size in filters_of(network)]
    before = [rng.random((PAIRS, mask.shape[1])) < rng.choice([0.3, 0.7, 1.0]) for mask in first]
    after = [mask.copy() for mask in before]
    for n in range(PAIRS):
        unit = rng.choice([i for i, mask in enumerate(before) if mask[n].any()])
        after[unit][n, rng.choice(np.flatnonzero(before[unit][n]))] = False
    masks = [np.concatenate(group) for group in zip(first, before, after, strict=True)]
    return *with_masks(network, masks), walked(network, first)


@pytest.mark.parametrize("network", NETWORKS)
class TestAgainstTheWalk:
    def test_exact_counts_what_a_compact_execution_computes(self, network):
        outputs, _, walks = counted(network)
        macs = ftwt.macs(outputs)
        assert macs.dtype == np.float64
        np.testing.assert_array_equal(macs[:WALKED], [walk.exact + walk.heads for walk in walks])

    def test_published_counts_units_with_the_mask_before_them(self, network):
        outputs, _, walks = counted(network)
        macs = ftwt.macs(outputs, "published")
        assert macs.dtype == np.float64
        np.testing.assert_array_equal(macs[:WALKED], [walk.published for walk in walks])

    def test_with_every_filter_on_exact_is_the_dense_total_and_the_heads(self, network):
        outputs, _, walks = counted(network)
        assert ftwt.dense_macs(outputs) == walks[0].exact
        assert ftwt.macs(outputs)[0] == ftwt.dense_macs(outputs) + walks[0].heads
        assert walks[0].heads > 0

    def test_counts_inside_jit_agree_to_a_millionth(self, network):
        outputs, inside, _ = counted(network)
        for convention, macs in inside.items():
            assert macs.dtype == jnp.float32
            np.testing.assert_allclose(macs, ftwt.macs(outputs, convention), rtol=1e-6)

    def test_layers_add_up_to_the_whole(self, network):
        outputs, _, _ = counted(network)
        for convention in ("exact", "published"):
            costs = ftwt.layer_macs(outputs.layers, convention)
            assert len(costs) == len(outputs.layers)
            np.testing.assert_array_equal(sum(costs), ftwt.macs(outputs, convention))

    def test_closing_a_filter_never_raises_the_exact_count(self, network):
        outputs, _, _ = counted(network)
        total = ftwt.macs(outputs)
        for cost in (*ftwt.layer_macs(outputs.layers), total):
            if np.ndim(cost):
                _, before, after = np.split(cost, [WALKED, WALKED + PAIRS])
                assert np.all(after <= before)
        assert np.any(total[-PAIRS:] < total[WALKED:-PAIRS])


@pytest.mark.parametrize("network", ["vgg", "resnet14", "resnet14 after block"])
def test_a_network_that_runs_is_counted_by_the_masks_of_its_own_heads(network):
    model, side, _, _ = NETWORKS[network]
    rng = np.random.default_rng(2)
    variables = jax.tree.map(
        lambda leaf: rng.uniform(-0.5, 1, leaf.shape).astype(np.float32), shapes_of(model, side)[1]["params"]
    )
    stats = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes_of(model, side)[1]["batch_stats"])
    images = rng.normal(size=(4, side, side, 3)).astype(np.float32)
    outputs = jax.jit(model.apply)({"params": variables, "batch_stats": stats}, images)
    masks = [np.asarray(gate.mask) for gate in outputs.gates]
    assert any(np.any(mask != mask[0]) for mask in masks)
    walks = walked(network, masks)
    np.testing.assert_array_equal(ftwt.macs(outputs), [walk.exact + walk.heads for walk in walks])
    np.testing.assert_array_equal(ftwt.macs(outputs, "published"), [walk.published for walk in walks])


# The published code's totals for CIFAR-10, and what of them is no convolution, classifier or shortcut.
PUBLISHED = {
    ("vgg16_bn", 1): (313_478_144, 276_480),
    ("resnet56", 1): (125_485_760, 64),
    ("mobilenet_v1", 1): (46_355_456, 1024),
    ("mobilenet_v1", 0.75): (26_509_056, 768),
    ("mobilenet_v1", 0.5): (12_167_680, 512),
    ("mobilenet_v1", 0.25): (3_331_328, 256),
    ("mobilenet_v2", 1): (91_154_944, 0),
}


@pytest.mark.newest
@pytest.mark.parametrize(("name", "width"), PUBLISHED)
@pytest.mark.parametrize("gates", [None, ftwt.GateConfig.paper()])
def test_dense_totals_on_cifar_are_the_published_ones(name, width, gates):
    outputs, _ = shapes_of(ftwt.create_model(name, 10, gates=gates, width=width), 32)
    total, beside = PUBLISHED[name, width]
    assert ftwt.dense_macs(outputs, "published") == total
    assert ftwt.dense_macs(outputs) == ftwt.dense_macs(outputs, "exact") == total - beside


@pytest.mark.parametrize(
    ("name", "arch", "published"),
    [
        ("resnet18", {}, 1.814e9),
        ("resnet34", {}, 3.664e9),
        ("resnet50", {}, 4.089e9),
        ("resnet101", {}, 7.801e9),
        ("resnet152", {}, 11.514e9),
        ("mobilenet_v1", {"stem": "imagenet"}, 569e6),
        ("mobilenet_v1", {"stem": "imagenet", "width": 0.75}, 325e6),
        ("mobilenet_v2", {"stem": "imagenet"}, 301e6),
    ],
)
def test_dense_totals_on_imagenet_are_the_published_ones(name, arch, published):
    outputs, _ = shapes_of(ftwt.create_model(name, 1000, **arch), 224)
    for convention in ("exact", "published"):
        np.testing.assert_allclose(ftwt.dense_macs(outputs, convention), published, rtol=2e-3)


@pytest.mark.parametrize("convention", ["exact", "published"])
def test_a_dense_network_costs_its_dense_total_for_every_sample(convention):
    outputs, _ = shapes_of(ftwt.create_model("resnet8", 10), 32, samples=3)
    macs = ftwt.macs(outputs, convention)
    np.testing.assert_array_equal(macs, np.full(3, ftwt.dense_macs(outputs, convention)))
    assert macs.dtype == np.float64


def layer(name="layer", gate=None, **fields):
    mask = None if gate is None else jnp.asarray(gate)
    fields = {"positions": 1, "kernel_area": 1, "in_features": 4, "out_features": 6} | fields
    gate = None if mask is None else ftwt.GateOutput(None, mask, None)
    return ftwt.LayerRecord(name, active_out=mask, gate=gate, **fields)


def test_counts_beyond_the_range_of_int32_are_exact():
    masks = np.ones((2, 2048), bool)
    masks[1, 0] = False
    big = layer(gate=masks, positions=1_000_003, kernel_area=49, in_features=2048, out_features=2048)
    outputs = ftwt.Outputs(jnp.zeros((2, 10)), (big, big))
    per_filter = 1_000_003 * 49 * 2048
    assert ftwt.dense_macs(outputs) == 2 * 2048 * per_filter
    exact = [2 * (filters * per_filter + 2048 * 2048) for filters in (2048, 2047)]
    assert ftwt.macs(outputs).tolist() == exact
    published = [filters * per_filter + filters * filters * 1_000_003 * 49 for filters in (2048, 2047)]
    assert ftwt.macs(outputs, "published").tolist() == published


def test_a_grouped_filter_pays_for_the_active_channels_of_its_own_group():
    record = layer(
        gate=[[True, True, False, True, False, False], [False] * 6],
        positions=5,
        kernel_area=9,
        groups=2,
        active_in=jnp.asarray([[True, False, True, True], [True] * 4]),
    )
    (cost,) = ftwt.layer_macs([record])
    np.testing.assert_array_equal(cost, [45 * (2 * 1 + 1 * 2) + 24, 24])
    (cost,) = ftwt.layer_macs([record.replace(active_in=None)])
    np.testing.assert_array_equal(cost, [45 * (2 * 2 + 1 * 2) + 24, 24])


def test_a_published_depthwise_unit_costs_nothing_once_an_input_is_off():
    first = layer(gate=[[True] * 4, [True, True, True, False]], out_features=4)
    depthwise = layer(gate=[[True, True, False, False]] * 2, positions=7, kernel_area=9, out_features=4, groups=4)
    _, cost = ftwt.layer_macs([first, depthwise], "published")
    np.testing.assert_array_equal(cost, [7 * 9 * 2, 0])


@pytest.mark.parametrize("count", [ftwt.macs, ftwt.dense_macs, lambda o, c: ftwt.layer_macs(o.layers, c)])
def test_an_unknown_convention_names_the_nearest(count):
    outputs = ftwt.Outputs(jnp.zeros((2, 10)), (layer(),))
    with pytest.raises(ftwt.UserError, match=r"convention 'exactly'.*'exact'\? known: exact, published"):
        count(outputs, "exactly")


@pytest.mark.parametrize(("depthwise", "head"), [("full", 24 * 24), ("own", 24)])
def test_a_depthwise_head_that_reads_its_own_channel_costs_one_mac_a_gate(depthwise, head):
    unit = ftwt.GatedUnit(24, groups=24, gates=ftwt.GateConfig.paper(depthwise=depthwise))
    images = jnp.ones((2, 5, 5, 24))
    outputs = unit.apply(unit.init(jax.random.key(0), images), images)
    assert outputs.active.all()
    np.testing.assert_array_equal(ftwt.layer_macs(outputs.layers)[0], 5 * 5 * 9 * 24 + head)
