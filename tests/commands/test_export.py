"""The command `export`: what was converted leaves bit for bit, what was trained here is at home in PyTorch."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from ftwt_jax.data import load_dataset
from ftwt_jax.training.optim import cooldown_step
from ftwt_jax.training.settings import BASELINE, GATED
from ftwt_jax.workdir import load
from tests.conftest import TINY, TINY_STEPS, fails, read_metrics
from tests.helpers import torch_imagenet as imagenet
from tests.helpers import torch_networks as theirs
from tests.helpers.folders import write_splits
from tests.helpers.weight_files import TINY_PLAN, convert, run, save, tensors, variables

UNTOUCHED = {
    "resnet8": theirs.ResNet(gated=True),
    # Heads with 40 inputs: dividing by it and multiplying again does not give back every number.
    "mobilenet_v2": theirs.MobileNetV2(width=0.25, gated=True),
    "mobilenet_v1": imagenet.TimmMobileNetV1(width=0.25),
    "resnet18": imagenet.TorchvisionResNet(num_classes=2, features=16),
}


def export(workdir: pathlib.Path, out: pathlib.Path, *flags: str) -> dict[str, np.ndarray]:
    run("export", f"--workdir={workdir}", f"--out={out}", *flags)
    return load_file(out)


def said(file: pathlib.Path) -> dict:
    with safe_open(file, framework="numpy") as opened:
        return json.loads(opened.metadata()["ftwt_jax"])


@pytest.mark.parametrize("name", UNTOUCHED)
def test_a_converted_network_leaves_as_it_came(tmp_path, name):
    net = theirs.randomize(UNTOUCHED[name], seed=0)
    config = []
    if name == "resnet18":
        data = write_splits(tmp_path / "images")
        config = [
            f"--config=configs/folder.py:{name}",
            f"--config.data.name=folder:{data}",
            "--config.model.width=0.25",
        ]
    workdir = convert(save(net, tmp_path / "net.pth.tar"), tmp_path / "run", f"--arch={name}", *config)
    expected = {f"module.{key}": value for key, value in tensors(net).items()}
    found = export(workdir, tmp_path / "net.safetensors")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
        assert found[key].tobytes() == value.tobytes(), key
    assert said(tmp_path / "net.safetensors")["model"]["width"] == (1 if name == "resnet8" else 0.25)


def shown_digits() -> tuple[torch.Tensor, np.ndarray]:
    digits = load_dataset("digits")
    return theirs.to_nchw((digits.test.images / 255 - digits.mean) / digits.std), digits.test.labels


def test_a_trained_network_is_at_home_in_pytorch(tiny_run, tmp_path):
    workdir, _ = tiny_run
    expected = json.loads((workdir / "evaluation.json").read_text())
    state = export(workdir, tmp_path / "dense.safetensors", "--baseline")
    net = theirs.VGG(plan=TINY_PLAN, channels=1).eval()
    net.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()}, strict=True)
    images, labels = shown_digits()
    with torch.no_grad():
        accuracy = (net(images).argmax(1).numpy() == labels).mean()
    assert accuracy == pytest.approx(expected["dense_accuracy"], abs=2.1 / len(labels))
    gated = export(workdir, tmp_path / "gated.safetensors")
    theirs.VGG(plan=TINY_PLAN, channels=1, gated=True).load_state_dict(
        {name: torch.from_numpy(array) for name, array in gated.items()}, strict=True
    )
    about = said(tmp_path / "gated.safetensors")
    assert about["model"] == {"name": "vgg_bn", "plan": [*TINY_PLAN], "width": 1.0, "dtype": "float32"}
    assert (about["num_classes"], about["class_names"]) == (10, [str(digit) for digit in range(10)])
    assert (about["gates"]["pool"], about["gates"]["r"]) == ("max", expected["r"])
    assert said(tmp_path / "dense.safetensors")["gates"] is None


@pytest.mark.parametrize("flags", [(), ("--baseline",), ("--best", "--layout=published")])
def test_a_trained_network_comes_in_again_with_its_evaluation(tiny_run, tmp_path, flags):
    workdir = tmp_path / "trained"  # Of its own: another evaluation is written into it.
    shutil.copytree(tiny_run[0], workdir)
    run("evaluate", f"--workdir={workdir}", *(flag for flag in flags if flag == "--best"))
    before = json.loads((workdir / "evaluation.json").read_text())
    export(workdir, tmp_path / "net.safetensors", *flags)
    again = convert(tmp_path / "net.safetensors", tmp_path / "again", *TINY)
    run("evaluate", f"--workdir={again}")
    after = json.loads((again / "evaluation.json").read_text())
    if "--baseline" in flags:
        assert after["accuracy"] == after["dense_accuracy"] == before["dense_accuracy"]
        return
    assert (before["dense_weights"], after["dense_weights"]) == (BASELINE, GATED)
    for name in before.keys() - {"predicted_macs_reduction", "checkpoint", "steps"}:
        if name.startswith("dense_"):
            continue
        assert after[name] == pytest.approx(before[name]) if name == "density" else after[name] == before[name], name


def test_the_best_checkpoint_can_be_had(tiny_run, capsys, tmp_path):
    workdir, _ = tiny_run
    evaluated = [line for line in read_metrics(workdir) if line["stage"] == GATED and "eval_accuracy" in line]
    # Before its gates are calibrated a network does other work, and is none of the candidates.
    frozen = cooldown_step(load(str(workdir))[1].gates, TINY_STEPS)
    scores = {line["step"]: line["eval_accuracy"] for line in evaluated if line["step"] >= frozen}
    export(workdir, tmp_path / "best.safetensors", "--best")
    best = int(capsys.readouterr().out.split("step ")[1].split(",")[0])
    assert scores[best] == max(scores.values())
    export(workdir, tmp_path / "newest.safetensors")
    assert f"gated, step {TINY_STEPS}, 18 tensors under published names" in capsys.readouterr().out


def test_the_r_that_a_budget_led_to_leaves_with_the_network(tiny_run, tmp_path):
    shutil.copytree(tiny_run[0], tmp_path / "run")
    for name, change in (("config.json", {"gates": {"budget": 0.6}}), ("estimate.json", {"r": 0.75})):
        file = tmp_path / "run" / name
        kept = json.loads(file.read_text())
        kept.update({key: kept[key] | value if isinstance(value, dict) else value for key, value in change.items()})
        file.write_text(json.dumps(kept))
    export(tmp_path / "run", tmp_path / "net.safetensors")
    assert said(tmp_path / "net.safetensors")["gates"]["r"] == 0.75


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("converted")
    net = theirs.randomize(theirs.ResNet(gated=True), seed=0)
    return convert(save(net, folder / "net.pth"), folder / "run", "--arch=resnet8")


@pytest.mark.parametrize("layout", ["published", "torchvision", "huggingface"])
def test_a_network_comes_in_again_under_any_names(converted, tmp_path, layout):
    found = export(converted, tmp_path / "net.safetensors", f"--layout={layout}")
    assert ("resnet.embedder.embedder.convolution.weight" in found) == (layout == "huggingface")
    again = convert(tmp_path / "net.safetensors", tmp_path / "again", "--arch=resnet8")
    same = functools.partial(np.testing.assert_allclose, rtol=0 if layout == "published" else 1e-6)
    for stage in (BASELINE, GATED):
        jax.tree.map(same, variables(again, stage), variables(converted, stage))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workdir={}"], "--out is missing"),
        (["--out=net.safetensors"], "--workdir is missing"),
        (["--workdir={}", "--out=net.pth"], "ends in .safetensors (weights for PyTorch) or .stablehlo"),
        (["--workdir={}", "--out=net.safetensors", "--layout=torchvison"], "did you mean 'torchvision'"),
        (["--workdir={}", "--out=net.safetensors", "--layout=timm"], "unknown layout of ResNet 'timm'"),
        (
            ["--workdir={}", "--out=net.safetensors", "--format=pth"],
            "--format takes one of safetensors, stablehlo, onnx; got 'pth'",
        ),
        (["--workdir={}", "--out=missing/net.safetensors"], "missing is not a folder"),
        (["--workdir={}/missing", "--out=net.safetensors"], "there is no workdir"),
        (["--workdir={}/checkpoints", "--out=net.safetensors"], "holds no run"),
        (["--workdir={}", "--out=net.safetensors", "--r=1"], "unknown flag --r; known: --baseline"),
    ],
)
def test_wrong_flags(capsys, monkeypatch, tmp_path, converted, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert says in fails(capsys, "export", *(argument.format(converted) for argument in arguments))
    assert not list(tmp_path.iterdir())


def test_a_workdir_without_a_network(capsys, tmp_path, converted):
    (tmp_path / "run").mkdir()
    shutil.copy(converted / "config.json", tmp_path / "run")
    error = fails(capsys, "export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'net.safetensors'}")
    assert "no trained baseline network" in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_file_that_is_there_is_left_alone(capsys, tmp_path, converted):
    (tmp_path / "net.safetensors").write_text("mine")
    error = fails(capsys, "export", f"--workdir={converted}", f"--out={tmp_path / 'net.safetensors'}")
    assert "already exists: choose another file with --out" in error
    assert (tmp_path / "net.safetensors").read_text() == "mine"
