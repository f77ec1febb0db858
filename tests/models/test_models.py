"""Every network of the registry: its size, where its gates sit, and which images it takes."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import ftwt_jax as ftwt
from ftwt_jax.gating.macs import layer_dense_macs
from ftwt_jax.models import REGISTRY, STEMS
from tests.conftest import random_like

KEY = jax.random.key(0)
GATES = ftwt.GateConfig.paper(r=0.7)
# Sides of images below which nothing is left of them.
SMALLEST = {"inception_v3": 75, "inception_v4": 75}
IMAGENET = {"stem": "imagenet"}
# Of images that these networks are made for, where their variables depend on it or smaller ones are too small.
PUBLISHED_SIDES = {"inception_v3": 299, "inception_v4": 299, "vit_small_patch16": 224}


@functools.cache
def shapes_of(model, side=32, dtype=jnp.float32, count=2):
    """(outputs, variables) as shapes, without running or allocating anything."""
    images = jax.ShapeDtypeStruct((count, side, side, 3), dtype)
    return jax.eval_shape(lambda x: model.init_with_output(KEY, x), images)


def parameters(model, side=32):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes_of(model, side)[1]["params"]))


def flat_shapes(variables):
    return {"/".join(path): leaf.shape for path, leaf in flax.traverse_util.flatten_dict(variables).items()}


@pytest.mark.parametrize(
    ("name", "classes", "arch", "count"),
    [
        ("vgg16_bn", 10, {}, 14_728_266),
        ("resnet20", 10, {}, 269_722),
        ("resnet56", 10, {}, 853_018),
        ("mobilenet_v1", 10, {}, 3_217_226),
        ("mobilenet_v2", 10, {}, 2_296_922),
        ("resnet18", 1000, {}, 11_689_512),
        ("resnet34", 1000, {}, 21_797_672),
        ("resnet50", 1000, {}, 25_557_032),
        ("resnet101", 1000, {}, 44_549_160),
        ("resnet152", 1000, {}, 60_192_808),
        ("mobilenet_v1", 1000, IMAGENET, 4_231_976),
        ("mobilenet_v2", 1000, IMAGENET, 3_504_872),
        ("densenet121", 1000, {}, 7_978_856),
        # torchvision's 27,161,264 without those of the auxiliary classifier.
        ("inception_v3", 1000, {}, 23_834_568),
        ("inception_v4", 1000, {}, 42_679_816),
        ("efficientnet_b0", 1000, {}, 5_288_548),
        ("convnext_tiny", 1000, {}, 28_589_128),
        ("vit_small_patch16", 1000, {}, 22_050_664),
    ],
)
def test_dense_networks_have_the_published_number_of_parameters(name, classes, arch, count):
    assert parameters(ftwt.create_model(name, classes, **arch), PUBLISHED_SIDES.get(name, 32)) == count


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("resnet101", 7.80, 7.81),
        ("resnet152", 11.51, 11.52),
        ("densenet121", 2.83, 2.87),
        ("inception_v3", 5.71, 5.73),
        # timm says 12.28, and 5.73 for v3: a little more than convolutions and classifier.
        ("inception_v4", 12.25, 12.30),
        ("efficientnet_b0", 0.385, 0.390),
        ("convnext_tiny", 4.45, 4.46),
        ("vit_small_patch16", 4.59, 4.61),
    ],
)
def test_dense_networks_have_the_published_macs(name, least, most):
    outputs, _ = shapes_of(ftwt.create_model(name, 1000), PUBLISHED_SIDES.get(name, 224))
    assert least <= ftwt.dense_macs(outputs) / 1e9 <= most


def test_attention_counts_its_two_products():
    outputs, _ = shapes_of(ftwt.create_model("vit_small_patch16", 1000), 224)
    products = [layer for layer in outputs.layers if "attention" in layer.name]
    tokens, features = 14 * 14 + 1, 6 * 64
    assert sum(map(layer_dense_macs, products)) == 12 * 2 * tokens * tokens * features
    linear = 12 * 12 * tokens * features**2 + 14 * 14 * 16 * 16 * 3 * features + 1000 * features
    assert ftwt.dense_macs(outputs) == linear + sum(map(layer_dense_macs, products))


@pytest.mark.parametrize(
    ("name", "arch", "count"),
    [
        ("vgg11_bn", {}, 8),
        ("vgg13_bn", {}, 10),
        ("vgg16_bn", {}, 13),
        ("vgg19_bn", {}, 16),
        ("resnet8", {}, 7),
        ("resnet56", {}, 55),
        ("resnet18", {}, 17),
        ("resnet34", {}, 33),
        ("resnet50", {}, 33),
        ("mobilenet_v1", {}, 27),
        ("mobilenet_v2", {}, 53),
        ("mobilenet_v2", IMAGENET, 52),
        # Every convolution: the first, two in each of 58 layers, three transitions.
        ("densenet121", {}, 120),
        ("inception_v3", {}, 94),
        ("inception_v4", {}, 149),
        ("efficientnet_b0", {}, 49),
        # The hidden neurons of each block.
        ("convnext_tiny", {}, 18),
        ("vit_small_patch16", {}, 12),
    ],
)
def test_gates_sit_at_as_many_units_as_the_design_says(name, arch, count):
    outputs, _ = shapes_of(ftwt.create_model(name, 10, GATES, **arch), SMALLEST.get(name, 32))
    assert len(outputs.gates) == len(set(outputs.gate_names)) == count
    assert count == sum(layer.unit for layer in outputs.layers)


def block_names(stages, convolutions):
    return [
        f"stage{stage}_block{block}/conv{conv}"
        for stage, blocks in enumerate(stages, 1)
        for block in range(blocks)
        for conv in range(1, convolutions + 1)
    ]


V1_NAMES = [f"pair{i}_{half}" for i in range(13) for half in ("depthwise", "pointwise")]
V2_NAMES = [f"block{i}/{step}" for i in range(17) for step in ("expand", "depthwise", "project")]


@pytest.mark.parametrize(
    ("name", "gates", "names"),
    [
        ("vgg11_bn", GATES, [f"unit{i}" for i in range(8)]),
        ("resnet14", GATES, ["stem", *block_names((2, 2, 2), 2)]),
        ("resnet14", ftwt.GateConfig.paper(after_block=True), ["stem", *block_names((2, 2, 2), 2)]),
        ("resnet18", GATES, ["stem", *block_names((2, 2, 2, 2), 2)]),
        ("resnet50", GATES, ["stem", *block_names((3, 4, 6, 3), 2)]),
        ("mobilenet_v1", GATES, ["stem", *V1_NAMES]),
        ("mobilenet_v2", GATES, ["stem", *V2_NAMES, "last"]),
    ],
)
def test_gates_come_in_forward_order_under_the_names_of_their_units(name, gates, names):
    outputs, variables = shapes_of(ftwt.create_model(name, 10, gates))
    assert list(outputs.gate_names) == names
    heads = {path for path in flat_shapes(variables["params"]) if "/gate_head/" in path}
    assert heads == {f"{unit}/gate_head/dense/{leaf}" for unit in names for leaf in ("kernel", "bias")}


def test_bottlenecks_gate_the_narrowing_and_the_3x3_convolution():
    outputs, _ = shapes_of(ftwt.create_model("resnet50", 10, GATES))
    layers = {layer.name: layer for layer in outputs.layers}
    block = {name.removeprefix("stage2_block0/"): layer for name, layer in layers.items() if "stage2_block0" in name}
    assert {name: layer.kernel_area for name, layer in block.items()} == {
        "conv1": 1,
        "conv2": 9,
        "conv3": 1,
        "shortcut": 1,
    }
    assert {name for name, layer in block.items() if layer.gate is not None} == {"conv1", "conv2"}


# Every name of the registry, with what it needs to be small, and the sides of images that its stems take.
BUILDS = [
    *((name, {"width": 0.125} | ({"plan": (16, "M", 32)} if name == "vgg_bn" else {})) for name in REGISTRY),
    ("resnet8", {"width": 0.125}),
    *((name, {"width": 0.125, "stem": stem}) for name in ("resnet18", "resnet50", "mobilenet_v1") for stem in STEMS),
    ("mobilenet_v2", {"width": 0.125, "stem": "imagenet"}),
]


@pytest.mark.parametrize(("name", "arch"), BUILDS)
def test_every_network_builds_dense_and_gated_and_the_gated_one_only_adds_heads(name, arch):
    side = SMALLEST.get(name, 32)
    dense, dense_variables = shapes_of(ftwt.create_model(name, 7, **arch), side)
    # Exports are traced for any number of images.
    (count,) = export.symbolic_shape("images")
    gated, gated_variables = shapes_of(ftwt.create_model(name, 7, GATES, **arch), side, count=count)
    assert (dense.logits.shape, gated.logits.shape) == ((2, 7), (count, 7))
    assert dense.gates == dense.gate_names == ()
    for gate in gated.gates:
        assert gate.logits.shape == gate.mask.shape == gate.target.shape
        assert (gate.logits.dtype, gate.mask.dtype, gate.target.dtype) == (jnp.float32, bool, bool)
    ours, theirs = flat_shapes(gated_variables), flat_shapes(dense_variables)
    assert theirs.items() < ours.items()
    assert all("/gate_head/" in path for path in ours.keys() - theirs.keys())


@functools.cache
def random_variables(model, side):
    """Variables of the right shapes with nothing left at its first value, gate heads included."""
    return random_like(shapes_of(model, side)[1])


RUNS = {
    "vgg": ("vgg_bn", 9, {"plan": (8, "M", 12)}),
    "resnet8": ("resnet8", 8, {"width": 0.25}),
    "resnet50": ("resnet50", 37, {"width": 0.0625}),
    "mobilenet_v1": ("mobilenet_v1", 17, {"width": 0.125}),
    "mobilenet_v2": ("mobilenet_v2", 8, {"width": 0.25}),
}


@pytest.mark.parametrize("network", RUNS)
def test_a_gated_network_runs_and_its_samples_do_not_depend_on_each_other(network):
    name, side, arch = RUNS[network]
    model = ftwt.create_model(name, 7, GATES, **arch)
    images = np.random.default_rng(1).normal(size=(3, side, side, 3)).astype(np.float32)
    apply = jax.jit(functools.partial(model.apply, control=ftwt.GateControl(targets=False)))
    outputs = apply(random_variables(model, side), images)
    turned = apply(random_variables(model, side), images[::-1])
    assert outputs.logits.shape == (3, 7)
    assert np.all(np.isfinite(outputs.logits))
    assert np.any(outputs.logits[0] != outputs.logits[1])
    np.testing.assert_allclose(outputs.logits, turned.logits[::-1], rtol=1e-4, atol=1e-5)
    for gate, shape in zip(outputs.gates, shapes_of(model, side)[0].gates, strict=True):
        assert gate.mask.shape == (3, shape.mask.shape[1])
    assert 0 < np.mean(np.concatenate([gate.mask for gate in outputs.gates], axis=1)) < 1


def test_training_updates_the_batch_statistics_of_every_unit():
    model = ftwt.create_model("resnet8", 7, GATES, width=0.125)
    variables = random_variables(model, 8)
    images = np.random.default_rng(1).normal(size=(3, 8, 8, 3)).astype(np.float32)
    train = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    _, updated = train(variables, images)
    before = flax.traverse_util.flatten_dict(variables["batch_stats"])
    after = flax.traverse_util.flatten_dict(updated["batch_stats"])
    assert before.keys() == after.keys()
    assert all(np.any(after[path] != before[path]) for path in before)


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 44, 110])
def test_a_cifar_resnet_has_the_depth_of_its_name(depth):
    outputs, _ = shapes_of(ftwt.create_model(f"resnet{depth}", 10, GATES, width=0.125))
    assert len(outputs.gates) + 1 == depth


@pytest.mark.parametrize(
    ("name", "arch", "smallest"),
    [
        ("vgg16_bn", {}, 32),
        ("vgg_bn", {"plan": (8, "M", 8, "M")}, 4),
        ("resnet20", {}, 4),
        ("resnet18", {}, 32),
        ("resnet18", {"stem": "cifar"}, 8),
        ("resnet50", {}, 32),
        ("mobilenet_v1", {}, 16),
        ("mobilenet_v1", IMAGENET, 32),
        ("mobilenet_v2", {}, 8),
        ("mobilenet_v2", IMAGENET, 32),
        ("densenet121", {}, 32),
        ("inception_v3", {}, 75),
        ("inception_v4", {}, 75),
        ("efficientnet_b0", {}, 32),
        ("convnext_tiny", {}, 32),
    ],
)
def test_images_too_small_are_refused_with_the_size_to_scale_them_to(name, arch, smallest):
    model = ftwt.create_model(name, 10, GATES, **{"width": 0.125} | arch)
    outputs, _ = shapes_of(model, smallest)
    assert min(layer.positions for layer in outputs.layers) == 1
    assert outputs.logits.shape == (2, 10)
    remedy = f"scale them to {smallest}x{smallest} or more"
    with pytest.raises(ftwt.UserError, match=f"{smallest - 1}x{smallest - 1} are too small.*{remedy}"):
        shapes_of(model, smallest - 1)
    with pytest.raises(ftwt.UserError, match="too small"):
        jax.eval_shape(model.init, KEY, jax.ShapeDtypeStruct((1, 64, smallest - 1, 3), jnp.float32))


def test_images_without_a_batch_axis_are_refused_with_the_axes_to_give():
    model = ftwt.create_model("resnet8", 10)
    with pytest.raises(ftwt.UserError, match=r"four axes \[N, H, W, channels\]; got shape \(32, 32, 3\)"):
        jax.eval_shape(model.init, KEY, jax.ShapeDtypeStruct((32, 32, 3), jnp.float32))


@pytest.mark.parametrize("side", [33, 34, 47])
@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("vgg11_bn", {}),
        ("resnet8", {}),
        ("resnet18", {}),
        ("resnet18", {"stem": "cifar"}),
        ("resnet50", {}),
        ("mobilenet_v1", {}),
        ("mobilenet_v2", {}),
        ("mobilenet_v2", IMAGENET),
    ],
)
def test_images_of_any_other_size_are_classified(name, arch, side):
    model = ftwt.create_model(name, 10, GATES, width=0.125, **arch)
    assert shapes_of(model, side)[0].logits.shape == (2, 10)


@pytest.mark.parametrize(
    ("network", "dtype"), [*((network, jnp.bfloat16) for network in RUNS), ("vgg", "bfloat16"), ("resnet8", "bfloat16")]
)
def test_in_half_precision_parameters_logits_and_gates_stay_float32(network, dtype):
    name, side, arch = RUNS[network]
    model = ftwt.create_model(name, 7, GATES, dtype=dtype, **arch)
    (outputs, activations), variables = jax.eval_shape(
        lambda x: (
            model.apply(
                variables := model.init(KEY, x),
                x,
                capture_intermediates=lambda module, _: isinstance(module, ftwt.GatedUnit),
            ),
            variables,
        ),
        jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert outputs.logits.dtype == jnp.float32
    assert {gate.logits.dtype for gate in outputs.gates} == {jnp.dtype(jnp.float32)}
    units = [leaf for leaf in jax.tree.leaves(activations) if leaf.ndim == 4]
    assert len(units) == len(outputs.gates)
    assert {leaf.dtype for leaf in units} == {jnp.dtype(jnp.bfloat16)}


def test_half_precision_logits_are_near_those_of_float32():
    name, side, arch = RUNS["resnet8"]
    images = np.random.default_rng(1).normal(size=(4, side, side, 3)).astype(np.float32)
    variables = random_variables(ftwt.create_model(name, 7, **arch), side)
    full, half = (
        jax.jit(ftwt.create_model(name, 7, dtype=dtype, **arch).apply)(variables, images).logits
        for dtype in (None, jnp.bfloat16)
    )
    error = np.linalg.norm(full - half) / np.linalg.norm(full)
    assert 0 < error < 0.05


@pytest.mark.parametrize(
    ("name", "arch", "filters"),
    [
        ("mobilenet_v1", {"width": 0.75}, {"stem": 24, "pair0_depthwise": 24, "pair12_pointwise": 768}),
        ("mobilenet_v1", {"width": 0.3}, {"stem": 9, "pair0_pointwise": 19, "pair12_pointwise": 307}),
        ("mobilenet_v2", {"width": 0.5}, {"stem": 16, "block1/expand": 48, "block16/project": 160, "last": 640}),
        ("mobilenet_v2", {"width": 0.5, **IMAGENET}, {"stem": 16, "block1/expand": 48, "last": 1280}),
        ("mobilenet_v2", {"width": 1.4, **IMAGENET}, {"stem": 48, "block16/project": 448, "last": 1792}),
        ("mobilenet_v2", {"width": 0.35, **IMAGENET}, {"stem": 16, "block0/project": 8, "block1/project": 8}),
        ("resnet8", {"width": 1.5}, {"stem": 24, "stage2_block0/conv1": 48, "stage3_block0/conv2": 96}),
        ("vgg11_bn", {"width": 0.01}, {"unit0": 1, "unit1": 1, "unit7": 5}),
        ("vgg16_bn", {"plan": (4, "M", 6)}, {"unit0": 4, "unit1": 6}),
    ],
)
def test_a_width_scales_every_layer_and_rounds_as_published(name, arch, filters):
    outputs, _ = shapes_of(ftwt.create_model(name, 10, **arch))
    layers = {layer.name: layer.out_features for layer in outputs.layers}
    assert {unit: layers[unit] for unit in filters} == filters
