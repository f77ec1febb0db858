"""State dicts of the published code: networks compute the same, gates included, and are exported unchanged.

The networks are those of `tests.helpers.torch_networks`, with random numbers in every tensor.
"""

import copy
import functools
import io
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F

import ftwt_jax as ftwt
from tests.helpers import torch_networks as theirs

pytestmark = pytest.mark.long

GATES = ftwt.GateConfig(r=0.9, pool="mean", min_filters=0)
AFTER = ftwt.GateConfig(r=0.9, pool="mean", min_filters=0, after_block=True)
IMAGES = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
LABELS = np.array([3, 1, 4, 1])
PLAN = (16, "M", 24, 24, "M", 20)
VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")
QUARTER = {"width": 0.25}
HEAD = "1Conv2dMask.weight"

# Our name and arguments, and theirs.
NETWORKS = {
    "resnet8": ("resnet8", {}, theirs.ResNet, {}),
    "resnet14": ("resnet14", {}, theirs.ResNet, {"blocks": 2}),
    "vgg": ("vgg_bn", {"plan": PLAN}, theirs.VGG, {"plan": PLAN}),
    "mobilenet_v1": ("mobilenet_v1", QUARTER, theirs.MobileNetV1, QUARTER),
    "mobilenet_v2": ("mobilenet_v2", QUARTER, theirs.MobileNetV2, QUARTER),
    "mobilenet_v2 projection": ("mobilenet_v2", QUARTER, theirs.MobileNetV2, QUARTER | {"projection": True}),
}
DENSE = NETWORKS | {
    "vgg11": ("vgg11_bn", {}, theirs.VGG, {"plan": VGG11}),
    "mobilenet_v2 named": ("mobilenet_v2", QUARTER | {"stem": "published"}, theirs.MobileNetV2, QUARTER),
}
GATED = [*((network, GATES) for network in NETWORKS), ("resnet14", AFTER)]


@functools.cache
def pair(network, gates=None):
    """A network of theirs, ours, and its variables; that they fit without a warning is part of every test."""
    name, arch, build, settings = DENSE[network]
    if gates is not None:
        settings = settings | {"gated": True} | ({"after_block": True} if gates.after_block else {})
    # With this seed no mask or target is decided by less than 1e-5.
    net = theirs.randomize(build(**settings), seed=10).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ftwt.WeightsWarning)
        variables = ftwt.from_torch(name, theirs.published_checkpoint(net), 10, gates, **arch)
    return net, ftwt.create_model(name, 10, gates, **arch), variables


# Optimised for compile time.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def compiled(model):
    """Outputs and gate loss of images, with r in place of the config's."""

    def apply(variables, images, r=None):
        outputs = model.apply(variables, images, control=ftwt.GateControl(r=r))
        return outputs, ftwt.gate_loss(outputs.gates)

    return quick(apply)


def check_close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * float(abs(expected).max()))


def check_equal(ours, expected):
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def weights(net):
    """Its tensors without batch norm's counts, which we do not need."""
    return {name: value for name, value in net.state_dict().items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("network", DENSE)
def test_a_dense_network_computes_the_same(network):
    net, model, variables = pair(network)
    with torch.no_grad():
        outputs, _ = compiled(model)(variables, IMAGES)
        check_close(outputs.logits, net(theirs.to_nchw(IMAGES)))


@pytest.mark.parametrize(("network", "gates"), GATED)
def test_a_gated_network_computes_the_same(network, gates):
    net, model, variables = pair(network, gates)
    for r in (0.4, 0.9, 1.0):
        net.r = r
        with torch.no_grad():
            expected = net(theirs.to_nchw(IMAGES))
        outputs, gate_loss = compiled(model)(variables, IMAGES, r)
        check_close(outputs.logits, expected.logits)
        assert len(outputs.gates) == len(expected.masks)
        for gate, logits, mask, target in zip(
            outputs.gates, expected.gate_logits, expected.masks, expected.targets, strict=True
        ):
            check_close(gate.logits, logits)
            np.testing.assert_array_equal(gate.mask, mask)
            np.testing.assert_array_equal(gate.target, target)
        np.testing.assert_array_equal(ftwt.macs(outputs, "published"), expected.macs)
        np.testing.assert_allclose(gate_loss, theirs.gate_loss(expected), rtol=1e-5)
    report = ftwt.summarize_gates(ftwt.count_gates(outputs.gates), samples=len(IMAGES))
    assert report.dynamic_filters > 0.1


@pytest.mark.parametrize(("network", "gates"), [("vgg", GATES), ("resnet8", AFTER), ("mobilenet_v1", None)])
def test_training_losses_and_gradients_are_the_same(network, gates):
    net, model, variables = pair(network, gates)

    def loss(params):
        outputs, _ = model.apply({**variables, "params": params}, IMAGES, train=True, mutable=["batch_stats"])
        task = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, LABELS).mean()
        return task + ftwt.gate_loss(outputs.gates), task

    (total, task), grads = quick(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    net = copy.deepcopy(net).train()
    net.r = GATES.r
    outputs = net(theirs.to_nchw(IMAGES))
    expected_task = F.cross_entropy(outputs if gates is None else outputs.logits, torch.from_numpy(LABELS))
    expected = expected_task if gates is None else expected_task + theirs.gate_loss(outputs)
    expected.backward()
    np.testing.assert_allclose([total, task], [expected.item(), expected_task.item()], rtol=1e-4)

    name, arch, *_ = NETWORKS[network]
    named = ftwt.to_torch(name, variables | {"params": grads}, 10, gates, **arch)
    whole = np.sqrt(sum(float((p.grad**2).sum()) for p in net.parameters()))
    for key, parameter in net.named_parameters():
        ours, reference = torch.from_numpy(named[key]), parameter.grad
        if key.endswith(HEAD):
            # Our kernel is theirs over C_in and its gradient theirs times C_in, but it left as a kernel does.
            ours = ours / ours.shape[1] ** 2
        # A convolution's bias before batch norm has a gradient of zero, and rounding.
        assert (ours - reference).norm() < 1e-3 * reference.norm() + 1e-6 * whole, key


@pytest.mark.parametrize(("network", "gates"), [*((network, None) for network in NETWORKS), *GATED])
def test_an_imported_network_is_exported_unchanged(network, gates):
    net, _, variables = pair(network, gates)
    name, arch, *_ = DENSE[network]
    back = ftwt.to_torch(name, variables, 10, gates, **arch)
    came = weights(net)
    assert back.keys() == came.keys()
    for key, tensor in came.items():
        assert back[key].dtype == np.float32
        # Dividing by C_in and multiplying by it is exact for powers of 2 alone.
        inexact = key.endswith(HEAD) and tensor.shape[1] & (tensor.shape[1] - 1)
        np.testing.assert_allclose(back[key], tensor, rtol=1e-6 if inexact else 0, err_msg=key)


@pytest.mark.parametrize(("arch", "total"), [({}, 91_154_944), ({"width": 0.5, "stem": "published"}, 78_604_544)])
def test_the_two_mobilenets_v2_have_the_dense_totals_that_were_published(arch, total):
    model = ftwt.create_model("mobilenet_v2", 10, **arch)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    outputs, _ = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), images)
    assert ftwt.dense_macs(outputs, "published") == ftwt.dense_macs(outputs, "exact") == total


def on_disk(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def mapped(change):
    return lambda state: {name: change(value) for name, value in state.items()}


def prefixed(prefix):
    return lambda state: {prefix + name: value for name, value in state.items()}


FORMS = {
    "tensors": dict,
    "module.": prefixed("module."),
    "_orig_mod.": prefixed("_orig_mod."),
    "module._orig_mod.": prefixed("module._orig_mod."),
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "best_acc": torch.tensor(0.9)},
    "model": lambda state: {"model": state, "optimizer": {"param_groups": []}},
    "file": lambda state: on_disk({"state_dict": prefixed("module.")(state), "arch": "resnet8"}),
    "parameters": mapped(lambda value: torch.nn.Parameter(value, requires_grad=value.is_floating_point())),
    "NumPy": mapped(lambda value: value.numpy()),
    "NumPy, transposed in memory": mapped(lambda value: np.asfortranarray(value.numpy())),
    "JAX": mapped(lambda value: jnp.asarray(value.numpy())),
    "float64": mapped(lambda value: value.double() if value.is_floating_point() else value),
    "no counts": lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
    "no copies": lambda state: {
        name: value for name, value in state.items() if not re.search(r"masked_conv\d?\.(conv|bn)\.", name)
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_a_state_dict_is_understood_in_every_form(form):
    net, _, variables = pair("resnet8", GATES)
    check_equal(ftwt.from_torch("resnet8", FORMS[form](net.state_dict()), 10, GATES), variables)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("library", ["torch", "jax", "numpy"])
def test_half_precision_becomes_float32(kind, library):
    def half(value):
        value = value.to(getattr(torch, kind)) if value.is_floating_point() else value
        if library == "torch":
            return value
        array = value.float().numpy().astype(jnp.dtype(kind)) if value.is_floating_point() else value.numpy()
        return jnp.asarray(array) if library == "jax" else array

    net, _, variables = pair("resnet8")
    variables = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(kind)).astype(np.float32), variables)
    found = ftwt.from_torch("resnet8", mapped(half)(net.state_dict()), 10)
    check_equal(found, variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
