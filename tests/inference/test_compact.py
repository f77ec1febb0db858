"""Compact execution returns what the masked network returns, whatever its gates say and however it is run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ftwt_jax as ftwt
from ftwt_jax.inference import native
from ftwt_jax.inference.compact import CompactNetwork
from ftwt_jax.models.resnet import ResNet
from tests.helpers.compact import (
    BARE,
    GATES,
    NEVER,
    PLAIN_HEADS,
    assert_close,
    assert_same,
    few_examples,
    heads_of,
    masked,
    random_images,
    random_variables,
)

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("quick_compilation")]


def sample(outputs, index):
    """The outputs of one sample, as a batch of one."""
    return jax.tree.map(lambda leaf: leaf[index : index + 1], outputs)


def network_of(name, gates, arch):
    return ResNet(7, gates=gates, **arch) if name == "resnet" else ftwt.create_model(name, 7, gates=gates, **arch)


SMALL_RESNET = {"features": 8, "stage_sizes": (1, 2)}
AFTER_BLOCK = ftwt.GateConfig.paper(after_block=True)
MEAN = ftwt.GateConfig.paper(pool="mean")
MEAN_PLAIN = ftwt.GateConfig.paper(pool="mean", norm="none")
OWN = ftwt.GateConfig()
NETWORKS = {
    "vgg": ("vgg_bn", GATES, {"plan": (24, "M", 40, 8)}, 8),
    "vgg mean": ("vgg_bn", MEAN, {"plan": (24, "M", 40, 8)}, 8),
    "vgg plain heads": ("vgg_bn", PLAIN_HEADS, {"plan": (24, "M", 40, 8)}, 8),
    "vgg mean plain heads": ("vgg_bn", MEAN_PLAIN, {"plan": (24, "M", 40, 8)}, 8),
    "resnet8": ("resnet8", GATES, {}, 8),
    "resnet8 after block": ("resnet8", AFTER_BLOCK, {}, 8),
    "projection after block": ("resnet", AFTER_BLOCK, SMALL_RESNET, 16),
    "bottleneck": ("resnet", PLAIN_HEADS, {"bottleneck": True, **SMALL_RESNET}, 16),
    "mobilenet_v1": ("mobilenet_v1", OWN, {"width": 0.25}, 16),
    "mobilenet_v2": ("mobilenet_v2", PLAIN_HEADS, {"width": 0.125, "stem": "published"}, 8),
}
LARGE = {
    "resnet18": ("resnet18", GATES, {"width": 0.125}, 64),
    "resnet18 after block": ("resnet18", AFTER_BLOCK, {"width": 0.125}, 64),
    "resnet50": ("resnet50", MEAN, {"width": 0.125}, 64),
    "mobilenet_v1 imagenet": ("mobilenet_v1", PLAIN_HEADS, {"width": 0.25, "stem": "imagenet"}, 64),
    "mobilenet_v2 imagenet": ("mobilenet_v2", GATES, {"width": 0.25, "stem": "imagenet"}, 32),
    "mobilenet_v2 projections": ("mobilenet_v2", GATES, {"width": 0.25}, 16),
}
# A second shape of images is as long to compile as the first.
ALONE = ("vgg", "vgg plain heads", "resnet8 after block", "bottleneck", "mobilenet_v1", "mobilenet_v2", *LARGE)
IN_BATCHES = (*(name for name in NETWORKS if not name.startswith("mobilenet")), *LARGE)


@pytest.mark.parametrize(
    "name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow, id=name) for name in LARGE)], ids=str
)
def test_a_calibrated_network_answers_as_the_masked_one(prepare, name):
    network, gates, arch, side = (NETWORKS | LARGE)[name]
    model = network_of(network, gates, arch)
    images = random_images(5, side, seed=1)
    # With more filters off, the images never reach the end of a deep network.
    variables = random_variables(model, images, never=0.1 if name.startswith("mobilenet") else 0.2)
    expected = masked(model, variables, images, control=BARE)
    assert np.ptp(expected.logits, axis=0).max() > 1e-3 * np.abs(expected.logits).max()
    on = np.concatenate([np.asarray(gate.mask) for gate in expected.gates], axis=1)
    assert 0.1 < on.mean() < 0.9
    assert np.any(on != on[0])

    compact = prepare(model, variables, random_images(6, side, seed=2))
    assert len(compact.execution.kept) > len(expected.gates) / 2
    if name in IN_BATCHES:
        outputs, outside = compact.run(images)
        assert_same(outputs, expected)
        assert all(gate.target is None for gate in outputs.gates)
        assert outside.shape == (5,)
    if name in ALONE:
        outputs, outside = compact.run(images[3:4])
        assert_same(outputs, sample(expected, 3))
        assert outside.shape == (1,)


@pytest.mark.newest
@pytest.mark.device
@pytest.mark.parametrize("name", ["vgg", "projection after block", "bottleneck"])
def test_without_calibration_nothing_is_left_out_and_no_sample_is_outside(prepare, name):
    network, gates, arch, side = NETWORKS[name]
    model = network_of(network, gates, arch)
    images = random_images(5, side, seed=1)
    variables = random_variables(model, images, seed=1)
    compact = prepare(model, variables)
    assert not compact.execution.kept
    outputs, outside = compact.run(images)
    assert_same(outputs, masked(model, variables, images, control=BARE))
    assert not np.any(outside)


@few_examples(max_examples=5)
@given(
    plan=st.lists(st.sampled_from([1, 3, 8, 24, 40]), min_size=1, max_size=3),
    gates=st.builds(
        ftwt.GateConfig,
        pool=st.sampled_from(["max", "mean"]),
        norm=st.sampled_from(["none", "softmax", "layer"]),
    ),
    samples=st.sampled_from([1, 2, 5, 9]),
    never=st.sampled_from([0, 0.5, 0.9, 1]),
    seed=st.integers(0, 1000),
)
def test_any_stack_of_units_answers_as_the_masked_one(prepare, plan, gates, samples, never, seed):
    model = ftwt.create_model("vgg_bn", 3, plan=plan, gates=gates)
    images = random_images(samples, 4, seed=seed)
    variables = random_variables(model, images, seed, never)
    compact = prepare(model, variables, random_images(2, 4, seed=seed + 1))
    assert_same(compact(images), masked(model, variables, images, control=BARE))


@pytest.mark.parametrize("never", [0, 0.5], ids=["all filters in use", "some never on"])
def test_all_ways_to_run_are_timed_and_one_is_taken(monkeypatch, never):
    timed = []
    monkeypatch.setattr(CompactNetwork, "__call__", lambda self, images: timed.append(self.execution) or 0)
    model = ftwt.create_model("vgg_bn", 5, plan=(8,), gates=GATES)
    variables = random_variables(model, random_images(1), never=never)
    for head in heads_of(variables):
        head["kernel"][:] = 0
        head["bias"][:] = np.where(head["bias"] == NEVER, NEVER, 1)
    compact = ftwt.compact(model, variables, random_images(9))
    ways = {(bool(execution.kept), execution.per_image) for execution in timed}
    if native.available():
        assert ways == ({(True, False), (True, True), (False, True)} if never else {(False, False), (False, True)})
        assert len(timed) == 10 * len(ways)
    assert compact.execution in timed or not native.available()


@pytest.mark.device
def test_logits_alone_are_the_same_logits():
    model = ftwt.create_model("vgg_bn", 5, plan=(8, 8), gates=GATES)
    images = random_images(3, 4)
    compact = ftwt.compact(model, random_variables(model, images))
    np.testing.assert_array_equal(compact.logits(images), compact(images).logits)
    np.testing.assert_array_equal(jax.jit(compact.logits)(images), compact(images).logits)


@pytest.mark.parametrize("bias", [NEVER, 1e3], ids=["none on", "all on"])
def test_a_unit_with_no_filter_on_or_all(prepare, bias):
    model = ftwt.create_model("vgg_bn", 3, plan=(8, 12, "M", 8), gates=GATES)
    images = random_images(2, 4)
    variables = random_variables(model, images)
    variables["params"]["unit1"]["gate_head"]["dense"]["bias"][:] = bias
    compact = prepare(model, variables, images)
    outputs, outside = compact.run(images)
    assert_same(outputs, masked(model, variables, images, control=BARE))
    assert np.all(np.asarray(outputs.gates[1].mask) == (bias > 0))
    assert not np.any(outside)
    assert ("unit1" in compact.execution.kept) == (bias < 0)


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_dense_network_keeps_its_logits(calibrated):
    model = ftwt.create_model("resnet8", 5, width=0.25)
    images = random_images(3)
    variables = random_variables(model, images)
    compact = ftwt.compact(model, variables, images if calibrated else None)
    outputs, outside = compact.run(images)
    assert_same(outputs, masked(model, variables, images))
    assert not np.any(outside)
    assert not compact.execution.kept


def test_a_network_in_bfloat16_answers_within_its_rounding(prepare):
    model = ftwt.create_model("vgg_bn", 5, plan=(24, "M", 40), gates=PLAIN_HEADS, dtype=jnp.bfloat16)
    images = random_images(5)
    variables = random_variables(model, images)
    for head in heads_of(variables):  # No gate logit that rounding could carry over zero.
        head["kernel"][:] = 0
    compact = prepare(model, variables, images)
    outputs = compact(images)
    expected = masked(model, variables, images, control=BARE)
    assert outputs.logits.dtype == jnp.float32
    assert len(compact.execution.kept) == 2
    assert_close(outputs.logits, expected.logits, share=0.03)


@pytest.mark.parametrize("masks", ["open", "targets"])
def test_masks_that_do_not_come_from_the_heads_are_obeyed_or_refused(masks):
    control = ftwt.GateControl(masks=masks)
    model = ftwt.create_model("vgg_bn", 5, plan=(8, 8), gates=GATES)
    images = random_images(2, 4)
    variables = random_variables(model, images, never=0.5)
    try:
        logits = ftwt.compact(model, variables, images, control=control)(images).logits
    except ftwt.UserError:
        return
    assert_close(logits, masked(model, variables, images, control=control).logits)
