"""Weights under the names of torchvision, Hugging Face, timm and kuangliu, and export under every layout."""

import functools
import warnings

import jax
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import ftwt_jax as ftwt
from ftwt_jax.models import REGISTRY, STEMS, options_of
from ftwt_jax.weights.entries import entries, parameter_shapes
from ftwt_jax.weights.names import layouts
from tests.conftest import random_like
from tests.helpers import torch_imagenet as imagenet
from tests.helpers import torch_networks as theirs

GATES = ftwt.GateConfig.paper(pool="mean")
CLASSES = 1000
QUARTER, NARROW = {"width": 0.25}, {"width": 0.35}
BASIC, DEEP = (2, 2, 2, 2), (3, 4, 6, 3)


def hugging_face(layer_type="basic", depths=BASIC, features=16):
    growth = 4 if layer_type == "bottleneck" else 1
    sizes = [growth * features * 2**stage for stage in range(4)]
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            layer_type=layer_type, depths=depths, hidden_sizes=sizes, embedding_size=features, num_labels=CLASSES
        )
    )


torchvision = functools.partial(imagenet.TorchvisionResNet, features=16)
kuangliu = functools.partial(imagenet.KuangliuResNet, CLASSES, features=16)
SMALL = QUARTER | {"stem": "cifar"}
# Whose names it has and ours; our arguments; theirs.
NETWORKS = {
    ("torchvision", "resnet18"): (QUARTER, torchvision),
    ("torchvision", "resnet34"): (QUARTER, functools.partial(torchvision, stage_sizes=DEEP)),
    ("torchvision", "resnet50"): (QUARTER, functools.partial(torchvision, stage_sizes=DEEP, bottleneck=True)),
    ("huggingface", "resnet18"): (QUARTER, hugging_face),
    ("huggingface", "resnet34"): (QUARTER, functools.partial(hugging_face, depths=DEEP)),
    ("huggingface", "resnet50"): (QUARTER, functools.partial(hugging_face, "bottleneck", DEEP)),
    ("kuangliu", "resnet18"): (SMALL, kuangliu),
    # At this width rounding to multiples of 8 goes both ways.
    ("torchvision", "mobilenet_v2"): (NARROW, functools.partial(imagenet.TorchvisionMobileNetV2, **NARROW)),
    ("timm", "mobilenet_v1"): (QUARTER, functools.partial(imagenet.TimmMobileNetV1, **QUARTER)),
}


def pair(name, build, **arch):
    """A network of theirs with random numbers and the variables of it, which fit without a warning."""
    net = theirs.randomize(build(), seed=0).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ftwt.WeightsWarning)
        return net, ftwt.from_torch(name, net.state_dict(), CLASSES, **arch)


@functools.cache
def imported(layout, name):
    return pair(name, NETWORKS[layout, name][1], **with_stem(layout, name))


def with_stem(layout, name):
    """Our arguments, with the stem, which is not the default of MobileNets."""
    return {"stem": "imagenet"} | NETWORKS[layout, name][0]


@functools.cache
def compiled(model):
    """Optimised for compile time."""
    return jax.jit(model.apply, compiler_options={"xla_backend_optimization_level": 0})


def check_logits(model, variables, net, side):
    images = np.random.default_rng(side).normal(size=(2, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        expected = net(theirs.to_nchw(images))
    expected = getattr(expected, "logits", expected)
    ours = compiled(model)(variables, images).logits
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * float(abs(expected).max()))


def check_equal(ours, expected):
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


@pytest.mark.parametrize("side", [64, 97])
@pytest.mark.parametrize(("layout", "name"), NETWORKS)
def test_a_network_computes_the_same(layout, name, side):
    net, variables = imported(layout, name)
    check_logits(ftwt.create_model(name, CLASSES, **with_stem(layout, name)), variables, net, side)


@pytest.mark.parametrize(
    ("layout", "name"), [("huggingface", "resnet18"), ("kuangliu", "resnet18"), *list(NETWORKS)[-2:]]
)
def test_a_stem_that_is_left_out_follows_from_the_names(layout, name):
    net, variables = imported(layout, name)
    stem = with_stem(layout, name)["stem"]
    arch = {key: value for key, value in NETWORKS[layout, name][0].items() if key != "stem"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ftwt.WeightsWarning)
        check_equal(ftwt.from_torch(name, net.state_dict(), CLASSES, **arch), variables)
    # Only if `create_model` builds another network by default.
    assert len(caught) == ("mobilenet" in name or stem == "cifar")
    assert all(f'pass stem="{stem}" to create_model' in str(warning.message) for warning in caught)


def test_a_whole_resnet18_computes_the_same():
    net, variables = pair("resnet18", functools.partial(hugging_face, features=64))
    check_logits(ftwt.create_model("resnet18", CLASSES), variables, net, 225)


@pytest.mark.parametrize(("layout", "name"), NETWORKS)
def test_an_imported_network_is_exported_unchanged(layout, name):
    net, variables = imported(layout, name)
    came = {key: value for key, value in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    back = ftwt.to_torch(name, variables, CLASSES, layout=layout, **with_stem(layout, name))
    assert back.keys() == came.keys()
    for key, tensor in came.items():
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)
        assert back[key].dtype == np.float32
        assert back[key].flags.writeable  # PyTorch warns about read-only arrays.


@pytest.mark.parametrize(
    ("layout", "name", "other"),
    [
        ("huggingface", "resnet18", None),
        ("huggingface", "resnet50", "torchvision"),
        ("torchvision", "resnet34", "huggingface"),
        ("torchvision", "mobilenet_v2", "timm"),
        ("timm", "mobilenet_v1", None),
        ("kuangliu", "resnet18", "torchvision"),
    ],
)
def test_a_network_can_be_exported_under_other_names_and_imported_again(layout, name, other):
    _, variables = imported(layout, name)
    state = ftwt.to_torch(name, variables, CLASSES, layout=other, **with_stem(layout, name))
    twin = (other or "torchvision", name)
    if twin in NETWORKS:
        assert state.keys() == {key for key in imported(*twin)[0].state_dict() if "num_batches" not in key}
    check_equal(ftwt.from_torch(name, state, CLASSES, **with_stem(layout, name)), variables)


def test_timm_names_of_mobilenet_v2_are_those_that_timm_has():
    _, variables = imported("torchvision", "mobilenet_v2")
    state = ftwt.to_torch("mobilenet_v2", variables, CLASSES, layout="timm", **NARROW)
    layers = {key.rpartition(".")[0] for key in state}
    first = {"conv_dw", "bn1", "conv_pw", "bn2"}
    other = {"conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"}
    sizes = (1, 2, 3, 4, 3, 3, 1)
    blocks = {
        f"blocks.{stage}.{block}.{layer}"
        for stage, size in enumerate(sizes)
        for block in range(size)
        for layer in (other if stage else first)
    }
    assert layers == {"conv_stem", "bn1", "conv_head", "bn2", "classifier", *blocks}


def test_a_mobilenet_v2_is_exported_without_naming_its_stem():
    _, variables = imported("torchvision", "mobilenet_v2")
    named = ftwt.to_torch("mobilenet_v2", variables, CLASSES, **with_stem("torchvision", "mobilenet_v2"))
    check_equal(ftwt.to_torch("mobilenet_v2", variables, CLASSES, **NARROW), named)
    published = theirs.randomize(theirs.MobileNetV2(width=0.125), seed=0).state_dict()
    variables = ftwt.from_torch("mobilenet_v2", published, 10, width=0.125)
    back = ftwt.to_torch("mobilenet_v2", variables, 10, width=0.125)
    assert back.keys() == {key for key in published if "num_batches" not in key}


def every_network():
    # The deepest have the names of resnet50.
    for name in (*sorted(REGISTRY.keys() - {"resnet101", "resnet152"}), "resnet8", "resnet14"):
        arch = {"width": 0.125} | ({"plan": (24, "M", 40)} if name == "vgg_bn" else {})
        stems = (*STEMS, "published") if name == "mobilenet_v2" else STEMS
        yield from ((name, arch | {"stem": stem}) for stem in stems if "stem" in options_of(name))
        if "stem" not in options_of(name):
            yield name, arch


@functools.cache
def shapes_of(model):
    return parameter_shapes(model)


@pytest.mark.parametrize(("name", "arch"), list(every_network()))
def test_no_two_arrays_share_a_name(name, arch):
    model = ftwt.create_model(name, 7, GATES, **arch)
    shapes = shapes_of(model)
    for layout in layouts(model):
        found = [entry for entry in entries(model, layout, shapes) if layout.gated or not entry.is_head]
        names = [key for entry in found for key in (entry.name, entry.copy) if key]
        assert len(names) == len(set(names)) >= len(found)


# An example takes up to a second, and says by itself which network it was.
@settings(max_examples=6, deadline=None, phases=[Phase.generate])
@given(st.sampled_from(list(every_network())), st.sampled_from([None, GATES]), st.integers(0, 99), st.data())
def test_what_is_exported_is_imported_again_unchanged(network, gates, seed, data):
    name, arch = network
    model = ftwt.create_model(name, 7, gates, **arch)
    layout = data.draw(st.sampled_from(sorted({layout.name for layout in layouts(model)})))
    structs = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes_of(model).items()}
    variables = flatten_dict(random_like(unflatten_dict(structs), seed))
    state = ftwt.to_torch(name, unflatten_dict(variables), 7, gates, layout=layout, **arch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ftwt.WeightsWarning)
        # Any stem is tried under any names, also under those of images of another kind.
        warnings.filterwarnings("ignore", ".* but stem=.* is requested", ftwt.WeightsWarning)
        found = flatten_dict(ftwt.from_torch(name, state, 7, gates, **arch))
    assert found.keys() == variables.keys()
    for path, leaf in variables.items():
        # A head's kernel is multiplied by C_in and divided by it, which rounds.
        np.testing.assert_allclose(found[path], leaf, rtol=1e-6 if "gate_head" in path else 0, err_msg=str(path))
