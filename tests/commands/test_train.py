"""The command `train`: what it leaves behind, and that a killed run ends as one that was not."""

import dataclasses
import json
import os
import pathlib
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.digits import get_config
from ftwt_jax import workdir as workdirs
from ftwt_jax.training.run import open_run
from ftwt_jax.training.settings import BASELINE, GATED
from ftwt_jax.workdir.integrity import write_list
from tests.conftest import TINY, TINY_STEPS, read_metrics

pytestmark = pytest.mark.long

DEFAULT_R = get_config().gates.r
FROZEN = round(get_config().gates.cooldown * TINY_STEPS)
FLAG = "--xla_force_host_platform_device_count=2"
KEYS = {
    "accuracy",
    "dense_accuracy",
    "macs_reduction",
    "macs_reduction_published",
    "gate_accuracy",
    "static_gate_accuracy",
    "static_accuracy",
    "static_macs_reduction",
    "dynamic_filters",
    "density",
    "samples",
}


def variables(workdir: pathlib.Path, stage: str):
    path, config = workdirs.load(str(workdir))
    return jax.device_get(open_run(config, path).trained(stage))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.newest
def test_workdir_holds_config_checkpoints_metrics_and_evaluation(tiny_run):
    workdir, printed = tiny_run
    config = json.loads((workdir / "config.json").read_text())
    assert config["gates"]["epochs"] == 2
    assert config["model"]["plan"] == [8, "M", 16]
    for stage in (BASELINE, GATED):
        steps = {int(path.name) for path in (workdir / "checkpoints" / stage).iterdir() if path.name.isdigit()}
        assert TINY_STEPS in steps
        assert len(steps) <= 2, "the newest and the best are kept, no more"
    result = json.loads((workdir / "evaluation.json").read_text())
    assert result.keys() >= KEYS
    assert len(result["density"]) == len(result["units"]) == 2
    fractions = [value for key, value in result.items() if key in KEYS - {"samples", "density"}]
    assert all(0 <= value <= 1 for value in [*fractions, *result["density"]])
    for text in ("unit0", "classifier", "predicted before gate training", f"{result['macs_reduction']:.3f}"):
        assert text in printed


@pytest.mark.newest
def test_estimate_is_printed_before_gate_training_and_beside_what_was_reached(tiny_run):
    workdir, printed = tiny_run
    predicted = json.loads((workdir / "estimate.json").read_text())["macs_reduction"]
    assert printed.index(f"predicted MACs reduction {predicted:.3f}") < printed.index("gated 2/")
    line = next(line for line in printed.splitlines() if "predicted before gate training" in line)
    assert f"{predicted:.3f}" in line


def test_best_and_newest_checkpoints_are_kept(tiny_run):
    workdir, _ = tiny_run
    for stage in (BASELINE, GATED):
        scores = {
            m["step"]: m["eval_accuracy"] for m in read_metrics(workdir) if m["stage"] == stage and "eval_accuracy" in m
        }
        # Before the gates are calibrated, accuracy is one at another budget.
        best = max(score for step, score in scores.items() if stage == BASELINE or step >= FROZEN)
        kept = {int(path.name) for path in (workdir / "checkpoints" / stage).iterdir() if path.name.isdigit()}
        assert any(scores[step] == best for step in kept)
        assert max(scores) in kept


def test_metrics_and_tensorboard_tell_the_same(tiny_run):
    workdir, _ = tiny_run
    events = EventAccumulator(str(workdir))
    events.Reload()
    metrics = read_metrics(workdir)
    for stage, offset in ((BASELINE, 0), (GATED, TINY_STEPS)):
        lines = {m["step"]: m["loss"] for m in metrics if m["stage"] == stage}
        assert list(lines) == [*range(2, TINY_STEPS + 1, 2)]
        scalars = {event.step - offset: event.value for event in events.Scalars(f"{stage}/loss")}
        assert scalars == pytest.approx(lines, rel=1e-6)
    gated = [m for m in metrics if m["stage"] == GATED]
    assert {"gate_accuracy", "density", "images_per_second", "accuracy", "gate_loss"} <= gated[-1].keys()
    assert all(0 <= m["input_wait"] <= 1 for m in metrics)


def test_plain_lines_when_there_is_no_terminal(tiny_run):
    _, printed = tiny_run
    lines = [line for line in printed.splitlines() if line.startswith("gated ")]
    assert len(lines) == TINY_STEPS // 2
    for figure in ("loss", "accuracy", "gate accuracy", "density", "images/s"):
        assert figure in lines[-1]
    assert "\x1b" not in printed
    for part in ("baseline network's evaluation and training step", "prediction for vgg_bn", "gated network's evalu"):
        assert printed.count(f"compiling the {part}") == 1
    # The first rate is one of steps that were timed: the first step compiles.
    assert " 0 images/s" not in printed


def test_bar_on_a_terminal(program, tiny_run, tmp_path):
    main, child = pty.openpty()
    arguments = [*TINY, f"--config.init_from={tiny_run[0]}", f"--workdir={tmp_path / 'run'}"]
    process = program.start("train", *arguments, stdin=child, stdout=child, stderr=child, text=False)
    os.close(child)
    shown = b""
    while process.poll() is None or select.select([main], [], [], 0)[0]:
        if select.select([main], [], [], 0.2)[0]:
            try:
                shown += os.read(main, 65536)
            except OSError:
                break
    assert process.wait(60) == 0
    text = shown.decode()
    assert "━" in text
    for figure in ("images/s", "gate accuracy", "density", f"{TINY_STEPS}/{TINY_STEPS}"):
        assert figure in text


def test_a_finished_run_only_evaluates_again(program, tiny_run):
    workdir, _ = tiny_run
    before = (workdir / "evaluation.json").read_text(), read_metrics(workdir)
    printed = program.run("train", *TINY, f"--workdir={workdir}")
    assert ((workdir / "evaluation.json").read_text(), read_metrics(workdir)) == before
    assert "baseline 2/" not in printed


def test_another_config_is_refused_by_the_names_of_its_fields(program, tiny_run):
    workdir, _ = tiny_run
    error = program.run("train", *TINY, f"--workdir={workdir}", "--config.gates.r=0.5", "--config.seed=7", status=2)
    assert f"config.gates.r: {DEFAULT_R} -> 0.5" in error
    assert "config.seed: 1 -> 7" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(("stage", "step"), [(BASELINE, 9), (GATED, 5)])
def test_a_killed_run_ends_with_the_same_parameters(program, tiny_run, tmp_path, stage, step):
    workdir = tmp_path / "run"
    process = program.start("train", *TINY, f"--workdir={workdir}")
    deadline = time.monotonic() + 300
    while not reached(workdir, stage, step):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (workdir / "evaluation.json").exists()

    printed = program.run("train", *TINY, f"--workdir={workdir}")
    assert f"{stage}: resuming from step" in printed
    for name in (BASELINE, GATED):
        assert_same(variables(workdir, name), variables(tiny_run[0], name))
    assert json.loads((workdir / "evaluation.json").read_text()) == json.loads(
        (tiny_run[0] / "evaluation.json").read_text()
    )
    mine, theirs = read_metrics(workdir), read_metrics(tiny_run[0])
    for line in (*mine, *theirs):
        for timed in ("images_per_second", "input_wait"):
            line.pop(timed, None)
    assert mine == theirs


# Notes which examples each step is given, then runs the program.
RECORDING = """
import json, sys
from ftwt_jax.training import feed
from ftwt_jax.__main__ import main
log = open(sys.argv[1], "a")
def recorded(run):
    def recording(self, state, inputs, r, offsets):
        for indices in inputs["index"].reshape(len(offsets), -1).tolist():
            print(json.dumps(indices), file=log, flush=True)
        return run(self, state, inputs, r, offsets)
    return recording
for kind in (feed.HostFeed, feed.DeviceFeed):
    kind.run = recorded(kind.run)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_a_killed_run_sees_no_example_twice_and_misses_none(program, tmp_path, on_device):
    workdir, count = tmp_path / "run", 1347
    arguments = ["train", *TINY, f"--workdir={workdir}", "--config.gates.epochs=0"]
    arguments.append(f"--config.data.on_device={on_device}")

    def start(log: str) -> subprocess.Popen:
        command = [sys.executable, "-c", RECORDING, tmp_path / log, *arguments]
        return subprocess.Popen(
            command, cwd=program.cwd, env=program.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    killed = start("before")
    deadline = time.monotonic() + 300
    while not reached(workdir, BASELINE, 14):
        assert killed.poll() is None, killed.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    again = start("after")
    printed, error = again.communicate(timeout=300)
    assert again.returncode == 0, error
    step = int(re.search(r"resuming from step (\d+)", printed).group(1))
    before, after = (
        [json.loads(row) for row in (tmp_path / log).read_text().splitlines()] for log in ("before", "after")
    )
    seen = np.concatenate([*before[:step], *after])
    assert count < step * len(before[0]) < 2 * count, "killed within an epoch"
    for epoch in range(2):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


def edit_kept_data(workdir: pathlib.Path, stage: str, old: str, new: str) -> None:
    """Changes what the newest checkpoint says of the data it was trained on."""
    newest = max((workdir / "checkpoints" / stage).glob("[0-9]*"), key=lambda path: int(path.name))
    edited = 0
    for kept in newest.glob("dataset/*"):
        edited += kept.read_text().count(old)
        kept.write_text(kept.read_text().replace(old, new))
    assert edited == 1
    write_list(newest)


def refused_to_go_on(program, finished: pathlib.Path, workdir: pathlib.Path, old: str, new: str) -> str:
    """What `train` says to a finished run that is to go on, but whose checkpoint tells of other data."""
    shutil.copytree(finished, workdir)
    edit_kept_data(workdir, GATED, old, new)
    config = json.loads((workdir / "config.json").read_text())
    config["gates"]["epochs"] = 3
    (workdir / "config.json").write_text(json.dumps(config))
    return program.run("train", *TINY, f"--workdir={workdir}", "--config.gates.epochs=3", status=2)


def test_the_position_in_data_that_have_changed_is_refused(program, tiny_run, tmp_path):
    error = refused_to_go_on(program, tiny_run[0], tmp_path / "run", '"train_size": 1347', '"train_size": 1340')
    assert "was trained on 1340 images, and the data now has 1347" in error


def test_a_run_does_not_go_on_with_other_classes(program, tiny_run, tmp_path):
    error = refused_to_go_on(program, tiny_run[0], tmp_path / "run", '["0", "1"', '["1", "0"')
    assert "trained on these classes in another order: class 0 was '1' and is now '0'" in error


def test_a_network_is_given_images_normalised_as_in_training(tiny_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run[0], workdir)
    path, config = workdirs.load(str(workdir))
    mean = open_run(config, path).dataset.mean[0]
    edit_kept_data(workdir, BASELINE, f'"mean": [{mean}]', '"mean": [0.125]')
    assert open_run(config, path).dataset.mean == [0.125]
    config.init_from = str(workdir)
    assert open_run(config, tmp_path / "new").dataset.mean == [0.125]


def reached(workdir: pathlib.Path, stage: str, step: int) -> bool:
    try:
        lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return False
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return any(entry["stage"] == stage and entry["step"] >= step for entry in entries)


def test_gates_start_from_another_runs_baseline(program, tiny_run, tmp_path):
    workdir = tmp_path / "run"
    printed = program.run("train", *TINY, f"--config.init_from={tiny_run[0]}", f"--workdir={workdir}")
    assert "baseline 2/" not in printed
    assert_same(variables(workdir, BASELINE), variables(tiny_run[0], BASELINE))
    assert_same(variables(workdir, GATED), variables(tiny_run[0], GATED))


def test_a_baseline_of_another_network_is_refused_by_the_name_of_an_array(program, tiny_run, tmp_path):
    other = [*TINY, f"--config.init_from={tiny_run[0]}", "--config.model.width=2.0", f"--workdir={tmp_path}/run"]
    error = program.run("train", *other, status=2)
    assert "does not fit" in error
    assert "unit0" in error
    assert "(8,) there" in error
    assert "(16,) in this config" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_run_stands_by_itself_once_it_has_taken_a_baseline(program, tiny_run, tmp_path):
    shutil.copytree(tiny_run[0], tmp_path / "baseline")
    arguments = [*TINY, f"--config.init_from={tmp_path / 'baseline'}", f"--workdir={tmp_path / 'run'}"]
    first = program.run("train", *arguments)
    shutil.rmtree(tmp_path / "baseline")
    again = program.run("train", *arguments)
    assert "resuming" not in again
    assert again.splitlines()[-4:-1] == first.splitlines()[-4:-1]


def test_a_budget_is_solved_between_the_stages(program, tiny_run, tmp_path):
    workdir = tmp_path / "run"
    arguments = [*TINY, f"--config.init_from={tiny_run[0]}", f"--workdir={workdir}", "--config.gates.budget=0.6"]
    printed = program.run("train", *arguments)
    chosen = json.loads((workdir / "estimate.json").read_text())
    assert chosen["macs_reduction"] == pytest.approx(0.6, abs=0.01)
    assert chosen["r"] != DEFAULT_R
    assert f"r = {chosen['r']:.4f} for a budget of 0.6" in printed
    assert f"{chosen['r']:.4f}" in program.run("estimate", f"--workdir={workdir}")
    assert json.loads((workdir / "evaluation.json").read_text())["r"] == chosen["r"]


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(program, tiny_run, tmp_path):
    workdir = tmp_path / "run"
    # The rate is harmless for the first epoch, then so large that weights overflow.
    explosive = (
        "--config.baseline.schedule=step",
        "--config.baseline.lr=0.01",
        "--config.baseline.lr_boundaries=(1,)",
        "--config.baseline.lr_factor=1e30",
    )
    error = program.run("train", *TINY, *explosive, f"--workdir={workdir}", status=2)
    assert "at step 1" in error
    assert "config.baseline.lr" in error
    kept = {int(path.name) for path in (workdir / "checkpoints" / BASELINE).iterdir() if path.name.isdigit()}
    assert kept
    newest = max(kept)
    assert f"the checkpoint of step {newest} is intact" in error
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables(workdir, BASELINE)))


def test_a_batch_that_the_devices_cannot_share_is_refused(program, tmp_path):
    two = dataclasses.replace(program, environment=program.environment | {"XLA_FLAGS": FLAG})
    odd = two.run("train", *TINY, f"--workdir={tmp_path / 'odd'}", "--config.batch_size=127", status=2)
    assert "config.batch_size=127 must be a positive multiple of 2, the number of devices" in odd
