"""What functions do to channels, as found by following them, against what they do to numbers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftwt_jax.gating.contract import effect

N, H, W, C = 3, 6, 8, 4
KEPT = np.linspace(0.5, 2, C, dtype=np.float32)
GATE = np.random.default_rng(1).normal(size=(N, 1, 1, C)).astype(np.float32)

# Each with what has to be found: zero, own, uniform.
FUNCTIONS = {
    "relu": (nn.relu, "zou"),
    "relu6": (nn.relu6, "zou"),
    "gelu": (nn.gelu, "zou"),
    "silu": (nn.silu, "zou"),
    "hard swish": (nn.hard_swish, "zou"),
    "leaky relu": (nn.leaky_relu, "zou"),
    "elu": (nn.elu, "zou"),
    "tanh": (jnp.tanh, "zou"),
    "relu6 of a shifted value": (lambda v: v * nn.relu6(v + 3) / 6, "zou"),
    "max pool": (lambda v: nn.max_pool(v, (3, 3), (2, 2), "SAME"), "zou"),
    "average pool": (lambda v: nn.avg_pool(v, (2, 2), (2, 2)), "zou"),
    "global mean": (lambda v: v.mean((1, 2), keepdims=True), "zou"),
    "global mean to rows": (lambda v: v.mean((1, 2)), "zou"),
    "bilinear": (lambda v: jax.image.resize(v, (N, 2 * H, 2 * W, C), "bilinear"), "zou"),
    "nearest": (lambda v: jax.image.resize(v, (N, 2 * H, 2 * W, C), "nearest"), "zou"),
    "crop": (lambda v: v[:, 1:-1, ::2], "zou"),
    "flip": (lambda v: v[:, ::-1], "zou"),
    "pad": (lambda v: jnp.pad(v, ((0, 0), (1, 1), (1, 0), (0, 0))), "zou"),
    "pixels in one axis": (lambda v: v.reshape(N, H * W, C), "zou"),
    "there and back": (lambda v: v.transpose(3, 0, 1, 2).transpose(1, 2, 3, 0), "zou"),
    "instance norm": (lambda v: jax.nn.standardize(v, axis=(1, 2)), "zou"),
    "where": (lambda v: jnp.where(v > 0.5, v, 0), "zou"),
    "clip": (lambda v: jnp.clip(v, -1, 1), "zou"),
    "dropout": (nn.Dropout(0.5, deterministic=True), "zo"),
    "scale": (lambda v: v * KEPT, "zo"),
    "another network's gate": (lambda v: v * GATE, "zo"),
    "depthwise": (
        lambda v: jax.lax.conv_general_dilated(
            v, jnp.ones((3, 3, 1, C)), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=C
        ),
        "zo",
    ),
    "squeeze and excitation": (lambda v: v * nn.sigmoid(v.mean((1, 2), keepdims=True) @ jnp.ones((C, C))), "z"),
    "norm of a pixel": (lambda v: v / jnp.sqrt(jnp.square(v).sum(-1, keepdims=True) + 1), "z"),
    "sigmoid": (nn.sigmoid, "ou"),
    "bias": (lambda v: v + KEPT, "o"),
    "pad with ones": (lambda v: jnp.pad(v, ((0, 0), (1, 1), (0, 0), (0, 0)), constant_values=1), "ou"),
    "softmax over pixels": (lambda v: jax.nn.softmax(v, (1, 2)), "ou"),
    "layer norm": (lambda v: v - v.mean(-1, keepdims=True), ""),
    "softmax": (nn.softmax, ""),
    "less the batch's mean": (lambda v: v - v.mean(0), ""),
}
MOVING = {
    "flatten": lambda v: v.reshape(N, 1, 1, -1),
    "channels reversed": lambda v: v[..., ::-1],
    "channels taken": lambda v: v[..., np.array([1, 0, 3, 2])],
    "channels rolled": lambda v: jnp.roll(v, 1, -1),
    "images rolled": lambda v: jnp.roll(v, 1, 0),
    "images reversed": lambda v: v[::-1],
    "space to depth": lambda v: v.reshape(N, 3, 2, 4, 2, C).transpose(0, 1, 3, 2, 4, 5).reshape(N, 3, 4, 4 * C),
    "concatenated": lambda v: jnp.concatenate([v, v], -1),
    "sorted": lambda v: jnp.sort(v, -1),
    "channels first": lambda v: v.transpose(0, 3, 1, 2),
    "product": lambda v: v @ jnp.ones((C, C)),
}


def maps(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(N, H, W, C)).astype(np.float32))


@pytest.mark.newest
@pytest.mark.parametrize(("fn", "wanted"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_what_a_function_does_is_found(fn, wanted):
    found = effect(fn, maps())
    assert found.in_place
    assert (
        "".join(letter for letter, is_so in zip("zou", (found.zero, found.own, found.uniform), strict=True) if is_so)
        == wanted
    )


@pytest.mark.newest
@pytest.mark.parametrize("fn", MOVING.values(), ids=MOVING)
def test_a_function_that_moves_or_mixes_channels_is_noticed(fn):
    found = effect(fn, maps())
    assert not found.in_place
    assert not found.zero


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "dropout"])
def test_what_is_found_is_true_of_numbers(name):
    """On maps of which some channels are switched off in some images: the same facts, from the values."""
    fn, wanted = FUNCTIONS[name]
    off = np.random.default_rng(2).random((N, C)) < 0.5
    whole, some = maps(), jnp.where(off[:, None, None], 0, maps())
    before, after = np.asarray(fn(whole)), np.asarray(fn(some))
    rows = np.moveaxis(after.reshape(N, -1, C), 1, 2)
    if "z" in wanted:
        assert np.all(rows[off] == 0)
    if "o" in wanted:
        np.testing.assert_array_equal(rows[~off], np.moveaxis(before.reshape(N, -1, C), 1, 2)[~off])
    if "u" in wanted:
        few = jnp.take(some, jnp.array([1, 3]), axis=-1)
        if name not in ("bilinear", "nearest", "pixels in one axis"):  # They name the number of channels.
            np.testing.assert_allclose(np.asarray(fn(few)), after[..., [1, 3]], rtol=1e-6)


def test_a_number_that_depends_on_how_many_channels_there_are_is_kept():
    def fn(v):
        return v / v.shape[-1]

    assert effect(fn, maps()) != effect(fn, maps()[..., :2])
    assert effect(nn.relu, maps()) == effect(nn.relu, maps()[..., :2])


def test_nothing_is_known_of_a_function_that_fails_or_loops():
    def fails(v):
        raise RuntimeError

    for fn in (fails, lambda v: jax.lax.fori_loop(0, 2, lambda _, v: v * 2, v), lambda v: (v, v)):
        assert not effect(fn, maps()).in_place
