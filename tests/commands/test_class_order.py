"""A converted classifier's classes have an order: it is kept and compared, and asked for where it is not known."""

import numpy as np
from PIL import Image

from tests.conftest import fails
from tests.helpers import torch_networks as theirs
from tests.helpers.weight_files import TINY_PLAN, convert, kept, run, save, tiny

NUMBERED = ("1", "2", "10")
NATURAL = "--config.data.class_order=natural"


VGG = ("--config=configs/folder.py:vgg_bn", f"--config.model.plan={TINY_PLAN}")
RESNET = ("--config=configs/folder.py:resnet8",)


def data_flags(root, classes=NUMBERED, network=VGG) -> list[str]:
    """Flags of a folder with three images of each class in either split."""
    for label, name in enumerate(classes):
        for index in range(6):
            path = root / ("train" if index % 2 else "val") / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), 20 * label + index, np.uint8)).save(path)
    data = [f"--config.data.name=folder:{root}", "--config.data.augment=crop", "--config.data.image_size=8"]
    training = ["--config.batch_size=8", "--config.baseline.epochs=1", "--config.gates.epochs=0"]
    return [*network, *data, *training]


def test_the_order_of_a_converted_classifier_is_asked_for_kept_and_compared(tmp_path, capsys):
    flags = data_flags(tmp_path / "images")
    checkpoint = save(tiny(num_classes=3), tmp_path / "net.pth")
    error = fails(capsys, "convert", f"--checkpoint={checkpoint}", f"--out={tmp_path / 'run'}", *flags)
    assert "class 1 is '10' in order of bytes, as torchvision and TFDS sort, and '2' in natural order" in error
    assert "--config.data.class_order" in error
    assert not (tmp_path / "run").exists()

    workdir = convert(checkpoint, tmp_path / "run", *flags, NATURAL)
    assert kept(workdir)["class_names"] == ["1", "2", "10"]
    # A run that starts from it and does not say in which order its own data are.
    error = fails(capsys, "train", *flags, f"--config.init_from={workdir}", f"--workdir={tmp_path / 'next'}")
    assert "on these classes in another order: class 1 was '2' and is now '10'; set config.data.class_order" in error

    run("export", f"--workdir={workdir}", f"--out={tmp_path / 'own.safetensors'}")
    again = ["convert", f"--checkpoint={tmp_path / 'own.safetensors'}", f"--out={tmp_path / 'again'}", *flags]
    assert "its classes are those of config.data in another order" in fails(capsys, *again)
    run(*again, NATURAL)
    assert kept(tmp_path / "again")["class_names"] == ["1", "2", "10"]


def test_a_classifier_whose_classes_have_no_names_is_refused_on_data_of_uncertain_order(tmp_path, capsys):
    classes = tuple(map(str, range(1, 11)))
    net = save(theirs.randomize(theirs.ResNet(), seed=0), tmp_path / "net.pth")
    source = convert(net, tmp_path / "source", "--arch=resnet8")
    assert kept(source)["class_names"] == []
    flags = [*data_flags(tmp_path / "images", classes, RESNET), f"--config.init_from={source}"]
    error = fails(capsys, "train", *flags, f"--workdir={tmp_path / 'run'}")
    assert "has classes without names" in error
    assert "class 1 is '10' in order of bytes" in error
    assert "set config.data.class_order to bytes or natural" in error
    run("train", *flags, NATURAL, f"--workdir={tmp_path / 'run'}")
    assert kept(tmp_path / "run")["class_names"] == list(classes)
    # Where there is only one order, none is asked for.
    others = [*data_flags(tmp_path / "others", tuple("abcdefghij"), RESNET), f"--config.init_from={source}"]
    run("train", *others, f"--workdir={tmp_path / 'other run'}")
    assert "classes in order of bytes" not in capsys.readouterr().out


def test_training_says_in_which_order_numbered_classes_are(tmp_path, capsys):
    flags = data_flags(tmp_path / "images")
    run("train", *flags, f"--workdir={tmp_path / 'run'}")
    said = capsys.readouterr().out
    assert "classes in order of bytes: class 1 is '10' in order of bytes" in said
    assert kept(tmp_path / "run")["class_names"] == ["1", "10", "2"]
    error = fails(capsys, "train", *flags, NATURAL, f"--workdir={tmp_path / 'run'}")
    assert "class_order" in error
