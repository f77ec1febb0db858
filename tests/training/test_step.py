"""The training step, its optimizers and schedules."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

import ftwt_jax as ftwt
from ftwt_jax.data.source import ArraySource, Dataset
from ftwt_jax.models.vit import ViT
from ftwt_jax.parallel.sharding import data_mesh, put_batch, replicated
from ftwt_jax.training import optim
from ftwt_jax.training.settings import BASELINE
from ftwt_jax.training.step import GateTraining, create_state, make_train_step, normalizer
from ftwt_jax.weights.adapt import adapt
from ftwt_jax.workdir.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPOCHS, PER_EPOCH = 200, 10
CLASSES = {"class_names": ["a", "b", "c", "d"]}
TOTAL = EPOCHS * PER_EPOCH


def settings(**changes) -> ConfigDict:
    """The published recipe of gate training on CIFAR."""
    published = {
        "lr": 0.01,
        "schedule": "step",
        "lr_boundaries": (81, 122, 151),
        "lr_factor": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "head_lr": 0.1,
        "loss_weight": 1.0,
        "cooldown": 0.5,
    }
    return ConfigDict(published | changes)


def test_published_schedule_drops_at_its_epochs():
    rate = optim.learning_rate(settings(lr=0.1), PER_EPOCH, TOTAL)
    wanted = {0: 0.1, 80: 0.1, 81: 0.01, 121: 0.01, 122: 0.001, 150: 0.001, 151: 0.0001, 199: 0.0001}
    for epoch, value in wanted.items():
        assert rate(epoch * PER_EPOCH) == pytest.approx(value, rel=1e-5), epoch
    assert rate(81 * PER_EPOCH - 1) == pytest.approx(0.1, rel=1e-5)


def test_cosine_schedule_ends_at_zero():
    rate = optim.learning_rate(settings(schedule="cosine", lr=0.2), PER_EPOCH, TOTAL)
    np.testing.assert_allclose([rate(0), rate(TOTAL // 2), rate(TOTAL)], [0.2, 0.1, 0.0], atol=1e-6)


def test_gate_loss_stops_counting_at_the_cooldown():
    weight = optim.gate_weight(settings(loss_weight=3.0), TOTAL)
    assert [float(weight(s)) for s in (0, TOTAL // 2 - 1, TOTAL // 2, TOTAL)] == [3.0, 3.0, 0.0, 0.0]


def test_optimizer_follows_the_published_recipe():
    """Against SGD written out: momentum, decay on backbone kernels alone, heads at their own rate until they freeze."""
    stage = settings(cooldown=0.5, lr_boundaries=(2,))
    optimizer, _ = optim.make_optimizer(stage, steps_per_epoch=1, total_steps=6)
    rng = np.random.default_rng(0)
    unit = {"conv": {"kernel": (2, 2)}, "bn": {"scale": (3,), "bias": (3,)}, "gate_head": {"dense": {"kernel": (2, 3)}}}
    params = {"unit": jax.tree.map(lambda s: rng.normal(size=s), unit, is_leaf=lambda x: isinstance(x, tuple))}
    state = optimizer.init(params)
    wanted = jax.tree.map(np.copy, params)
    speed = jax.tree.map(np.zeros_like, params)
    for step in range(6):
        grads = jax.tree.map(lambda p: rng.normal(size=p.shape), params)
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        rate = 0.01 if step < 2 else 0.001
        for path, lr, decay in (
            (("conv", "kernel"), rate, 5e-4),
            (("bn", "scale"), rate, 0),
            (("bn", "bias"), rate, 0),
            (("gate_head", "dense", "kernel"), 0.1 if step < 3 else 0, 0),
        ):
            w, v, g = wanted["unit"], speed["unit"], grads["unit"]
            for key in path[:-1]:
                w, v, g = w[key], v[key], g[key]
            v[path[-1]] = 0.9 * v[path[-1]] + g[path[-1]] + decay * w[path[-1]]
            w[path[-1]] = w[path[-1]] - lr * v[path[-1]]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), params, wanted)


@pytest.fixture(scope="module")
def job():
    """A gated network, its step, a fresh state and batches."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (32, 8, 8, 3), np.uint8)
    source = ArraySource(images, rng.integers(0, 4, 32).astype(np.int32))
    dataset = Dataset(source, source, 4, (8, 8, 3), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    model = ftwt.create_model("vgg_bn", 4, gates=ftwt.GateConfig(r=0.8), plan=(8, "M", 12))
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    stage = settings(lr=0.05)
    optimizer, _ = optim.make_optimizer(stage, 2, 10)
    mesh, normalize = data_mesh(), normalizer(dataset)
    step = make_train_step(
        model, optimizer, lambda batch: normalize(batch["image"]), mesh, GateTraining(optim.gate_weight(stage, 10))
    )
    batch = put_batch({"image": images, "label": np.asarray(source.labels)}, mesh)

    def fresh():
        return jax.device_put(create_state(variables, optimizer), replicated(mesh))

    return step, fresh, batch


def test_step_compiles_once_whatever_r(job):
    step, fresh, batch = job
    state = fresh()
    for r in np.linspace(0.5, 1.0, 10):
        state, _ = step(state, batch, jnp.float32(r))
    assert step._cache_size() == 1
    assert int(state.step) == 10


@pytest.mark.device
def test_steps_lower_both_losses(job):
    step, fresh, batch = job
    state, seen = fresh(), []
    for _ in range(30):
        state, metrics = step(state, batch, jnp.float32(0.9))
        seen.append(jax.device_get(metrics))
    assert seen[-1]["loss"] < 0.8 * seen[0]["loss"]
    assert seen[4]["gate_loss"] < seen[0]["gate_loss"]


def test_a_network_without_batch_norm_is_trained_kept_and_adapted_to_images_of_another_size(tmp_path):
    model = ViT(4, depth=1, width=1 / 6, gates=ftwt.GateConfig())
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    assert "batch_stats" not in variables
    stage = settings(lr=0.02)
    optimizer, _ = optim.make_optimizer(stage, 2, 10)
    mesh, weight = data_mesh(), GateTraining(optim.gate_weight(stage, 10))
    step = make_train_step(model, optimizer, lambda batch: batch["image"] / 255 - 0.5, mesh, weight, accumulate=2)
    batch = put_batch({"image": images, "label": np.arange(8, dtype=np.int32) % 4}, mesh)
    state, seen = jax.device_put(create_state(variables, optimizer), replicated(mesh)), []
    for _ in range(5):
        state, metrics = step(state, batch, jnp.float32(0.9))
        seen.append(jax.device_get(metrics["loss"]))
    assert seen[-1] < seen[0]
    with contextlib.closing(Checkpoints(tmp_path, BASELINE, CLASSES, create=True)) as checkpoints:
        checkpoints.save_network({"params": jax.device_get(state.params)}, finished=True)
    with contextlib.closing(Checkpoints(tmp_path, BASELINE, CLASSES)) as checkpoints:
        kept = checkpoints.restore_network(jax.tree.map(np.asarray, state.variables), replicated(mesh))
    jax.tree.map(np.testing.assert_array_equal, kept, state.variables)
    larger = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    adapted, _ = adapt(kept, {path: leaf.shape for path, leaf in larger.items()})
    assert {path: leaf.shape for path, leaf in flatten_dict(adapted).items()} == {
        path: leaf.shape for path, leaf in larger.items()
    }


def test_state_is_donated(job):
    step, fresh, batch = job
    state = fresh()
    step(state, batch, jnp.float32(0.8))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


@pytest.mark.device
def test_heads_stand_still_after_the_cooldown_and_the_backbone_goes_on(job):
    step, fresh, batch = job
    state, seen = fresh(), []
    for _ in range(8):
        state, _ = step(state, batch, jnp.float32(0.8))
        seen.append(jax.device_get(state.params))
    heads = [p["unit1"]["gate_head"]["dense"]["kernel"] for p in seen]
    kernels = [p["unit1"]["conv"]["kernel"] for p in seen]
    assert (heads[3] != heads[4]).any()
    for later in range(5, 8):
        np.testing.assert_array_equal(heads[4], heads[later])
        assert (kernels[later - 1] != kernels[later]).any()


def test_normalised_images_have_mean_0_and_deviation_1():
    images = np.random.default_rng(0).integers(0, 256, (50, 6, 6, 2), np.uint8)
    source = ArraySource(images, np.zeros(50, np.int32))
    pixels = images / 255
    dataset = Dataset(source, source, 1, (6, 6, 2), pixels.mean((0, 1, 2)), pixels.std((0, 1, 2)))
    found = np.asarray(normalizer(dataset)(jnp.asarray(images)))
    np.testing.assert_allclose(found.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(found.std((0, 1, 2)), 1, atol=1e-5)
