"""Folders of images: which files are read under which class, and what is refused."""

import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image, features

from ftwt_jax.data import load_dataset
from ftwt_jax.data.folder import Entry
from ftwt_jax.data.source import ArraySource
from tests.helpers.folders import (
    CLASSES,
    SPLITS,
    files,
    load,
    refused,
    spoil,
    warned_of_images,
    write_image,
    write_splits,
    write_tree,
)


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


def test_images_are_found_in_folders_of_a_class_and_under_every_extension(tmp_path):
    write_splits(tmp_path, each=1)
    bees = tmp_path / "train" / "bee"
    names = ["a.jpg", "B.JPG", "c.jpeg", "d.Png", "e.webp", "2019/f.png", "2019/may/g.PNG", "2020.jpg/h.jpeg"]
    names += ["i.bmp", "j.gif", "k.tif", "l.TIFF", "m.ppm", *(["n.avif"] if features.check("avif") else [])]
    for name in names:
        write_image(bees / name)
    for name in ("o.jpe", "p.JFIF"):
        shutil.copy(bees / "a.jpg", bees / name)
        names.append(name)
    found = [name for name, label in files(load(tmp_path).train, tmp_path / "train") if label == 1]
    assert sorted(found) == sorted(f"bee/{name}" for name in ["000.png", *names])
    assert len(load(tmp_path, augment="crop").train) == len(names) + 2, "each can be decoded"


def test_images_are_ordered_by_name_whatever_the_order_on_disk(tmp_path):
    write_splits(tmp_path, each=1)
    names = [f"{number:02}" for number in np.random.default_rng(0).permutation(40)]
    for name in names:
        write_image(tmp_path / "train/bee" / name / f"{name}.png")
        write_image(tmp_path / "train/ant" / f"{name}.png")
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
        "train/ant/image",
        "train/ant/png",
        "train/ant/.ipynb_checkpoints/000-checkpoint.png",
        "train/.cache/000.png",
        "train/000.png",
        ".cache/ant/000.png",
        "000.png",
    ],
)
def test_hidden_files_and_files_that_are_not_images_of_a_class_are_ignored(tmp_path, name):
    write_splits(tmp_path)
    wanted = files(load(tmp_path).train, tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes((tmp_path / "train/ant/000.png").read_bytes())
    with warned_of_images(tmp_path) as warned:
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


def test_what_is_held_out_of_one_tree_does_not_depend_on_its_path(tmp_path):
    parts = [files(load(write_tree(tmp_path / name, each=20)).test, tmp_path / name) for name in ("here", "there")]
    assert parts[0] == parts[1]
    numbers = [int(pathlib.Path(name).stem) for name, label in parts[0] if label == 0]
    assert numbers != list(range(len(numbers))), "the first images are often of one kind"


@pytest.mark.parametrize(
    ("tree", "options", "says"),
    [
        ([], {}, ["{root} has no class folders"]),
        (["ant/000.png"], {}, ["only one class folder, 'ant'", "{root}"]),
        (["train/ant/0.png", "val/ant/0.png"], {}, ["only one class folder, 'ant'", "{root}/train"]),
        (["ant/0.txt", "bee/0.png"], {}, ["no images in {root}/ant", ".jpg, .jpeg, .png, .webp"]),
        (["0.png", "1.png"], {}, ["{root} holds images that are not in a folder per class", "prepare folder:{root} "]),
        (
            ["train/ant/0.png", "train/bee/0.png", "val/0.png", "val/1.png"],
            {},
            ["{root}/val holds images that are not", "ftwt_jax prepare folder:{root}/val --annotations=FILE`"],
        ),
        (
            ["train/ant/0.png", "train/bee/0.png", "val/images/0.png", "val/val_annotations.txt"],
            {},
            ["{root}/val holds images that are not", "ftwt_jax prepare folder:{root}/val`"],
        ),
        (
            ["train/ant/0.png", "train/bee/0.png", "val/0.png", "val_by_class/ant/0.png"],
            {},
            ["set config.data.test_split=val_by_class"],
        ),
        (["ant/train/0.png", "ant/val/0.png", "bee/train/0.png"], {}, ["{root}/ant is divided into train/ and val/"]),
        (["set/train/ant/0.png", "set/test/ant/0.png"], {}, ["{root}/set is divided", "config.data.name=folder:PATH"]),
        (["1/0.png", "1/1.png", "2/0.png", "2/1.png"], {"class_order": "nat"}, ["class_order", "bytes, natural"]),
        (["1/0.png", "1/1.png", "2/0.png", "2/1.png"], {"max_pixels": 0}, ["config.data.max_pixels", "got 0"]),
        (["ant/0.png", "bee/0.png", "bee/1.png"], {}, ["{root}/ant has only one image"]),
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
            ["no images in {root}/val/bee"],
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
            write_image(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("not an image")
    error = refused(tmp_path, **options)
    for text in says:
        assert text.format(root=tmp_path) in error


def test_many_classes_that_differ_are_named_by_the_first_five(tmp_path):
    write_tree(tmp_path / "train", [f"{number:02}" for number in range(20)], each=1)
    write_tree(tmp_path / "val", ["00", "01"], each=1)
    assert f"only in {tmp_path / 'train'}: 02, 03, 04, 05, 06, ..." in refused(tmp_path)


def test_a_folder_that_is_missing_is_refused_by_its_name(tmp_path):
    file = write_image(tmp_path / "image.png")
    for place in (tmp_path / "nowhere", file, ""):
        error = refused(place)
        assert f"config.data.name=folder:PATH must name a folder of images; {str(place)!r} is not a folder" in error


def test_a_path_may_be_relative_or_start_at_home(tmp_path, monkeypatch):
    write_splits(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    wanted = load(tmp_path / "images").train.entries
    assert wanted[0] == Entry(str(tmp_path / "images/train/ant/000.png"), 0)
    for place in ("images", "~/images", "./images/"):
        dataset = load_dataset(f"folder:{place}", image_size=8)
        assert dataset.train.entries == wanted
    # Images are read much later, when the folder may have changed.
    monkeypatch.chdir("/")
    assert dataset.train[0]["image"].read_bytes() == (tmp_path / "images/train/ant/000.png").read_bytes()


def test_small_images_are_held_in_memory_at_one_size_with_their_mean_and_deviation(tmp_path):
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
    # The shorter side has the wanted length already, so the image is only cropped.
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
    # 12 images of 8x8x3 bytes are 2304: half of the memory must be more.
    installed = {"SC_PHYS_PAGES": 4607, "SC_PAGE_SIZE": 1}
    monkeypatch.setattr(os, "sysconf", installed.__getitem__)
    error = refused(tmp_path, augment=augment)
    assert "12 images of 8x8" in error
    assert "config.data.augment=resized_crop" in error
    write_image(tmp_path / "train/ant/000.png")
    assert len(load(tmp_path, augment="resized_crop").train) == 6
    installed["SC_PHYS_PAGES"] = 4608
    assert len(load(tmp_path, augment=augment).train) == 6


def test_a_link_to_a_folder_above_is_not_followed_forever(tmp_path):
    write_splits(tmp_path)
    before = len(load(tmp_path).train)
    (tmp_path / "train/ant/loop").symlink_to(tmp_path / "train/ant")
    assert len(load(tmp_path).train) == before


def test_one_folder_cannot_be_both_splits(tmp_path):
    write_splits(tmp_path)
    assert "both trained on and held out" in refused(tmp_path, train_split="train", test_split="train")


@pytest.mark.parametrize("names", [("training", "validation"), ("Train", "Val")])
def test_folders_that_look_like_splits_are_not_taken_for_classes(tmp_path, names):
    write_splits(tmp_path, names)
    assert "look like splits" in refused(tmp_path)
    assert load(tmp_path, train_split=names[0], test_split=names[1]).class_names == CLASSES


def test_a_held_out_split_alone_is_not_taken_for_a_tree_of_classes(tmp_path):
    write_splits(tmp_path)
    shutil.rmtree(tmp_path / "train")
    assert "has no train/" in refused(tmp_path)


def test_an_image_of_too_many_pixels_is_skipped_unless_it_can_be_reduced(tmp_path):
    for split in SPLITS:
        write_tree(tmp_path / split, each=60)
    write_image(tmp_path / "train/ant/large.jpg", side=256)
    write_image(tmp_path / "train/ant/large.png", side=256)
    with pytest.warns(UserWarning, match="256x256 pixels are more than config.data.max_pixels=4096"):
        dataset = load(tmp_path, max_pixels=4096)
    assert dataset.skipped.names == (str(tmp_path / "train/ant/large.png"),)
    assert len(load(tmp_path, max_pixels=256 * 256).train) == 122
