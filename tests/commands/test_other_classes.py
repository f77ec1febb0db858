"""A converted network for data with other classes, or images with other channels, than those it was trained on."""

import pathlib

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from ftwt_jax.training.settings import BASELINE
from tests.conftest import fails, read_metrics
from tests.helpers import torch_networks as theirs
from tests.helpers.weight_files import (
    TINY_PLAN,
    assert_same,
    contents,
    convert,
    kept,
    run,
    save,
    steps,
    tiny,
    variables,
)

CLASSES = ("ant", "bee", "cat")
GREY = "--config=configs/digits.py:resnet8"


def on_folder(root: pathlib.Path, classes: tuple[str, ...], *arguments: str) -> list[str]:
    """Flags of a folder of small images, written if it is not there, and of a few steps of a baseline on it."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(classes):
        for index in range(20):
            path = root / ("val" if index % 5 == 0 else "train") / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(60 * label, 60 * label + 100, (16, 16, 3), np.uint8)).save(path)
    data = [f"--config.data.name=folder:{root}", "--config.data.augment=crop", "--config.data.image_size=16"]
    # So slow that whatever is trained stays near to where it started.
    training = ["--config.batch_size=16", "--config.baseline.epochs=1", "--config.baseline.lr=1e-6"]
    return [*arguments, *data, *training, "--config.log_every=1", "--config.gates.epochs=0"]


def kernels(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Of the convolutions of the newest baseline, by path."""
    found = flatten_dict(variables(workdir, BASELINE)["params"], sep="/")
    return {path: kernel for path, kernel in found.items() if path.endswith("conv/kernel")}


def assert_trained_from(workdir: pathlib.Path, start: dict[str, np.ndarray], arguments: list[str]) -> None:
    """`train` with these arguments trains this baseline, and does it once."""
    run("train", *arguments, f"--workdir={workdir}")
    assert [line["stage"] for line in read_metrics(workdir)] == [BASELINE] * 3
    assert max(steps(workdir, BASELINE)) == 3
    assert variables(workdir, BASELINE)["params"]["classifier"]["dense"]["bias"].shape == (3,)
    for path, kernel in kernels(workdir).items():
        assert 0 < np.abs(kernel - start[path]).max() < 1e-3, path
    before = contents(workdir)
    run("train", *arguments, f"--workdir={workdir}")
    assert contents(workdir) == before


def test_a_checkpoint_of_other_classes_is_what_a_baseline_is_trained_from(capsys, tmp_path):
    net = tiny(gated=True)
    arguments = on_folder(
        tmp_path / "images", CLASSES, "--config=configs/folder.py:vgg_bn", f"--config.model.plan={TINY_PLAN}"
    )
    workdir = convert(save(net, tmp_path / "net.pth"), tmp_path / "run", *arguments)
    said = capsys.readouterr().out
    assert "note: it has 10 classes, not 3: the classifier is re-initialised" in said
    assert "note: its gate heads are left out" in said
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == [BASELINE]
    assert kept(workdir)["unfinished"]
    assert kept(workdir)["class_names"] == list(CLASSES)
    start = kernels(workdir)
    for kernel, index in zip(start.values(), (0, 2), strict=True):
        assert_same(kernel.transpose(3, 2, 0, 1), net.features[index].conv.weight.detach().numpy())
    run("evaluate", f"--workdir={workdir}")
    assert_trained_from(workdir, start, arguments)


def test_a_baseline_is_taken_for_other_classes(tmp_path):
    net = theirs.randomize(theirs.ResNet(), seed=0)
    source = convert(save(net, tmp_path / "net.pth"), tmp_path / "source", "--arch=resnet8")
    start = kernels(source)
    assert_same(start["stem/conv/kernel"].transpose(3, 2, 0, 1), net.conv1.weight.detach().numpy())
    arguments = on_folder(tmp_path / "new", CLASSES, "--config=configs/folder.py:resnet8")
    assert_trained_from(tmp_path / "run", start, [*arguments, f"--config.init_from={source}"])


def test_a_baseline_that_knows_the_names_of_its_classes_is_taken_for_others(tmp_path):
    flags = "--config=configs/folder.py:vgg_bn", f"--config.model.plan={TINY_PLAN}"
    old = on_folder(tmp_path / "old", CLASSES[:2], *flags)
    source = convert(save(tiny(num_classes=2), tmp_path / "net.pth"), tmp_path / "source", *old)
    arguments = on_folder(tmp_path / "new", CLASSES, *flags, f"--config.init_from={source}")
    assert_trained_from(tmp_path / "run", kernels(source), arguments)


def test_a_converted_baseline_is_trained_further_on_the_same_classes(capsys, tmp_path):
    flags = "--config=configs/folder.py:vgg_bn", f"--config.model.plan={TINY_PLAN}"
    arguments = on_folder(tmp_path / "images", CLASSES, *flags)
    source = convert(save(tiny(num_classes=3), tmp_path / "net.pth"), tmp_path / "source", *arguments)
    start, asked = kernels(source), [*arguments, f"--config.init_from={source}"]
    run("train", *asked, f"--workdir={tmp_path / 'taken'}")
    assert steps(tmp_path / "taken", BASELINE) == {0}
    assert_same(kernels(tmp_path / "taken"), start)
    assert_trained_from(tmp_path / "run", start, [*asked, "--config.fine_tune=True"])
    # Or in its own folder.
    own = [*arguments, "--config.fine_tune=True"]
    assert_trained_from(convert(tmp_path / "net.pth", tmp_path / "own", *own), start, own)
    trained = [*own, f"--workdir={tmp_path / 'none'}"]
    assert "set config.init_from" in fails(capsys, "train", *trained)
    refused = fails(capsys, "train", *trained, f"--config.init_from={source}", "--config.baseline.epochs=0")
    assert "for how long to train further" in refused
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("channels", "arguments"),
    [(1, ["--arch=resnet8"]), (4, ["--arch=resnet8"]), (4, [GREY])],
    ids=["grey for RGB", "four for RGB", "four for grey"],
)
def test_a_network_for_images_with_other_channels_is_refused(capsys, tmp_path, channels, arguments):
    checkpoint = save(theirs.ResNet(channels=channels), tmp_path / "net.safetensors")
    assert "channel" in fails(capsys, "convert", f"--checkpoint={checkpoint}", f"--out={tmp_path / 'run'}", *arguments)
    assert not (tmp_path / "run").exists()
