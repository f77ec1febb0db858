"""A network with subnets, its router, and its compact execution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import ftwt_jax as ftwt
from ftwt_jax.inference.subnets import cut_by_choice, cut_rows, merged, part_sizes
from tests.conftest import random_like
from tests.helpers.compact import KEY, assert_close, random_images
from tests.subnets.test_find import make

IMAGES = random_images(32, side=16)


def other_norms(variables):
    """The variables with a batch norm of its own in each subnet."""
    rng = np.random.default_rng(5)
    return with_norms(variables, lambda leaf: leaf * rng.uniform(0.6, 1.6, leaf.shape) + 0.05)


@pytest.fixture(scope="module", params=["resnet", "own"])
def routed(request, quick_compilation):
    """A network with three subnets, variables whose router uses them all, and its outputs."""
    model, variables = make(request.param)
    subnets = ftwt.find_subnets(model, variables, IMAGES, 3, 0.3, multiple=1)
    network = ftwt.SubnetNetwork(model, subnets, ftwt.make_router(3, (16, 16, 3), subnets.dense_macs))
    made = ftwt.init_subnets(network, variables, IMAGES[:1], KEY)
    router = random_like(jax.eval_shape(lambda: {kind: made[kind]["router"] for kind in made}), seed=3)
    logits = jax.jit(network.router.apply)(router, IMAGES).logits
    router["params"]["classifier"]["dense"]["bias"] -= np.asarray(logits.mean(axis=0))
    made = other_norms({kind: {**tree, "router": router[kind]} for kind, tree in made.items()})
    return network, made, jax.jit(network.apply)(made, IMAGES)


def test_a_router_costs_little(routed):
    network, _, outputs = routed
    images = jnp.zeros((1, 16, 16, 3))
    cost = ftwt.macs(jax.eval_shape(network.router.init_with_output, KEY, images)[0])[0]
    assert cost <= 0.02 * network.subnets.dense_macs
    assert len(set(np.asarray(outputs.routes.choice))) == 3
    np.testing.assert_allclose(ftwt.macs(outputs), network.subnets.macs[outputs.routes.choice] + cost)
    assert ftwt.dense_macs(outputs) == network.subnets.dense_macs


def test_layers_keep_their_names(routed):
    network, variables, _ = routed
    dense = jax.eval_shape(network.network.init, KEY, IMAGES[:1])
    assert set(variables["params"]) == {*dense["params"], "router"}
    assert "gate_head" not in str(jax.tree.structure(variables))


@pytest.mark.parametrize("batch", [1, 7])
def test_compact_execution_is_the_masked_network(routed, batch):
    network, variables, outputs = routed
    compact = ftwt.compact(network, variables)
    for start in range(0, 32 // batch * batch, max(batch, 8)):
        part = IMAGES[start : start + batch]
        ours, whole = compact(part), outputs.logits[start : start + batch]
        np.testing.assert_allclose(ours.logits, whole, atol=1e-4 * float(jnp.abs(outputs.logits).max()))
        np.testing.assert_array_equal(ours.routes.choice, outputs.routes.choice[start : start + batch])
        np.testing.assert_array_equal(ftwt.macs(ours), ftwt.macs(outputs)[start : start + batch])
        assert_close(compact.logits(part), ours.logits)
    assert_close(jax.jit(compact.logits)(IMAGES[:5]), outputs.logits[:5])
    np.testing.assert_allclose(compact.macs, network.subnets.macs)


def test_nothing_is_compiled_in_steady_state(quick_compilation):
    model, variables = make("vgg")
    subnets = ftwt.find_subnets(model, variables, IMAGES, 3, 0.3, multiple=1)
    network = ftwt.SubnetNetwork(model, subnets, ftwt.make_router(3, (16, 16, 3), subnets.dense_macs))
    made = ftwt.init_subnets(network, variables, IMAGES[:1], KEY)
    compact = ftwt.compact(network, made)
    compact.prepare(IMAGES)
    compact.logits(IMAGES)
    programs = [part._cache_size() for part in compact._parts]
    for seed in range(6):
        compact.logits(random_images(32, side=16, seed=seed))
    assert [part._cache_size() for part in compact._parts] == programs
    assert max(programs) <= 3


def test_a_single_subnet_needs_no_router(quick_compilation):
    model, variables = make("resnet")
    subnets = ftwt.find_subnets(model, variables, IMAGES, 1, 0.4)
    assert ftwt.make_router(1, (16, 16, 3), subnets.dense_macs) is None
    network = ftwt.SubnetNetwork(model, subnets)
    made = ftwt.init_subnets(network, variables, IMAGES[:1], KEY)
    assert_close(ftwt.compact(network, made).logits(IMAGES[:4]), jax.jit(network.apply)(made, IMAGES[:4]).logits)


def test_a_choice_overrules_the_router(routed):
    network, variables, outputs = routed
    control = ftwt.GateControl(choice=jnp.array([2, -1, 0, -1]))
    found = network.apply(variables, IMAGES[:4], control=control)
    wanted = np.array([2, outputs.routes.choice[1], 0, outputs.routes.choice[3]])
    np.testing.assert_array_equal(found.routes.choice, wanted)


def test_the_batch_norms_of_subnets_begin_as_that_of_the_network(quick_compilation):
    model, variables = make("resnet")
    subnets = ftwt.find_subnets(model, variables, IMAGES, 2, 0.3)
    network = ftwt.SubnetNetwork(model, subnets, ftwt.make_router(2, (16, 16, 3), subnets.dense_macs))
    made = flatten_dict(ftwt.init_subnets(network, variables, IMAGES[:1], KEY), sep="/")
    norms = {name: leaf for name, leaf in made.items() if "/bn/" in name and "/router/" not in name}
    before = flatten_dict(variables, sep="/")
    assert norms
    for name, leaf in norms.items():
        np.testing.assert_array_equal(leaf, np.stack([before[name]] * 2))


def test_only_its_own_images_train_the_batch_norm_of_a_subnet(routed):
    network, variables, _ = routed
    control = ftwt.GateControl(choice=jnp.array([0, 2, 2, 0]))

    def loss(params):
        given = {**variables, "params": params}
        outputs, changed = network.apply(given, IMAGES[:4], train=True, control=control, mutable=["batch_stats"])
        return jnp.sum(outputs.logits**2), changed["batch_stats"]

    grads, statistics = jax.grad(loss, has_aux=True)(variables["params"])
    before = flatten_dict(variables["batch_stats"])
    assert not any("router" in path for path in flatten_dict(grads) if flatten_dict(grads)[path].any())
    for path, leaf in flatten_dict(statistics).items():
        if leaf.ndim == 2:
            np.testing.assert_array_equal(leaf[1], before[path][1])
            assert not np.array_equal(leaf[0], before[path][0])
    norms = [leaf for path, leaf in flatten_dict(grads).items() if "bn" in path and "router" not in path]
    assert not any(leaf[1].any() for leaf in norms)
    assert all(leaf[0].any() and leaf[2].any() for leaf in norms)


def test_the_task_does_not_train_the_router(routed):
    network, variables, _ = routed

    def loss(params):
        outputs, _ = network.apply({**variables, "params": params}, IMAGES[:4], train=True, mutable=["batch_stats"])
        return jnp.sum(outputs.logits**2)

    grads = jax.grad(loss)(variables["params"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads["router"]))
    assert all(any(np.any(leaf) for leaf in jax.tree.leaves(tree)) for name, tree in grads.items() if name != "router")


def test_variables_of_another_network_are_refused(routed):
    network, _, _ = routed
    with pytest.raises(ftwt.UserError, match="another network"):
        ftwt.init_subnets(network, {"params": {}}, IMAGES[:1], KEY)


def test_compact_execution_takes_one_batch_norm_for_all_subnets_too(routed):
    network, variables, _ = routed
    one = with_norms(variables, lambda leaf: leaf[1])
    alike = with_norms(variables, lambda leaf: jnp.stack([leaf[1]] * 3))
    found = ftwt.compact(network, one).logits(IMAGES[:6])
    assert_close(found, jax.jit(network.apply)(alike, IMAGES[:6]).logits)


def test_batch_norms_of_another_number_of_subnets_are_refused(routed):
    network, variables, _ = routed
    with pytest.raises(ftwt.UserError, match=r"bn/.* is not that of 3 subnets: make variables by ftwt\.init_subnets"):
        ftwt.compact(network, with_norms(variables, lambda leaf: leaf[:2]))


def with_norms(variables, change):
    """The variables with other batch norms of subnets."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: change(leaf) if "'bn'" in str(path) and leaf.ndim == 2 else leaf, variables
    )


def test_masks_of_subnets_need_a_choice():
    model, variables = make("vgg")
    with pytest.raises(ftwt.UserError, match="choice="):
        model.apply(variables, IMAGES[:1], control=ftwt.GateControl(masks="subnets"))


def test_a_batch_is_cut_by_subnet_and_put_together_again():
    sizes = part_sizes(32)
    assert sizes == [32, 8, 2]
    lengths = {number: [len(rows) for rows, _ in cut_rows(np.arange(number), sizes)] for number in (1, 3, 5, 9, 17, 32)}
    assert lengths == {1: [1], 3: [2, 1], 5: [5], 9: [8, 1], 17: [17], 32: [32]}
    choice = np.random.default_rng(0).integers(0, 3, 32)
    parts = cut_by_choice(choice, part_sizes(len(choice)))
    assert all(len(padded) in sizes and set(padded) == set(rows) for _, rows, padded in parts)
    logits = [np.stack([padded, np.full(len(padded), subnet)], axis=1) for subnet, _, padded in parts]
    np.testing.assert_array_equal(merged(parts, logits), np.stack([np.arange(32), choice], axis=1))
