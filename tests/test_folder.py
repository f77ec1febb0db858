"""Folders of pictures: which files are read under which class, what is refused, and what becomes of broken files."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import warnings
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from PIL import Image

from ftwt_jax.data import load_dataset
from ftwt_jax.data.folder import Entry
from ftwt_jax.data.pipeline import eval_batches, train_batches
from ftwt_jax.data.source import ArraySource, Dataset
from ftwt_jax.errors import UserError
from tests.conftest import Program

GARBAGE = b"This is no picture."
SPLITS = ("train", "val")
CLASSES = ("ant", "bee")


def write_picture(path: pathlib.Path, shade: int = 0, side: int = 8) -> pathlib.Path:
    """A picture of one shade, of which nearly nothing is lost in any format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (shade, shade, shade)).save(path)
    return path


def write_tree(root: pathlib.Path, classes: Iterable[str] = CLASSES, each: int = 3, first: int = 0) -> pathlib.Path:
    """`each` pictures a class, of shades that count on from `first` in the order of the classes."""
    for place, name in enumerate(classes):
        for index in range(each):
            write_picture(root / name / f"{index:03}.png", first + place * each + index)
    return root


def write_splits(root: pathlib.Path, splits: Iterable[str] = SPLITS, each: int = 3) -> pathlib.Path:
    for split in splits:
        write_tree(root / split, each=each)
    return root


def load(root: pathlib.Path, **options) -> Dataset:
    return load_dataset(f"folder:{root}", **{"image_size": 8} | options)


def refused(root: pathlib.Path | str, **options) -> str:
    """What the refusal says: one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError) as caught:
            load_dataset(f"folder:{root}", **{"image_size": 8} | options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files(source, root: pathlib.Path) -> list[tuple[str, int]]:
    """Path below `root` and label of everything in a split."""
    examples = [source[index] for index in range(len(source))]
    return [(pathlib.Path(e["name"]).relative_to(root).as_posix(), int(e["label"])) for e in examples]


@contextlib.contextmanager
def warned_of_pictures(root: pathlib.Path) -> Iterator[list[str]]:
    """The warnings of undecodable pictures below `root` that are given inside; threads of other tests may warn too."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [text for warning in caught if "cannot be decoded" in (text := str(warning.message)) and str(root) in text]


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (("train", "val"), {}),
        (("train", "test"), {}),
        (("train", "val", "test"), {}),
        (("fit", "judge"), {"train_split": "fit", "test_split": "judge"}),
        (("train", "judge", "val"), {"test_split": "judge"}),
        (("fit", "val", "train"), {"train_split": "fit"}),
        (("a/fit", "b/judge"), {"train_split": "a/fit", "test_split": "b/judge"}),
    ],
)
def test_two_folders_are_the_two_splits(tmp_path, names, options):
    dataset = load(write_splits(tmp_path, names, each=2), **options)
    wanted = [(f"{name}/00{index}.png", label) for label, name in enumerate(CLASSES) for index in range(2)]
    assert files(dataset.train, tmp_path / names[0]) == wanted
    assert files(dataset.test, tmp_path / names[1]) == wanted
    assert dataset.num_classes == 2


def test_classes_are_the_sorted_names_of_the_folders(tmp_path):
    names = ["zebra", "Ant", "10", "9", "old tree", "été"]
    for split in SPLITS:
        write_tree(tmp_path / "animals" / split, names, each=1)
    dataset = load(tmp_path / "animals")
    assert dataset.class_names == ("10", "9", "Ant", "old tree", "zebra", "été")
    assert dataset.num_classes == 6
    for name, label in files(dataset.train, tmp_path / "animals" / "train"):
        assert dataset.class_names[label] == name.partition("/")[0]
    assert dataset.describe()["class_names"] == list(dataset.class_names)


def test_pictures_are_found_in_folders_of_a_class_and_under_every_extension(tmp_path):
    write_splits(tmp_path, each=1)
    bees = tmp_path / "train" / "bee"
    names = ["a.jpg", "B.JPG", "c.jpeg", "d.Png", "e.webp", "2019/f.png", "2019/may/g.PNG", "2020.jpg/h.jpeg"]
    for name in names:
        write_picture(bees / name)
    found = [name for name, label in files(load(tmp_path).train, tmp_path / "train") if label == 1]
    assert sorted(found) == sorted(f"bee/{name}" for name in ["000.png", *names])


def test_pictures_come_in_the_order_of_their_names_however_the_disk_holds_them(tmp_path):
    write_splits(tmp_path, each=1)
    names = [f"{number:02}" for number in np.random.default_rng(0).permutation(40)]
    for name in names:
        write_picture(tmp_path / "train/bee" / name / f"{name}.png")
        write_picture(tmp_path / "train/ant" / f"{name}.png")
    found = [name for name, _ in files(load(tmp_path).train, tmp_path / "train")]
    ants = sorted({"000", *names})
    assert found == [
        *(f"ant/{name}.png" for name in ants),
        "bee/000.png",
        *(f"bee/{name}/{name}.png" for name in sorted(names)),
    ]


@pytest.mark.parametrize(
    "name",
    [
        "train/ant/.hidden.png",
        "train/ant/._000.png",
        "train/ant/notes.txt",
        "train/ant/picture",
        "train/ant/png",
        "train/ant/.ipynb_checkpoints/000-checkpoint.png",
        "train/.cache/000.png",
        "train/000.png",
        ".cache/ant/000.png",
        "000.png",
    ],
)
def test_what_is_hidden_or_no_picture_of_a_class_is_left_alone(tmp_path, name):
    write_splits(tmp_path)
    wanted = files(load(tmp_path).train, tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes((tmp_path / "train/ant/000.png").read_bytes())
    with warned_of_pictures(tmp_path) as warned:
        dataset = load(tmp_path)
    assert files(dataset.train, tmp_path) == wanted
    assert dataset.class_names == CLASSES
    assert not warned


@pytest.mark.parametrize(
    ("fraction", "held_out"), [(None, [3, 1, 1]), (0.1, [3, 1, 1]), (0.5, [15, 5, 1]), (0.99, [29, 9, 1])]
)
def test_of_one_tree_the_same_share_of_every_class_is_held_out(tmp_path, fraction, held_out):
    sizes = {"ant": 30, "bee": 10, "cat": 2}
    for name, size in sizes.items():
        write_tree(tmp_path, [name], each=size)
    dataset, again = (load(tmp_path, test_fraction=fraction) for _ in range(2))
    train, test = (files(source, tmp_path) for source in (dataset.train, dataset.test))
    assert [sum(label == number for _, label in test) for number in range(3)] == held_out
    assert not set(train) & set(test)
    everything = {(f"{name}/{index:03}.png", label) for label, name in enumerate(sizes) for index in range(sizes[name])}
    assert set(train) | set(test) == everything
    assert len(train) + len(test) == len(everything)
    assert (files(again.train, tmp_path), files(again.test, tmp_path)) == (train, test)


def test_what_is_held_out_of_one_tree_does_not_hang_on_where_it_lies(tmp_path):
    parts = [files(load(write_tree(tmp_path / name, each=20)).test, tmp_path / name) for name in ("here", "there")]
    assert parts[0] == parts[1]
    numbers = [int(pathlib.Path(name).stem) for name, label in parts[0] if label == 0]
    assert numbers != list(range(len(numbers))), "the first pictures are often of one kind"


@pytest.mark.parametrize(
    ("tree", "options", "says"),
    [
        ([], {}, ["no class in {root}"]),
        (["ant/000.png"], {}, ["only one class, 'ant'", "{root}"]),
        (["train/ant/0.png", "val/ant/0.png"], {}, ["only one class, 'ant'", "{root}/train"]),
        (["ant/0.txt", "bee/0.png"], {}, ["no pictures in {root}/ant", "jpg, jpeg, png, webp"]),
        (["ant/0.png", "bee/0.png", "bee/1.png"], {}, ["{root}/ant has one picture"]),
        (["train/ant/0.png", "train/bee/0.png"], {}, ["{root} has no val/ or test/", "folder:{root}/train"]),
        (["train/ant/0.png", "train/bee/0.png"], {"test_split": "judge"}, ["{root} has no judge/"]),
        (["val/ant/0.png", "val/bee/0.png"], {"train_split": "fit"}, ["{root} has no fit/"]),
        (["val/ant/0.png", "val/bee/0.png"], {"test_split": "val"}, ["{root} has no train/"]),
        (
            ["train/ant/0.png", "train/bee/0.png", "val/ant/0.png", "val/wasp/0.png"],
            {},
            ["only in {root}/train: bee", "only in {root}/val: wasp"],
        ),
        (
            ["train/ant/0.png", "train/bee/0.png", "train/wasp/0.png", "val/ant/0.png", "val/bee/0.png"],
            {},
            ["different classes", "only in {root}/train: wasp"],
        ),
        (
            ["train/ant/0.png", "train/bee/0.png", "val/ant/0.png", "val/bee/notes.txt"],
            {},
            ["no pictures in {root}/val/bee"],
        ),
        (["ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png"], {"test_fraction": 0.0}, ["test_fraction", "got 0.0"]),
        (["ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png"], {"test_fraction": 1.0}, ["test_fraction", "got 1.0"]),
        (
            ["ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png"],
            {"augment": "resized_corp"},
            ["config.data.augment", "did you mean 'resized_crop'"],
        ),
        (["ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png"], {"image_size": 0}, ["config.data.image_size", "got 0"]),
        (["ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png"], {"data_dir": "x"}, ["data_dir", "test_fraction"]),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_on_one_line_that_names_it(tmp_path, tree, options, says):
    for name in tree:
        path = tmp_path / name
        if path.suffix == ".png":
            write_picture(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("no picture")
    error = refused(tmp_path, **options)
    for text in says:
        assert text.format(root=tmp_path) in error


def test_many_classes_that_differ_are_named_by_the_first_five(tmp_path):
    write_tree(tmp_path / "train", [f"{number:02}" for number in range(20)], each=1)
    write_tree(tmp_path / "val", ["00", "01"], each=1)
    assert f"only in {tmp_path / 'train'}: 02, 03, 04, 05, 06, ..." in refused(tmp_path)


def test_a_folder_that_is_missing_is_refused_by_its_name(tmp_path):
    file = write_picture(tmp_path / "picture.png")
    for place in (tmp_path / "nowhere", file, ""):
        error = refused(place)
        assert f"no folder of pictures at {str(place)!r}" in error
        assert "config.data.name=folder:PATH" in error


def test_a_path_may_be_relative_or_start_at_home(tmp_path, monkeypatch):
    write_splits(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    wanted = load(tmp_path / "pictures").train.entries
    assert wanted[0] == Entry(str(tmp_path / "pictures/train/ant/000.png"), 0)
    for place in ("pictures", "~/pictures", "./pictures/"):
        dataset = load_dataset(f"folder:{place}", image_size=8)
        assert dataset.train.entries == wanted
    # Pictures are read long after; whoever changes the folder meanwhile must not be noticed.
    monkeypatch.chdir("/")
    assert dataset.train[0]["image"].read_bytes() == (tmp_path / "pictures/train/ant/000.png").read_bytes()


def spoil(root: pathlib.Path, names: Iterable[str]) -> None:
    for name in names:
        (root / name).write_bytes(GARBAGE)


@pytest.mark.parametrize("augment", ["crop", "none", "resized_crop"])
@pytest.mark.parametrize("damage", ["no picture", "empty", "cut off", "cut-off JPEG"])
@pytest.mark.parametrize("split", SPLITS)
def test_one_broken_picture_of_120_is_skipped_with_one_warning_and_counted(tmp_path, augment, damage, split):
    write_splits(tmp_path, each=30)
    broken = tmp_path / split / "bee" / "004.png"
    if damage == "cut-off JPEG":
        broken.unlink()
        broken = broken.with_suffix(".jpg")
        # Of noise, so that the cut lies behind all headers: only decoding can tell.
        Image.effect_noise((40, 40), 60).convert("RGB").save(broken)
    if damage.startswith("cut"):
        data = broken.read_bytes()
        broken.write_bytes(data[: len(data) * 9 // 10] if damage == "cut-off JPEG" else data[: len(data) // 2])
    else:
        broken.write_bytes(GARBAGE if damage == "no picture" else b"")
    with warned_of_pictures(tmp_path) as warned:
        dataset = load(tmp_path, augment=augment)
        trained = next(train_batches(dataset, 60, seed=0))
        evaluated = list(eval_batches(dataset, dataset.test, 60))
    assert len(warned) == 1
    assert str(broken) in warned[0]
    assert "\n" not in warned[0]
    assert dataset.skipped.names == (str(broken),)
    assert dataset.skipped.summary() == "1 of 120 pictures cannot be decoded and were skipped"
    sizes = {name: 59 if name == split else 60 for name in SPLITS}
    assert (len(dataset.train), len(dataset.test)) == tuple(sizes.values())
    labels = {"train": trained["label"][: sizes["train"]], "val": evaluated[0]["label"][: sizes["val"]]}
    for name, size in sizes.items():
        assert labels[name].tolist().count(0) == 30
        assert labels[name].tolist().count(1) == size - 30
    assert evaluated[0]["weight"].sum() == sizes["val"]


def test_pictures_keep_their_labels_where_one_before_them_is_skipped(tmp_path):
    for split in SPLITS:
        write_tree(tmp_path / split, [f"{number:02}" for number in range(60)], each=1, first=100)
    write_picture(tmp_path / "train/07/more.png", 107)
    spoil(tmp_path, ["train/07/000.png"])
    for augment in ("crop", "resized_crop"):
        with warned_of_pictures(tmp_path) as warned:
            dataset = load(tmp_path, augment=augment)
        assert len(warned) == 1
        batch = next(train_batches(dataset, 60, seed=0))
        np.testing.assert_array_equal(batch["image"].max((1, 2, 3)), 100 + batch["label"])
        assert set(batch["label"]) == set(range(60))


@pytest.mark.parametrize("augment", ["crop", "resized_crop"])
def test_more_than_a_hundredth_of_broken_pictures_is_refused_with_their_names(tmp_path, augment):
    write_splits(tmp_path, each=25)
    names = ["train/ant/007.png", "val/bee/011.png"]
    spoil(tmp_path, names)
    error = refused(tmp_path, augment=augment)
    assert "2 of 100 pictures" in error
    assert "1%" in error
    assert all(str(tmp_path / name) in error for name in names)


@pytest.mark.parametrize("augment", ["crop", "resized_crop"])
def test_exactly_a_hundredth_of_broken_pictures_is_skipped(tmp_path, augment):
    write_splits(tmp_path, each=50)
    spoil(tmp_path, ["train/ant/007.png", "val/bee/011.png"])
    with warned_of_pictures(tmp_path) as warned:
        dataset = load(tmp_path, augment=augment)
    assert len(warned) == len(dataset.skipped.names) == 2


def test_nothing_is_skipped_where_nothing_is_broken(tmp_path):
    with warned_of_pictures(tmp_path) as warned:
        dataset = load(write_splits(tmp_path))
    assert not warned
    assert dataset.skipped.names == ()


@pytest.fixture
def breaking_later(tmp_path) -> tuple[Dataset, pathlib.Path]:
    """60 pictures to train on, the same to evaluate, each of a shade of its own, and all whole so far; their folder."""
    write_tree(tmp_path / "train", each=30, first=100)
    write_tree(tmp_path / "val", each=30, first=100)
    dataset = load(tmp_path, augment="resized_crop")
    return dataset, tmp_path


def test_training_goes_on_with_another_picture_where_one_breaks_later(breaking_later):
    dataset, root = breaking_later
    spoil(root, ["train/ant/004.png"])
    with warned_of_pictures(root) as warned:
        batches = train_batches(dataset, 10, seed=0)
        epochs = [[next(batches) for _ in range(6)] for _ in range(3)]
    assert len(warned) == 1
    assert str(root / "train/ant/004.png") in warned[0]
    assert dataset.skipped.names == (str(root / "train/ant/004.png"),)
    for epoch in epochs:
        index = np.concatenate([batch["index"] for batch in epoch])
        # The next one stands in for it.
        assert sorted(index) == sorted([*range(4), 5, *range(5, 60)])
        shades = np.concatenate([batch["image"].max((1, 2, 3)) for batch in epoch])
        np.testing.assert_array_equal(shades, 100 + index)
        np.testing.assert_array_equal(np.concatenate([batch["label"] for batch in epoch]), index // 30)


def test_the_last_picture_too_has_one_that_stands_in_for_it(breaking_later):
    dataset, root = breaking_later
    spoil(root, ["train/bee/029.png"])
    with warned_of_pictures(root):
        batches = train_batches(dataset, 60, seed=0)
        assert sorted(next(batches)["index"]) == sorted([0, *range(59)])


def test_evaluation_gives_no_weight_to_a_picture_that_breaks_later(breaking_later):
    dataset, root = breaking_later
    spoil(root, ["val/ant/004.png"])
    with warned_of_pictures(root) as warned:
        for _ in range(2):
            batches = list(eval_batches(dataset, dataset.test, 32))
            weights = np.concatenate([batch["weight"] for batch in batches])
            np.testing.assert_array_equal(np.flatnonzero(weights == 0), [4, 60, 61, 62, 63])
            shades = np.concatenate([batch["image"].max((1, 2, 3)) for batch in batches])
            np.testing.assert_array_equal(shades[weights == 1], 100 + np.delete(np.arange(60), 4))
    assert len(warned) == 1
    assert str(root / "val/ant/004.png") in warned[0]


@pytest.mark.parametrize("split", SPLITS)
def test_too_many_pictures_that_break_later_end_the_run(breaking_later, split):
    dataset, root = breaking_later
    spoil(root, [f"{split}/ant/004.png", f"{split}/bee/011.png"])
    batches = train_batches(dataset, 60, seed=0) if split == "train" else eval_batches(dataset, dataset.test, 60)
    with warned_of_pictures(root), pytest.raises(UserError, match=r"2 of 120 .* more than 1%"):
        next(batches)


def test_small_pictures_are_held_in_memory_at_one_size_with_their_mean_and_deviation(tmp_path):
    rng = np.random.default_rng(0)
    for split in SPLITS:
        for name, (height, width) in {"ant": (48, 32), "bee": (40, 70)}.items():
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(5):
                pixels = rng.normal((60, 120, 200), 25, (height, width, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.png")
    dataset = load(tmp_path, augment="crop", image_size=32)
    for source in (dataset.train, dataset.test):
        assert isinstance(source, ArraySource)
        assert source.images.dtype == np.uint8
        assert source.images.shape == (10, 32, 32, 3)
        np.testing.assert_array_equal(source.labels, [0] * 5 + [1] * 5)
    # The shorter side is whole already: nothing but the centre is cut out.
    tall = np.asarray(Image.open(tmp_path / "train/ant/3.png"))
    np.testing.assert_array_equal(dataset.train.images[3], tall[8:40])
    pixels = dataset.train.images / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(dataset.std, pixels.std((0, 1, 2)), rtol=1e-6)
    assert (dataset.crop_padding, dataset.flip, dataset.resized_crop) == (4, True, False)
    assert dataset.image_shape == (32, 32, 3)


@pytest.mark.parametrize(("augment", "padding"), [("crop", 1), ("none", 0), ("resized_crop", 0)])
@pytest.mark.parametrize("flip", [True, False])
def test_the_wanted_augmentation_is_set(tmp_path, augment, padding, flip):
    dataset = load(write_splits(tmp_path), augment=augment, flip=flip)
    assert (dataset.crop_padding, dataset.flip, dataset.resized_crop) == (padding, flip, augment == "resized_crop")


@pytest.mark.parametrize("augment", ["crop", "none"])
def test_a_set_too_large_for_memory_is_refused_before_it_is_read(tmp_path, monkeypatch, augment):
    write_splits(tmp_path)
    spoil(tmp_path, ["train/ant/000.png"])
    # 12 pictures of 8x8x3 bytes are 2304: half of the memory must be more.
    installed = {"SC_PHYS_PAGES": 4607, "SC_PAGE_SIZE": 1}
    monkeypatch.setattr(os, "sysconf", installed.__getitem__)
    error = refused(tmp_path, augment=augment)
    assert "12 pictures of 8x8" in error
    assert "config.data.augment=resized_crop" in error
    write_picture(tmp_path / "train/ant/000.png")
    assert len(load(tmp_path, augment="resized_crop").train) == 6
    installed["SC_PHYS_PAGES"] = 4608
    assert len(load(tmp_path, augment=augment).train) == 6


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run on a folder of pictures: what it read, where it wrote and what it printed."""

    pictures: pathlib.Path
    broken: pathlib.Path
    workdir: pathlib.Path
    out: str
    err: str


@pytest.fixture(scope="module")
def quick(program) -> Program:
    """The program, compiling in a third of the time what then runs slower."""
    return dataclasses.replace(program, environment=program.environment | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"})


@pytest.fixture(scope="module")
def trained(quick, tmp_path_factory) -> Trained:
    pictures, workdir = tmp_path_factory.mktemp("animals"), tmp_path_factory.mktemp("runs") / "run"
    for split, each in (("train", 52), ("val", 10)):
        write_tree(pictures / split, each=each)
    broken = pictures / "train/bee/041.png"
    broken.write_bytes(GARBAGE)
    process = quick.start(
        "train",
        "--config=configs/folder.py:resnet8",
        f"--config.data.name=folder:{pictures}",
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
    return Trained(pictures, broken, workdir, out, err)


@pytest.mark.xdist_group("trained_on_a_folder")
def test_training_on_a_folder_names_the_broken_picture_once_and_counts_it(trained):
    lines = [line for line in trained.err.splitlines() if trained.broken.name in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"ftwt: warning: {trained.broken} cannot be decoded")
    assert "103 pictures to train on, 20 held out, 2 classes" in trained.out
    assert trained.out.count("1 of 124 pictures cannot be decoded and were skipped") == 1
    result = json.loads((trained.workdir / "evaluation.json").read_text())
    assert result["skipped"] == [str(trained.broken)]
    assert result["samples"] == 20


@pytest.mark.parametrize("stage", ["baseline", "gated"])
@pytest.mark.xdist_group("trained_on_a_folder")
def test_a_checkpoint_holds_what_the_network_must_know_of_its_data(trained, stage):
    steps = [path for path in (trained.workdir / "checkpoints" / stage).iterdir() if path.name.isdigit()]
    assert steps
    for step in steps:
        # Its name is the checkpoint library's own affair.
        (text,) = [text for path in (step / "dataset").iterdir() if (text := path.read_text()).startswith("{")]
        kept = json.loads(text)
        assert kept["class_names"] == list(CLASSES)
        assert kept["image_shape"] == [16, 16, 3]
        assert len(kept["mean"]) == len(kept["std"]) == 3


@pytest.mark.xdist_group("trained_on_a_folder")
def test_a_network_is_not_evaluated_on_classes_it_was_not_trained_on(trained, quick):
    for split in SPLITS:
        (trained.pictures / split / "bee").rename(trained.pictures / split / "wasp")
    try:
        process = quick.start("evaluate", f"--workdir={trained.workdir}", stdout=subprocess.DEVNULL)
        error = process.communicate(timeout=600)[1]
    finally:
        for split in SPLITS:
            (trained.pictures / split / "wasp").rename(trained.pictures / split / "bee")
    assert process.returncode == 2, error
    (line,) = [line for line in error.splitlines() if line.startswith("ftwt: error: ")]
    assert "'bee' there, 'wasp' here" in line
    assert "trained on other classes" in line


@pytest.mark.parametrize("augment", ["crop", "resized_crop"])
def test_a_file_that_cannot_be_opened_is_skipped_like_a_broken_one(tmp_path, augment):
    write_splits(tmp_path, each=60)
    (tmp_path / "train/ant/999.png").symlink_to(tmp_path / "gone.png")
    with pytest.warns(UserWarning, match=r"999\.png cannot be decoded"):
        dataset = load_dataset(f"folder:{tmp_path}", image_size=8, augment=augment)
    assert [name.endswith("999.png") for name in dataset.skipped.names] == [True]


def test_a_link_to_a_folder_above_is_not_followed_round(tmp_path):
    write_splits(tmp_path)
    before = len(load(tmp_path).train)
    (tmp_path / "train/ant/loop").symlink_to(tmp_path / "train/ant")
    assert len(load(tmp_path).train) == before


def test_what_is_trained_on_is_not_held_out(tmp_path):
    write_splits(tmp_path)
    assert "both trained on and held out" in refused(tmp_path, train_split="train", test_split="train")


def test_a_held_out_part_alone_is_no_tree_of_classes(tmp_path):
    write_splits(tmp_path)
    shutil.rmtree(tmp_path / "train")
    assert "has no train/" in refused(tmp_path)
