"""Batch norm against Flax's, and the reductions that it uses against jax.numpy's."""

import dataclasses

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from ftwt_jax.ops import native
from ftwt_jax.ops.batch_norm import BatchNorm, BatchNormBySubnet
from ftwt_jax.ops.reductions import channel_sum, max_pool_all, mean_pool_all, over_channels
from tests.conftest import random_like

KEY = jax.random.key(0)
SHAPES = [(1, 1, 1, 1), (1, 1, 1, 5), (1, 4, 3, 6), (4, 1, 1, 6), (3, 2, 5, 7), (2, 8, 8, 16)]
TOLERANCES = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}
either_use = pytest.mark.parametrize("evaluate", [False, True], ids=["train", "evaluate"])
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def normals(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def distinct(shape, dtype=jnp.float32):
    """No two values of a map are equal, even when rounded to bfloat16."""
    samples, height, width, features = shape
    rng = np.random.default_rng(0)
    pixels = np.stack([rng.permutation(height * width) for _ in range(samples * features)])
    maps = pixels.reshape(samples, features, height, width).transpose(0, 2, 3, 1)
    return jnp.asarray(maps - height * width // 2, dtype)


def assert_close(ours, theirs, tolerance):
    """Equal up to rounding relative to the largest number of each array."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        b = np.asarray(b, np.float32)
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))


def both(evaluate, dtype=None):
    """Batch norm, and Flax's."""
    flaxs = nn.BatchNorm(use_running_average=evaluate, momentum=0.9, epsilon=1e-5, dtype=dtype)
    return BatchNorm(use_running_average=evaluate, dtype=dtype), flaxs


def with_gradients(layer, variables, x, weights):
    """The output, the new statistics, and the gradients of a weighted sum by parameters and input."""

    def loss(params, x):
        out, new = layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.sum(out.astype(jnp.float32) * weights), (out, new)

    gradients, (out, new) = jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)
    return {"out": out, "new": new, "gradients": gradients}


@either_use
def test_variables_equal_flaxs(evaluate):
    x = normals((2, 3, 3, 5), dtype=jnp.bfloat16)
    ours, flaxs = jax.jit(lambda x: [layer.init(KEY, x) for layer in both(evaluate, jnp.bfloat16)])(x)
    names = {"/".join(path) for path in flax.traverse_util.flatten_dict(ours)}
    assert names == {"params/scale", "params/bias", "batch_stats/mean", "batch_stats/var"}
    assert_close(ours, flaxs, 0)


def compared(shape, evaluate, dtype=jnp.float32, asked=None):
    """Results of our batch norm and of Flax's on maps of one dtype with another as result."""
    x = normals(shape, 1, dtype) * 2 + 1
    variables = random_like(jax.eval_shape(both(evaluate)[1].init, KEY, x))
    compare = jax.jit(lambda *given: [with_gradients(layer, *given) for layer in both(evaluate, asked)])
    return compare(variables, x, normals(shape, 2))


@either_use
@every_shape
def test_outputs_statistics_and_gradients_equal_flaxs(shape, evaluate):
    assert_close(*compared(shape, evaluate), 1e-5)


@every_shape
def test_without_a_compiler_training_equals_flaxs_too(shape, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    assert_close(*compared(shape, evaluate=False), 1e-5)


@pytest.mark.parametrize("shape", [(16, 9, 8, 19), (200, 16, 16, 16)], ids=str)
def test_maps_in_many_parts_equal_flaxs_and_themselves_every_time(shape):
    ours, flaxs = compared(shape, evaluate=False)
    assert_close(ours, flaxs, 1e-5)
    assert_close(ours, compared(shape, evaluate=False)[0], 0)


@either_use
@pytest.mark.parametrize(
    ("dtype", "asked"),
    [(jnp.bfloat16, None), (jnp.bfloat16, jnp.bfloat16), (jnp.float32, jnp.bfloat16)],
    ids=["bf16", "bf16 as bf16", "f32 as bf16"],
)
@pytest.mark.parametrize("shape", [(1, 4, 3, 6), (3, 2, 5, 7)], ids=str)
def test_in_bfloat16_they_equal_flaxs_with_statistics_in_float32(shape, dtype, asked, evaluate):
    ours, flaxs = compared(shape, evaluate, dtype, asked)
    assert ours["out"].dtype == (asked or jnp.float32)
    assert_close(ours, flaxs, TOLERANCES[jnp.bfloat16])
    assert {leaf.dtype for leaf in jax.tree.leaves(ours["new"])} == {np.dtype("float32")}
    assert_close(ours["new"], flaxs["new"], 1e-5)


def test_evaluation_does_not_change_the_statistics():
    ours, _ = both(evaluate=True)
    x = normals((3, 2, 2, 4))
    variables = random_like(jax.eval_shape(ours.init, KEY, x))
    out, new = jax.jit(lambda *given: ours.apply(*given, mutable=["batch_stats"]))(variables, x)
    assert_close(new["batch_stats"], variables["batch_stats"], 0)
    assert_close(jax.jit(ours.apply)(variables, x), out, 0)


def test_a_channel_of_one_value_far_from_zero_stays_finite():
    x = jnp.full((4, 3, 3, 2), 1000.1)
    ours, _ = both(evaluate=False)
    result = jax.jit(lambda *given: with_gradients(ours, ours.init(KEY, x), *given))(x, normals(x.shape))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))
    assert (result["new"]["batch_stats"]["var"] >= 0.9).all()


def test_several_steps_under_scan_equal_flaxs():
    batches = normals((5, 4, 3, 3, 6)) * 3 - 1

    def run(layer):
        variables = layer.init(KEY, batches[0])

        def step(statistics, x):
            out, new = layer.apply({**variables, "batch_stats": statistics}, x, mutable=["batch_stats"])
            return new["batch_stats"], out

        return jax.lax.scan(step, variables["batch_stats"], batches)

    assert_close(*jax.jit(lambda: [run(layer) for layer in both(evaluate=False)])(), 1e-5)


@either_use
def test_gradients_by_vmap_equal_flaxs(evaluate):
    x = normals((3, 4, 2, 2, 5))
    weights = normals((4, 2, 2, 5), 1)
    variables = random_like(jax.eval_shape(both(True)[1].init, KEY, x[0]))

    def mapped(layer, x):
        return jax.vmap(lambda x: with_gradients(layer, variables, x, weights))(x)

    assert_close(*jax.jit(lambda x: [mapped(layer, x) for layer in both(evaluate)])(x), 1e-5)


REDUCTIONS = {
    "channel sum": (channel_sum, lambda x: jnp.sum(x, axis=(0, 1, 2))),
    "mean of maps": (mean_pool_all, lambda x: jnp.mean(x, axis=(1, 2))),
    "maximum of maps": (max_pool_all, lambda x: jnp.max(x, axis=(1, 2))),
    "over channels": (
        lambda x: over_channels(x[0, 0, 0], x.shape) * x,
        lambda x: x[0, 0, 0] * x,
    ),
}
every_reduction = pytest.mark.parametrize(("ours", "theirs"), REDUCTIONS.values(), ids=REDUCTIONS)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["f32", "bf16"])
@every_shape
@every_reduction
def test_reductions_and_their_gradients_equal_jax_numpys(ours, theirs, shape, dtype):
    x = distinct(shape, dtype)
    cotangent = normals(jax.eval_shape(theirs, x).shape, 1, dtype)

    def value_and_gradient(reduce, x):
        out, pull = jax.vjp(reduce, x)
        return out, pull(cotangent)

    compare = jax.jit(lambda x: [value_and_gradient(reduce, x) for reduce in (ours, theirs)])
    assert_close(*compare(x), TOLERANCES[dtype])


@every_reduction
def test_reductions_agree_outside_jit_under_vmap_and_forward(ours, theirs):
    x = distinct((3, 4, 5, 6))
    assert_close(ours(x), theirs(x), 1e-5)
    stack = jnp.stack([x, -x])
    assert_close(*jax.jit(lambda: [jax.vmap(reduce)(stack) for reduce in (ours, theirs)])(), 1e-5)
    assert_close(*jax.jit(lambda: [jax.jvp(reduce, (x,), (x[::-1],)) for reduce in (ours, theirs)])(), 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["f32", "bf16"])
def test_a_maximum_is_exact_with_ties_and_infinities(dtype):
    x = jnp.asarray(np.random.default_rng(0).choice([-np.inf, -1, 0, 2, 3], size=(5, 2, 3, 7)), dtype)
    np.testing.assert_array_equal(jax.jit(max_pool_all)(x), jnp.max(x, axis=(1, 2)))


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (3, 2, 5, 4)], ids=str)
def test_values_over_channels_broadcast_to_every_image(shape):
    values = normals((4,))
    whole = over_channels(values, shape)
    assert whole.shape == (1, *shape[1:])
    np.testing.assert_array_equal(jnp.broadcast_to(whole, shape), jnp.broadcast_to(values, shape))


@every_reduction
def test_reductions_export_for_every_platform_with_any_batch(ours, theirs):
    maps = jax.ShapeDtypeStruct(export.symbolic_shape("b, 3, 4, 5"), jnp.float32)
    exported = export.export(jax.jit(ours), platforms=["cpu", "cuda", "tpu"])(maps)
    for samples in (1, 3):
        x = distinct((samples, 3, 4, 5))
        assert_close(exported.call(x), theirs(x), 1e-5)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@every_reduction
def test_gpu_and_tpu_get_no_barrier(ours, theirs, platform):
    exported = export.export(jax.jit(ours), platforms=[platform])(distinct((2, 3, 4, 5)))
    assert "optimization_barrier" not in exported.mlir_module()


@either_use
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_each_subnet_has_a_batch_norm_of_its_own_images(evaluate, dtype):
    """Against one batch norm for each subnet's images; subnet 1 has none."""
    x, choice = normals((7, 3, 5, 6), dtype=dtype) * 2 + 1, np.array([2, 0, 2, 2, 0, 3, 2])
    weights = normals(x.shape, seed=1)
    layer = BatchNormBySubnet(4, use_running_average=evaluate, dtype=dtype)
    variables = random_like(jax.eval_shape(layer.init, KEY, x, choice))
    found = with_gradients(Routed(layer, choice), variables, x, weights)
    for subnet in range(4):
        own = choice == subnet
        mine = jax.tree.map(lambda leaf, subnet=subnet: leaf[subnet], variables)
        here = jax.tree.map(lambda leaf, subnet=subnet: leaf[subnet], (found["new"], found["gradients"][0]))
        if not own.any():
            assert_close(here, ({"batch_stats": mine["batch_stats"]}, jax.tree.map(jnp.zeros_like, here[1])), 0)
            continue
        one = BatchNorm(use_running_average=evaluate, dtype=dtype)
        wanted = with_gradients(one, mine, x[own], weights[own])
        tolerance = TOLERANCES[dtype]
        assert_close(found["out"][own], wanted["out"], tolerance)
        assert_close(here, (wanted["new"], wanted["gradients"][0]), tolerance)
        assert_close(found["gradients"][1][own], wanted["gradients"][1], tolerance)


@dataclasses.dataclass
class Routed:
    """A batch norm by subnets as a function of maps alone."""

    layer: nn.Module
    choice: np.ndarray

    def apply(self, variables, maps, **options):
        return self.layer.apply(variables, maps, jnp.asarray(self.choice), **options)
