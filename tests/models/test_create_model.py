"""Names and options of networks: which are known, and how others are refused."""

import pytest

import ftwt_jax as ftwt
from ftwt_jax import config as configs
from ftwt_jax.models import AMBIGUOUS, REGISTRY


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("vgg16", "vgg16_bn"),
        ("vgg16bn", "vgg16_bn"),
        ("ResNet50", "resnet50"),
        ("resnet57", "resnet56"),
        ("resnet-18", "resnet18"),
        ("mobilenetv2", "mobilenet_v2"),
    ],
)
def test_an_unknown_network_names_the_nearest_and_all(name, nearest):
    with pytest.raises(ftwt.UserError, match=rf"unknown network '{name}': did you mean '{nearest}'\?") as refused:
        ftwt.create_model(name, 10)
    for known in REGISTRY:
        assert known in str(refused.value)


@pytest.mark.parametrize("name", ["resnet2", "resnet9", "resnet21", "resnet", "resnet20x", "xresnet20"])
def test_a_depth_other_than_6n_plus_2_is_unknown(name):
    with pytest.raises(ftwt.UserError, match=f"unknown network '{name}'"):
        ftwt.create_model(name, 10)


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_name_that_means_two_networks_is_refused_until_one_is_chosen(name):
    for arch in ({}, {"stem": "imagenet"}):
        with pytest.raises(ftwt.UserError, match=rf"{name} means two networks: set stem='cifar'"):
            ftwt.create_model(name, 10, **arch)
    model = ftwt.create_model(name, 10, stem="cifar")
    assert (6 * sum(model.stage_sizes) // 3 + 2, model.bottleneck) == (int(name.removeprefix("resnet")), False)
    assert configs.updated({"model": {"name": name, "stem": None}})["model"]["stem"] == "cifar"


@pytest.mark.parametrize(
    ("name", "option", "hint"),
    [
        ("resnet18", "widht", "did you mean 'width'? known: width, stem, dtype"),
        ("resnet56", "stem", "known: width, dtype"),
        ("vgg16_bn", "stem", "known: width, plan, dtype"),
        ("mobilenet_v1", "plan", "known: width, stem, dtype"),
        ("resnet18", "stage_sizes", "known: width, stem, dtype"),
        ("densenet121", "stem", "known: width, dtype"),
    ],
)
def test_an_unknown_option_names_the_network_and_its_options(name, option, hint):
    with pytest.raises(ftwt.UserError, match=rf"unknown (?=.*{name})(?=.*option).*'{option}'") as refused:
        ftwt.create_model(name, 10, **{option: 1})
    assert str(refused.value).endswith(hint)


def test_an_unknown_stem_names_the_nearest():
    with pytest.raises(ftwt.UserError, match=r"stem 'cifar10': did you mean 'cifar'\? known: cifar, imagenet"):
        ftwt.create_model("resnet18", 10, stem="cifar10")


@pytest.mark.parametrize("width", [0, -1, float("nan"), float("inf"), "0.5", None])
def test_a_width_must_be_a_positive_number(width):
    with pytest.raises(ftwt.UserError, match=r"width.*positive") as refused:
        ftwt.create_model("resnet18", 10, width=width)
    assert repr(width) in str(refused.value)


@pytest.mark.parametrize("classes", [0, -3, 2.5, "10", None, True])
def test_num_classes_must_be_a_positive_whole_number(classes):
    with pytest.raises(ftwt.UserError, match=r"num_classes must be a positive whole number") as refused:
        ftwt.create_model("resnet18", classes)
    assert repr(classes) in str(refused.value)


@pytest.mark.parametrize("gates", [0.9, {"r": 0.9}, True, ftwt.GateConfig])
def test_gates_must_be_a_gate_config(gates):
    with pytest.raises(ftwt.UserError, match="gates must be a GateConfig or None"):
        ftwt.create_model("resnet18", 10, gates)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ((16, "P"), "'P'"),
        ((16, 0), "got 0"),
        ((16, 1.5), "1.5"),
        ("64M", "got '64M'"),
        (("M",), "at least one unit"),
        ((), "at least one unit"),
        (16, "16"),
    ],
)
def test_a_plan_holds_filters_and_pools(plan, message):
    with pytest.raises(ftwt.UserError, match=message):
        ftwt.create_model("vgg_bn", 10, plan=plan)


def test_a_vgg_of_ones_own_needs_a_plan_and_shows_one():
    with pytest.raises(ftwt.UserError, match=r"vgg_bn needs a plan.*plan=\(16, 'M', 32, 'M'\)"):
        ftwt.create_model("vgg_bn", 10)
