"""Images that cannot be decoded are named once, skipped and counted; too many of them end the run."""

import dataclasses
import html
import json
import os
import pathlib
import subprocess

import numpy as np
import pytest
from PIL import Image

from ftwt_jax.data import load_dataset
from ftwt_jax.data.pipeline import eval_batches, train_batches
from ftwt_jax.data.source import Dataset
from ftwt_jax.errors import UserError, printable
from tests.helpers.folders import (
    CLASSES,
    GARBAGE,
    SPLITS,
    load,
    refused,
    spoil,
    warned_of_images,
    write_image,
    write_splits,
    write_tree,
)

pytestmark = pytest.mark.long


@pytest.mark.parametrize("augment", ["crop", "none", "resized_crop"])
@pytest.mark.parametrize("damage", ["not an image", "empty", "truncated", "truncated JPEG"])
@pytest.mark.parametrize("split", SPLITS)
def test_one_broken_image_of_120_is_skipped_with_one_warning_and_counted(tmp_path, augment, damage, split):
    write_splits(tmp_path, each=30)
    broken = tmp_path / split / "bee" / "004.png"
    if damage == "cut-off JPEG":
        broken.unlink()
        broken = broken.with_suffix(".jpg")
        # Noise, so that the cut comes after all headers, where only decoding notices it.
        Image.effect_noise((40, 40), 60).convert("RGB").save(broken)
    if damage.startswith("cut"):
        data = broken.read_bytes()
        broken.write_bytes(data[: len(data) * 9 // 10] if damage == "cut-off JPEG" else data[: len(data) // 2])
    else:
        broken.write_bytes(GARBAGE if damage == "not an image" else b"")
    with warned_of_images(tmp_path) as warned:
        dataset = load(tmp_path, augment=augment)
        trained = next(train_batches(dataset, 60, seed=0))
        evaluated = list(eval_batches(dataset, dataset.test, 60))
    assert len(warned) == 1
    assert str(broken) in warned[0]
    assert "\n" not in warned[0]
    assert dataset.skipped.names == (str(broken),)
    assert dataset.skipped.summary() == "1 of 120 images cannot be decoded and were skipped"
    sizes = {name: 59 if name == split else 60 for name in SPLITS}
    assert (len(dataset.train), len(dataset.test)) == tuple(sizes.values())
    labels = {"train": trained["label"][: sizes["train"]], "val": evaluated[0]["label"][: sizes["val"]]}
    for name, size in sizes.items():
        assert labels[name].tolist().count(0) == 30
        assert labels[name].tolist().count(1) == size - 30
    assert evaluated[0]["weight"].sum() == sizes["val"]


def test_images_keep_their_labels_if_one_before_them_is_skipped(tmp_path):
    for split in SPLITS:
        write_tree(tmp_path / split, [f"{number:02}" for number in range(60)], each=1, first=100)
    write_image(tmp_path / "train/07/more.png", 107)
    spoil(tmp_path, ["train/07/000.png"])
    for augment in ("crop", "resized_crop"):
        with warned_of_images(tmp_path) as warned:
            dataset = load(tmp_path, augment=augment)
        assert len(warned) == 1
        batch = next(train_batches(dataset, 60, seed=0))
        np.testing.assert_array_equal(batch["image"].max((1, 2, 3)), 100 + batch["label"])
        assert set(batch["label"]) == set(range(60))


@pytest.mark.parametrize("augment", ["crop", "resized_crop"])
def test_more_than_a_hundredth_of_broken_images_is_refused_with_their_names(tmp_path, augment):
    write_splits(tmp_path, each=25)
    names = ["train/ant/007.png", "val/bee/011.png"]
    spoil(tmp_path, names)
    error = refused(tmp_path, augment=augment)
    assert "2 of 100 images" in error
    assert "1%" in error
    assert all(str(tmp_path / name) in error for name in names)


@pytest.mark.parametrize("augment", ["crop", "resized_crop"])
def test_exactly_a_hundredth_of_broken_images_is_skipped(tmp_path, augment):
    write_splits(tmp_path, each=50)
    spoil(tmp_path, ["train/ant/007.png", "val/bee/011.png"])
    with warned_of_images(tmp_path) as warned:
        dataset = load(tmp_path, augment=augment)
    assert len(warned) == len(dataset.skipped.names) == 2


def test_nothing_is_skipped_if_nothing_is_broken(tmp_path):
    with warned_of_images(tmp_path) as warned:
        dataset = load(write_splits(tmp_path))
    assert not warned
    assert dataset.skipped.names == ()


@pytest.fixture
def breaking_later(tmp_path) -> tuple[Dataset, pathlib.Path]:
    """60 images to train on, the same to evaluate, each of a different shade, none broken yet; their folder."""
    write_tree(tmp_path / "train", each=30, first=100)
    write_tree(tmp_path / "val", each=30, first=100)
    dataset = load(tmp_path, augment="resized_crop")
    return dataset, tmp_path


def test_training_uses_another_image_in_place_of_one_that_breaks_later(breaking_later):
    dataset, root = breaking_later
    spoil(root, ["train/ant/004.png"])
    with warned_of_images(root) as warned:
        batches = train_batches(dataset, 10, seed=0)
        epochs = [[next(batches) for _ in range(6)] for _ in range(3)]
    assert len(warned) == 1
    assert str(root / "train/ant/004.png") in warned[0]
    assert dataset.skipped.names == (str(root / "train/ant/004.png"),)
    for epoch in epochs:
        index = np.concatenate([batch["index"] for batch in epoch])
        # The next one replaces it.
        assert sorted(index) == sorted([*range(4), 5, *range(5, 60)])
        shades = np.concatenate([batch["image"].max((1, 2, 3)) for batch in epoch])
        np.testing.assert_array_equal(shades, 100 + index)
        np.testing.assert_array_equal(np.concatenate([batch["label"] for batch in epoch]), index // 30)


def test_the_last_image_is_replaced_too(breaking_later):
    dataset, root = breaking_later
    spoil(root, ["train/bee/029.png"])
    with warned_of_images(root):
        batches = train_batches(dataset, 60, seed=0)
        assert sorted(next(batches)["index"]) == sorted([0, *range(59)])


def test_evaluation_gives_no_weight_to_an_image_that_breaks_later(breaking_later):
    dataset, root = breaking_later
    spoil(root, ["val/ant/004.png"])
    with warned_of_images(root) as warned:
        for _ in range(2):
            batches = list(eval_batches(dataset, dataset.test, 32))
            weights = np.concatenate([batch["weight"] for batch in batches])
            np.testing.assert_array_equal(np.flatnonzero(weights == 0), [4, 60, 61, 62, 63])
            shades = np.concatenate([batch["image"].max((1, 2, 3)) for batch in batches])
            np.testing.assert_array_equal(shades[weights == 1], 100 + np.delete(np.arange(60), 4))
    assert len(warned) == 1
    assert str(root / "val/ant/004.png") in warned[0]


@pytest.mark.parametrize("split", SPLITS)
def test_too_many_images_that_break_later_end_the_run(breaking_later, split):
    dataset, root = breaking_later
    spoil(root, [f"{split}/ant/004.png", f"{split}/bee/011.png"])
    batches = train_batches(dataset, 60, seed=0) if split == "train" else eval_batches(dataset, dataset.test, 60)
    with warned_of_images(root), pytest.raises(UserError, match=r"2 of 120 .* more than 1%"):
        next(batches)


@pytest.mark.parametrize("augment", ["crop", "resized_crop"])
def test_a_file_that_cannot_be_opened_is_skipped_like_a_broken_one(tmp_path, augment):
    write_splits(tmp_path, each=60)
    (tmp_path / "train/ant/999.png").symlink_to(tmp_path / "gone.png")
    with pytest.warns(UserWarning, match=r"999\.png cannot be decoded"):
        dataset = load_dataset(f"folder:{tmp_path}", image_size=8, augment=augment)
    assert [name.endswith("999.png") for name in dataset.skipped.names] == [True]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run on a folder of images: what it read, where it wrote, and what it printed."""

    images: pathlib.Path
    broken: pathlib.Path
    workdir: pathlib.Path
    out: str
    err: str


@pytest.fixture(scope="module")
def trained(program, tmp_path_factory) -> Trained:
    # A name with a byte that is not UTF-8.
    images = tmp_path_factory.mktemp("images") / os.fsdecode(b"anim\xe4ls")
    workdir = tmp_path_factory.mktemp("runs") / "run"
    for split, each in (("train", 52), ("val", 10)):
        write_tree(images / split, each=each)
    broken = images / "train/bee/041.png"
    broken.write_bytes(GARBAGE)
    process = program.start(
        "train",
        "--config=configs/folder.py:resnet8",
        f"--config.data.name=folder:{images}",
        "--config.data.augment=crop",
        "--config.data.image_size=16",
        "--config.model.stem=cifar",
        "--config.model.width=0.25",
        "--config.batch_size=16",
        "--config.eval_batch_size=16",
        "--config.baseline.epochs=1",
        "--config.gates.epochs=1",
        f"--workdir={workdir}",
    )
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, f"{out}\n{err}"
    return Trained(images, broken, workdir, out, err)


def test_training_on_a_folder_names_the_broken_image_once_and_counts_it(trained):
    lines = [line for line in trained.err.splitlines() if trained.broken.name in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"ftwt: warning: {printable(str(trained.broken))} cannot be decoded")
    assert "103 images to train on, 20 held out, 2 classes" in trained.out
    assert trained.out.count("1 of 124 images cannot be decoded and were skipped") == 1
    result = json.loads((trained.workdir / "evaluation.json").read_text())
    assert result["skipped"] == [printable(str(trained.broken))]
    assert result["samples"] == 20


def test_a_report_shows_names_that_are_not_utf8_and_its_commands_find_them(trained, program):
    program.run("report", trained.workdir)
    page = (trained.workdir / "report/index.html").read_bytes().decode()
    (quoted,) = [line for line in map(html.unescape, page.splitlines()) if "--config.data.name=" in line]
    shell = ["bash", "-c", f"printf %s {quoted.strip().removesuffix(chr(92))}"]
    given = subprocess.run(shell, capture_output=True, check=True).stdout
    assert given == b"--config.data.name=folder:" + os.fsencode(trained.images)


@pytest.mark.parametrize("stage", ["baseline", "gated"])
def test_a_checkpoint_holds_what_the_network_must_know_about_its_data(trained, stage):
    steps = [path for path in (trained.workdir / "checkpoints" / stage).iterdir() if path.name.isdigit()]
    assert steps
    for step in steps:
        # The checkpoint library chooses its name.
        (text,) = [text for path in (step / "dataset").iterdir() if (text := path.read_text()).startswith("{")]
        kept = json.loads(text)
        assert kept["class_names"] == list(CLASSES)
        assert kept["image_shape"] == [16, 16, 3]
        assert len(kept["mean"]) == len(kept["std"]) == 3


def test_a_network_is_not_evaluated_on_classes_it_was_not_trained_on(trained, program):
    for split in SPLITS:
        (trained.images / split / "bee").rename(trained.images / split / "wasp")
    try:
        process = program.start("evaluate", f"--workdir={trained.workdir}", stdout=subprocess.DEVNULL)
        error = process.communicate(timeout=600)[1]
    finally:
        for split in SPLITS:
            (trained.images / split / "wasp").rename(trained.images / split / "bee")
    assert process.returncode == 2, error
    (line,) = [line for line in error.splitlines() if line.startswith("ftwt: error: ")]
    assert "class 1 was 'bee' and is now 'wasp'" in line
    assert "trained on other classes" in line
