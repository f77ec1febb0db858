"""The dense networks in PyTorch give the logits of ours."""

import functools
import math

import flax.linen as nn
import jax
import numpy as np
import pytest

import ftwt_jax as ftwt
from ftwt_jax.errors import UserError
from tests.conftest import random_like

torch = pytest.importorskip("torch")
from ftwt_jax.benchmark.torch_dense import torch_network  # noqa: E402

PLAN = (8, "M", 12, 16, "M")
QUARTER = {"width": 0.25}
EIGHTH = {"width": 0.125}
ODD = (19, 32, 3)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Layers so small spend more time waiting for threads than computing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def shapes(model, image):
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image), np.float32))


def variables_of(model, image=(32, 32, 3)):
    """Random variables, batch statistics too, for images [H, W, channels]."""
    return random_like(shapes(model, image), seed=1)


def random_images(shape):
    return np.random.default_rng(2).normal(size=(2, *shape)).astype(np.float32)


def logits_of(network, images):
    with torch.inference_mode():
        return network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def check(model, variables, image):
    """Compares logits [N, classes] of both; returns the PyTorch network."""
    images = random_images(image)
    # One pass of small images is over long before an optimised program is compiled.
    fast = {"xla_backend_optimization_level": 0}
    run = jax.jit(lambda v, x: model.apply(v, x).logits).lower(variables, images).compile(compiler_options=fast)
    expected = np.asarray(run(variables, images))
    network = torch_network(model, variables)
    found = logits_of(network, images)
    largest = np.abs(expected).max()
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * largest)
    # Only logits that the images change can show that the networks agree.
    assert np.ptp(expected, axis=0).max() > 1e-2 * largest
    return network


@pytest.mark.parametrize(
    ("name", "arch", "image"),
    [
        ("vgg_bn", {"plan": PLAN}, (32, 32, 3)),
        ("vgg_bn", {"plan": PLAN}, (15, 18, 1)),
        ("resnet8", {}, (32, 32, 3)),
        ("resnet8", {}, (27, 22, 3)),
        ("resnet18", EIGHTH, (64, 64, 3)),
        ("resnet50", EIGHTH, (65, 47, 3)),
        ("mobilenet_v1", QUARTER, (32, 32, 3)),
        ("mobilenet_v1", {"stem": "imagenet", **QUARTER}, (64, 45, 3)),
        ("mobilenet_v2", QUARTER, (32, 32, 3)),
        ("mobilenet_v2", {"stem": "published", **QUARTER}, ODD),
        ("mobilenet_v2", {"stem": "imagenet", **QUARTER}, (64, 45, 3)),
        # So narrow that the first block needs no projection, and that depthwise kernels have one channel.
        ("mobilenet_v2", {"width": 0.05}, (16, 16, 3)),
    ],
    ids=str,
)
def test_logits_and_parameters_are_those_of_our_network(name, arch, image):
    model = ftwt.create_model(name, 7, **arch)
    variables = variables_of(model, image)
    network = check(model, variables, image)
    ours = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert sum(tensor.numel() for tensor in network.parameters()) == ours


def test_a_cifar_mobilenet_without_projections_runs_as_the_published_one():
    published = ftwt.create_model("mobilenet_v2", 7, stem="published", **QUARTER)
    variables = variables_of(published, ODD)
    images = random_images(ODD)
    # Against our own network, the published one is compared above.
    expected = logits_of(torch_network(published, variables), images)
    found = logits_of(torch_network(ftwt.create_model("mobilenet_v2", 7, **QUARTER), variables), images)
    np.testing.assert_array_equal(found, expected)


def test_the_network_is_in_eval_mode_and_has_its_own_weights():
    model = ftwt.create_model("resnet8", 7)
    variables = variables_of(model)
    network = torch_network(model, variables)
    assert not any(module.training for module in network.modules())
    images = random_images((32, 32, 3))
    before = logits_of(network, images)
    for leaf in jax.tree.leaves(variables):
        leaf[...] = math.nan
    np.testing.assert_array_equal(logits_of(network, images), before)


def test_other_networks_are_refused_on_one_line():
    with pytest.raises(UserError, match=r"^--torch knows VGG, ResNet, MobileNetV1 and MobileNetV2; got Dense$"):
        torch_network(nn.Dense(3), {})
