"""State dicts that do not fit: what is re-initialised or left out is warned of, the rest is refused by name."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

import ftwt_jax as ftwt
from ftwt_jax.models.vgg import PLANS
from ftwt_jax.weights.source import read_state
from ftwt_jax.weights.state import recognise
from tests.conftest import random_like
from tests.helpers import torch_imagenet as imagenet
from tests.helpers import torch_networks as theirs

GATES = ftwt.GateConfig.paper(pool="mean", min_filters=0)
IMAGES = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
HEAD = "mask.model.1Conv2dMask"


PLAN = (8, "M", 12)
# Arguments of ours and theirs; their gated VGG has other names for everything than the dense one.
ARCH = {"resnet8": {}, "vgg_bn": {"plan": PLAN}}
THEIRS = {"resnet8": theirs.ResNet, "vgg_bn": functools.partial(theirs.VGG, plan=PLAN)}


@functools.cache
def tensors(gates=None, name="resnet8", **settings):
    net = theirs.randomize(THEIRS[name](gated=gates is not None, **settings), seed=0)
    return {key: tensor for key, tensor in net.state_dict().items() if "num_batches" not in key}


@functools.cache
def fitting(gates=None, name="resnet8"):
    return ftwt.from_torch(name, tensors(gates, name), 10, gates, **ARCH[name])


def run(variables, classes=10, gates=None, name="resnet8"):
    model = ftwt.create_model(name, classes, gates, **ARCH[name])
    # Optimised for compile time.
    return jax.jit(model.apply, compiler_options={"xla_backend_optimization_level": 0})(variables, IMAGES)


def imported(said, state, *arguments, name="resnet8"):
    """Variables; checks that exactly these warnings were raised, on one line each, at the caller."""
    with pytest.warns(ftwt.WeightsWarning) as caught:
        variables = ftwt.from_torch(name, state, *arguments, **ARCH[name])
    lines = [str(warning.message) for warning in caught]
    assert len(lines) == len(said)
    for pattern in said:
        assert any(re.fullmatch(f".*{pattern}.*", line) for line in lines), lines
    assert {warning.filename for warning in caught} == {__file__}
    return variables


def check_shared(ours, expected, *except_in):
    """Checks that every array but those of some modules is the same in both."""
    ours, expected = (
        {path: leaf for path, leaf in flatten_dict(v).items() if not {*except_in} & {*path}} for v in (ours, expected)
    )
    assert ours.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(ours[path], leaf)


NO_HEADS, HEADS = "no gate heads: new ones are initialised", "gate heads are left out"
CLASSES = "10 classes, not 7: the classifier is re-initialised"


class TestWhatIsMadeAnew:
    @pytest.mark.parametrize("gates", [None, GATES])
    def test_there_is_no_warning_if_everything_fits(self, gates):
        with warnings.catch_warnings():
            warnings.simplefilter("error", ftwt.WeightsWarning)
            ftwt.from_torch("resnet8", tensors(gates), 10, gates)

    @pytest.mark.parametrize("gates", [None, GATES])
    def test_other_classes_reinitialise_the_classifier_and_nothing_else(self, gates):
        variables = imported([CLASSES], tensors(gates), 7, gates)
        check_shared(variables, fitting(gates), "classifier")
        logits = run(variables, 7, gates).logits
        assert logits.shape == (3, 7)
        assert jnp.std(logits) > 0

    def test_gates_of_a_dense_file_are_new_with_every_filter_on(self):
        variables = imported([NO_HEADS], tensors(None, "vgg_bn"), 10, GATES, name="vgg_bn")
        check_shared(variables, fitting(None, "vgg_bn"), "gate_head")
        outputs = run(variables, 10, GATES, "vgg_bn")
        assert len(outputs.gates) == 2
        assert all(gate.mask.all() for gate in outputs.gates)
        dense = run(fitting(None, "vgg_bn"), name="vgg_bn")
        np.testing.assert_allclose(outputs.logits, dense.logits, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", ARCH)
    def test_a_dense_network_ignores_the_heads_of_a_gated_file(self, name):
        variables = imported([HEADS], tensors(GATES, name), 10, name=name)
        check_shared(variables, fitting(GATES, name), "gate_head")
        assert run(variables, name=name).logits.shape == (3, 10)

    @pytest.mark.parametrize(("have", "gates", "said"), [(None, GATES, NO_HEADS), (GATES, None, HEADS)])
    def test_two_differences_are_both_warned_of(self, have, gates, said):
        imported([said, CLASSES], tensors(have, "vgg_bn"), 7, gates, name="vgg_bn")


def refused(state, *arguments, name="resnet8", **arch):
    """The one line of the error."""
    with pytest.raises(ftwt.UserError) as error:
        ftwt.from_torch(name, state, *(arguments or (10,)), **arch)
    assert "\n" not in str(error.value)
    return str(error.value)


def words(message):
    return set(re.split(r"[\s,:;]+", message))


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


MISSING = ("conv1.weight", "layer2.0.bn1.running_var", "layer3.0.conv2.weight", "fc.bias")
ADDED = {"fc2.weight": torch.ones(3, 3), "layer1.0.extra.0.weight": torch.ones(1), "scale": torch.tensor(1.0)}
RESHAPED = {
    "bn1.weight": torch.ones(17),
    "layer1.0.conv1.weight": torch.ones(16, 3, 3, 16),
    "layer2.0.conv1.weight": torch.ones(32, 16, 9),
    "layer2.0.bn1.bias": torch.tensor(1.0),
    "fc.weight": torch.ones(10, 65),
}


class TestWhatIsRefused:
    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_all_tensors_that_are_missing_unexpected_or_of_the_wrong_shape_are_named_at_once(self, prefix):
        state = {**without(tensors(), *MISSING), **ADDED, **RESHAPED}
        message = refused({prefix + name: tensor for name, tensor in state.items()})
        bad = {prefix + name for name in (*MISSING, *ADDED, *RESHAPED)}
        assert words(message) & {prefix + name for name in (*tensors(), *ADDED)} == bad
        lists = r".*missing: (.*); unexpected: (.*); wrong: (.*)"
        for names, text in zip((MISSING, ADDED, RESHAPED), re.fullmatch(lists, message).groups(), strict=True):
            assert {prefix + name for name in names} == {word for word in words(text) if word in bad}
        assert "10x65, not 10x64" in message

    @pytest.mark.parametrize(
        ("name", "copy"),
        [
            ("conv1.weight", "masked_conv.conv.weight"),
            ("layer3.0.bn2.running_mean", "layer3.0.masked_conv2.bn.running_mean"),
        ],
    )
    def test_two_copies_that_differ_are_both_named(self, name, copy):
        state = tensors(GATES)
        message = refused({**state, copy: state[copy] + 1}, 10, GATES)
        assert words(message) & state.keys() == {name, copy}
        assert "differ" in message

    def test_missing_heads_are_named_if_others_are_there(self):
        gone = {f"masked_conv.{HEAD}.bias", f"layer2.0.masked_conv1.{HEAD}.weight"}
        state = tensors(GATES)
        assert words(refused(without(state, *gone), 10, GATES)) & state.keys() == gone

    @pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64])
    def test_weights_that_are_not_floats_are_named_with_their_dtype(self, kind):
        changed = {name: tensors()[name].to(kind) for name in ("layer1.0.conv2.weight", "fc.bias")}
        message = refused({**tensors(), **changed})
        assert words(message) & tensors().keys() == changed.keys()
        assert str(kind).removeprefix("torch.") in message

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_values_that_are_not_finite_are_refused_by_the_names_of_their_tensors(self, value):
        state = tensors() | {name: tensors()[name].clone() for name in ("layer1.0.conv2.weight", "bn1.running_var")}
        for name in ("layer1.0.conv2.weight", "bn1.running_var"):
            state[name].view(-1)[-1] = value
        message = refused(state)
        assert "NaN or infinite" in message
        assert words(message) & tensors().keys() == {"layer1.0.conv2.weight", "bn1.running_var"}

    @pytest.mark.parametrize("tensor", [torch.ones(10, device="meta"), torch.ones(10).to_sparse()])
    def test_a_tensor_without_plain_numbers_is_named(self, tensor):
        assert "tensor fc.bias is not a dense array" in refused({**tensors(), "fc.bias": tensor})

    @pytest.mark.parametrize(
        ("state", "reason"),
        [
            ({}, "no tensors"),
            ({"state_dict": {}}, "no tensors"),
            ({"epoch": 3, "arch": "resnet8"}, "no tensors.*epoch, arch"),
            ({"conv1.weight": [[1.0]]}, "no tensors.*conv1.weight"),
            ([torch.ones(3)], "got list"),
            (None, "got NoneType"),
            ("resnet8.pth", "got str"),
            (torch.nn.Linear(2, 2), "got Linear"),
        ],
    )
    def test_what_is_not_a_state_dict_is_refused(self, state, reason):
        assert re.search(reason, refused(state))

    @pytest.mark.parametrize(("blocks", "kind"), [(2, "unexpected"), (0, "missing")])
    def test_of_many_tensors_the_first_are_named_and_the_others_counted(self, blocks, kind):
        """Two of three stages have other blocks than a ResNet-8, which makes it no network that is known."""
        stages = "layer1.", "layer2."
        state = {key: value for key, value in tensors(blocks=1).items() if not (blocks == 0 and key.startswith(stages))}
        state |= {key: value for key, value in tensors(blocks=blocks or 1).items() if key.startswith(stages) and blocks}
        differing = sorted(state.keys() ^ tensors(blocks=1).keys())
        message = refused(state)
        assert (
            f"does not fit this resnet8: {kind}: {', '.join(differing[:10])} and {len(differing) - 10} more" in message
        )
        assert len(differing) == 20
        assert len(message) < 400

    @pytest.mark.parametrize(("asked", "gates"), [("resnet20", None), ("resnet14", GATES), ("vgg11_bn", None)])
    @pytest.mark.parametrize("have", [None, GATES], ids=["dense", "gated"])
    def test_the_file_of_another_network_is_refused_with_the_name_of_its_own(self, asked, gates, have):
        with pytest.raises(ftwt.UserError) as error:
            ftwt.from_torch(asked, tensors(have), 10, gates)
        assert str(error.value) == f"this looks like resnet8, not {asked}"

    @pytest.mark.parametrize(
        ("name", "build"),
        [
            ("resnet18", functools.partial(imagenet.TorchvisionResNet, features=16)),
            ("resnet34", functools.partial(imagenet.KuangliuResNet, stage_sizes=(3, 4, 6, 3), features=8)),
            ("resnet32", functools.partial(theirs.ResNet, blocks=5)),
            ("vgg13_bn", functools.partial(theirs.VGG, plan=PLANS["vgg13_bn"])),
            ("mobilenet_v1", functools.partial(theirs.MobileNetV1, width=0.25, gated=True)),
            ("mobilenet_v2", functools.partial(imagenet.TorchvisionMobileNetV2, width=0.35)),
        ],
    )
    def test_every_network_is_recognised_at_any_width(self, name, build):
        assert recognise(read_state(build().state_dict())) == name

    def test_a_network_like_none_is_recognised_as_none(self):
        assert recognise(read_state({**tensors(), "fc2.weight": torch.ones(3, 3)})) is None
        assert recognise(read_state(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).state_dict())) is None

    @pytest.mark.parametrize(
        ("name", "arguments", "arch", "reason"),
        [
            ("resnet9", (10,), {}, "unknown network 'resnet9'"),
            ("resnet8", (0,), {}, "num_classes"),
            ("resnet8", (10, 0.9), {}, "gates must be"),
            ("resnet8", (10,), {"stem": "imagenet"}, "unknown resnet8 option 'stem'"),
            ("resnet8", (10,), {"width": 0.5}, "conv1.weight is 16x3x3x3, not 8x3x3x3"),
            ("mobilenet_v2", (10,), {}, "looks like resnet8, not mobilenet_v2"),
        ],
    )
    def test_other_arguments_are_checked(self, name, arguments, arch, reason):
        assert re.search(reason, refused(tensors(), *arguments, name=name, **arch))

    def test_the_projections_of_one_mobilenet_v2_are_unexpected_in_the_other(self):
        net = theirs.MobileNetV2(width=0.125, projection=True)
        message = refused(net.state_dict(), name="mobilenet_v2", width=0.125, stem="published")
        assert {word for word in words(message) if word.endswith(".shortcut.0.weight")} == {
            f"bottlenecks.{block}.shortcut.0.weight" for block in (0, 1)
        }
        assert "and 10 more" in message


def renamed(state, **parts):
    """With parts of the names replaced."""
    for old, new in parts.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    return state


HIDDEN = {
    f"classifier.{index}.{leaf}": torch.ones(*size[: 2 if leaf == "weight" else 1])
    for index, size in ((0, (64, 98)), (3, (64, 64)), (6, (10, 64)))
    for leaf in ("weight", "bias")
}
SHORTCUT = {"layer2.0.downsample.0.weight": torch.ones(32, 16, 1, 1)}


class TestOtherNetworksUnderNamesMuchLikeOurs:
    @pytest.mark.parametrize("name", ["resnet8", "resnet20", "vgg11_bn"])
    def test_shortcuts_of_another_kind_are_the_reason_and_not_the_name_of_the_classifier(self, name):
        """The network of `tests.helpers` under akamaster's names, which differ in the classifier's alone."""
        message = refused({"state_dict": renamed(tensors(), **{"fc.": "linear."})}, name=name)
        assert "shortcuts take every second pixel and add zero channels on both sides" in message
        assert len(message) < 300

    def test_shortcuts_with_weights_are_the_reason(self):
        for state in (tensors() | SHORTCUT, renamed(tensors() | SHORTCUT, downsample="shortcut", **{"fc.": "linear."})):
            assert "its shortcuts are convolutions (layer2.0." in refused(state)

    def test_hidden_layers_of_a_classifier_are_the_reason(self):
        state = {key: value for key, value in tensors(name="vgg_bn").items() if not key.startswith("classifier")}
        with pytest.raises(ftwt.UserError) as error:
            ftwt.from_torch("vgg16_bn", state | HIDDEN, 10)
        assert "hidden layers (classifier.0.weight 64x98, classifier.3.weight 64x64, classifier.6" in str(error.value)


class TestWhatDoesNotLeave:
    @pytest.mark.parametrize(
        ("name", "arch", "layout", "known"),
        [
            ("resnet8", {}, "timm", "published, torchvision, huggingface"),
            ("vgg_bn", {"plan": (4,)}, "torchvision", "published"),
            ("mobilenet_v1", {}, "Timm", "published, timm"),
            ("mobilenet_v2", {}, "huggingface", "published, torchvision, timm"),
        ],
    )
    def test_an_unknown_layout_names_the_known_ones(self, name, arch, layout, known):
        model = ftwt.create_model(name, 10, **arch)
        variables = random_like(jax.eval_shape(model.init, jax.random.key(0), IMAGES))
        with pytest.raises(ftwt.UserError, match=f"layout.*{layout!r}.*known: {known}$"):
            ftwt.to_torch(name, variables, 10, layout=layout, **arch)

    @pytest.mark.parametrize(
        ("name", "classes", "gates", "variables", "reason"),
        [
            ("resnet14", 10, None, fitting, "params/stage1_block1/conv1/conv/kernel"),
            ("resnet8", 7, None, fitting, "params/classifier/dense/bias, params/classifier/dense/kernel$"),
            ("resnet8", 10, GATES, fitting, "params/stem/gate_head/dense/kernel"),
            ("resnet8", 10, None, lambda: fitting(GATES), "params/stem/gate_head/dense/kernel"),
            ("resnet8", 10, None, lambda: {"params": fitting()["params"]}, "batch_stats/stem/bn/mean"),
        ],
    )
    def test_variables_of_another_network_are_refused_by_their_paths(self, name, classes, gates, variables, reason):
        with pytest.raises(ftwt.UserError, match=f"^the variables do not fit this {name}: .*{reason}"):
            ftwt.to_torch(name, variables(), classes, gates)
