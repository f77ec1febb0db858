"""What networks do between units: joins, rearrangements, functions; and what is said where masks are lost."""

import functools
import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ftwt_jax as ftwt
from tests.helpers.compact import KEY, assert_same, every_way, masked, random_images, random_variables
from tests.helpers.random_networks import counted

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("quick_compilation")]
GATES = ftwt.GateConfig()


def unit(features=8, **options):
    return ftwt.GatedUnit(features, **{"gates": GATES, **options})


class Net(nn.Module):
    """A network of one function of the images."""

    build: str

    @nn.compact
    def __call__(self, images):
        return ftwt.Classifier(5)(BUILDS[self.build](self, images))


def two(images):
    x = unit()(images)
    return unit(6)(x), unit(4)(x)


def shared(net, images, wrap=lambda module: module):
    x, both = unit()(images), wrap(ftwt.GatedUnit)(8, gates=GATES)
    return ftwt.residual_add(both(x), both(x.map(lambda v: v[:, ::-1])))


def with_shortcut(images, fn):
    x = unit()(images)
    return unit()(x, shortcut=x.map(fn))


def inception(net, images):
    x = unit()(images)
    pool = x.map(lambda v: nn.max_pool(v, (3, 3), padding="SAME"))
    return unit(7)(ftwt.concatenate([unit(4, kernel_size=1)(x), unit(5)(x), unit(3, kernel_size=1)(pool)]))


def u_net(net, images):
    down = unit()(images)
    deep = unit(12)(down.map(lambda v: nn.max_pool(v, (2, 2), (2, 2))))
    up = deep.map(lambda v: jax.image.resize(v, (v.shape[0], 8, 8, v.shape[-1]), "nearest"))
    return unit()(ftwt.concatenate([images, up, down]))


def shuffle_net(net, images):
    x = unit(16)(images)
    left, right = (ftwt.permute_channels(x, part) for part in (range(8), range(8, 16)))
    x = ftwt.concatenate([left, unit()(right)])
    return unit(6)(ftwt.permute_channels(x, np.arange(16).reshape(2, 8).T.ravel()))


# Each is counted right, and loses nothing.
KEEPING = {
    "flatten": lambda net, images: ftwt.flatten(unit()(images)),
    "dense after flatten": lambda net, images: ftwt.GatedDense(24, gates=GATES)(ftwt.flatten(unit()(images))),
    "concatenate": lambda net, images: unit(7)(ftwt.concatenate([*two(images), images])),
    "dense block": lambda net, images: unit(5)(ftwt.concatenate([x := unit()(images), unit(4)(x)])),
    "inception": inception,
    "u-net": u_net,
    "shuffle": shuffle_net,
    "pixel unshuffle": lambda net, images: unit()(ftwt.pixel_unshuffle(unit()(images), 2)),
    "pixel shuffle": lambda net, images: unit()(ftwt.pixel_shuffle(unit(8)(images), 2)),
    "a unit called in two branches": shared,
    "remat of it": lambda net, images: shared(net, images, nn.remat),
    "one channel added to eight": lambda net, images: unit()(ftwt.residual_add(unit()(images), unit(1)(images))),
    "positions added": lambda net, images: unit()(
        ftwt.residual_add(unit()(images), net.param("positions", nn.initializers.normal(), (1, 8, 8, 8)))
    ),
    "a shortcut for all pixels": lambda net, images: with_shortcut(images, lambda v: v.mean((1, 2), keepdims=True)),
    "a shortcut for each row": lambda net, images: with_shortcut(images, lambda v: v[:, :, :1]),
    "a shortcut of one channel": lambda net, images: unit()(
        x := unit()(images), shortcut=ftwt.permute_channels(x, [3])
    ),
    "a shortcut for all images": lambda net, images: unit()(
        unit()(images), shortcut=net.param("added", nn.initializers.normal(), (1, 8, 8, 8))
    ),
    "norms made within": lambda net, images: unit(norm=nn.BatchNorm(epsilon=0.3))(
        unit(norm=functools.partial(nn.BatchNorm, epsilon=0.2))(images)
    ),
    "a module as function": lambda net, images: unit()(unit()(images).map(nn.PReLU())),
    "tokens": lambda net, images: ftwt.GatedDense(12, act=nn.gelu, gates=GATES)(
        ftwt.PlainConv(6, kernel_size=None, norm=None, use_bias=True)(images.reshape(len(images), 64, 3))
    ),
}
# Each is right, but says where it loses masks, and what would not.
LOSING = {
    "reshape to a row": (lambda net, images: unit()(images).map(lambda v: v.reshape(len(v), 1, 1, -1)), "flatten"),
    "concatenate within map": (
        lambda net, images: unit()((pair := two(images))[0].map(lambda v: jnp.concatenate([v, pair[1].values], -1))),
        "concatenate",
    ),
    "concatenate by replace": (
        lambda net, images: unit()(
            (pair := two(images))[0].replace(values=jnp.concatenate([pair[0].values, pair[1].values], -1))
        ),
        "concatenate",
    ),
    "layer norm": (lambda net, images: unit()(unit()(images).map(lambda v: nn.LayerNorm()(v))), "module itself"),
    "a norm itself": (lambda net, images: unit()(unit()(images).map(nn.GroupNorm(2))), "norm="),
    "bias": (lambda net, images: unit()(unit()(images).map(lambda v: v + 1)), "act="),
    "sigmoid": (lambda net, images: unit()(unit()(images).map(nn.sigmoid)), "act="),
    "space to depth": (
        lambda net, images: unit()(
            unit()(images).map(lambda v: v.reshape(-1, 4, 2, 4, 2, 8).swapaxes(2, 3).reshape(-1, 4, 4, 32))
        ),
        "pixel_unshuffle",
    ),
    "two pools": (
        lambda net, images: unit()(
            unit()(images).map(
                lambda v: jnp.concatenate([nn.avg_pool(v, (2, 2), (2, 2)), nn.max_pool(v, (2, 2), (2, 2))], -1)
            )
        ),
        "concatenate",
    ),
    "channels reversed": (lambda net, images: unit()(unit()(images).map(lambda v: v[..., ::-1])), "permute_channels"),
    "a layer on the values": (lambda net, images: unit()(nn.Conv(6, (3, 3))(unit()(images).values)), "PlainConv"),
}
BUILDS = KEEPING | {name: build for name, (build, _) in LOSING.items()}


def check(name, lost_layers=0):
    model, images = Net(name), random_images(5, seed=3)
    variables = random_variables(model, images, never=0.4)
    expected = masked(model, variables, images)
    dense, calls = counted(model, variables, images)
    if not lost_layers:
        assert ftwt.dense_macs(expected) == dense
        assert len(expected.layers) == sum(calls.values())
    for network in every_way(model, variables, random_images(8)):
        assert_same(network(images), expected)
    return expected


@pytest.mark.parametrize("name", KEEPING)
def test_what_follows_channels_loses_nothing(name, recwarn):
    outputs = check(name)
    assert not [warning for warning in recwarn if issubclass(warning.category, ftwt.CompositionWarning)]
    # Each layer but the first after the images knows which of its channels are off, unless all can be on.
    if name not in ("positions added", "tokens"):
        assert outputs.layers[-1].active_in is not None
        assert not np.all(outputs.layers[-1].active_in)


@pytest.mark.parametrize("name", LOSING)
def test_what_loses_masks_is_right_and_says_so(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(name, lost_layers=name in ("concatenate within map", "concatenate by replace", "a layer on the values"))
    said = [warning for warning in caught if issubclass(warning.category, ftwt.CompositionWarning)]
    assert any(LOSING[name][1] in str(warning.message) for warning in said)
    assert all("\n" not in str(warning.message) and warning.filename == __file__ for warning in said)


def test_values_are_read_without_a_word_outside_of_networks(recwarn):
    model, images = unit(), random_images(2)
    out = model.apply(model.init(KEY, images), images)
    assert out.values.shape == out.shape == (2, 8, 8, 8)
    assert (out.ndim, out.dtype) == (4, jnp.float32)
    assert not recwarn.list


def test_joining_keeps_order_control_and_records():
    control = ftwt.GateControl(r=0.5)
    mask = jnp.asarray([[True, False]])
    a = ftwt.Activations(jnp.ones((1, 2, 2, 2)), mask, control=control)
    joined = ftwt.concatenate([jnp.ones((1, 2, 2, 1)), a])
    np.testing.assert_array_equal(joined.active, [[True, True, False]])
    assert joined.control is control
    flat = ftwt.flatten(a)
    np.testing.assert_array_equal(flat.active, [[True, False] * 4])
    np.testing.assert_array_equal(ftwt.permute_channels(a, [1, 0, 1]).active, [[False, True, False]])
    np.testing.assert_array_equal(ftwt.pixel_unshuffle(a, 2).active, [[True] * 4 + [False] * 4])


def test_maps_can_be_searched_for_in_a_list():
    ends = [ftwt.Activations(jnp.ones((1, side, side, 2))) for side in (4, 2, 4)]
    assert [ends.index(end) for end in ends] == [0, 1, 2]
    assert len({*ends}) == 3


def test_pixel_shuffles_are_pytorchs_and_undo_each_other():
    torch = pytest.importorskip("torch")
    maps = random_images(2, side=6, channels=8)
    there = ftwt.pixel_unshuffle(maps, 2)
    theirs = torch.nn.functional.pixel_unshuffle(torch.from_numpy(maps).permute(0, 3, 1, 2), 2)
    np.testing.assert_array_equal(there.values, theirs.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(ftwt.pixel_shuffle(there, 2).values, maps)


MAPS = random_images(2, channels=8)
MISTAKES = {
    "sum of other channels": lambda: ftwt.residual_add(MAPS, MAPS[..., :3]),
    "sum of other pixels": lambda: ftwt.residual_add(MAPS, MAPS[:, ::2]),
    "sum larger than both": lambda: ftwt.residual_add(MAPS[:, :1], MAPS[:, :, :1]),
    "one array": lambda: ftwt.concatenate(MAPS),
    "none": lambda: ftwt.concatenate([]),
    "other pixels": lambda: ftwt.concatenate([MAPS, MAPS[:, ::2]]),
    "no such channel": lambda: ftwt.permute_channels(MAPS, [8]),
    "order of bools": lambda: ftwt.permute_channels(MAPS, [True, False]),
    "block": lambda: ftwt.pixel_unshuffle(MAPS, 3),
    "block of channels": lambda: ftwt.pixel_shuffle(MAPS, 3),
    "images changed": lambda: ftwt.Activations(MAPS).map(lambda v: v[:1]),
    "no maps": lambda: ftwt.Activations(MAPS).map(lambda v: v.sum()),
    "shortcut": lambda: unit().init(KEY, MAPS, shortcut=MAPS[..., :3]),
    "shortcut that grows": lambda: unit(1).init(KEY, MAPS, shortcut=MAPS),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_what_does_not_fit_is_refused_on_one_line(mistake):
    with pytest.raises(ftwt.UserError) as error:
        mistake()
    assert "\n" not in str(error.value)
    assert re.search(r"\d", str(error.value)) or "list" in str(error.value)
