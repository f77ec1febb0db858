"""The command `benchmark`, and the gates that it makes where none are trained."""

import io
import json
import re
import shutil

import jax
import numpy as np
import pytest
from rich.console import Console

import ftwt_jax as ftwt
from ftwt_jax.benchmark.inference import _print
from ftwt_jax.benchmark.synthetic import random_gates
from tests.conftest import fails

pytestmark = pytest.mark.long

KEYS = {"arch", "batch", "platform", "macs_reduction", "dense_ms", "masked_ms", "compact_ms", "max_abs_diff"}


def held(result: dict) -> None:
    """What every benchmark.json promises."""
    assert result.keys() >= KEYS | {"gates", "speedup", "realisation", "outside", "samples", "max_abs_logit", "flipped"}
    assert min(result["dense_ms"], result["masked_ms"], result["compact_ms"]) > 0
    assert result["speedup"] == pytest.approx(result["dense_ms"] / result["compact_ms"])
    assert result["realisation"] == pytest.approx(result["speedup"] * (1 - result["macs_reduction"]))
    assert result["max_abs_diff"] <= 1e-4 * result["max_abs_logit"]
    assert 0 <= result["outside"] <= 1
    assert 0 <= result["flipped"] < 0.5
    if "train_overhead" in result:
        rates = (result[f"train_{kind}_images_per_second"] for kind in ("dense", "gated"))
        assert result["train_overhead"] == pytest.approx(next(rates) / next(rates))
    if "train_torch_ratio" in result:
        rates = (result[f"train_torch_{kind}images_per_second"] for kind in ("dense_", ""))
        assert result["train_torch_ratio"] == pytest.approx(next(rates) / next(rates))


def test_a_trained_network_is_timed_on_its_own_images(program, tiny_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run[0], workdir)
    said = program.run("benchmark", f"--workdir={workdir}", "--torch")
    result = json.loads((workdir / "benchmark.json").read_text())
    held(result)
    assert result["arch"] == "vgg_bn"
    assert result["gates"] == "trained"
    assert result["batch"] == 1
    assert result["images"] == "held out"
    assert result["torch_ms"] > 0
    assert "PyTorch" in said
    assert "compact" in said
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    assert result["macs_reduction"] == pytest.approx(evaluation["macs_reduction"], abs=0.05)


def test_synthetic_gates_need_no_training_and_keep_the_budget(program, tmp_path):
    out = tmp_path / "made" / "here"
    program.run("benchmark", "--arch=resnet8", "--budget=0.4", "--batch=8", "--train", "--torch", f"--workdir={out}")
    result = json.loads((out / "benchmark.json").read_text())
    held(result)
    assert result["gates"] == "synthetic"
    assert result["batch"] == 8
    assert result["macs_reduction"] == pytest.approx(0.4, abs=0.05)
    assert result["train_batch"] == 128
    assert result["train_overhead"] > 0
    assert result["train_torch_images_per_second"] > 0
    assert result["train_torch_ratio"] > 0


@pytest.mark.parametrize(("arch", "budget"), [("vgg_bn", 0.7), ("resnet8", 0.4)])
def test_random_masks_keep_the_budget_and_differ_from_sample_to_sample(arch, budget):
    options = {"plan": (16, "M", 24, 24)} if arch == "vgg_bn" else {}
    model = ftwt.create_model(arch, 10, gates=ftwt.GateConfig.paper(), **options)
    images = jax.random.normal(jax.random.key(0), (96, 16, 16, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images[:1])
    gated, reduction = random_gates(model, variables, images[:48], budget)
    outputs = jax.jit(model.apply)(gated, images[48:])
    assert reduction == pytest.approx(budget, abs=0.02)
    assert np.mean(1 - ftwt.macs(outputs) / ftwt.dense_macs(outputs)) == pytest.approx(budget, abs=0.05)
    masks = np.concatenate([np.asarray(gate.mask) for gate in outputs.gates], axis=1)
    assert len(np.unique(masks, axis=0)) == len(masks)
    assert np.mean(masks.any(0) & ~masks.all(0)) > 0.9


def test_a_reduction_that_no_masks_reach_is_refused():
    model = ftwt.create_model("vgg_bn", 10, gates=ftwt.GateConfig.paper(), plan=(16,))
    images = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images[:1])
    with pytest.raises(ftwt.UserError, match="random gates cannot cut this network by 0"):
        random_gates(model, variables, images, 0.999)
    dense = ftwt.create_model("vgg_bn", 10, plan=(16,))
    with pytest.raises(ftwt.UserError, match="no gates"):
        random_gates(dense, dense.init(jax.random.key(1), images[:1]), images, 0.5)


def test_mistakes_are_one_line(capsys, tiny_run, tmp_path):
    for arguments, said in [
        ((), "--arch=vgg16_bn --budget=0.73"),
        (("--arch=vgg16_bn",), "--budget"),
        (("--arch=vgg17", "--budget=0.5"), "vgg17"),
        (("--arch=resnet8", "--budget=1.5"), "between 0 and 1"),
        (("--arch=resnet8", "--budget=0.4", "--image_size=2"), "too small"),
        (("--arch=resnet8", "--budget=0.4", "--image_size=-4"), "--image_size"),
        ((f"--workdir={tiny_run[0]}", "--batch=0"), "--batch"),
        ((f"--workdir={tiny_run[0]}", "--image_size=32"), "--image_size belongs to --arch"),
        ((str(tiny_run[0]), "--seconds=3"), "--seconds belongs to --input"),
        ((str(tiny_run[0]), "--config=digits"), "--config belongs to --input"),
        (("--input", "--config=digits", "--batch=3"), "--batch belongs to --arch or a trained network"),
        (("--input", "--config=digits", f"--workdir={tiny_run[0]}"), "--workdir belongs to"),
        (("--arch=resnet8", "--budget=0.4", "--data=digits"), "--data belongs to a trained network"),
        ((f"--workdir={tmp_path / 'nowhere'}",), "nowhere"),
    ]:
        assert said in fails(capsys, "benchmark", *arguments)


def test_synthetic_gates_do_not_take_the_place_of_a_trained_network(capsys, tiny_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run[0], workdir)
    (workdir / "benchmark.json").write_text("{}")
    error = fails(capsys, "benchmark", str(workdir), "--arch=resnet8", "--budget=0.4")
    assert f"{workdir} holds a run of its own: leave out --arch to time that" in error
    assert (workdir / "benchmark.json").read_text() == "{}"


@pytest.mark.parametrize("scale", [1.0, 0.0123, 234.5])
def test_printed_figures_divide(scale):
    """Every ratio that is printed is that of the figures beside it, and a slower network is called slower."""
    times = {"dense_ms": 0.937, "masked_ms": 1.213, "compact_ms": 0.976, "torch_ms": 7.103, "torch_compact_ms": 1.217}
    result = {name: scale * value for name, value in times.items()}
    result |= {"arch": "vgg", "gates": "trained", "batch": 1, "device": "cpu", "macs_reduction": 0.514}
    result |= {"max_abs_diff": 0.0, "max_abs_logit": 1.0, "outside": 0.0, "flipped": 0.0}
    result["speedup"] = result["dense_ms"] / result["compact_ms"]
    console = Console(width=120, file=io.StringIO())
    _print(result, console)
    printed = console.file.getvalue()
    dense, _, compact = (
        [float(word) for word in re.findall(r"[\d.]+", line)] for line in printed.splitlines() if line.endswith("x │")
    )
    assert dense[0] / compact[0] == pytest.approx(compact[1], rel=5e-3)
    theirs, ours, ratio = (
        float(word) for word in re.findall(r"[\d.]+", next(x for x in printed.splitlines() if "PyTorch" in x))
    )
    assert theirs / ours == pytest.approx(ratio, rel=5e-3)
    (line,) = [line for line in printed.splitlines() if line.startswith("MACs reduction")]
    assert line == "MACs reduction 0.514: at most 2.06 x if time followed MACs; compact: 0.960 x, slower than dense"
