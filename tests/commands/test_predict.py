"""The command `predict`: the answers are those of the masked network, whatever the files are called or hold."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ftwt_jax as ftwt
from ftwt_jax.__main__ import main
from ftwt_jax.commands.predict.output import to_csv, to_table
from ftwt_jax.commands.predict.predictor import load_predictor, to_rows
from ftwt_jax.data import load_dataset
from ftwt_jax.data.pipeline import eval_batches
from ftwt_jax.data.single import file_reader, find_files
from ftwt_jax.gating.gates import GateControl
from ftwt_jax.training.run import load_run
from ftwt_jax.training.settings import BASELINE, GATED
from tests.conftest import fails
from tests.helpers.folders import GARBAGE, write_tree

NAMES = ("0 one, two.png", "1 line\nbreak.png", "2 été [red] \r.png", '3 "quoted".png', "4.png")
COUNT = len(NAMES)


@pytest.fixture(scope="module")
def run(tiny_run):
    return load_run(str(tiny_run[0]))


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """Held-out digits as files."""
    place = tmp_path_factory.mktemp("images")
    for name, image in zip(NAMES, run.dataset.test.images, strict=False):
        Image.fromarray(image[..., 0]).save(place / name)
    return place


@pytest.fixture(scope="module")
def wanted(run):
    """Probabilities [N, classes], MACs [N] and density [N] of the gated network, and probabilities of the dense one."""
    images = run.normalize(jnp.asarray(run.dataset.test.images[:COUNT]))
    gated, dense = (
        run.models[stage].apply(run.trained(stage), images, control=GateControl(targets=False))
        for stage in (GATED, BASELINE)
    )
    density = np.concatenate([gate.mask for gate in gated.gates], axis=-1).mean(axis=-1)
    return jax.nn.softmax(gated.logits), ftwt.macs(gated), density, jax.nn.softmax(dense.logits)


def predicted(capsys, run, *arguments) -> list[dict]:
    assert main(["predict", f"--workdir={run.workdir}", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_folder_is_answered_as_the_masked_network_would(capsys, run, folder, wanted):
    probabilities, macs, density, _ = wanted
    found = predicted(capsys, run, folder, "--top=10")
    assert [answer["file"] for answer in found] == [str(folder / name) for name in NAMES]
    for answer, shares, cost, share in zip(found, probabilities, macs, density, strict=True):
        told = {choice["label"]: choice["probability"] for choice in answer["top"]}
        np.testing.assert_allclose([told[label] for label in range(10)], shares, atol=1e-4)
        assert [*told.values()] == sorted(told.values(), reverse=True)
        assert answer["label"] == np.argmax(shares)
        assert answer["class"] == run.dataset.class_names[answer["label"]]
        assert answer["macs"] == cost
        assert answer["density"] == pytest.approx(share, abs=1e-6)
        assert "subnet" not in answer


def test_csv_of_paths_on_standard_input(program, tiny_run, folder, wanted):
    """As a process. A name with a line break needs zero bytes between the names."""
    command = program.command("predict", f"--workdir={tiny_run[0]}", "--csv", "--top=2")
    broken = os.path.join(os.fsencode(folder), b"not utf-8 \xff.png")
    listed = b"\0".join([*(os.fsencode(folder / name) for name in NAMES), broken])
    done = subprocess.run(command, input=listed, capture_output=True, cwd=program.cwd, env=program.environment)
    assert (done.returncode, done.stderr) == (0, b"")
    rows = list(csv.DictReader(io.StringIO(done.stdout.decode(), newline="")))
    assert [row["file"] for row in rows[:-1]] == [str(folder / name) for name in NAMES]
    assert [int(row["label"]) for row in rows[:-1]] == np.argmax(wanted[0], axis=-1).tolist()
    assert all(float(row["probability"]) >= float(row["probability_2"]) for row in rows[:-1])
    assert [row["error"] for row in rows] == [""] * COUNT + ["no such file or directory"]
    assert rows[-1]["macs"] == ""


def test_lines_on_standard_input_stand_where_the_dash_does(capsys, monkeypatch, run, folder):
    lines = f"{folder / NAMES[0]}\r\n\n{folder / NAMES[3]}\n".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    found = predicted(capsys, run, folder / NAMES[4], "-", folder / NAMES[4])
    assert [answer["file"] for answer in found] == [str(folder / NAMES[place]) for place in (4, 0, 3, 4)]
    assert found[0] == found[3]


def test_the_table_shows_names_that_are_no_markup_and_the_mean(capsys, monkeypatch, run, folder, wanted):
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["predict", f"--workdir={run.workdir}", "--top=2", str(folder), "gone.png"]) == 0
    printed = capsys.readouterr().out
    assert "1 line\\nbreak.png" in printed
    assert "2 été [red] \\r.png" in printed
    assert "error: no such file or directory" in printed
    assert f"gated: {COUNT} of {COUNT + 1} images, {wanted[1].mean():,.0f} MACs on average" in printed


def test_files_that_cannot_be_read_are_named_and_the_others_answered(capsys, run, folder, tmp_path):
    (tmp_path / "text.png").write_bytes(GARBAGE)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes((folder / NAMES[0]).read_bytes()[:60])
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "nothing").mkdir()
    found = predicted(capsys, run, tmp_path, tmp_path / "nothing", "gone.png", folder / NAMES[0])
    errors = {os.path.basename(answer["file"]): answer["error"] for answer in found[:-1]}
    assert all(answer.keys() == {"file", "error"} for answer in found[:-1])
    assert errors.pop("cut.png")
    assert errors.pop("text.png").startswith("not a JPEG, PNG")
    assert errors == {
        "empty.png": "the file is empty",
        "pipe.png": "not a regular file",
        "nothing": "no images in this folder",
        "gone.png": "no such file or directory",
    }
    assert found[-1]["probability"] > 0


def test_without_any_answer_the_status_is_2(capsys, run, tmp_path):
    assert main(["predict", f"--workdir={run.workdir}", "--json", "gone.png", "lost.png"]) == 2
    printed = capsys.readouterr()
    assert [answer["file"] for answer in json.loads(printed.out)] == ["gone.png", "lost.png"]
    assert printed.err == (
        "ftwt: error: none of 2 files could be answered: gone.png: no such file or directory, "
        "lost.png: no such file or directory\n"
    )


def test_every_kind_of_image_is_converted(capsys, run, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    image.convert("RGBA").save(tmp_path / "rgba.png")
    image.convert("P").save(tmp_path / "palette.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    image.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.fromarray(255 - pixels)])
    Image.new("L", (20_000, 1)).save(tmp_path / "thin.png")
    (tmp_path / ".hidden").mkdir()
    image.save(tmp_path / ".hidden" / "x.png")
    found = predicted(capsys, run, tmp_path)
    assert len(found) == 6
    assert not [answer for answer in found if "error" in answer]


def test_one_program_serves_all_batches(run, folder, wanted):
    """Of 2, 2 and 1 images."""
    predictor = load_predictor(str(run.workdir))
    found = predictor.predict(find_files([str(folder)]), batch=2)
    np.testing.assert_allclose([answer["probability"] for answer in found], wanted[0].max(axis=-1), atol=1e-4)
    assert predictor.network._jitted._cache_size() == 1


def test_the_number_of_a_subnet_is_told_where_there_is_one():
    logits = np.asarray([[0.0, 1.0], [np.nan, 0.0], [3.0, 1.0]], np.float32)
    outputs = types.SimpleNamespace(logits=logits, gates=(), layers=(), routes=types.SimpleNamespace(choice=[4, 5, 6]))
    rows = [{"file": "x.png", **row} for row in to_rows(outputs, ("ant", "bee"), 1)]
    assert [row.get("subnet") for row in rows] == [4, None, 6]
    assert [row.get("class") for row in rows] == ["bee", None, "ant"]
    assert "not finite" in rows[1]["error"]
    told = list(csv.DictReader(io.StringIO(to_csv(rows, 1))))
    assert [row["subnet"] for row in told] == ["4", "", "6"]
    assert to_table(rows).columns[-1].header == "subnet"


def test_the_dense_network_where_it_is_wanted_or_the_only_one(capsys, run, folder, wanted, tmp_path):
    only_dense = shutil.copytree(run.workdir, tmp_path / "dense")
    shutil.rmtree(only_dense / "checkpoints" / GATED)
    asked = predicted(capsys, run, "--baseline", folder)
    assert main(["predict", f"--workdir={only_dense}", "--json", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out) == asked
    np.testing.assert_allclose([answer["probability"] for answer in asked], wanted[3].max(axis=-1), atol=1e-4)
    assert {answer["density"] for answer in asked} == {1.0}
    assert fails(capsys, "predict", f"--workdir={only_dense}", "--budget=0.5", str(folder)).endswith(
        "holds no gated network yet, and --budget belongs to one\n"
    )


def test_a_budget_moves_the_gates(capsys, run, folder):
    before, after = (
        np.mean([answer["macs"] for answer in predicted(capsys, run, folder, *more)]) for more in ((), ["--budget=0.8"])
    )
    assert after < before


@pytest.mark.parametrize("name", ["answers.json", "answers.csv"])
def test_answers_are_written_to_a_file(capsys, run, folder, tmp_path, name):
    assert main(["predict", f"--workdir={run.workdir}", f"--out={tmp_path / name}", str(folder)]) == 0
    assert f"wrote {tmp_path / name}" in capsys.readouterr().out
    with (tmp_path / name).open(newline="") as file:
        found = json.load(file) if name.endswith("json") else list(csv.DictReader(file))
    assert [answer["file"] for answer in found] == [str(folder / one) for one in NAMES]


@pytest.mark.parametrize("augment", ["crop", "resized_crop"])
@pytest.mark.parametrize("grey", [False, True])
def test_a_file_is_prepared_as_a_held_out_image_of_a_folder(tmp_path, augment, grey):
    """Which for large images is the centre, and for small ones all of their shorter side."""
    rng = np.random.default_rng(0)
    for path in map(str, write_tree(tmp_path).rglob("*.png")):
        shape = (41, 30) if grey else (41, 30, 3)
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)
    options = {"name": f"folder:{tmp_path}", "image_size": 16, "augment": augment, "test_fraction": 0.4}
    dataset = load_dataset(**options)
    batch = next(iter(eval_batches(dataset, dataset.train, len(dataset.train))))["image"]
    read = file_reader(options, dataset.image_shape)
    ours = {read(str(path)).tobytes() for path in tmp_path.rglob("*.png")}
    assert {image.tobytes() for image in batch} <= ours


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["x.png"], "--workdir is missing, for example --workdir=workdirs/digits"),
        (["x.png", "--workdir=/gone"], "/gone"),
        (["x.png", "--workdir=w", "--json", "--csv"], "give --json or --csv, not both"),
        (["x.png", "--workdir=w", "--out=x.txt"], "--out takes a file that ends in .json or .csv, or give --json"),
        (["x.png", "--workdir=w", "--top=0"], "--top takes a whole number, at least 1; got 0"),
        (["x.png", "--workdir=w", "--batch=-1"], "--batch takes a whole number, at least 1; got -1"),
        (["x.png", "--workdir=w", "--budget=0.5", "--baseline"], "--budget moves gates, and --baseline asks the dense"),
        (["x.png", "--workdir=w", "--data=digits"], "which only --budget does: leave it out"),
        (["--workdir=w", "-"], "there are no images: name image files (.jpg, .jpeg, .png"),
    ],
)
def test_mistakes_are_one_line(capsys, monkeypatch, arguments, says):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert says in fails(capsys, "predict", *arguments)


def test_a_folder_without_images_names_the_kinds_that_are_read(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert main(["predict", "--workdir=w", str(tmp_path)]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert "left out: files of kinds that are not read: 1 (1 .txt such as notes.txt)" in warning
    assert f"no images ({tmp_path}: no images in this folder): name image files (.jpg, .jpeg, .png" in error


def test_ctrl_c_is_one_line(program, tiny_run, folder):
    """While it waits for standard input, so that the moment is certain."""
    process = program.start("predict", f"--workdir={tiny_run[0]}", stdin=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(4)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "ftwt: interrupted\n")
    assert process.returncode == 130
