"""Subnets: at the budget, none empty, the same for the same seed, and groups of images that want the same filters."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

import ftwt_jax as ftwt
from ftwt_jax.subnets.find import cut_again
from ftwt_jax.subnets.ties import find_ties
from tests.helpers.compact import KEY, random_images, random_variables

GATES = ftwt.GateConfig()
IMAGES = random_images(48, side=16)


class Own(nn.Module):
    """A network of a user's own: two branches, a projection, depthwise filters, a sum, groups of filters."""

    gates: ftwt.GateConfig

    @nn.compact
    def __call__(self, images, train=False):
        unit = functools.partial(ftwt.GatedUnit, gates=self.gates)
        x = unit(12)(images, train)
        y = unit(12, groups=12, strides=2)(x, train)
        y = unit(24, kernel_size=1, act=None)(y, train)
        x = ftwt.residual_add(y, ftwt.PlainConv(24, strides=2)(x, train)).map(nn.relu)
        x = ftwt.concatenate([unit(16, groups=4)(x, train), unit(16, kernel_size=1)(x, train)])
        return ftwt.Classifier(10)(unit(16, norm="layer")(x, train))


NETWORKS = {
    "resnet": functools.partial(ftwt.create_model, "resnet8", 10),
    "vgg": functools.partial(ftwt.create_model, "vgg_bn", 10, plan=(16, "M", 24, 24)),
    "own": Own,
}


def make(name, **gates):
    model = NETWORKS[name](gates=ftwt.GateConfig(**gates))
    return model, random_variables(model, IMAGES[:1])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_subnet_is_at_the_budget(name, quick_compilation):
    model, variables = make(name)
    for source in ("heads", "targets"):
        subnets = ftwt.find_subnets(model, variables, IMAGES, 3, 0.3, source=source, multiple=1)
        assert subnets.count == 3
        assert np.abs(1 - subnets.macs / subnets.dense_macs - 0.3).max() < 0.005
        assert abs(subnets.macs_reduction - 0.3) < 0.005
        assert all(mask.any(axis=1).all() for mask in subnets.masks.values())
        assert len(subnets.assignment) == len(IMAGES)
        assert set(subnets.assignment) == {0, 1, 2}


def test_macs_are_those_of_a_network_of_these_widths(quick_compilation):
    model, variables = make("vgg")
    subnets = ftwt.find_subnets(model, variables, IMAGES, 2, 0.5)
    for subnet, macs in enumerate(subnets.macs):
        plan = [int(mask[subnet].sum()) for mask in subnets.masks.values()]
        narrower = ftwt.create_model("vgg_bn", 10, plan=(plan[0], "M", *plan[1:]))
        outputs, _ = jax.eval_shape(narrower.init_with_output, KEY, IMAGES[:1])
        assert ftwt.dense_macs(outputs) == macs


def test_the_same_seed_finds_the_same(quick_compilation):
    model, variables = make("resnet")
    first, again = (ftwt.find_subnets(model, variables, IMAGES, 3, 0.4, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.assignment, again.assignment)
    for name, mask in first.masks.items():
        np.testing.assert_array_equal(mask, again.masks[name])


def test_widths_are_multiples(quick_compilation):
    model, variables = make("vgg")
    subnets = ftwt.find_subnets(model, variables, IMAGES, 2, 0.45, multiple=4)
    assert all(np.all(mask.sum(axis=1) % 4 == 0) for mask in subnets.masks.values())
    assert abs(subnets.macs_reduction - 0.45) < 0.05


def test_images_that_want_other_filters_are_in_other_groups(quick_compilation):
    model, variables = make("vgg")
    bright = np.abs(IMAGES[:20]) + 2
    found = ftwt.find_subnets(model, variables, [bright, -bright[:12]], 2, 0.4, source="targets").assignment
    assert len(set(found[:20])) == len(set(found[20:])) == 1
    assert found[0] == 0 != found[-1]


def test_router_and_budget_together(quick_compilation):
    model, variables = make("vgg")
    subnets = ftwt.find_subnets(model, variables, IMAGES, 2, 0.4, extra_macs=20_000.0, multiple=1)
    assert np.abs(1 - (subnets.macs + 20_000) / subnets.dense_macs - 0.4).max() < 0.005


def test_the_same_groups_of_images_are_cut_at_another_budget(quick_compilation):
    model, variables = make("resnet")
    subnets, wanted = (ftwt.find_subnets(model, variables, IMAGES, 3, budget, multiple=1) for budget in (0.45, 0.2))
    again = cut_again(subnets, find_ties(model, variables, IMAGES[:1]), 0.2, multiple=1)
    assert again.assignment is subnets.assignment
    np.testing.assert_array_equal(again.macs, wanted.macs)
    for name, mask in wanted.masks.items():
        np.testing.assert_array_equal(again.masks[name], mask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "number of subnets"),
        ({"count": 100}, "100 subnets need as many images"),
        ({"budget": 1.5}, "between 0 and 1"),
        ({"budget": 0.9999}, "no subnets have a MACs reduction of 0.9999"),
        ({"source": "router"}, "source is"),
        ({"multiple": 0}, "1 or more"),
        ({"r": 0.0}, r"\(0, 1\]"),
        ({"images": np.zeros((0, 16, 16, 3), np.float32)}, "need as many images"),
        ({"images": np.ones((9, 16, 16, 3), np.float32), "count": 3}, "differ too little"),
    ],
)
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_what_cannot_work_is_refused(changes, message, quick_compilation):
    model, variables = make("vgg")
    with pytest.raises(ftwt.UserError, match=message):
        ftwt.find_subnets(model, variables, **({"images": IMAGES, "count": 2, "budget": 0.4} | changes))
