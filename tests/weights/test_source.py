"""Checkpoints that hold more than one state dict, or one under names of their own: which was taken is said."""

import warnings

import jax
import numpy as np
import pytest
import torch

import ftwt_jax as ftwt
from tests.helpers import torch_networks as theirs
from tests.helpers.weight_files import TINY_PLAN, tiny

STATE = tiny().state_dict()
MEAN = {name: value * 2 if value.is_floating_point() else value for name, value in STATE.items()}
COUNT = {"n_averaged": torch.tensor(7)}


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


def read(state, **options) -> tuple[dict, list[str]]:
    """The variables, and what was said of them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ftwt.WeightsWarning)
        variables = ftwt.from_torch("vgg_bn", state, 10, plan=TINY_PLAN, **options)
    return variables, [str(warning.message) for warning in caught]


def assert_is(variables, state) -> None:
    jax.tree.map(np.testing.assert_array_equal, variables, read(state)[0])


# One network, taken without a word.
ALONE = {
    "kuangliu": {"net": under("module.", STATE), "acc": 95.1, "epoch": 199},
    "Lightning": {"state_dict": under("model.", STATE), "epoch": 3, "optimizer_states": [{"state": {0: STATE}}]},
    "Lightning, compiled": {"state_dict": under("model._orig_mod.", STATE), "callbacks": {"x": {"best": 0.5}}},
    "FSDP": under("_fsdp_wrapped_module.", STATE),
    "backbone": under("student.backbone.", STATE),
    "key that nobody knows": {"weights_of_mine": {"inner": STATE}},
    "with an optimizer": {"model": STATE, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}},
}


@pytest.mark.parametrize("state", ALONE.values(), ids=ALONE)
def test_one_network_is_found_wherever_it_is(state):
    variables, said = read(state)
    assert said == []
    assert_is(variables, STATE)


# The checkpoint, what is taken, and the name of the other.
SEVERAL = {
    "timm": ({"state_dict": STATE, "state_dict_ema": MEAN}, "state_dict", "state_dict_ema"),
    "mean first": ({"model_ema": under("module.", MEAN), "model": STATE}, "model", "model_ema"),
    "torchvision": ({"model": STATE, "model_ema": under("module.", MEAN) | COUNT}, "model", "model_ema"),
    "Lightning, attribute": (
        {"state_dict": {**under("ema_model.module.", MEAN), **under("model.", STATE)}},
        "state_dict/model",
        "state_dict/ema_model.module",
    ),
    "Lightning, callback": (
        {"state_dict": under("model.", STATE), "callbacks": {"EMA": {"ema_state_dict": under("model.", MEAN)}}},
        "state_dict",
        "callbacks/EMA/ema_state_dict",
    ),
    "within": ({**STATE, **under("ema.", MEAN)}, "plain", "ema"),
}


@pytest.mark.parametrize(("state", "taken", "other"), SEVERAL.values(), ids=SEVERAL)
def test_of_several_networks_the_trained_one_is_taken_and_a_name_takes_another(state, taken, other):
    variables, said = read(state)
    assert_is(variables, STATE)
    (line,) = said
    assert taken in line
    assert other in line
    assert f"{taken} is taken; weights=NAME takes another" in line
    variables, said = read(state, weights=other)
    assert_is(variables, MEAN)
    assert not any("is taken" in line for line in said)


def test_the_weights_that_lightning_averages_take_the_place_of_the_trained_ones():
    """`WeightAveraging` saves the mean as `state_dict` and keeps what it was made of beside it; both are named."""
    state = {"state_dict": under("model.", MEAN), "current_model_state": under("model.", STATE)}
    variables, (line,) = read(state)
    assert_is(variables, MEAN)
    assert "it holds state_dict and current_model_state: state_dict is taken" in line
    assert_is(read(state, weights="current_model_state")[0], STATE)


def test_what_lies_beside_the_network_is_named():
    more = {"criterion.weight": torch.ones(10), "train_acc.tp": torch.ones(10)}
    variables, (line,) = read({"state_dict": {**under("model.", STATE), **more}})
    assert_is(variables, STATE)
    assert "left out: criterion.weight, train_acc.tp; the network is what begins with 'model.'" in line


def test_weights_of_an_unknown_name_are_refused_with_the_known_ones():
    state = {"state_dict": STATE, "state_dict_ema": MEAN}
    with pytest.raises(ftwt.UserError, match=r"unknown weights 'ema': .*known: state_dict, state_dict_ema"):
        read(state, weights="ema")


def test_a_checkpoint_that_holds_itself_ends():
    state = {"net": STATE}
    state["self"] = state
    assert_is(read(state, weights="net")[0], STATE)


def test_a_second_classifier_half_way_is_not_a_network():
    """As Inception's and GoogLeNet's: it is unexpected in ours, and named so."""
    aux = {"AuxLogits.conv.weight": torch.ones(4, 4, 1, 1), "AuxLogits.fc.weight": torch.ones(10, 4)}
    with pytest.raises(ftwt.UserError, match=r"unexpected: AuxLogits\.conv\.weight, AuxLogits\.fc\.weight"):
        ftwt.from_torch("resnet8", {**theirs.ResNet().state_dict(), **aux}, 10)
