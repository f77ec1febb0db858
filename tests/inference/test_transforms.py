"""Flax's and JAX's transformations of networks with units: what works, and what is refused on one line."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ftwt_jax as ftwt
from tests.helpers.compact import (
    KEY,
    assert_close,
    assert_same,
    every_way,
    masked,
    random_images,
    random_variables,
)

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("quick_compilation")]
GATES = ftwt.GateConfig()
IMAGES = random_images(4)


class Small(nn.Module):
    features: int = 8

    @nn.compact
    def __call__(self, images):
        x = ftwt.GatedUnit(self.features, gates=GATES)(images)
        return ftwt.Classifier(5)(ftwt.GatedUnit(self.features, gates=GATES)(x))


class Stacked(nn.Module):
    """Units whose parameters are stacked, by `nn.scan` or `nn.vmap`."""

    how: str

    @nn.compact
    def __call__(self, images):
        x = ftwt.GatedUnit(8, gates=GATES)(images)
        axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
        if self.how == "vmap":
            units = nn.vmap(ftwt.GatedUnit, in_axes=None, axis_size=2, **axes)
            y = units(8, gates=GATES)(x).values.sum(0)
        else:

            def body(unit, values, _):
                return unit(values).values, None

            y, _ = nn.scan(body, length=2, **axes)(ftwt.GatedUnit(8, gates=GATES), x.values, None)
        return ftwt.Classifier(5)(y)


@pytest.mark.parametrize("how", ["vmap", "scan"])
def test_stacked_parameters_say_what_is_lost_and_are_not_run_compact(how):
    model = Stacked(how)
    variables = random_variables(model, IMAGES)
    with pytest.warns(ftwt.CompositionWarning, match="leaves masks, layer records and GateControl behind"):
        model.apply(variables, IMAGES)
    with pytest.raises(ftwt.UserError, match="a module for each layer; make them in a loop") as error:
        ftwt.compact(model, variables)(IMAGES)
    assert "\n" not in str(error.value)


def test_an_ensemble_under_vmap_is_each_of_its_networks():
    model = Small()
    each = [random_variables(model, IMAGES, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    outputs = jax.vmap(model.apply, (0, None))(stacked, IMAGES)
    per_network = jax.vmap(lambda v: ftwt.macs(model.apply(v, IMAGES)))(stacked)
    for index, variables in enumerate(each):
        expected = masked(model, variables, IMAGES)
        assert_close(outputs.logits[index], expected.logits)
        np.testing.assert_allclose(per_network[index], ftwt.macs(expected), rtol=1e-6)
    with pytest.raises(ftwt.UserError, match="count within the call"):
        ftwt.macs(outputs)


def test_tabulate_prints_a_line_for_layers_not_a_page():
    model = ftwt.create_model("resnet20", 10, gates=GATES)
    table = model.tabulate(KEY, np.zeros((1, 32, 32, 3), np.float32), depth=1, console_kwargs={"width": 200})
    assert len(table.splitlines()) < 160
    assert "Total Parameters" in table
    assert "20 layers" in table


def test_a_network_is_an_nnx_module_that_optax_trains():
    """As docs/api.md shows it."""
    model = nnx.bridge.ToNNX(Small(), rngs=nnx.Rngs(0))
    nnx.bridge.lazy_init(model, IMAGES)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    labels = jnp.array([0, 1, 2, 3])

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            outputs = model(IMAGES)
            task = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, labels).mean()
            return task + ftwt.gate_loss(outputs.gates)

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_variables_that_change_later_do_not_reach_a_compact_network():
    model = Small()
    variables = jax.tree.map(jnp.array, random_variables(model, IMAGES))
    expected = masked(model, variables, IMAGES)
    network = ftwt.compact(model, variables)
    jax.jit(lambda v: jax.tree.map(jnp.zeros_like, v), donate_argnums=0)(variables)
    assert_same(network(IMAGES), expected)
    host = random_variables(model, IMAGES)
    network = ftwt.compact(model, host)
    jax.tree.map(lambda leaf: leaf.fill(0), host)
    assert_same(network(IMAGES), expected)


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, images, more):
        return Small()(images + more)


def refusals():
    model = Small()
    variables = random_variables(model, IMAGES)
    gone = jax.tree.map(jnp.array, variables)
    jax.tree.map(lambda leaf: leaf.delete(), gone)
    network = ftwt.compact(model, variables)
    return {
        "params alone": lambda: ftwt.compact(model, variables["params"]),
        "nothing": lambda: ftwt.compact(model, None),
        "traced": lambda: jax.jit(lambda v: ftwt.compact(model, v)(IMAGES).logits)(variables),
        "deleted": lambda: ftwt.compact(model, gone),
        "two inputs": lambda: network(IMAGES, IMAGES),
        "a dict": lambda: network({"images": IMAGES}),
        "control": lambda: ftwt.compact(model, variables, control=ftwt.GateControl()),
        "a gradient": lambda: jax.grad(lambda images: network(images).logits.sum())(jnp.asarray(IMAGES)),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_compact_execution_cannot_do_it_says_on_one_line(name):
    if name == "a gradient" and not ftwt.compact(Small(), random_variables(Small(), IMAGES)).execution.per_image:
        pytest.skip("needs the kernels for a CPU")
    with pytest.raises(ftwt.UserError) as error:
        refusals()[name]()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_a_portable_compact_network_has_derivatives():
    model = Small()
    variables = random_variables(model, IMAGES)
    network = ftwt.compact(model, variables, portable=True)
    ours = jax.grad(lambda images: network(images).logits.sum())(jnp.asarray(IMAGES))
    theirs = jax.grad(lambda images: model.apply(variables, images).logits.sum())(jnp.asarray(IMAGES))
    assert_close(ours, theirs)


def test_strict_rank_promotion_breaks_nothing():
    with jax.numpy_rank_promotion("raise"):
        for name in ("resnet8", "mobilenet_v1", "vgg11_bn"):
            model = ftwt.create_model(name, 5, gates=GATES, width=0.1)
            images = random_images(2, side=32)
            # Ranks are looked at while tracing.
            jax.eval_shape(model.init, KEY, images)
            variables = random_variables(model, images)
            jax.eval_shape(
                lambda images, model=model, variables=variables: ftwt.macs(model.apply(variables, images)), images
            )
            for network in every_way(model, variables, images) if name == "resnet8" else ():
                network(images)

            def loss(params, variables=variables, images=images, model=model):
                out, _ = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
                return (
                    ftwt.gate_loss(out.gates)
                    + optax.softmax_cross_entropy_with_integer_labels(out.logits, jnp.zeros(2, int)).mean()
                )

            jax.eval_shape(jax.grad(loss), variables["params"])
