"""A workdir whose images are elsewhere, or nowhere on this machine: what needs none works, the rest names `--data`."""

import json
import shutil
import tarfile

import numpy as np
import pytest
from jax import export

from ftwt_jax.__main__ import main
from ftwt_jax.data import other_options
from ftwt_jax.training.run import load_run
from ftwt_jax.training.settings import BASELINE, GATED
from tests.conftest import fails
from tests.helpers.reports import change_json
from tests.workdir.test_older_versions import ARCHIVE

pytestmark = pytest.mark.long

GONE = "folder:/gone/away"


def without_images(workdir):
    config = json.loads((workdir / "config.json").read_text())
    change_json(workdir / "config.json", data=config["data"] | {"name": GONE})
    return workdir


@pytest.fixture
def moved(tiny_run, tmp_path):
    return without_images(shutil.copytree(tiny_run[0], tmp_path / "moved"))


def logits(file, images):
    return np.asarray(export.deserialize(bytearray(file.read_bytes())).call(images))


def wanted(run, stage, images):
    return np.asarray(run.models[stage].apply(run.trained(stage), run.normalize(images)).logits)


def test_a_program_needs_no_images(tiny_run, moved, tmp_path):
    run = load_run(str(tiny_run[0]))
    images = np.random.default_rng(0).integers(0, 256, (5, *run.dataset.image_shape), np.uint8)
    for stage, flags in ((GATED, ()), (BASELINE, ("--baseline",))):
        file = tmp_path / f"{stage}.stablehlo"
        assert main(["export", str(moved), f"--out={file}", *flags]) == 0
        np.testing.assert_allclose(logits(file, images), wanted(run, stage, images), rtol=1e-4, atol=1e-4)


def test_a_workdir_without_gates_gives_its_dense_network(capsys, tiny_run, moved, tmp_path):
    shutil.rmtree(moved / "checkpoints" / GATED)
    run = load_run(str(tiny_run[0]))
    images = run.dataset.test.images[:5]
    file = tmp_path / "dense.stablehlo"
    assert main(["export", f"--workdir={moved}", f"--out={file}"]) == 0
    assert "vgg_bn, dense, for cpu" in capsys.readouterr().out
    np.testing.assert_allclose(logits(file, images), wanted(run, BASELINE, images), rtol=1e-4, atol=1e-4)
    for flag in ("--compact", "--budget=0.5"):
        error = fails(capsys, "export", str(moved), f"--out={tmp_path / 'x.stablehlo'}", flag, "--data=digits")
        assert f"{moved} holds no gated network yet, and --compact and --budget belong to one" in error


def test_what_needs_images_names_the_flag_for_them(capsys, moved, tmp_path):
    compact = ("export", str(moved), f"--out={tmp_path / 'x.stablehlo'}", "--compact")
    for command in (
        ("evaluate", str(moved)),
        compact,
        ("benchmark", str(moved), "--budget=0.5"),
        ("estimate", str(moved)),
    ):
        assert "'/gone/away' is not a folder; if its data are elsewhere now, name them with --data=" in fails(
            capsys, *command
        )
    assert not (tmp_path / "x.stablehlo").exists()


def test_an_evaluation_on_named_data(capsys, tiny_run, moved, tmp_path):
    before = (moved / "evaluation.json").read_text()
    out = tmp_path / "found.json"
    assert main(["evaluate", str(moved), "--data=digits", f"--out={out}"]) == 0
    found, expected = json.loads(out.read_text()), json.loads((tiny_run[0] / "evaluation.json").read_text())
    assert found == expected
    assert found["data"] == "digits"
    # Without a file to write, it is shown and kept nowhere.
    assert main(["evaluate", str(moved), "--data=digits"]) == 0
    assert "not written, since they are of other data than" in capsys.readouterr().out
    assert (moved / "evaluation.json").read_text() == before


def test_other_classes_are_refused(capsys, tiny_run, tmp_path):
    (tmp_path / "images").mkdir()
    error = fails(capsys, "evaluate", str(tiny_run[0]), f"--data=folder:{tmp_path / 'images'}")
    assert "has no class folders" in error
    assert "if its data are elsewhere" not in error
    assert "unknown data set" in fails(capsys, "evaluate", str(tiny_run[0]), "--data=digts")
    remedy = f"write folder:{tmp_path / 'images'}"
    assert remedy in fails(capsys, "evaluate", str(tiny_run[0]), f"--data={tmp_path / 'images'}")


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_file_that_cannot_be_written_is_refused_before_any_work(capsys, tiny_run, tmp_path, command):
    for name, says in (
        ("none/net.safetensors", f"{tmp_path / 'none'} is not a folder"),
        ("net.safetensors", "is a folder"),
    ):
        (tmp_path / "net.safetensors").mkdir(exist_ok=True)
        assert says in fails(capsys, command, str(tiny_run[0]), f"--out={tmp_path / name}")


def test_a_benchmark_without_images_says_so(capsys, moved):
    assert main(["benchmark", str(moved), "--batch=8"]) == 0
    assert "timed on random images, since its own cannot be loaded" in capsys.readouterr().out
    result = json.loads((moved / "benchmark.json").read_text())
    assert result["images"] == "random"
    assert result["max_abs_diff"] <= 1e-4 * result["max_abs_logit"]


def test_a_report_looks_at_named_images(capsys, moved):
    assert main(["report", f"--workdir={moved}", "--data=digits"]) == 0
    assert "looked at its held-out images" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["run", "converted"])
def test_an_older_workdir_needs_no_images_either(tmp_path, name):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    run = load_run(str(tmp_path / name))
    images = run.dataset.test.images[:5]
    expected = wanted(run, GATED, images)
    file = tmp_path / "found.stablehlo"
    assert main(["export", str(without_images(tmp_path / name)), f"--out={file}"]) == 0
    np.testing.assert_allclose(logits(file, images), expected, rtol=1e-4, atol=1e-4)


def test_other_data_are_prepared_as_those_that_were_trained_on(tmp_path):
    digits = {
        "name": "digits",
        "image_size": None,
        "augment": None,
        "flip": None,
        "train_split": None,
        "on_device": True,
    }
    other = other_options(digits, "folder:/elsewhere", (16, 16, 1))
    assert other == digits | {"name": "folder:/elsewhere", "image_size": 16, "augment": "crop"}
    folder = digits | {"name": "folder:/here", "image_size": 64, "train_split": "a", "data_dir": None}
    assert other_options(folder, "folder:/there")["train_split"] == "a"
    assert other_options(folder, "folder:/there")["augment"] == "resized_crop"
    assert other_options(folder, "tfds:cifar10")["train_split"] is None
    prepared = digits | {"name": "tfds:cifar10", "data_dir": str(tmp_path / "gone")}
    assert other_options(prepared, "tfds:cifar10")["data_dir"] is None
    assert other_options(prepared | {"data_dir": str(tmp_path)}, "tfds:cifar10")["data_dir"] == str(tmp_path)
