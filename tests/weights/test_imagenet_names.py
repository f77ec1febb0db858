"""Networks that are for ImageNet alone, small: computed as in torchvision and timm, imported, exported, and compact."""

import dataclasses
import functools
import warnings
from collections.abc import Callable

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

import ftwt_jax as ftwt
from ftwt_jax.models import REGISTRY
from ftwt_jax.models.convnext import ConvNeXt
from ftwt_jax.models.densenet import DenseNet
from ftwt_jax.models.efficientnet import EfficientNet
from ftwt_jax.models.inception import InceptionV3, InceptionV4
from ftwt_jax.models.vit import ViT
from ftwt_jax.weights.adapt import POSITIONS, adapt
from tests.helpers import torch_inception
from tests.helpers import torch_more as theirs
from tests.helpers.compact import assert_close, assert_same, every_way, masked, random_images, random_variables
from tests.helpers.torch_networks import to_nchw

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("quick_compilation")]
CLASSES = 7
STAGES = ((1, 3, 16, 1, 1), (6, 5, 24, 2, 2), (4, 3, 24, 1, 1))


@dataclasses.dataclass(frozen=True)
class Small:
    """A network of few layers: ours, its width, and its twins by layout; and sides of images that it takes."""

    build: Callable
    width: float
    twins: dict[str, Callable]
    sides: tuple[int, ...] = (49, 64)


THREE = {"stage_sizes": (1, 1, 1), "width": 0.125}
SMALL = {
    "densenet121": Small(
        functools.partial(DenseNet, stage_sizes=(2, 1)),
        0.25,
        {"torchvision": functools.partial(theirs.DenseNet, stage_sizes=(2, 1), growth=8, features=16)},
    ),
    "inception_v3": Small(
        functools.partial(InceptionV3, stage_sizes=(1, 1, 1)),
        0.125,
        {"torchvision": functools.partial(torch_inception.InceptionV3, auxiliary=False, **THREE)},
        (97,),
    ),
    "inception_v4": Small(
        functools.partial(InceptionV4, stage_sizes=(1, 1, 1)),
        0.125,
        {"timm": functools.partial(torch_inception.InceptionV4, **THREE)},
        (97,),
    ),
    "efficientnet_b0": Small(
        functools.partial(EfficientNet, stages=STAGES),
        1,
        {
            "torchvision": functools.partial(theirs.TorchvisionEfficientNet, stages=STAGES),
            "timm": functools.partial(theirs.TimmEfficientNet, stages=STAGES),
        },
    ),
    "convnext_tiny": Small(
        functools.partial(ConvNeXt, stage_sizes=(1, 2)),
        0.25,
        {
            "torchvision": functools.partial(theirs.TorchvisionConvNeXt, stage_sizes=(1, 2), features=24),
            "timm": functools.partial(theirs.TimmConvNeXt, stage_sizes=(1, 2), features=24),
        },
    ),
    # Made for images of 48x48.
    "vit_small_patch16": Small(
        functools.partial(ViT, depth=2),
        1 / 3,
        {"timm": functools.partial(theirs.ViT, depth=2, heads=2, side=48)},
        (48, 80, 32),
    ),
}
PAIRS = [(name, layout) for name, small in SMALL.items() for layout in small.twins]


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    """The names stand for the small networks."""
    for name, small in SMALL.items():
        monkeypatch.setitem(REGISTRY, name, small.build)


@functools.cache
def imported(name, layout):
    """A twin with random numbers, and the variables made of it, which fit without a warning."""
    net = theirs.randomize(SMALL[name].twins[layout](CLASSES), seed=0).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ftwt.WeightsWarning)
        return net, ftwt.from_torch(name, net.state_dict(), CLASSES, width=SMALL[name].width)


def state_of(net):
    return {key: value for key, value in net.state_dict().items() if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_a_network_computes_the_same(name, layout):
    net, variables = imported(name, layout)
    model = ftwt.create_model(name, CLASSES, width=SMALL[name].width)
    for side in SMALL[name].sides:
        images = random_images(2, side, seed=side)
        with torch.no_grad():
            expected = net(to_nchw(images))
        assert_close(jax.jit(model.apply)(variables, images).logits, expected)


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_an_imported_network_is_exported_unchanged_and_under_the_other_names(name, layout):
    net, variables = imported(name, layout)
    width = SMALL[name].width
    back = ftwt.to_torch(name, variables, CLASSES, layout=layout, width=width)
    came = state_of(net)
    assert back.keys() == came.keys()
    for key, tensor in came.items():
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)
    for other, twin in SMALL[name].twins.items():
        state = ftwt.to_torch(name, variables, CLASSES, layout=other, width=width)
        assert {key: value.shape for key, value in state.items()} == {
            key: value.shape for key, value in state_of(twin(CLASSES)).items()
        }
        again = ftwt.from_torch(name, state, CLASSES, width=width)
        jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_the_auxiliary_classifier_of_inception_v3_is_left_out_and_that_is_said():
    net = theirs.randomize(torch_inception.InceptionV3(CLASSES, **THREE), seed=0).eval()
    with pytest.warns(ftwt.WeightsWarning, match="its auxiliary classifier, AuxLogits, is left out") as caught:
        variables = ftwt.from_torch("inception_v3", net.state_dict(), CLASSES, width=0.125)
    assert len(caught) == 1
    images = random_images(2, 97)
    model = ftwt.create_model("inception_v3", CLASSES, width=0.125)
    with torch.no_grad():
        assert_close(jax.jit(model.apply)(variables, images).logits, net(to_nchw(images)))


def test_the_names_in_the_file_of_densenet_are_read_too():
    net, variables = imported("densenet121", "torchvision")
    kinds = {f"{kind}{i}": f"{kind}.{i}" for kind in ("norm", "conv") for i in (1, 2)}

    def renamed(key):
        *start, part, leaf = key.split(".")
        return ".".join([*start, kinds[part] if "denselayer" in key else part, leaf])

    state = {renamed(key): value for key, value in net.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    found = ftwt.from_torch("densenet121", state, CLASSES, width=0.25)
    jax.tree.map(np.testing.assert_array_equal, found, variables)


def test_positions_of_another_size_of_images_are_resized_where_a_network_is_adapted():
    net, variables = imported("vit_small_patch16", "timm")
    model = ftwt.create_model("vit_small_patch16", CLASSES, width=1 / 3)
    images = random_images(2, 80)
    shapes = {
        path: leaf.shape for path, leaf in flatten_dict(jax.eval_shape(model.init, jax.random.key(0), images)).items()
    }
    adapted, notes = adapt(variables, shapes)
    assert flatten_dict(adapted)[POSITIONS].shape == (1, 26, 128)
    assert notes == ["it was trained on images of another size: its embeddings of positions are resized"]
    with torch.no_grad():
        assert_close(jax.jit(model.apply)(adapted, images).logits, net(to_nchw(images)))


def test_a_vit_takes_oblong_images_and_says_which_it_does_not():
    net, variables = imported("vit_small_patch16", "timm")
    model = ftwt.create_model("vit_small_patch16", CLASSES, width=1 / 3)
    oblong = np.concatenate(np.split(random_images(4, 48), 2), axis=1)
    with torch.no_grad():
        assert_close(model.apply(variables, oblong).logits, net(to_nchw(oblong)))
    with pytest.raises(ftwt.UserError, match=r"their sides are multiples of 16; got 49x49"):
        model.apply(variables, random_images(1, 49))
    with pytest.raises(ftwt.UserError, match="made for square images; got 6x3 patches"):
        jax.eval_shape(model.init, jax.random.key(0), oblong)


@pytest.mark.parametrize("name", SMALL)
def test_compact_execution_is_that_with_masks(name):
    model = ftwt.create_model(name, CLASSES, ftwt.GateConfig(), width=SMALL[name].width)
    images = random_images(3, SMALL[name].sides[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ftwt.CompositionWarning)
        variables = random_variables(model, images, never=0.3)
        expected = masked(model, variables, images)
        calls = [layer.name for layer in expected.layers]
        assert len(calls) == len(set(calls))
        on = np.concatenate([gate.mask for gate in expected.gates], axis=1)
        assert 0.1 < on.mean() < 0.9
        for network in every_way(model, variables, images[:2]):
            assert_same(network(images), expected)
