"""Filters that are added to each other go together, so that a subnet is an ordinary dense network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ftwt_jax as ftwt
from ftwt_jax.subnets.ties import find_ties

IMAGES = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
KEY = jax.random.key(0)
GATES = ftwt.GateConfig()


def ties_of(model, images=IMAGES):
    return find_ties(model, jax.eval_shape(model.init, KEY, images), images)


def test_units_in_a_row_are_free():
    ties = ties_of(ftwt.create_model("vgg_bn", 10, gates=GATES, plan=(4, "M", 6)))
    assert ties.count == 10
    assert not set(ties.groups["unit0"]) & set(ties.groups["unit1"])
    assert [len(block) for block in ties.blocks()] == [4, 6]


def test_a_stream_is_cut_the_same_in_every_block_and_stage():
    ties = ties_of(ftwt.create_model("resnet14", 10, gates=GATES))
    groups = ties.groups
    for stage, channels in ((1, 16), (2, 32), (3, 64)):
        for block in (0, 1):
            np.testing.assert_array_equal(
                groups[f"stage{stage}_block{block}/conv2"], groups[f"stage{stage}_block0/conv2"]
            )
        # What an earlier stage left out is not there later either, in its place.
        np.testing.assert_array_equal(groups[f"stage{stage}_block1/conv2"][:16], groups["stem"])
        assert len(set(groups[f"stage{stage}_block0/conv2"])) == channels
    assert not set(groups["stem"]) & set(groups["stage1_block0/conv1"])


def test_a_projection_shortcut_is_cut_with_its_stream():
    ties = ties_of(ftwt.create_model("resnet18", 10, gates=GATES, stem="cifar", width=0.25))
    np.testing.assert_array_equal(ties.groups["stage2_block0/shortcut"], ties.groups["stage2_block1/conv2"])
    assert "stage2_block0/shortcut" not in ties.units
    # A bottleneck's stream holds no unit's filters, so nothing tells which of its channels matter.
    bottlenecks = ties_of(ftwt.create_model("resnet50", 10, gates=GATES, stem="cifar", width=0.25))
    assert not any("shortcut" in name or "conv3" in name for name in bottlenecks.groups)


def test_depthwise_filters_go_with_the_channels_that_they_read():
    ties = ties_of(ftwt.create_model("mobilenet_v1", 10, gates=GATES, width=0.25))
    np.testing.assert_array_equal(ties.groups["pair0_depthwise"], ties.groups["stem"])
    np.testing.assert_array_equal(ties.groups["pair1_depthwise"], ties.groups["pair0_pointwise"])


class Own(nn.Module):
    """A network with whatever is done between its two units."""

    between: object

    @nn.compact
    def __call__(self, images, train=False):
        x = ftwt.GatedUnit(4, gates=GATES, name="first")(images, train)
        y = ftwt.GatedUnit(4, gates=GATES, name="second")(x, train)
        return ftwt.Classifier(3)(self.between(x, y))


@pytest.mark.parametrize(
    ("between", "tied", "kept"),
    [
        (ftwt.residual_add, True, False),
        (lambda x, y: ftwt.concatenate([x, y]), False, False),
        (lambda x, y: ftwt.flatten(y), False, False),
        (lambda x, y: ftwt.residual_add(x.map(nn.relu), y), True, False),
        # Sigmoid makes zeros non-zero: its channels are always there, and so is what is added to them.
        (lambda x, y: ftwt.residual_add(x.map(nn.sigmoid), y), None, True),
    ],
    ids=["sum", "concatenated", "flattened", "mapped", "sigmoid"],
)
def test_functions_between_units(between, tied, kept):
    if kept:
        with pytest.warns(ftwt.CompositionWarning), pytest.raises(ftwt.UserError, match="no filter"):
            ties_of(Own(between))
        return
    groups = ties_of(Own(between)).groups
    assert (list(groups["first"]) == list(groups["second"])) is tied


def test_a_network_without_gates_is_refused():
    with pytest.raises(ftwt.UserError, match="no units with gates"):
        ties_of(ftwt.create_model("resnet8", 10))
