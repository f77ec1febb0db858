"""`prepare folder:PATH` sorts images that lie together into a new folder by class, from a file of annotations."""

import errno
import os
import pathlib
import shutil

import pytest
from scipy.io import savemat

from ftwt_jax.__main__ import main
from tests.conftest import fails
from tests.helpers.folders import files, load, write_image, write_tree

CLASSES = ("n01", "n02", "n03")
COUNT = 12
# The class of each image, in order of their names.
TRUTH = [CLASSES[(5 * index) % 3] for index in range(COUNT)]
NAMES = [f"ILSVRC2012_val_{index:08}.JPEG" for index in range(1, COUNT + 1)]
# The numbers of the classes in ImageNet's own order, which is not that of their names.
NUMBERS = {"n03": 1, "n01": 2, "n02": 3}


def lines(rows) -> str:
    return "".join(f"{row}\n" for row in rows)


@pytest.fixture
def imagenet(tmp_path) -> pathlib.Path:
    """A set with classes in `train/` and none in `val/`."""
    write_tree(tmp_path / "set/train", CLASSES)
    for index, name in enumerate(NAMES):
        write_image(tmp_path / "set/val" / name, 10 * index)
    return tmp_path / "set"


def prepared(root: pathlib.Path, *flags: str, where: str = "val_by_class") -> None:
    """Runs `prepare`, and checks that each image is under its class and that nothing was moved."""
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert main(["prepare", f"folder:{root}", *flags]) == 0
    target = root / where
    found = {path.name: path.parent.name for path in target.rglob("*") if path.is_file()}
    assert found == dict(zip(NAMES, TRUTH, strict=True))
    for path, data in before.items():
        assert path.read_bytes() == data
    for path in target.rglob("*.JPEG"):
        assert path.read_bytes() == (root / "val" / path.name).read_bytes()
    assert sorted(path.name for path in target.parent.iterdir() if path.name.startswith(".")) == []


ANNOTATIONS = {
    "Tiny ImageNet": [f"{name}\t{label}\t0\t32\t44\t62" for name, label in zip(NAMES, TRUTH, strict=True)],
    "Kaggle": [
        "ImageId,PredictionString",
        *(
            f"{name[:-5]},{label} 156 48 272 332 {label} 42 9 322 285 "
            for name, label in zip(NAMES, TRUTH, strict=True)
        ),
    ],
    "name and class": [f"val/{name} {label}" for name, label in reversed([*zip(NAMES, TRUTH, strict=True)])],
    "classes in order": TRUTH,
    "boxes before the class": [
        "filename,width,height,Class",
        *(f"{name},{index},480,{label}" for index, (name, label) in enumerate(zip(NAMES, TRUTH, strict=True))),
    ],
    "pandas": [",filename,label", *(f"{i},{n},{c}" for i, (n, c) in enumerate(zip(NAMES, TRUTH, strict=True)))],
    "the class first": ["label;filename", *(f"{c};{n}" for n, c in zip(NAMES, TRUTH, strict=True))],
    "a class among other columns": [f"{n},4,{c},x" for n, c in zip(NAMES, TRUTH, strict=True)],
}


def test_annotations_may_be_a_spreadsheets_unicode_text(imagenet, tmp_path):
    text = lines(f"{name}\t{label}" for name, label in zip(NAMES, TRUTH, strict=True))
    (tmp_path / "file.txt").write_text(text, encoding="utf-16")
    prepared(imagenet, f"--annotations={tmp_path / 'file.txt'}")


@pytest.mark.parametrize("kind", ANNOTATIONS)
def test_annotations_are_read_in_the_forms_that_are_about(imagenet, tmp_path, kind):
    (tmp_path / "file.txt").write_text(lines(ANNOTATIONS[kind]))
    prepared(imagenet, f"--annotations={tmp_path / 'file.txt'}")
    dataset = load(imagenet, test_split="val_by_class")
    wanted = sorted(zip(TRUTH, NAMES, strict=True))
    assert files(dataset.test, imagenet / "val_by_class") == [
        (f"{label}/{name}", CLASSES.index(label)) for label, name in wanted
    ]


def numbered(kind: str, path: pathlib.Path) -> pathlib.Path:
    in_order = sorted(CLASSES, key=NUMBERS.__getitem__)
    if kind == "meta.mat":
        rows = [(NUMBERS[name], name, 0) for name in in_order] + [(4, "n99", 2)]
        synsets = [{"ILSVRC2012_ID": number, "WNID": name, "num_children": inner} for number, name, inner in rows]
        savemat(path / kind, {"synsets": synsets})
    elif kind == "map_clsloc.txt":
        (path / kind).write_text(lines(f"{name} {NUMBERS[name]} a_word" for name in CLASSES))
    else:
        (path / kind).write_text(lines(f"{name} a word, another" for name in in_order))
    return path / kind


@pytest.mark.parametrize("kind", ["meta.mat", "map_clsloc.txt", "synset_words.txt"])
def test_numbers_are_read_with_what_they_stand_for(imagenet, tmp_path, capsys, kind):
    (tmp_path / "truth.txt").write_text(lines(NUMBERS[label] for label in TRUTH))
    flags = f"--annotations={tmp_path / 'truth.txt'}", f"--numbers={numbered(kind, tmp_path)}"
    prepared(imagenet, *flags, f"--out={imagenet / 'sorted'}", where="sorted")
    said = capsys.readouterr().out
    assert "1 is n03, 3 is n02" in said
    assert f"--config.data.name=folder:{imagenet} --config.data.test_split=sorted" in said


def test_an_index_is_not_taken_for_the_name_of_an_image(tmp_path):
    for index in range(6):
        write_image(tmp_path / "set" / f"{index}.png", 10 * index)
    rows = [f"{index},{5 - index}.png,{'ab'[index % 2]}" for index in range(6)]
    (tmp_path / "file.csv").write_text(lines(["index,file,label", *rows]))
    assert main(["prepare", f"folder:{tmp_path / 'set'}", f"--annotations={tmp_path / 'file.csv'}"]) == 0
    found = {path.name: path.parent.name for path in (tmp_path / "set_by_class").rglob("*.png")}
    assert found == {f"{5 - index}.png": "ab"[index % 2] for index in range(6)}


@pytest.mark.parametrize("name", ["../n01", "..", "n01/n02"])
def test_no_class_leads_out_of_the_new_folder(imagenet, tmp_path, capsys, name):
    shutil.rmtree(imagenet / "train")
    (tmp_path / "truth.txt").write_text(lines([1, 2] * (COUNT // 2)))
    (tmp_path / "classes.txt").write_text(lines([f"{name} 1", "n02 2"]))
    flags = f"--annotations={tmp_path / 'truth.txt'}", f"--numbers={tmp_path / 'classes.txt'}"
    error = fails(capsys, "prepare", f"folder:{imagenet}", *flags)
    assert f"a class {name!r}, which cannot be a folder" in error
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["set", "val"]


def test_numbers_may_begin_at_zero(imagenet, tmp_path):
    (tmp_path / "val.txt").write_text(lines(f"{n} {NUMBERS[c] - 1}" for n, c in zip(NAMES, TRUTH, strict=True)))
    prepared(imagenet, f"--annotations={tmp_path / 'val.txt'}", f"--numbers={numbered('synset_words.txt', tmp_path)}")


def test_images_in_a_folder_of_their_own_are_sorted_by_the_file_beside_them(imagenet):
    (imagenet / "val").rename(imagenet / "images")
    (imagenet / "val").mkdir()
    (imagenet / "images").rename(imagenet / "val/images")
    (imagenet / "val/val_annotations.txt").write_text(lines(ANNOTATIONS["Tiny ImageNet"]))
    assert main(["prepare", f"folder:{imagenet}"]) == 0
    assert sorted(path.name for path in (imagenet / "val_by_class").iterdir()) == list(CLASSES)
    assert len(load(imagenet, test_split="val_by_class").test) == COUNT


def test_images_are_linked_or_copied(imagenet, tmp_path, capsys, monkeypatch):
    (tmp_path / "file.txt").write_text(lines(ANNOTATIONS["name and class"]))
    prepared(imagenet, f"--annotations={tmp_path / 'file.txt'}")
    assert "by links, which take no space" in capsys.readouterr().out
    assert (imagenet / "val" / NAMES[0]).samefile(imagenet / "val_by_class" / TRUTH[0] / NAMES[0])
    shutil.rmtree(imagenet / "val_by_class")

    def refuse(source, target):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    prepared(imagenet, f"--annotations={tmp_path / 'file.txt'}")
    assert f"{COUNT} of them copied" in capsys.readouterr().out


def test_images_without_a_class_are_left_out_and_told(imagenet, tmp_path, capsys):
    (tmp_path / "file.txt").write_text(lines([*ANNOTATIONS["name and class"][1:], "a.JPEG n01", "b.JPEG n01"]))
    assert main(["prepare", f"folder:{imagenet}", f"--annotations={tmp_path / 'file.txt'}"]) == 0
    said = capsys.readouterr().out
    assert f"left out: 1 images ({NAMES[-1]})" in said
    assert "with the name of no image there: 2" in said


@pytest.mark.parametrize(
    ("annotations", "flags", "says"),
    [
        (None, [], ["--annotations is missing", "{root}/val"]),
        (TRUTH[:-1], [], ["its 11 lines neither hold the names of images in {root}/val", "as these, 12"]),
        ([2] * COUNT, [], ["classes as numbers", "--numbers=FILE", "meta.mat"]),
        (["n01"] * 11 + ["n07"], [], ["classes that {root}/train does not have: n07"]),
        ([*ANNOTATIONS["name and class"], f"{NAMES[0]} n03"], [], [f"gives {NAMES[0]} two classes"]),
        ([f"{name},1,2" for name in NAMES], [], ["has 3 columns", "which one is the class cannot be told"]),
        (
            ["file,label,target", *(f"{name},n01,n02" for name in NAMES)],
            [],
            ["has 3 columns ('file', 'label', 'target')", "keep two, the image's name and its class"],
        ),
        ([f"{name},n01" for name in NAMES], [], ["gives every image the class 'n01': at least two are needed"]),
        ([f"{name}," for name in NAMES], [], [f"gives {NAMES[0]} a class '', which cannot be a folder"]),
        (TRUTH, ["--out={root}/train"], ["{root}/train already exists: choose another folder with --out"]),
        ([2] * COUNT, ["--numbers={root}/classes.txt"], ["whether the numbers begin at 0 or at 1 cannot be told"]),
        ([3] * 11 + [7], ["--numbers={root}/classes.txt"], ["does not tell what the numbers 7 stand for"]),
    ],
)
def test_what_cannot_be_sorted_is_refused_and_nothing_written(imagenet, tmp_path, capsys, annotations, flags, says):
    (imagenet / "classes.txt").write_text(lines(CLASSES))
    if annotations is not None:
        (tmp_path / "file.txt").write_text(lines(annotations))
        flags = [f"--annotations={tmp_path / 'file.txt'}", *flags]
    error = fails(capsys, "prepare", f"folder:{imagenet}", *(flag.format(root=imagenet) for flag in flags))
    for text in says:
        assert text.format(root=imagenet) in error
    assert sorted(path.name for path in imagenet.iterdir()) == ["classes.txt", "train", "val"]


def test_classes_in_order_of_images_whose_order_is_not_certain_are_refused(tmp_path, capsys):
    for index in range(11):
        write_image(tmp_path / "set" / f"{index}.png")
    (tmp_path / "file.txt").write_text(lines(["ant"] * 11))
    error = fails(capsys, "prepare", f"folder:{tmp_path / 'set'}", f"--annotations={tmp_path / 'file.txt'}")
    assert "the order of the images is not certain" in error


def test_a_folder_that_is_sorted_already_is_refused(tmp_path, capsys):
    write_tree(tmp_path, CLASSES)
    assert "nothing to sort" in fails(capsys, "prepare", f"folder:{tmp_path}", "--annotations=file.txt")
    assert "--annotations is for folder:PATH" in fails(capsys, "prepare", "tfds:cifar10", "--annotations=file.txt")
