"""Networks as ONNX graphs: how clean they are, and that engines return what JAX does."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from ftwt_jax.benchmark.synthetic import random_gates
from ftwt_jax.budget.trained import random_images
from ftwt_jax.engines.graph import onnx_model
from ftwt_jax.engines.sessions import open_session
from ftwt_jax.errors import UserError
from ftwt_jax.gating.gates import GateConfig
from ftwt_jax.inference.compact import compact, fold
from ftwt_jax.models import create_model
from tests.conftest import random_like

pytestmark = pytest.mark.usefixtures("quick_compilation")
ENGINES = ("onnxruntime", "openvino", "torch")
SMALL_VGG = {"name": "vgg_bn", "plan": (8, 16, "M", 24)}


@dataclasses.dataclass
class Network:
    model: object
    variables: object
    images: jax.Array


def make(name: str, gates: GateConfig | None = None, size: int = 32, **options) -> Network:
    model = create_model(name, 10, gates=gates, **options)
    images = random_images(96, (size, size, 3), jax.random.key(1))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images[:1])
    variables = random_like(shapes)
    if gates is not None:
        variables, _ = random_gates(model, variables, images[:64], 0.4)
    return Network(model, variables, images)


def kinds(model) -> collections.Counter:
    return collections.Counter(node.op_type for node in model.graph.node)


def agree(function, images, shape=None, batches=(1, 3, 32), few=0.0):
    """The model, once all engines return JAX's logits but for the share `few` of images, whose gates lie at zero."""
    model = onnx_model(function, jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype), "network")
    jitted = jax.jit(function)
    for engine in ENGINES:
        run = open_session(engine, model, threads=2)
        for batch in batches:
            expected = np.asarray(jitted(images[:batch]))
            found = run(np.asarray(images[:batch]))
            assert found.shape == expected.shape
            off = np.max(np.abs(found - expected), axis=1) > 1e-4 * np.max(np.abs(expected))
            assert np.sum(off) <= few * batch, (engine, batch)
    return model


def logits_of(network):
    return lambda images: network(images).logits


def test_a_dense_resnet_is_convolutions_and_what_lies_between_them():
    one = make("resnet20")
    model = agree(logits_of(fold(one.model, one.variables)), one.images)
    assert kinds(model) == {
        "Transpose": 1,
        "Conv": 19,
        "Relu": 19,
        "Add": 9,
        "AveragePool": 2,
        "Pad": 2,
        "ReduceMean": 1,
        "Gemm": 1,
    }
    assert all(len(node.input) == 3 for node in model.graph.node if node.op_type == "Conv"), "a bias is added apart"
    assert [side.dim_param for side in model.graph.input[0].type.tensor_type.shape.dim] == ["N", "", "", ""]
    assert model.opset_import[0].version == 17
    assert all(held.data_type in (1, 7) for held in model.graph.initializer), "float32, and int64 for axes"


def test_a_masked_vgg_has_a_head_for_each_convolution():
    one = make(**SMALL_VGG, gates=GateConfig())
    model = agree(logits_of(fold(one.model, one.variables)), one.images)
    found = kinds(model)
    assert found["Conv"] == found["Where"] == found["Greater"] == found["ReduceMax"] == 3
    assert found["LayerNormalization"] == 3
    assert found["Gemm"] == 4
    assert found["Transpose"] == 1


@pytest.mark.parametrize(
    "gates", [None, GateConfig(), GateConfig.paper(), GateConfig(norm="none", pool="mean")], ids=str
)
def test_mobilenet_dense_and_with_every_kind_of_head(gates):
    one = make("mobilenet_v1", gates, width=0.25)
    model = agree(logits_of(fold(one.model, one.variables)), one.images, batches=(1, 8), few=0.13)
    found = kinds(model)
    assert found["Conv"] == 27
    assert found["Transpose"] == 1
    assert "BatchNormalization" not in found
    if gates is None:
        assert found == {"Transpose": 1, "Conv": 27, "Relu": 27, "ReduceMean": 1, "Gemm": 1}


def test_a_compact_network_takes_the_way_back_where_filters_were_left_out():
    one = make("vgg_bn", GateConfig(), plan=(24, 32, "M", 48))
    params = flatten_dict(one.variables["params"])
    for path in params:
        if path[-3:] == ("gate_head", "dense", "bias"):
            # Half of the filters are on in no image.
            params[path] = np.where(np.arange(params[path].size) % 2, -100, params[path])
    variables = {**one.variables, "params": unflatten_dict(params)}
    network = compact(one.model, variables, calibration=one.images[:64], portable=True)
    assert network.execution.kept
    model = agree(logits_of(network), one.images)
    assert kinds(model)["If"] == 1
    shapes = [tuple(held.dims) for held in model.graph.initializer]
    assert any(len(shape) == 4 and shape[0] < 24 for shape in shapes), "no convolution became smaller"
    # Nothing like what it has seen: all engines compute all filters.
    strange = 40 * random_images(32, (32, 32, 3), jax.random.key(9))
    agree(logits_of(network), strange, few=0.1)


def test_images_of_a_data_set_are_normalised_inside():
    one = make(**SMALL_VGG)
    network = fold(one.model, one.variables)
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), np.uint8)
    mean = jnp.array([0.4, 0.5, 0.6])
    model = agree(lambda x: network((x.astype(jnp.float32) / 255 - mean) / 0.25).logits, images)
    assert model.graph.input[0].type.tensor_type.elem_type == 2
    assert kinds(model)["Transpose"] == 1


def test_a_dense_network_of_flax_itself():
    def function(images):
        kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3 * 8 * 8, 10)).astype(np.float32))
        return jax.nn.softmax(images.reshape(images.shape[0], -1) @ kernel) * 3 + 1

    agree(function, random_images(32, (8, 8, 3), jax.random.key(0)))


def test_what_has_no_operator_is_named_with_its_layer_and_the_remedy():
    def function(images):
        with jax.named_scope("sorting"):
            return jnp.sort(images.mean((1, 2)))

    with pytest.raises(UserError, match=r"^sort of .*sorting.* cannot be written as ONNX.*--format=stablehlo$"):
        onnx_model(function, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32), "network")
    with pytest.raises(UserError, match="logits"):
        onnx_model(lambda x: x, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32), "network")
    with pytest.raises(UserError, match="uint8 or float32"):
        onnx_model(lambda x: x, jax.ShapeDtypeStruct((1, 8, 8), jnp.float32), "network")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("resnet56", 32, {}),
        ("vgg16_bn", 32, {}),
        ("mobilenet_v2", 32, {}),
        ("resnet34", 64, {"stem": "imagenet"}),
        ("densenet121", 64, {}),
        ("efficientnet_b0", 64, {}),
        ("convnext_tiny", 64, {}),
        ("vit_small_patch16", 224, {}),
        ("inception_v3", 299, {}),
    ],
)
@pytest.mark.parametrize("gates", [None, GateConfig()], ids=["dense", "masked"])
def test_larger_networks(name, size, options, gates):
    one = make(name, gates, size, **options)
    batches = (1, 3, 32) if size <= 64 else (1, 3)
    agree(logits_of(fold(one.model, one.variables)), one.images, batches=batches, few=0.13 if gates else 0)
