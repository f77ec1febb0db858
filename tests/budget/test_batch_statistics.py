"""Batch statistics measured again, against mean and variance counted with NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ftwt_jax as ftwt
from ftwt_jax.budget import batch_statistics
from ftwt_jax.budget.batch_statistics import BatchStatistics
from ftwt_jax.ops.batch_norm import EPSILON
from ftwt_jax.parallel.sharding import data_mesh
from tests.conftest import random_like

PLAN = (6, "M", 10)
SIZE = 12


def normalize(images):
    return images.astype(jnp.float32) / 128 - 1


def batch(seed: int, padding: int = 0) -> dict[str, np.ndarray]:
    """Images as `eval_batches` gives them; the last ones fill the batch up."""
    rng = np.random.default_rng(seed)
    weight = np.ones(SIZE, np.float32)
    weight[SIZE - padding :] = 0
    images = rng.integers(0, 256, (SIZE, 8, 8, 3), np.uint8)
    return {"image": images, "label": np.zeros(SIZE, np.int32), "weight": weight}


@pytest.fixture(scope="module")
def measured():
    """What measures, and a gated network's variables with nothing left at its first value."""
    model = ftwt.create_model("vgg_bn", 4, gates=ftwt.GateConfig.paper(), plan=PLAN)
    variables = random_like(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))))
    return BatchStatistics(model, normalize, data_mesh()), variables


def counted(variables: dict, images: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Mean and variance of one batch before each batch norm, every layer masked as the heads say."""
    x, found = np.asarray(normalize(images), np.float64), {}
    for index, features in enumerate(f for f in PLAN if f != "M"):
        unit = variables["params"][f"unit{index}"]
        y = np.asarray(nn.Conv(features, (3, 3), padding=1).apply({"params": unit["conv"]}, x), np.float64)
        mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
        found[f"unit{index}"] = {"bn": {"mean": mean, "var": var}}
        y = np.maximum((y - mean) / np.sqrt(var + EPSILON) * unit["bn"]["scale"] + unit["bn"]["bias"], 0)
        pooled = np.exp(x.max((1, 2)))
        head = unit["gate_head"]["dense"]
        logits = pooled / pooled.sum(-1, keepdims=True) * x.shape[-1] @ head["kernel"] + head["bias"]
        x = np.where((logits > 0)[:, None, None, :], y, 0)
        assert 0.2 < np.mean(logits > 0) < 0.8
        if index == 0:
            x = x.reshape(SIZE, 4, 2, 4, 2, features).max((2, 4))
    return found


def assert_close(found: dict, wanted: dict) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)


def mean_of(*parts: dict) -> dict:
    return jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *parts)


def test_mean_and_variance_are_averaged_over_the_batches_whatever_they_were_before(measured):
    statistics, variables = measured
    batches = [batch(seed) for seed in range(3)]
    found = statistics.renewed(variables, batches)
    wanted = mean_of(*(counted(variables, one["image"]) for one in batches))
    assert_close(found["batch_stats"], wanted)
    others = {**variables, "batch_stats": jax.tree.map(lambda x: 3 * x + 1, variables["batch_stats"])}
    assert_close(statistics.renewed(others, batches)["batch_stats"], wanted)


def test_only_the_batch_statistics_are_changed_and_what_was_given_stays(measured):
    statistics, variables = measured
    before = jax.tree.map(np.copy, variables)
    found = statistics.renewed(variables, [batch(0)])
    jax.tree.map(np.testing.assert_array_equal, found["params"], before["params"])
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    changed = jax.tree.map(lambda a, b: bool(np.all(a != b)), found["batch_stats"], before["batch_stats"])
    assert all(jax.tree.leaves(changed))


def test_a_batch_that_was_filled_up_is_left_out(measured):
    statistics, variables = measured
    full = [batch(0), batch(1)]
    wanted = statistics.renewed(variables, full)["batch_stats"]
    for batches in ([*full, batch(2, padding=1)], [full[0], batch(3, padding=5), full[1]]):
        found = statistics.renewed(variables, batches)["batch_stats"]
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_filled_up_batch_is_used_where_there_is_no_other(measured):
    statistics, variables = measured
    only = batch(0, padding=3)
    assert_close(statistics.renewed(variables, [only])["batch_stats"], counted(variables, only["image"]))


def test_a_batch_that_is_filled_up_on_another_process_is_left_out_here_too(measured, monkeypatch):
    """Each process sees its part of a batch alone; where they disagreed, each would wait for the other for ever."""
    statistics, variables = measured
    full = [batch(0), batch(1)]
    wanted = statistics.renewed(variables, full[:1])["batch_stats"]
    monkeypatch.setattr(batch_statistics, "all_gather", lambda names: [*names, "1"])
    found = statistics.renewed(variables, full)["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_any_number_of_batches_and_any_variables_are_measured_with_one_compilation(measured):
    statistics, variables = measured
    statistics.renewed(variables, [batch(0)])
    before = statistics._step._cache_size()
    other = jax.tree.map(lambda x: x * 1.5, variables)
    statistics.renewed(other, [batch(seed) for seed in range(4)])
    assert statistics._step._cache_size() == before


def test_the_statistics_of_subnets_are_those_of_their_own_images(quick_compilation):
    """The first layer's, of images that are in several batches, in one, and in none."""
    model = ftwt.create_model("vgg_bn", 4, gates=ftwt.GateConfig(), plan=PLAN)
    batches, shape = [batch(seed) for seed in range(3)], (8, 8, 3)
    images = np.concatenate([one["image"] for one in batches])
    dense = random_like(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape))))
    subnets = ftwt.find_subnets(model, dense, normalize(images), 3, 0.3, source="targets", multiple=1)
    network = ftwt.SubnetNetwork(model, subnets, Brightness(3))
    variables = ftwt.init_subnets(network, dense, normalize(images[:1]), jax.random.key(1))
    # Only the second batch has images for subnet 1, none has any for subnet 2.
    batches[0]["image"][:] //= 2
    batches[1]["image"][:5] //= 2
    batches[2]["image"][:] //= 2
    found = BatchStatistics(network, normalize, data_mesh()).renewed(variables, batches)["batch_stats"]
    dark = np.concatenate([batches[0]["image"], batches[1]["image"][:5], batches[2]["image"]])
    unit = variables["params"]["unit0"]
    before = variables["batch_stats"]["unit0"]["bn"]
    for subnet, own in enumerate((dark, batches[1]["image"][5:])):
        y = nn.Conv(PLAN[0], (3, 3), padding=1).apply({"params": unit["conv"]}, normalize(own))
        np.testing.assert_allclose(found["unit0"]["bn"]["mean"][subnet], y.mean((0, 1, 2)), rtol=1e-4, atol=1e-4)
    for leaf in ("mean", "var"):
        np.testing.assert_allclose(found["unit0"]["bn"][leaf][2], before[leaf][2], rtol=1e-4, atol=1e-5)


class Brightness(nn.Module):
    """A router without variables: dark images to subnet 0, bright ones to subnet 1."""

    count: int

    @nn.compact
    def __call__(self, images, train=False):
        # Half of what is drawn evenly from 0 to 255 has a mean of 64, -0.5 when it is prepared.
        bright = jnp.mean(images, axis=(1, 2, 3)) > -0.25
        return ftwt.Outputs(jax.nn.one_hot(bright.astype(jnp.int32), self.count), ())
