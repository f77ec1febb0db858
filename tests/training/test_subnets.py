"""A run with subnets, from training to prediction, as a user runs it."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

import ftwt_jax as ftwt
from ftwt_jax.training.run import load_run
from tests.conftest import TINY_STEPS, TINY_SUBNETS, fails, read_metrics

pytestmark = pytest.mark.long


def test_it_is_trained_after_its_gates(tiny_subnets):
    workdir, printed = tiny_subnets
    stages = [row["stage"] for row in read_metrics(workdir)]
    assert sorted(set(stages), key=stages.index) == ["baseline", "gated", "subnets"]
    last = [row for row in read_metrics(workdir) if row["stage"] == "subnets"][-1]
    assert last["step"] == TINY_STEPS
    assert {"router_loss", "router_accuracy", "eval_accuracy", "eval_macs_reduction"} <= set(last)
    assert "subnets: 3 found by heads" in printed
    assert "a single subnet, not trained" in printed


def test_its_figures(tiny_subnets):
    workdir, _ = tiny_subnets
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    found = evaluation["subnets"]
    assert abs(found["macs_reduction"] - 0.3) < 0.01
    assert sum(row["images"] for row in found["subnets"]) == evaluation["samples"]
    assert np.array([row["classes"] for row in found["subnets"]]).sum() == evaluation["samples"]
    right = sum(row["images"] * row["accuracy"] for row in found["subnets"] if row["images"])
    assert right / evaluation["samples"] == pytest.approx(found["accuracy"])
    assert found["router_loss"] == pytest.approx(found["own_accuracy"] - found["accuracy"])
    assert 0 <= found["router_accuracy"] <= 1
    for name, mask in load_file(workdir / "subnets.safetensors").items():
        if name.startswith("masks/"):
            unit = found["units"][name.removeprefix("masks/")]
            assert unit["kept"] == mask.sum(axis=1).tolist()
            assert unit["all"] <= min(unit["kept"]) <= max(unit["kept"]) <= unit["any"] <= unit["filters"]


def test_it_resumes_with_the_same_subnets(tiny_subnets, program, tmp_path):
    workdir, _ = tiny_subnets
    shutil.copytree(workdir, tmp_path / "run")
    for step in (tmp_path / "run" / "checkpoints" / "subnets").iterdir():
        if step.name == str(TINY_STEPS):
            shutil.rmtree(step)
    before = (workdir / "subnets.safetensors").read_bytes()
    printed = program.run("train", *TINY_SUBNETS, f"--workdir={tmp_path / 'run'}")
    assert "subnets: resuming from step 20 of 22" in printed
    assert (tmp_path / "run" / "subnets.safetensors").read_bytes() == before
    figures, again = (json.loads((path / "evaluation.json").read_text()) for path in (workdir, tmp_path / "run"))
    assert again["subnets"] == figures["subnets"]


def test_compact_is_the_network_of_the_workdir(tiny_subnets):
    run = load_run(str(tiny_subnets[0]))
    variables, model = run.trained("subnets"), run.models["subnets"]
    images = run.normalize(run.dataset.test.images[:40])
    whole, compact = model.apply(variables, images), ftwt.compact(model, variables)(images)
    np.testing.assert_allclose(compact.logits, whole.logits, atol=1e-4 * np.abs(whole.logits).max())
    np.testing.assert_array_equal(compact.routes.choice, whole.routes.choice)


@pytest.mark.parametrize("kind", ["onnx", "stablehlo"])
def test_it_is_exported_as_a_folder(tiny_subnets, tmp_path, capsys, kind):
    import jax
    import jax.numpy as jnp
    from jax import export

    from ftwt_jax.__main__ import main

    workdir, _ = tiny_subnets
    assert main(["export", str(workdir), f"--out={tmp_path / 'out'}", f"--format={kind}"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert len(manifest["subnets"]) == 3
    run = load_run(str(workdir))
    images = run.dataset.test.images[:20]
    whole = run.models["subnets"].apply(run.trained("subnets"), run.normalize(images))

    def run_file(name, images):
        if kind == "onnx":
            onnxruntime = pytest.importorskip("onnxruntime")
            path = str(tmp_path / "out" / name)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            return session.run(None, {"images": images})[0]
        program = export.deserialize(bytearray((tmp_path / "out" / name).read_bytes()))
        return np.asarray(jax.jit(program.call)(jnp.asarray(images)))

    choice = run_file(manifest["router"], images).argmax(axis=1)
    np.testing.assert_array_equal(choice, whole.routes.choice)
    for subnet in np.unique(choice):
        logits = run_file(manifest["subnets"][subnet]["file"], images[choice == subnet])
        expected = np.asarray(whole.logits)[choice == subnet]
        np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(whole.logits).max())
    alone = np.concatenate([run_file(manifest["one_image"], image[None]) for image in images])
    np.testing.assert_allclose(alone, whole.logits, atol=1e-4 * np.abs(whole.logits).max())
    assert "already exists" in fails(capsys, "export", str(workdir), f"--out={tmp_path / 'out'}", f"--format={kind}")


def test_predict_names_the_subnet_of_each_image(tiny_subnets, tmp_path, capsys):
    import cv2

    from ftwt_jax.__main__ import main

    workdir, _ = tiny_subnets
    run = load_run(str(workdir))
    for index, image in enumerate(run.dataset.test.images[:5]):
        cv2.imwrite(str(tmp_path / f"{index}.png"), image)
    assert main(["predict", f"--workdir={workdir}", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(row["subnet"] in (0, 1, 2) for row in rows)


def test_what_cannot_work_is_refused(tiny_subnets, tiny_run, capsys, tmp_path):
    workdir, _ = tiny_subnets
    without = fails(capsys, "export", str(tiny_run[0]), f"--out={tmp_path / 'out'}", "--format=onnx")
    assert "no subnets" in without
    assert "--budget" in fails(capsys, "export", str(workdir), "--out=x", "--format=onnx", "--budget=0.3")
    untrained = ("--config.gates.epochs=0", f"--workdir={tmp_path / 'w'}")
    assert "config.subnets.epochs" in fails(capsys, "train", *TINY_SUBNETS, *untrained)


@pytest.fixture(scope="module")
def without_gates(program, tmp_path_factory):
    """A run that goes from its baseline to subnets, and what it printed."""
    workdir = tmp_path_factory.mktemp("without_gates") / "run"
    settings = ("--config.gates.epochs=0", "--config.subnets.epochs=1")
    return workdir, program.run("train", *TINY_SUBNETS, *settings, f"--workdir={workdir}")


def test_without_gates_they_are_found_by_targets(without_gates):
    workdir, printed = without_gates
    assert "subnets: 3 found by targets" in printed
    found = json.loads((workdir / "evaluation.json").read_text())
    assert found["gate_accuracy"] is None
    # One filter of the first layer's eight is a twentieth of the work.
    assert abs(found["subnets"]["macs_reduction"] - 0.3) < 0.03


def test_without_gates_the_tables_are_of_subnets_alone(without_gates, program):
    workdir, _ = without_gates
    printed = program.run("evaluate", str(workdir), "--budgets=0.3,0.5")
    rows = json.loads((workdir / "budgets.json").read_text())["rows"]
    assert [set(row) for row in rows] == [{"budget", "subnets_accuracy", "subnets_macs_reduction"}] * 2
    assert "fixed masks" not in printed
    printed = program.run("evaluate", str(workdir), "--corruptions")
    for row in json.loads((workdir / "corruptions.json").read_text())["rows"]:
        assert row["density"] is None
        assert {"subnets_accuracy", "subnets_macs_reduction"} <= set(row)
    assert "subnets" in printed[printed.rindex("┏") :]
    program.run("report", str(workdir))
    page = (workdir / "report" / "index.html").read_text()
    assert "--budgets=0.3,0.5" in page
    assert "Some of the images in subnet 0" in page
