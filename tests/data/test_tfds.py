"""`tfds:NAME`: a set that TFDS prepared is read as it was written, without TensorFlow; errors name what is missing."""

import collections
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

from ftwt_jax.data import load_dataset
from ftwt_jax.data.decoding import LazyImage
from ftwt_jax.data.source import Dataset, Source
from ftwt_jax.errors import UserError
from tests.conftest import ROOT, Program, fails, read_metrics

# One worker runs all of this file, so that the sets are built once.
pytestmark = pytest.mark.long

NAME, SIDE, CLASSES, SIZES = "ftwt_shades", 32, ("dark", "medium", "light"), {"train": 90, "test": 30}
TRAIN = (
    "train",
    "--config=configs/cifar10.py:vgg_bn",
    "--config.model.plan=(8,)",
    f"--config.data.name=tfds:{NAME}",
    "--config.data.image_size=16",
    "--config.batch_size=16",
    "--config.eval_batch_size=16",
    "--config.log_every=2",
    "--config.baseline.epochs=1",
    "--config.gates.epochs=1",
)
# A machine without TensorFlow: the package cannot be found.
WITHOUT_TENSORFLOW = """
import importlib.machinery

find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *rest: None if name == "tensorflow" else find(name, *rest)
"""
# Runs the arguments, then prints which modules of TensorFlow were loaded.
TELL_TENSORFLOW = "\nimport sys\nprint('loaded:', [m for m in sys.modules if m.partition('.')[0] == 'tensorflow'])"


@dataclasses.dataclass(frozen=True)
class Written:
    """Images and labels by split, and the folders that hold them in either format."""

    images: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    array_record: pathlib.Path
    tfrecord: pathlib.Path

    def counted(self, *splits: str) -> collections.Counter:
        return sum((count(self.images[split], self.labels[split]) for split in splits), collections.Counter())


def count(images, labels) -> collections.Counter:
    return collections.Counter((int(label), image.tobytes()) for image, label in zip(images, labels, strict=True))


def counted(source: Source, channels: int = 3) -> collections.Counter:
    """The contents of a source, in any order."""
    examples = [source[i] for i in range(len(source))]
    return count([LazyImage(e["image"], channels).pixels() for e in examples], [e["label"] for e in examples])


def load(folder: pathlib.Path, name: str = NAME, **options) -> Dataset:
    return load_dataset(f"tfds:{name}", data_dir=str(folder), **options)


def refused(folder: pathlib.Path, name: str = NAME, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, name, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def command_in(message: str) -> list[str]:
    """Arguments of the command that a message gives between backticks."""
    return shlex.split(re.search(r"`python -m ftwt_jax (.*?)`", message)[1])


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def python(program: Program, code: str, *arguments) -> str:
    """Runs code in a separate process; returns its output."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    options = {"cwd": program.cwd, "env": program.environment, "capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def written(program, tmp_path_factory) -> Written:
    folder, rng = tmp_path_factory.mktemp("tfds"), np.random.default_rng(0)
    labels = {split: rng.integers(0, len(CLASSES), size) for split, size in SIZES.items()}
    # Channels of different means and deviations, so that they cannot be confused.
    images = {
        split: (rng.integers(0, (60, 120, 170), (size, SIDE, SIDE, 3)) + 40 * labels[split][:, None, None, None])
        for split, size in SIZES.items()
    }
    images = {split: values.astype(np.uint8) for split, values in images.items()}
    arrays = {f"{split}_images": images[split] for split in SIZES} | {
        f"{split}_labels": labels[split] for split in SIZES
    }
    np.savez(folder / "written.npz", **arrays)
    python(program, (ROOT / "tests" / "helpers" / "build_shades.py").read_text(), folder)
    return Written(images, labels, folder / "array_record", folder / "tfrecord")


@pytest.fixture
def tfrecord(written, tmp_path) -> pathlib.Path:
    """A copy of the set in the other format, to be changed."""
    return shutil.copytree(written.tfrecord, tmp_path / "tfrecord")


@pytest.fixture
def array_record(written, tmp_path) -> pathlib.Path:
    return shutil.copytree(written.array_record, tmp_path / "array_record")


@pytest.fixture(scope="module")
def without_tensorflow(program, tmp_path_factory) -> Program:
    """The program on a machine that has no TensorFlow."""
    folder = tmp_path_factory.mktemp("hidden")
    (folder / "sitecustomize.py").write_text(WITHOUT_TENSORFLOW)
    path = os.pathsep.join([str(folder), program.environment["PYTHONPATH"]])
    return dataclasses.replace(program, environment=program.environment | {"PYTHONPATH": path})


@pytest.mark.parametrize("augment", ["crop", "none", "resized_crop"])
def test_every_image_is_read_as_it_was_written(written, augment):
    data = load(written.array_record, augment=augment, image_size=SIDE)
    assert (len(data.train), len(data.test)) == (SIZES["train"], SIZES["test"])
    assert (data.class_names, data.num_classes, data.image_shape) == (CLASSES, 3, (SIDE, SIDE, 3))
    assert counted(data.train) == written.counted("train")
    assert counted(data.test) == written.counted("test")
    assert not data.skipped.names
    assert data.crop_padding == (4 if augment == "crop" else 0)
    assert data.resized_crop == (augment == "resized_crop")
    if not data.resized_crop:
        pixels = written.images["train"] / 255
        np.testing.assert_allclose(data.mean, pixels.mean((0, 1, 2)), rtol=1e-9)
        np.testing.assert_allclose(data.std, pixels.std((0, 1, 2)), rtol=1e-9)


@pytest.mark.parametrize(("augment", "side"), [("crop", SIDE), ("resized_crop", 224)])
def test_the_default_side_is_that_of_the_images(written, augment, side):
    data = load(written.array_record, augment=augment)
    assert data.image_shape == (side, side, 3)


def test_slices_of_splits_leave_nothing_out(written):
    options = {"train_split": "train[:90%]", "test_split": "train[90%:]"}
    data = load(written.array_record, **options)
    assert (len(data.train), len(data.test)) == (81, 9)
    assert counted(data.train) + counted(data.test) == written.counted("train")
    np.testing.assert_allclose(data.mean, data.train.images.mean((0, 1, 2)) / 255, rtol=1e-9)


@pytest.mark.parametrize(("train", "size"), [("train[:50]", 50), ("train[-7:]", 7), ("train[:50%]+train[80:]", 55)])
def test_a_slice_of_one_split_does_not_change_the_other(written, train, size):
    data = load(written.array_record, train_split=train)
    assert len(data.train) == size
    assert not counted(data.train) - written.counted("train", "test")
    assert counted(data.test) == written.counted("test")


@pytest.mark.parametrize(
    ("train", "test"),
    [(None, "train[90%:]"), ("train", "train[:1]"), ("all", None), ("train+test", None), ("train[:51]", "train[50:]")],
)
def test_nothing_that_is_held_out_is_trained_on(written, train, test):
    error = refused(written.array_record, train_split=train, test_split=test)
    assert repr(train or "train") in error
    assert repr(test or "test") in error
    assert "share images" in error


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ("trian", "has no split 'trian'"),
        ("train[:2%", "has no split 'train[:2%'"),
        ("train[:500]", "90 examples"),
        ("train[:0]", "the split 'train[:0]' of tfds:ftwt_shades is empty"),
        ("train[10:10]", "the split 'train[10:10]' of tfds:ftwt_shades is empty"),
        ("train[20:10]", "train[20:10]"),
    ],
)
@pytest.mark.parametrize("which", ["train_split", "test_split"])
def test_a_missing_or_empty_split_is_refused(written, split, says, which):
    assert says in refused(written.array_record, **{which: split})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cifarr10", "did you mean 'cifar10'"),
        ("no_such_set_at_all", "unknown TFDS data set 'no_such_set_at_all': not one of"),
        ("cifar10/", "cannot be opened"),
        ("ftwt_words", "is not a set of images with classes"),
        ("ftwt_undivided", "train_split='train[:90%]' and config.data.test_split='train[90%:]'"),
    ],
)
def test_an_unusable_set_is_refused(written, name, says):
    assert says in refused(written.array_record, name)


def test_a_set_of_one_split_and_other_features_is_read_in_slices(written):
    options = {"train_split": "train[:90%]", "test_split": "train[90%:]"}
    data = load(written.array_record, "ftwt_undivided", **options)
    assert (data.class_names, data.image_shape) == (("0", "1", "2"), (SIDE, SIDE, 1))
    grey = count(written.images["train"][..., :1], written.labels["train"])
    assert counted(data.train, channels=1) + counted(data.test, channels=1) == grey


@pytest.mark.parametrize("folder", ["data", "my data"])
def test_a_set_that_is_not_prepared_is_refused_with_the_command_that_prepares_it(tmp_path, folder):
    place = tmp_path / folder
    message = refused(place, "cifar10")
    assert f"`python -m ftwt_jax prepare tfds:cifar10 --data_dir={shlex.quote(str(place))}`" in message
    assert command_in(message) == ["prepare", "tfds:cifar10", f"--data_dir={place}"]
    assert not list(tmp_path.iterdir())


def test_the_other_format_is_refused_until_the_command_that_is_named_has_converted_it(program, written, tfrecord):
    old = {path: data for path, data in files(tfrecord).items() if "tfrecord-" in path}
    command = command_in(refused(tfrecord))
    assert command == ["prepare", f"tfds:{NAME}", f"--data_dir={tfrecord}"]
    # As if an earlier conversion had been killed.
    records = next(tfrecord.rglob("*-train.tfrecord-*"))
    unfinished = f"incomplete.{records.name.replace('.tfrecord-', '.array_record-')}"
    (records.parent / unfinished).write_bytes(b"half of it")

    assert "is prepared in" in program.run(*command)
    converted = files(tfrecord)
    assert old.items() <= converted.items()
    assert not [path for path in converted if "incomplete" in path]
    found, direct = load(tfrecord), load(written.array_record)
    for split in SIZES:
        assert counted(getattr(found, split)) == counted(getattr(direct, split)) == written.counted(split)
    assert found.describe() == direct.describe()

    assert "is prepared in" in program.run(*command)
    assert files(tfrecord) == converted


def test_damaged_records_are_not_half_converted(program, tfrecord):
    records = next(tfrecord.rglob("*-train.tfrecord-*"))
    records.write_bytes(records.read_bytes()[:50_000])
    error = program.run("prepare", f"tfds:{NAME}", f"--data_dir={tfrecord}", status=2)
    assert error.splitlines()[-1].startswith("ftwt: error: ")
    assert NAME in error.splitlines()[-1]
    assert "Traceback" not in error
    refused(tfrecord)


@pytest.mark.parametrize("harm", [pathlib.Path.unlink, lambda path: os.truncate(path, 100_000)], ids=["gone", "cut"])
def test_missing_or_damaged_records_are_refused(array_record, harm):
    harm(next(array_record.rglob(f"{NAME}-train.*")))
    assert NAME in refused(array_record)


@pytest.fixture(scope="module")
def trained(program, written, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """A finished run, and what its process printed, to the last line about TensorFlow."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    run = f"import sys\nfrom ftwt_jax.__main__ import main\nassert main(sys.argv[1:]) == 0{TELL_TENSORFLOW}"
    arguments = [*TRAIN, f"--config.data.data_dir={written.array_record}", f"--workdir={workdir}"]
    return workdir, python(program, run, *arguments)


def test_training_ends_with_gates_that_can_be_evaluated(program, trained):
    workdir, printed = trained
    assert f"tfds:{NAME}: 90 images to train on, 30 held out, 3 classes" in printed
    assert [line["stage"] for line in read_metrics(workdir)] == ["baseline"] * 3 + ["gated"] * 3
    result = (workdir / "evaluation.json").read_text()
    assert json.loads(result)["samples"] == 30
    (workdir / "evaluation.json").unlink()
    program.run("evaluate", f"--workdir={workdir}")
    assert (workdir / "evaluation.json").read_text() == result


def test_training_does_not_load_tensorflow_even_if_it_is_installed(trained):
    assert importlib.util.find_spec("tensorflow"), "it must be there to be left alone"
    assert trained[1].splitlines()[-1] == "loaded: []"


def test_a_prepared_set_needs_no_tensorflow(without_tensorflow, written, array_record):
    before = files(array_record)
    code = f"""
import sys
from ftwt_jax.__main__ import main
from ftwt_jax.data import load_dataset
assert main(["prepare", "tfds:{NAME}", "--data_dir=" + sys.argv[1]]) == 0
data = load_dataset("tfds:{NAME}", data_dir=sys.argv[1])
print(len(data.train), len(data.test), data.mean)
"""
    said, read = python(without_tensorflow, code, array_record).splitlines()
    assert said.startswith(f"tfds:{NAME} is prepared in {array_record}")
    assert said.endswith("train 90, test 30")
    assert read == f"90 30 {load(written.array_record).mean}"
    assert files(array_record) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "prepare takes one dataset, such as tfds:cifar10; got none"),
        (["cifar10"], "prepare takes tfds:NAME"),
        (["folder:images"], "nothing to sort in"),
        (["folder:"], "or folder:PATH"),
        (["tfds:"], "prepare takes tfds:NAME"),
        (
            ["tfds:cifar10", "tfds:mnist"],
            "prepare takes one dataset, such as tfds:cifar10; got tfds:cifar10 tfds:mnist",
        ),
        (["tfds:cifarr10"], "did you mean 'cifar10'"),
        (["tfds:cifar10", "--datadir=d"], "did you mean --data_dir?"),
    ],
)
def test_prepare_used_wrongly(capsys, monkeypatch, tmp_path, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert says in fails(capsys, "prepare", *arguments)
    assert not list(tmp_path.iterdir())


def test_preparing_without_tensorflow_names_the_extra(without_tensorflow, tfrecord):
    """For a set to download, one to convert, and one that cannot even be opened without it."""
    before = files(tfrecord)
    code = f"""
import contextlib, sys
from ftwt_jax.__main__ import main
with contextlib.redirect_stderr(sys.stdout):
    for name in ("cifar10", "{NAME}", "coco"):
        print(main(["prepare", "tfds:" + name, "--data_dir=" + sys.argv[1]]))
"""
    printed = python(without_tensorflow, code, tfrecord)
    lines = [line for line in printed.splitlines() if line.startswith("ftwt: error: ")]
    assert len(lines) == printed.count("\n2\n") == 3
    for line in lines:
        assert "needs TensorFlow" in line
        assert "[prepare]" in line
    assert files(tfrecord) == before


def test_archives_that_must_be_downloaded_by_hand_are_named(program, tmp_path):
    """The only set of TFDS whose preparation gets far without a network; then it must say what to do."""
    error = program.run("prepare", "tfds:imagenet2012", f"--data_dir={tmp_path}", status=2)
    assert error.splitlines()[-1].startswith("ftwt: error: tfds:imagenet2012 cannot be prepared: ")
    for archive in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        assert archive in error
