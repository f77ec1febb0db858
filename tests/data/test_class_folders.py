"""Folders of classes: what is left out and told, the order of classes, and names in any writing."""

import errno
import os
import pathlib
import unicodedata
import warnings

import pytest

from ftwt_jax.errors import UserError
from tests.helpers.folders import (
    CLASSES,
    SPLITS,
    files,
    load,
    refused,
    spoil,
    write_image,
    write_splits,
    write_tree,
)


def warned(root: pathlib.Path, **options) -> list[str]:
    """What the loading of a folder warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(root, **options)
    return [str(warning.message) for warning in caught if str(root) in str(warning.message)]


def test_all_that_is_left_out_is_told_on_one_line(tmp_path):
    write_splits(tmp_path)
    assert not warned(tmp_path)
    files = ["ant/a.heic", "ant/b.heic", "bee/c.MOV", "bee/image", "ant/.DS_Store", "ant/._000.png", "bee/Thumbs.db"]
    for name in files:
        (tmp_path / "train" / name).write_bytes(b"x")
    for name in ("__MACOSX/ant/0.png", "ant/@eaDir/000.png/T.jpg", "bee/.thumbnails/0.png", "loose.png"):
        write_image(tmp_path / "train" / name)
    (tmp_path / "val/lost+found").mkdir()
    (tmp_path / "val/New folder").mkdir()
    (tmp_path / "train/gone").symlink_to(tmp_path / "nowhere")
    (line,) = warned(tmp_path)
    assert "\n" not in line
    assert "files of kinds that are not read: 4 (2 .heic such as train/ant/a.heic, 1 " in line
    assert "1 .mov such as train/bee/c.MOV" in line
    assert "1 without an extension such as train/bee/image" in line
    assert "images in no class folder: 1 (train/loose.png)" in line
    assert "(train/__MACOSX, train/ant/@eaDir, train/bee/.thumbnails, val/lost+found)" in line
    assert "class folders without images (train/gone, val/New folder)" in line
    assert not any(name in line for name in (".DS_Store", "._000.png", "Thumbs.db"))
    assert load(tmp_path).class_names == CLASSES
    assert len(load(tmp_path).train) == 6


def test_classes_within_classes_are_told(tmp_path):
    for name in ("pets/cat", "pets/dog", "wild/elk"):
        write_tree(tmp_path, [name])
    (line,) = warned(tmp_path)
    assert "classes are the upper folders, not those within them (pets/cat, pets/dog)" in line
    assert load(tmp_path).class_names == ("pets", "wild")


@pytest.mark.parametrize(
    ("names", "natural"),
    [
        (["0", "1", "10", "11", "2"], ("0", "1", "2", "10", "11")),
        (["a10b", "a9b"], ("a9b", "a10b")),
        (["Zebra", "ant"], ("ant", "Zebra")),
        (["01", "02", "10"], None),
        (["ant", "bee²"], None),
    ],
)
def test_the_order_of_numbered_classes_is_chosen_or_in_doubt(tmp_path, names, natural):
    write_tree(tmp_path, names, each=2)
    datasets = {order: load(tmp_path, class_order=order) for order in (None, "bytes", "natural")}
    assert datasets[None].class_names == datasets["bytes"].class_names == tuple(names)
    assert datasets["natural"].class_names == (natural or tuple(names))
    assert bool(datasets[None].order_doubt) == (natural is not None)
    assert not datasets["bytes"].order_doubt
    assert not datasets["natural"].order_doubt
    for dataset in datasets.values():
        for name, label in files(dataset.train, tmp_path):
            assert dataset.class_names[label] == name.partition("/")[0]


def test_a_class_has_the_same_name_however_unicode_writes_it(tmp_path):
    for split, form in (("train", "NFC"), ("val", "NFD")):
        write_tree(tmp_path / split, [unicodedata.normalize(form, name) for name in ("bar", "café")])
    assert not os.path.exists(tmp_path / "val" / unicodedata.normalize("NFC", "café"))
    dataset = load(tmp_path)
    assert dataset.class_names == ("bar", unicodedata.normalize("NFC", "café"))
    assert [label for _, label in files(dataset.test, tmp_path)] == [0, 0, 0, 1, 1, 1]
    write_tree(tmp_path / "train", [unicodedata.normalize("NFD", "café")])
    assert "differ only in how Unicode writes it: merge them" in refused(tmp_path)


def test_names_that_are_not_utf8_are_read_and_become_text(tmp_path):
    for split in SPLITS:
        write_tree(tmp_path / split, ["bar", os.fsdecode(b"caf\xe9")])
        (tmp_path / split / "bar/000.png").rename(tmp_path / split / "bar" / os.fsdecode(b"\xff.png"))
    spoil(tmp_path, [os.fsdecode(b"train/bar/\xff.png")])
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    str(caught.value).encode()
    write_image(tmp_path / os.fsdecode(b"train/bar/\xff.png"))
    dataset = load(tmp_path)
    assert dataset.class_names == ("bar", "caf\\udce9")
    assert (len(dataset.train), len(dataset.test)) == (6, 6)
    dataset.train[2]["name"].encode()
    dataset.train[2]["image"].read_bytes()


def test_a_folder_that_may_not_be_read_is_not_passed_over(tmp_path, monkeypatch):
    write_splits(tmp_path)
    closed = tmp_path / "train/ant/more"
    write_image(closed / "0.png")
    scandir = os.scandir

    def refusing(path="."):
        # Permissions of files do not bind root, as whom containers run tests.
        if pathlib.Path(path) == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError):
        load(tmp_path)
