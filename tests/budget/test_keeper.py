"""Gates held to a budget while they are trained, from outside: what is reached, kept, refused and taken up again."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict

from ftwt_jax import workdir as workdirs
from ftwt_jax.__main__ import main
from ftwt_jax.budget.calibrate import Calibration
from ftwt_jax.budget.keeper import OFFSETS, POINTS
from ftwt_jax.gating.gates import HEAD_NAME, GateControl
from ftwt_jax.training.run import Run, open_run
from ftwt_jax.training.settings import GATED
from ftwt_jax.workdir.checkpoints import NETWORK
from tests.commands.test_train import reached
from tests.conftest import TINY, TINY_STEPS, config_of, fails, read_metrics
from tests.helpers.processes import assert_ends_like, figures, newest, wait_until, went_on
from tests.survival.test_told_to_stop import told

pytestmark = pytest.mark.long

# So many filters that one more or less is no more than some hundredths of the work.
SMALL = (*(flag.replace("(8,'M',16)", "(24,'M',32)") for flag in TINY), "--config.gates.cooldown=0.5")
ANY = (*SMALL, "--config.gates.budgets=(0.3,0.8)")
# Heads freeze after step 11; checkpoints are those of step 4, 8, 12 ... 20 and 22, of which the last two are kept.
FROZEN, LAST = TINY_STEPS // 2, (20, TINY_STEPS)
# Heads that learn slowly leave too many filters on, far more than so low an r asks for.
SLOW = ("--config.gates.r=0.6", "--config.gates.head_lr=0.02")
NEAR = 0.03


@pytest.fixture(scope="module")
def any_run(program, tmp_path_factory) -> pathlib.Path:
    """A finished run for every budget from 0.3 to 0.8, left at what r predicts."""
    workdir = tmp_path_factory.mktemp("any") / "run"
    program.run("train", *ANY, f"--workdir={workdir}")
    return workdir


@pytest.fixture(scope="module")
def train(program, any_run, tmp_path_factory):
    """Trains gates from that run's baseline with further flags; returns the workdir."""

    def trained(*flags: str) -> pathlib.Path:
        workdir = tmp_path_factory.mktemp("gated") / "run"
        program.run("train", *SMALL, f"--config.init_from={any_run}", f"--workdir={workdir}", *flags)
        return workdir

    return trained


@pytest.fixture(scope="module")
def slow_run(train) -> pathlib.Path:
    """A run whose heads have learnt little when they freeze."""
    return train(*SLOW)


@pytest.fixture(scope="module")
def raw_run(train) -> pathlib.Path:
    """The same, not calibrated."""
    return train(*SLOW, "--config.gates.calibrate=False")


@pytest.fixture(scope="module")
def static_run(train) -> pathlib.Path:
    """A run whose masks are fixed when the heads freeze."""
    return train("--config.gates.budget=0.6", "--config.gates.static=True")


def read(workdir: pathlib.Path, name: str) -> dict:
    return json.loads((workdir / f"{name}.json").read_text())


def opened(workdir: pathlib.Path) -> Run:
    path, config = workdirs.load(str(workdir))
    return open_run(config, path)


def evaluated(workdir: pathlib.Path) -> dict[int, dict]:
    """What was measured of the gated network, by step."""
    return {m["step"]: m for m in read_metrics(workdir) if m["stage"] == GATED and "eval_accuracy" in m}


def heads(workdir: pathlib.Path) -> list[dict[str, np.ndarray]]:
    """Kernel and bias of every gate head, by name, in the last two checkpoints."""
    found = []
    with contextlib.closing(opened(workdir).checkpoints(GATED)) as checkpoints:
        for step in LAST:
            shapes = checkpoints.network_shapes()
            network = checkpoints._restore(step, {NETWORK: ocp.args.StandardRestore(shapes)})[NETWORK]
            names = flatten_dict(network["params"], sep="/")
            found.append({name: np.asarray(x) for name, x in names.items() if HEAD_NAME in name})
    return found


def assert_measured(calibration: Calibration, variables: dict) -> None:
    """That batch statistics are those that training images have under the masks of these gates."""
    again = calibration.statistics.renewed(variables, calibration.batches)
    for a, b in zip(*(jax.tree.leaves(one["batch_stats"]) for one in (again, variables)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def masks(workdir: pathlib.Path) -> list[np.ndarray]:
    """The masks of every unit over the held-out images."""
    run = opened(workdir)
    control = GateControl(targets=False)
    apply = jax.jit(lambda variables, images: run.models[GATED].apply(variables, images, control=control).gates)
    gates = apply(run.trained(GATED), run.normalize(jnp.asarray(run.dataset.test.images)))
    return [np.asarray(gate.mask) for gate in gates]


@pytest.mark.parametrize("name", ["any_run", "slow_run"])
def test_training_reaches_the_reduction_that_was_predicted(name, request):
    workdir = request.getfixturevalue(name)
    result, predicted = read(workdir, "evaluation"), read(workdir, "estimate")["macs_reduction"]
    assert result["predicted_macs_reduction"] == predicted
    assert result["macs_reduction"] == pytest.approx(predicted, abs=NEAR)
    assert result["dynamic_filters"] > 0


def test_gates_are_at_the_prediction_from_the_freeze_on(slow_run, raw_run):
    predicted = read(slow_run, "estimate")["macs_reduction"]
    calibrated, raw = evaluated(slow_run), evaluated(raw_run)
    for step in calibrated:
        assert (calibrated[step]["eval_macs_reduction"] == raw[step]["eval_macs_reduction"]) == (step <= FROZEN)
    for step in (12, TINY_STEPS):
        assert calibrated[step]["eval_macs_reduction"] == pytest.approx(predicted, abs=NEAR)
        assert raw[step]["eval_macs_reduction"] < predicted - 2 * NEAR


def test_without_calibration_frozen_gates_are_left_as_they_are(slow_run, raw_run, any_run):
    """Heads stand still after the freeze; calibrated ones are all moved by the same offset at the end."""
    before, after = heads(raw_run)
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    for run in (slow_run, any_run):
        before, after = heads(run)
        offset = after["unit0/gate_head/dense/bias"][0] - before["unit0/gate_head/dense/bias"][0]
        for name in before:
            np.testing.assert_allclose(after[name] - before[name], offset if name.endswith("bias") else 0, atol=1e-6)


def test_best_is_never_a_network_from_before_the_calibration(slow_run):
    accuracy = {step: line["eval_accuracy"] for step, line in evaluated(slow_run).items()}
    assert max(accuracy, key=accuracy.get) <= FROZEN, "or nothing is shown by what follows"
    with contextlib.closing(opened(slow_run).checkpoints(GATED)) as checkpoints:
        best = checkpoints.best_step()
    assert best > FROZEN
    assert accuracy[best] == max(value for step, value in accuracy.items() if step > FROZEN)


def test_offsets_of_the_budgets_are_kept_and_lead_from_one_to_the_other(any_run):
    table = read(any_run, "offsets")
    assert OFFSETS == "offsets.json"
    assert table["budgets"] == pytest.approx(np.linspace(0.3, 0.8, POINTS))
    assert table["offsets"] == sorted(table["offsets"], reverse=True)
    assert table["offsets"][0] > 0.05 > -0.05 > table["offsets"][-1]


@pytest.mark.parametrize("name", ["any_run", "slow_run", "static_run"])
def test_training_ends_with_the_batch_statistics_of_its_own_masks(name, request):
    run = opened(request.getfixturevalue(name))
    assert_measured(Calibration.of_training(run), run.trained(GATED))


def test_a_trained_network_is_brought_to_its_budgets(any_run):
    assert main(["evaluate", f"--workdir={any_run}", "--budgets=0.3,0.8"]) == 0
    for row in read(any_run, "budgets")["rows"]:
        assert row["macs_reduction"] == pytest.approx(row["budget"], abs=NEAR)


def test_a_run_told_to_stop_in_the_freeze_and_then_killed_ends_with_the_same_parameters(program, any_run, tmp_path):
    workdir = tmp_path / "run"
    _, error = told(program, tmp_path, "calibration", "train", *ANY, f"--workdir={workdir}")
    assert error.startswith(f"ftwt: {GATED} stopped at step {FROZEN} of")
    assert not (workdir / OFFSETS).exists()
    process = program.start("train", *ANY, f"--workdir={workdir}")
    wait_until(lambda: reached(workdir, GATED, 14), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert newest(workdir)[1] < TINY_STEPS
    stage, step = went_on(program.run("train", *ANY, f"--workdir={workdir}"))
    assert stage == GATED
    assert FROZEN < step < TINY_STEPS
    assert_ends_like(workdir, any_run)
    # A stop divides the figures of two steps into those of one and one.
    found, wanted = ([f for f in figures(run) if f["step"] not in (FROZEN, FROZEN + 1)] for run in (workdir, any_run))
    assert found == wanted
    assert read(workdir, "offsets") == read(any_run, "offsets")


def test_a_run_whose_offsets_are_lost_says_so(program, any_run, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(any_run, workdir)
    (workdir / OFFSETS).unlink()
    shutil.rmtree(workdir / "checkpoints" / GATED / str(TINY_STEPS))
    assert f"{workdir / OFFSETS} does not exist: it would hold the offsets of the gates" in fails(
        capsys, "train", *ANY, f"--workdir={workdir}"
    )


def test_fixed_masks_do_not_depend_on_the_image_and_keep_the_budget(static_run, any_run):
    result = read(static_run, "evaluation")
    for mask in masks(static_run):
        assert (mask == mask[:1]).all()
        assert mask.any()
    assert result["dynamic_filters"] == 0
    assert result["macs_reduction"] == result["static_macs_reduction"] == pytest.approx(0.6, abs=NEAR)
    assert any((mask != mask[:1]).any() for mask in masks(any_run))


def test_eight_devices_train_for_the_same_budgets(program, any_run, tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    eight = dataclasses.replace(program, environment=program.environment | flags)
    eight.run("train", *ANY, f"--config.init_from={any_run}", f"--workdir={tmp_path / 'run'}")
    found, wanted = (read(workdir, "offsets") for workdir in (tmp_path / "run", any_run))
    assert found["budgets"] == wanted["budgets"]
    assert found["offsets"] == pytest.approx(wanted["offsets"], abs=0.02)
    result = read(tmp_path / "run", "evaluation")
    assert result["macs_reduction"] == pytest.approx(result["predicted_macs_reduction"], abs=NEAR)


@pytest.mark.parametrize(
    "budgets", ["(0.3,)", "(0.3,0.5,0.8)", "(0.8,0.3)", "(0.5,0.5)", "(0,0.5)", "(0.5,1)", "('a','b')"]
)
def test_bad_budgets_are_refused_before_anything_is_trained(capsys, tmp_path, budgets):
    flags = [*TINY, f"--config.gates.budgets={budgets}", f"--workdir={tmp_path / 'run'}"]
    assert "the lowest and the highest MACs reduction, such as (0.3, 0.8); got (" in fails(capsys, "train", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--config.gates.budgets=(0.3,0.8)", "--config.gates.static=True"])
def test_what_calibration_brings_about_is_refused_without_it(capsys, tmp_path, flag):
    flags = [*TINY, flag, "--config.gates.calibrate=False", f"--workdir={tmp_path / 'run'}"]
    assert "leave config.gates.calibrate on" in fails(capsys, "train", *flags)
    assert not (tmp_path / "run").exists()


def test_a_workdir_from_before_there_was_calibration_is_still_read(capsys, raw_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(raw_run, workdir)
    config = read(workdir, "config")
    for field in ("calibrate", "static", "budgets"):
        del config["gates"][field]
    (workdir / "config.json").write_text(json.dumps(config))
    flags = [*SMALL, f"--config.init_from={config['init_from']}", *SLOW, f"--workdir={workdir}"]
    assert "config.gates.calibrate: False -> True" in fails(capsys, "train", *flags)
    workdirs.prepare(workdir, config_of([*flags, "--config.gates.calibrate=False"]))
    kept = opened(workdir).config.gates
    assert (kept.calibrate, kept.static, kept.budgets) == (False, False, None)


@pytest.mark.parametrize("flag", ["--config.gates.static=True", "--config.gates.budgets=(0.3,0.8)"])
def test_what_divides_a_saving_is_refused_where_none_is_predicted(capsys, tiny_run, tmp_path, flag):
    # A baseline of which all filters light in some place; heads are all that r = 1 then adds.
    flags = [*TINY, f"--config.init_from={tiny_run[0]}", "--config.gates.r=1.0", flag, f"--workdir={tmp_path / 'run'}"]
    assert "r = 1 is predicted to save nothing" in fails(capsys, "train", *flags)
