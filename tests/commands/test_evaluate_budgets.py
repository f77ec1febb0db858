"""One trained network at many budgets: `evaluate --budgets`, fixed masks beside it, and what else takes a budget."""

import contextlib
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export
from PIL import Image

import ftwt_jax as ftwt
from ftwt_jax import workdir as workdirs
from ftwt_jax.__main__ import main
from ftwt_jax.budget.batch_statistics import BatchStatistics
from ftwt_jax.budget.calibrate import CalibratedNetwork, Calibration
from ftwt_jax.budget.subnets import cut_to_budgets
from ftwt_jax.budget.trained import trained_subject
from ftwt_jax.commands.command import parse_numbers
from ftwt_jax.commands.estimate import SWEEP
from ftwt_jax.training.run import load_run, open_run
from ftwt_jax.training.settings import BASELINE, GATED, SUBNETS
from tests.budget.test_keeper import NEAR, SMALL, assert_measured
from tests.conftest import config_of, fails, random_like

pytestmark = pytest.mark.long

BUDGETS = (0.35, 0.6, 0.75)
HELD_OUT = 450
FIGURES = ("accuracy", "macs_reduction", "macs_reduction_published", "static_accuracy", "static_macs_reduction")
# Fixed masks are all on or off for every image: a filter more or less is the nearest that can be had.
A_FILTER = 0.05


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    """A workdir as training leaves it, of a network whose weights and gates are random; so are its answers."""
    workdir = tmp_path_factory.mktemp("any") / "run"
    config = config_of([*SMALL, "--config.gates.r=0.7", f"--workdir={workdir}"])
    run = open_run(config, workdir)
    workdirs.prepare(workdir, config)
    variables = random_like(run.abstract_variables(GATED))
    calibration = Calibration(run)
    variables = calibration.statistics.renewed(variables, calibration.batches)
    for stage in (BASELINE, GATED):
        wanted = flatten_dict(run.abstract_variables(stage))
        network = unflatten_dict({path: flatten_dict(variables)[path] for path in wanted})
        with contextlib.closing(run.checkpoints(stage, create=True)) as checkpoints:
            checkpoints.save_network(network)
    return workdir


@pytest.fixture(scope="module")
def swept(program, trained) -> tuple[dict, str]:
    """What `evaluate --budgets` has written, and what it has printed."""
    printed = program.run("evaluate", f"--workdir={trained}", f"--budgets={','.join(map(str, BUDGETS))}")
    return json.loads((trained / "budgets.json").read_text()), printed


@pytest.fixture(scope="module")
def opened(trained):
    """The run, and its network to be had at any budget."""
    path, config = workdirs.load(str(trained))
    run = open_run(config, path)
    return run, CalibratedNetwork(Calibration(run), run.trained(GATED), config.gates.r)


@pytest.fixture(scope="module")
def outputs(opened):
    """Outputs of the gated network with some variables for images of the held-out split."""
    run, _ = opened
    images = run.normalize(jnp.asarray(run.dataset.test.images))
    control = ftwt.GateControl(targets=False)
    return jax.jit(lambda variables: run.models[GATED].apply(variables, images, control=control))


def test_a_row_for_every_budget(swept):
    result, printed = swept
    assert result.keys() == {"dense_accuracy", "samples", "checkpoint", "rows"}
    assert (result["samples"], result["checkpoint"]) == (HELD_OUT, "newest")
    assert [row["budget"] for row in result["rows"]] == list(BUDGETS)
    for row in result["rows"]:
        assert row.keys() == {"budget", "offset", *FIGURES}
        assert all(0 <= row[key] <= 1 for key in FIGURES)
        for figure in (f"{row['accuracy']:.4f}", f"{row['macs_reduction']:.3f}", f"{row['static_accuracy']:.4f}"):
            assert figure in printed
    offsets = [row["offset"] for row in result["rows"]]
    assert offsets == sorted(offsets, reverse=True)


def test_budgets_are_met_and_so_they_are_by_fixed_masks(swept):
    for row in swept[0]["rows"]:
        assert row["macs_reduction"] == pytest.approx(row["budget"], abs=NEAR)
        assert row["static_macs_reduction"] == pytest.approx(row["budget"], abs=A_FILTER)


def test_figures_do_not_depend_on_how_long_gates_were_to_be_trained(program, trained, swept, tmp_path):
    other = tmp_path / "longer"
    shutil.copytree(trained, other)
    config = json.loads((other / "config.json").read_text())
    config["gates"]["epochs"] *= 10
    (other / "config.json").write_text(json.dumps(config))
    program.run("evaluate", f"--workdir={other}", f"--budgets={','.join(map(str, BUDGETS))}")
    assert json.loads((other / "budgets.json").read_text()) == swept[0]


def test_a_row_is_what_the_network_at_that_budget_does(swept, opened, outputs):
    """Against a count by hand over the whole held-out split."""
    run, network = opened
    labels = run.dataset.test.labels
    for row in swept[0]["rows"][::2]:
        found, static = (outputs(one.at(row["budget"])) for one in (network, network.fixed()))
        assert np.mean(np.argmax(found.logits, -1) == labels) == pytest.approx(row["accuracy"], abs=1 / HELD_OUT)
        for one, name in ((found, "macs_reduction"), (static, "static_macs_reduction")):
            assert np.mean(1 - ftwt.macs(one) / ftwt.dense_macs(one)) == pytest.approx(row[name], abs=1e-3)
        assert all((gate.mask == gate.mask[:1]).all() for gate in static.gates)
        assert any((gate.mask != gate.mask[:1]).any() for gate in found.gates)


def test_batch_statistics_are_those_of_the_budget(opened):
    run, network = opened
    low, high = (network.at(budget) for budget in (0.35, 0.75))
    # The first maps have no mask before them.
    first, second = (
        [variables["batch_stats"][unit]["bn"]["var"] for variables in (low, high)] for unit in ("unit0", "unit1")
    )
    np.testing.assert_allclose(*first, rtol=1e-5)
    assert np.mean(second[0]) > np.mean(second[1])
    # Whatever moved the gates last, they were measured after it.
    for variables in (low, high, network.fixed().at(0.5)):
        assert_measured(Calibration(run), variables)


def test_evaluate_gives_fixed_masks_of_the_same_work_beside_the_network(program, trained, swept):
    printed = program.run("evaluate", f"--workdir={trained}")
    result = json.loads((trained / "evaluation.json").read_text())
    assert result["dense_accuracy"] == swept[0]["dense_accuracy"]
    assert result["static_macs_reduction"] == pytest.approx(result["macs_reduction"], abs=A_FILTER)
    assert 0 <= result["static_accuracy"] <= 1
    line = next(line for line in printed.splitlines() if "of fixed masks with the same MACs" in line)
    assert f"{result['static_accuracy']:.4f}" in line


def test_without_gates_there_is_nothing_to_bring_to_a_budget(capsys, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / "checkpoints" / GATED)
    assert "holds no gated network yet" in fails(capsys, "evaluate", f"--workdir={workdir}", "--budgets=0.5")
    assert main(["evaluate", f"--workdir={workdir}"]) == 0
    result = json.loads((workdir / "evaluation.json").read_text())
    assert result["static_accuracy"] is result["static_macs_reduction"] is None


def test_a_budget_out_of_reach_is_refused_with_the_range_and_nothing_is_written(capsys, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    (workdir / "budgets.json").unlink(missing_ok=True)
    error = fails(capsys, "evaluate", f"--workdir={workdir}", "--budgets=0.5,0.9999")
    assert "no offset of the gates gives a MACs reduction of 0.9999: this network can be cut by 0.00 to 0.9" in error
    assert not (workdir / "budgets.json").exists()


@pytest.fixture(scope="module")
def cut(program, tiny_subnets, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """A workdir with subnets that was evaluated at two budgets, and what was printed."""
    workdir = shutil.copytree(tiny_subnets[0], tmp_path_factory.mktemp("cut") / "run")
    return workdir, program.run("evaluate", str(workdir), "--budgets=0.25,0.4")


def test_subnets_are_cut_again_at_each_budget(cut):
    workdir, printed = cut
    for row in json.loads((workdir / "budgets.json").read_text())["rows"]:
        assert row.keys() == {"budget", "offset", *FIGURES, "subnets_accuracy", "subnets_macs_reduction"}
        assert row["macs_reduction"] == pytest.approx(row["budget"], abs=NEAR)
        assert row["subnets_macs_reduction"] == pytest.approx(row["budget"], abs=A_FILTER)
        assert f"{row['subnets_accuracy']:.4f} │          {row['subnets_macs_reduction']:.3f} │" in printed


def test_subnets_at_a_budget_have_statistics_of_their_own_and_the_same_router(cut, quick_compilation):
    """Against a count by hand over the whole held-out split."""
    workdir, _ = cut
    run, rows = load_run(str(workdir)), json.loads((workdir / "budgets.json").read_text())["rows"]
    variables, calibration = run.trained(SUBNETS), Calibration(run)
    images, labels = run.normalize(jnp.asarray(run.dataset.test.images)), run.dataset.test.labels
    routes = run.models[SUBNETS].apply(variables, images).routes
    networks = cut_to_budgets(run, variables, [row["budget"] for row in rows])
    for row, network in zip(rows, networks, strict=True):
        measured = BatchStatistics(network, run.normalize, run.mesh).renewed(variables, calibration.batches)
        statistics = measured["batch_stats"] | {"router": variables["batch_stats"]["router"]}
        found = jax.jit(network.apply)(variables | {"batch_stats": statistics}, images)
        np.testing.assert_array_equal(found.routes.choice, routes.choice)
        assert np.mean(np.argmax(found.logits, -1) == labels) == pytest.approx(
            row["subnets_accuracy"], abs=1 / HELD_OUT
        )
        reduction = np.mean(1 - ftwt.macs(found) / ftwt.dense_macs(found))
        assert reduction == pytest.approx(row["subnets_macs_reduction"], abs=1e-5)


def test_subnets_at_the_budget_they_were_trained_for_are_those_of_the_run(tiny_subnets):
    run = load_run(str(tiny_subnets[0]))
    trained = json.loads((tiny_subnets[0] / "estimate.json").read_text())["macs_reduction"]
    (network,) = cut_to_budgets(run, run.trained(SUBNETS), [trained])
    for name, mask in run.models[SUBNETS].subnets.masks.items():
        np.testing.assert_array_equal(network.subnets.masks[name], mask)


def test_a_budget_out_of_reach_of_subnets_is_refused(capsys, tiny_subnets):
    error = fails(capsys, "evaluate", str(tiny_subnets[0]), "--budgets=0.3,0.98")
    assert "no subnets have a MACs reduction of 0.98: those of this network can have" in error
    assert not (tiny_subnets[0] / "budgets.json").exists()


@pytest.mark.parametrize("budgets", ["", "x", "0.5,x", "0.5,", "0", "1", "0.3,1.5", "-0.5", "nan", "0.3;0.5"])
def test_what_is_no_list_of_budgets(capsys, budgets):
    error = fails(capsys, "evaluate", "--workdir=missing", f"--budgets={budgets}")
    assert f"--budgets takes MACs reductions between 0 and 1, such as 0.3,0.5,0.7; got {budgets!r}" in error


def test_a_list_of_budgets():
    assert parse_numbers("0.5", "budgets", "", bool) == [0.5]
    assert parse_numbers("0.3, 0.5,.7", "budgets", "", bool) == [0.3, 0.5, 0.7]


def test_budgets_and_corruptions_are_two_commands(capsys):
    assert "--budgets or --corruptions" in fails(
        capsys, "evaluate", "--workdir=missing", "--budgets=0.5", "--corruptions"
    )


def test_a_benchmark_is_of_the_network_at_the_budget(program, trained):
    program.run("benchmark", f"--workdir={trained}", "--budget=0.75", "--batch=8")
    result = json.loads((trained / "benchmark.json").read_text())
    assert result["gates"] == "trained"
    assert result["macs_reduction"] == pytest.approx(0.75, abs=0.05)
    assert result["max_abs_diff"] <= 1e-4 * result["max_abs_logit"]


def test_a_program_is_exported_at_the_budget(trained, tmp_path):
    file = tmp_path / "network.stablehlo"
    assert main(["export", f"--workdir={trained}", f"--out={file}", "--budget=0.75"]) == 0
    at, before = (trained_subject(str(trained), budget=budget) for budget in (0.75, None))
    raw = np.random.default_rng(0).integers(0, 256, (32, *at.held_out.shape[1:]), np.uint8)
    found = np.asarray(export.deserialize(bytearray(file.read_bytes())).call(raw))
    wanted, otherwise = (
        np.asarray(one.gated.apply(one.gated_variables, one.normalize(jnp.asarray(raw))).logits) for one in (at, before)
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(found - otherwise).max() > 0.01 * np.abs(otherwise).max()


def test_a_budget_where_there_are_no_gates_to_move(capsys, trained, tmp_path):
    workdir, file = f"--workdir={trained}", tmp_path / "network.stablehlo"
    assert "the dense network, which has none" in fails(
        capsys, "export", workdir, f"--out={file}", "--baseline", "--budget=0.5"
    )
    weights = fails(capsys, "export", workdir, f"--out={tmp_path / 'a.safetensors'}", "--budget=0.5")
    assert "--budget belongs to a program" in weights
    assert "between 0 and 1; got 1.5" in fails(capsys, "benchmark", workdir, "--budget=1.5")
    assert "can be cut by" in fails(capsys, "export", workdir, f"--out={file}", "--budget=0.9999")
    assert not list(tmp_path.iterdir())


def test_estimate_shows_every_unit_in_a_table_and_in_a_plot(program, trained):
    (trained / "estimate.png").unlink(missing_ok=True)
    printed = program.run("estimate", f"--workdir={trained}", "--budget=0.6")
    table = printed[printed.index("predicted MACs reduction of each layer") :].splitlines()
    for name in ("unit0", "unit1", "classifier", "all"):
        (row,) = [line for line in table if line.split("│")[1:2] == [f" {name:10} "]]
        values = [float(value) for value in row.split("│")[2:-1]]
        assert values == sorted(values, reverse=True)
    predicted = [float(value) for value in row.split("│")[2:-1]]
    assert 0.6 in predicted
    assert len(predicted) < len(SWEEP)
    assert "estimate.png" in printed.replace("\n", "")
    with Image.open(trained / "estimate.png") as plot:
        assert plot.format == "PNG"
        assert 600 <= plot.width <= 2000
        assert 400 <= plot.height <= 1600
        assert len(set(np.asarray(plot.convert("L")).ravel().tolist())) > 20, "something is drawn"
