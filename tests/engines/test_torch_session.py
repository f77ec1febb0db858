"""Networks run by PyTorch node by node: the logits are JAX's."""

import sys
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftwt_jax.benchmark.subnets import synthetic_subnets
from ftwt_jax.benchmark.synthetic import random_gates
from ftwt_jax.budget.trained import Subject, random_images
from ftwt_jax.engines.graph import onnx_model
from ftwt_jax.engines.nodes import UnknownOperatorError
from ftwt_jax.engines.routed import open_routed, subnet_functions, subnet_graphs
from ftwt_jax.engines.sessions import open_session
from ftwt_jax.errors import UserError
from ftwt_jax.gating.gates import GateConfig
from ftwt_jax.inference.compact import fold
from ftwt_jax.inference.subnets import CompactSubnets
from ftwt_jax.models import create_model
from tests.conftest import random_like

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("quick_compilation")


def agree(function, images, threads=1):
    """Both return the same logits for one image, and for three."""
    model = onnx_model(function, jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype), "network")
    run, jitted = open_session("torch", model, threads), jax.jit(function)
    for batch in (1, 3):
        expected, found = np.asarray(jitted(images[:batch])), run(np.asarray(images[:batch]))
        assert found.dtype == np.float32
        assert found.shape == expected.shape
        assert np.max(np.abs(found - expected)) <= 1e-4 * np.max(np.abs(expected))


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("vgg_bn", (16, 16, 3), {"plan": (8, "M", 12, 16, "M")}),
        # Maps of odd sizes are padded on one side.
        ("resnet20", (19, 32, 1), {}),
        ("resnet18", (48, 48, 3), {"stem": "imagenet", "width": 0.25}),
        ("mobilenet_v1", (32, 32, 3), {"width": 0.125}),
        ("mobilenet_v2", (32, 32, 3), {"width": 0.25}),
    ],
)
def test_a_dense_network(name, shape, options):
    model, images = create_model(name, 10, **options), random_images(3, shape, jax.random.key(1))
    network = fold(model, random_like(jax.eval_shape(model.init, jax.random.key(0), images[:1])))
    agree(lambda images: network(images).logits, images)


def test_masks_a_router_and_subnets():
    model = create_model("vgg_bn", 10, plan=(24, "M", 32), gates=GateConfig())
    images = random_images(96, (16, 16, 3), jax.random.key(1))
    variables = random_like(jax.eval_shape(model.init, jax.random.key(0), images[:1]))
    variables, _ = random_gates(model, variables, images[:64], 0.4)
    masked = fold(model, variables)
    agree(lambda images: masked(images).logits, images)
    subject = Subject("vgg_bn", "synthetic", model, model, variables, variables, images[:64], images[64:], lambda x: x)
    compact = CompactSubnets(*synthetic_subnets(subject, 0.4))
    graphs = subnet_graphs(subnet_functions(compact), (16, 16, 3), jnp.float32, "network")
    images, expected = np.asarray(images[:8]), np.asarray(compact.logits(images[:8]))
    for found in (
        open_routed("torch", graphs, 1)(images),
        # Router and subnets in one graph, with a branch for each.
        np.concatenate([open_session("torch", graphs["one_image"], 1)(images[at : at + 1]) for at in range(8)]),
    ):
        assert np.max(np.abs(found - expected)) <= 1e-4 * np.max(np.abs(expected))


def test_windows_that_reach_beyond_one_side_of_the_maps():
    def function(images):
        same = {"strides": (2, 2), "padding": "SAME"}
        pools = [
            nn.max_pool(images, (2, 2), **same),
            nn.max_pool(images, (3, 3), strides=(2, 2), padding=((0, 1), (2, 0))),
            nn.avg_pool(images, (2, 2), **same),
            nn.avg_pool(images, (2, 2), **same, count_include_pad=False),
        ]
        return jnp.concatenate([jnp.sum(pool, axis=(1, 2)) for pool in pools], axis=-1)

    agree(function, random_images(3, (7, 9, 3), jax.random.key(1)))


def test_shapes_and_choices_of_channels():
    def function(images):
        x = jnp.concatenate([images[..., ::2], images[..., jnp.array([1, 3, 0])]], axis=-1)
        x = x.reshape(x.shape[0], -1, 5)[:, 2:9].swapaxes(1, 2)
        return jnp.where(
            x[..., 0] > jnp.argmax(x[:, 0], axis=-1)[:, None], jnp.min(x, axis=-1), 1 / (2 + x[..., 1] ** 2)
        )

    agree(function, random_images(3, (6, 6, 4), jax.random.key(1)))


def test_threads_of_others_stay_as_they_were_and_images_are_only_read():
    images = np.asarray(random_images(3, (8, 8, 3), jax.random.key(1)))
    assert not images.flags.writeable
    run = open_session(
        "torch", onnx_model(lambda x: nn.relu(x).mean((1, 2)), jax.ShapeDtypeStruct(images.shape, images.dtype), "n"), 1
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with warnings.catch_warnings(action="error"):
            run(images)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_is_not_known_is_named(monkeypatch):
    images = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)
    model = onnx_model(lambda images: jnp.prod(images, axis=(1, 2)), images, "network")
    with pytest.raises(UnknownOperatorError, match="torch does not know the operator ReduceProd"):
        open_session("torch", model, 1)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"needs torch: pip install -e '\.\[convert\]'"):
        open_session("torch", model, 1)
