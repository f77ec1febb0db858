"""The command `convert`: a workdir that every other command takes as it is, whatever its network was trained on."""

import dataclasses
import json
import pathlib
import shlex
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file as save_torch

from ftwt_jax.__main__ import main
from ftwt_jax.data import load_dataset
from ftwt_jax.training.settings import BASELINE, GATED
from tests.conftest import ROOT, TINY, config_of, fails, read_metrics
from tests.helpers import torch_imagenet as imagenet
from tests.helpers import torch_networks as theirs
from tests.helpers.weight_files import assert_same, contents, convert, kept, run, save, steps, tiny, variables

pytestmark = pytest.mark.long

RESNET8 = (
    "--config=configs/digits.py:resnet8",
    "--config.data.image_size=32",
    "--config.batch_size=256",
    "--config.gates.epochs=1",
)
TEN = ("--checkpoint={}/ten.safetensors", "--out=run")
CIFAR = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.mark.parametrize(
    ("arch", "network", "data", "model", "statistics"),
    [
        ("resnet8", theirs.ResNet(gated=True), "tfds:cifar10", {"width": 1.0}, CIFAR),
        ("resnet8", theirs.ResNet(100), "tfds:cifar100", {"width": 1.0}, CIFAR),
        ("mobilenet_v1", theirs.MobileNetV1(width=0.25), "tfds:cifar10", {"width": 0.25, "stem": "cifar"}, CIFAR),
        ("mobilenet_v1", imagenet.TimmMobileNetV1(width=0.25), "tfds:imagenet2012", {"width": 0.25}, ([0.5] * 3,) * 2),
        ("mobilenet_v2", imagenet.TorchvisionMobileNetV2(width=0.35), "tfds:imagenet2012", {"width": 0.35}, IMAGENET),
        ("resnet18", imagenet.TorchvisionResNet(features=16), "tfds:imagenet2012", {"stem": "imagenet"}, IMAGENET),
    ],
    ids=["gated", "100 classes", "width", "timm", "width that rounds", "torchvision"],
)
def test_data_and_network_are_known_from_the_file(tmp_path, arch, network, data, model, statistics):
    workdir = convert(save(network, tmp_path / "net.safetensors"), tmp_path / "run", f"--arch={arch}")
    config = json.loads((workdir / "config.json").read_text())
    assert config["data"]["name"] == data
    assert config["model"]["name"] == arch
    assert {key: config["model"][key] for key in model} == pytest.approx(model)
    heads = config["gates"]["pool"], config["gates"]["norm"], config["gates"]["depthwise"]
    assert heads == (("mean", "softmax", "full") if network.gated else ("max", "layer", "own"))
    assert (workdir / "checkpoints" / GATED).exists() == network.gated
    assert (kept(workdir)["mean"], kept(workdir)["std"]) == statistics


def test_what_is_asked_for_goes_before_what_the_file_tells(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = "--arch=resnet8", "--config.gates.pool=max", "--config.gates.r=0.8", "--config.data.data_dir=there"
    workdir = convert(save(theirs.ResNet(gated=True), tmp_path / "net.pth"), tmp_path / "run", *asked)
    config = json.loads((workdir / "config.json").read_text())
    assert (config["gates"]["pool"], config["gates"]["r"]) == ("max", 0.8)
    assert (config["data"]["name"], config["data"]["data_dir"]) == ("tfds:cifar10", str(tmp_path / "there"))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_a_file_of_half_precision_is_read_as_float32(tmp_path, kind):
    state = tiny().to(kind).state_dict()
    save_torch(state, tmp_path / "net.safetensors")
    workdir = convert(tmp_path / "net.safetensors", tmp_path / "run", *TINY)
    kernel = variables(workdir, BASELINE)["params"]["unit1"]["conv"]["kernel"]
    assert kernel.dtype == np.float32
    assert_same(kernel.transpose(3, 2, 0, 1), state["features.4.weight"].float().numpy())


def test_a_file_of_a_dtype_that_numpy_lacks_is_refused(capsys, tmp_path):
    save_torch(tiny().to(torch.float8_e4m3fn).state_dict(), tmp_path / "net.safetensors")
    error = fails(capsys, "convert", *TINY, f"--checkpoint={tmp_path}/net.safetensors", f"--out={tmp_path}/run")
    assert "float8_e4m3fn" in error
    assert "save it as float32 or bfloat16" in error


def test_a_flag_takes_the_averaged_weights(capsys, tmp_path):
    mean = theirs.randomize(theirs.ResNet(), seed=9)
    states = {"model": theirs.ResNet().state_dict(), "model_ema": mean.state_dict(), "epoch": 3}
    torch.save(states, tmp_path / "net.pth")
    asked = "--arch=resnet8", "--weights=model_ema"
    workdir = convert(tmp_path / "net.pth", tmp_path / "run", *asked)
    kernel = variables(workdir, BASELINE)["params"]["stem"]["conv"]["kernel"]
    assert_same(kernel.transpose(3, 2, 0, 1), mean.conv1.weight.detach().numpy())
    assert "is taken" not in capsys.readouterr().out
    convert(tmp_path / "net.pth", tmp_path / "other", asked[0])
    assert "note: it holds model and model_ema: model is taken; weights=NAME takes another" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "remedy"),
    [("--arch=resnet20", "--arch=resnet8"), ("--config=digits:resnet20", "--config=digits:resnet8")],
)
def test_another_network_than_was_asked_for_is_named_with_its_flag(capsys, tmp_path, asked, remedy):
    checkpoint = save(theirs.ResNet(gated=True), tmp_path / "net.safetensors")
    error = fails(capsys, "convert", asked, f"--checkpoint={checkpoint}", f"--out={tmp_path}/run")
    assert error == f"ftwt: error: net.safetensors: this looks like resnet8, not resnet20: {remedy}\n"


def said_next(capsys) -> list[list[str]]:
    """The arguments of the commands that `convert` named."""
    lines = capsys.readouterr().out.splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("ftwt ")]


def test_the_commands_that_it_names_run_as_they_are(capsys, monkeypatch, tmp_path):
    """In a folder whose name a shell would take apart."""
    monkeypatch.chdir(tmp_path)
    config = shutil.copy(ROOT / "configs" / "digits.py", tmp_path / "my config.py")
    asked = f"--config={pathlib.Path(config).name}:vgg_bn", *TINY[1:], "--config.gates.epochs=0"
    convert(save(tiny(), tmp_path / "net.pth"), tmp_path / "a run", *asked)
    evaluate, train = said_next(capsys)
    assert evaluate == ["evaluate", f"--workdir={tmp_path}/a run"]
    assert set(asked) <= set(train)
    for command in (evaluate, train):
        assert main(command) == 0
    assert json.loads((tmp_path / "a run-gated" / "config.json").read_text())["init_from"] == str(tmp_path / "a run")


def test_the_commands_that_it_names_bring_the_network_that_was_read_from_the_file(capsys, tmp_path):
    net = imagenet.KuangliuResNet(features=16)
    convert(save(net, tmp_path / "net.safetensors"), tmp_path / "run", "--arch=resnet18", "--config.gates.r=0.8")
    _, train = said_next(capsys)
    assert train[:2] == ["train", "--config=cifar10:resnet18"]
    config = config_of(train[1:])
    made = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config.model.width, config.gates.r, config.model.stem) == (0.25, 0.8, "cifar")
    assert config.model.to_dict() == made["model"]


def test_how_shortcuts_without_weights_are_computed_is_said(capsys, tmp_path):
    convert(save(theirs.ResNet(), tmp_path / "net.safetensors"), tmp_path / "run", "--arch=resnet8")
    said = capsys.readouterr().out
    assert "its shortcuts, of which the file tells nothing: 2x2 pixels averaged, and zero channels behind" in said


def test_what_is_said_can_be_shown_on_any_terminal(capsys, tmp_path):
    convert(save(theirs.ResNet(gated=True), tmp_path / "net.safetensors"), tmp_path / "run", "--arch=resnet8")
    assert capsys.readouterr().out.isascii()


def test_mean_and_deviation_can_be_given(tmp_path):
    given = "--mean=0.1,0.2,0.6", "--std=1,2,3"
    workdir = convert(save(tiny(), tmp_path / "net.pth"), tmp_path / "run", *TINY, *given)
    assert [kept(workdir)[name] for name in ("mean", "std")] == [pytest.approx([value]) for value in (0.3, 2)]


@dataclasses.dataclass(frozen=True)
class Converted:
    """A ResNet-8 of PyTorch's that tells digits apart, and the workdir made of it."""

    workdir: pathlib.Path
    net: theirs.ResNet

    @torch.no_grad()
    def expected(self) -> tuple[float, float, list[float]]:
        """Accuracy of the network on the held-out digits, of its dense one, and the density of each unit."""
        images, labels = shown_digits("test")
        dense = theirs.ResNet().eval()
        dense.load_state_dict({name: self.net.state_dict()[name] for name in dense.state_dict()})
        outputs = [net(images) for net in (self.net, dense)]
        logits = [out.logits if isinstance(out, theirs.Outputs) else out for out in outputs]
        masks = outputs[0].masks if self.net.gated else []
        accuracies = [float((each.argmax(1) == labels).float().mean()) for each in logits]
        return *accuracies, [float(mask.float().mean()) for mask in masks]


def shown_digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The digits as a network is shown them that was trained on RGB, and their labels."""
    source = getattr(load_dataset("digits", image_size=32), split)
    mean, std = map(np.mean, CIFAR)
    images = np.repeat((source.images / 255 - mean) / std, 3, axis=-1)
    return theirs.to_nchw(images), torch.as_tensor(source.labels).long()


@pytest.fixture(scope="module", params=["dense", "gated"])
def converted(request, tmp_path_factory) -> Converted:
    gated = request.param == "gated"
    net = theirs.randomize(theirs.ResNet(gated=gated), seed=2 if gated else 0).eval()
    images, labels = shown_digits("train")
    with torch.no_grad():
        features = F.pad(theirs.run(net.stack[:-1], images, theirs.Outputs(net.r, 3)), (0, 1), value=1.0)
        solution = torch.linalg.lstsq(features, F.one_hot(labels).float(), driver="gelsd").solution
        net.fc.weight.copy_(solution[:-1].T)
        net.fc.bias.copy_(solution[-1])
    folder = tmp_path_factory.mktemp(request.param)
    return Converted(convert(save(net, folder / "net.pth.tar"), folder / "run", "--arch=resnet8", *RESNET8), net)


def test_evaluate_finds_what_pytorch_finds(converted):
    run("evaluate", f"--workdir={converted.workdir}")
    result = json.loads((converted.workdir / "evaluation.json").read_text())
    accuracy, dense_accuracy, density = converted.expected()
    assert accuracy > 0.85
    assert result["accuracy"] == pytest.approx(accuracy, abs=2.1 / 450)
    assert result["dense_accuracy"] == pytest.approx(dense_accuracy, abs=2.1 / 450)
    assert result["density"] == pytest.approx(density, abs=0.01)
    assert result["samples"] == 450
    reductions = result["macs_reduction"], result["macs_reduction_published"]
    measured = result["gate_accuracy"], result["static_gate_accuracy"], result["dynamic_filters"]
    if converted.net.gated:
        assert all(0 < figure < 1 for figure in (*reductions, *measured))
    else:
        assert result["accuracy"] == result["dense_accuracy"]
        assert (reductions, measured) == ((0, 0), (None, None, None))


@pytest.mark.parametrize("converted", ["gated"], indirect=True)
def test_estimate_and_gate_training_start_from_what_was_converted(program, capsys, converted, tmp_path):
    run("estimate", f"--workdir={converted.workdir}", "--r=.9")
    assert "0.9000" in capsys.readouterr().out
    arguments = [*RESNET8, f"--config.init_from={converted.workdir}", f"--workdir={tmp_path / 'run'}"]
    program.run("train", *arguments, "--config.gates.calibrate=False")
    assert_same(variables(tmp_path / "run", BASELINE), variables(converted.workdir, BASELINE))
    assert 0 <= json.loads((tmp_path / "run" / "evaluation.json").read_text())["accuracy"] <= 1
    assert {line["stage"] for line in read_metrics(tmp_path / "run")} == {GATED}


def test_a_converted_baseline_is_what_gates_are_trained_for_in_its_own_folder(tmp_path):
    workdir = convert(save(tiny(), tmp_path / "net.pth"), tmp_path / "run", *TINY)
    before = contents(workdir / "checkpoints" / BASELINE)
    run("train", *TINY, f"--workdir={workdir}")
    assert contents(workdir / "checkpoints" / BASELINE) == before
    assert {line["stage"] for line in read_metrics(workdir)} == {GATED}
    assert 0 not in steps(workdir, GATED)


def test_the_dense_network_of_a_gated_file_is_called_what_it_is(capsys, tmp_path):
    workdir = convert(save(tiny(gated=True), tmp_path / "net.pth"), tmp_path / "run", *TINY)
    words = "its dense network is the gated one with every filter on"
    assert words in capsys.readouterr().out
    run("evaluate", f"--workdir={workdir}")
    said = capsys.readouterr()
    assert said.err.startswith(f"ftwt: warning: {workdir}: {words}")
    assert "all filters on" in said.out
    assert " dense " not in said.out
    assert json.loads((workdir / "evaluation.json").read_text())["dense_weights"] == "gated"
    run("export", f"--workdir={workdir}", f"--out={tmp_path}/dense.safetensors", "--baseline")
    assert f"note: {words}" in capsys.readouterr().out
    asked = *TINY, "--config.gates.epochs=0", f"--config.init_from={workdir}", f"--workdir={tmp_path}/other"
    run("train", *asked)
    assert words in capsys.readouterr().out


def test_a_converted_gated_network_is_only_evaluated(capsys, tmp_path):
    workdir = convert(save(tiny(gated=True), tmp_path / "net.pth"), tmp_path / "run", *TINY)
    before = contents(workdir / "checkpoints")
    assert "config.gates.norm: 'softmax' -> 'layer'" in fails(capsys, "train", *TINY, f"--workdir={workdir}")
    heads = "--config.gates.pool=mean", "--config.gates.norm=softmax", "--config.gates.depthwise=full"
    run("train", *TINY, f"--workdir={workdir}", *heads)
    assert contents(workdir / "checkpoints") == before
    assert json.loads((workdir / "evaluation.json").read_text())["gate_accuracy"] > 0
    assert not (workdir / "metrics.jsonl").exists()


@pytest.mark.parametrize("gated", [False, True])
def test_what_was_trained_elsewhere_is_evaluated_though_a_budget_is_asked_for(tmp_path, gated):
    asked = *TINY, "--config.gates.budget=0.6"
    workdir = convert(save(tiny(gated=gated), tmp_path / "net.pth"), tmp_path / "run", *asked)
    run("evaluate", f"--workdir={workdir}")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    save(theirs.ResNet(), folder / "ten.safetensors")
    save(theirs.ResNet(7), folder / "seven.safetensors")
    return folder


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--arch=resnet8", "--out=run"], "--checkpoint is missing"),
        ([TEN[0], "--arch=resnet8", "--out=gs:/bucket/run"], "for a bucket, write gs://bucket/run"),
        ([*TEN, "--arch=resnet8", "--weights=model_ema"], "unknown weights 'model_ema': known: none"),
        (["--arch=resnet8", "--checkpoint={}/ten.safetensors"], "--out is missing"),
        (["--checkpoint={}/ten.safetensors", "--out=run"], "--arch is missing"),
        ([*TEN, "--arch=resnt20"], "did you mean 'resnet20'"),
        ([*TEN, "--arch=resnet20", *RESNET8], "--arch=resnet20 differs from the config's network"),
        ([*TEN, "--arch=vgg_bn"], "plan"),
        ([*TEN, "--arch=resnet8", "--config.gats.r=0.8"], "did you mean 'gates'"),
        ([*TEN, "--arch=resnet8", "--config.gates.r=8."], "in (0, 1]"),
        ([*TEN, "--arch=resnet8", "--mean=1,1,1"], "--mean and --std together"),
        ([*TEN, "--arch=resnet8", "--std=1,1,1"], "--mean and --std together"),
        ([*TEN, "--arch=resnet8", "--mean=1,1", "--std=1,1,1"], "--mean takes three numbers"),
        ([*TEN, "--arch=resnet8", "--mean=1,1,x", "--std=1,1,1"], "--mean takes three numbers"),
        ([*TEN, "--arch=resnet8", "--mean=1,1,inf", "--std=1,1,1"], "--mean takes three numbers"),
        ([*TEN, "--arch=resnet8", "--mean=1,1,1", "--std=1,1,0"], "--std takes three numbers"),
        ([*TEN, "--arch=resnet8", "--workdir=run"], "unknown flag --workdir; known: --arch"),
        (["--checkpoint={}/seven.safetensors", "--out=run", "--arch=resnet8"], "no bundled data set has 7 classes"),
    ],
)
def test_wrong_flags(capsys, monkeypatch, tmp_path, files, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert says in fails(capsys, "convert", *(argument.format(files) for argument in arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("command", "flags"), [("convert", ("arch", "checkpoint", "mean")), ("export", ("layout",))])
def test_help(capsys, command, flags):
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"--{flag}" in said for flag in ("out", *flags))
