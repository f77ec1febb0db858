"""What the README promises of the run that a newcomer starts first."""

import json

import pytest

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def default_run(program, tmp_path_factory):
    """The default run, whole: its evaluation and what it printed."""
    workdir = tmp_path_factory.mktemp("default") / "digits"
    printed = program.run("train", "--config=configs/digits.py", f"--workdir={workdir}")
    return json.loads((workdir / "evaluation.json").read_text()), printed


def test_dense_accuracy(default_run):
    assert default_run[0]["dense_accuracy"] >= 0.97


def test_gated_accuracy_is_within_half_a_point(default_run):
    assert default_run[0]["accuracy"] >= default_run[0]["dense_accuracy"] - 0.005


def test_half_of_the_macs_are_saved(default_run):
    assert default_run[0]["macs_reduction"] >= 0.5


def test_gates_are_dynamic(default_run):
    result = default_run[0]
    assert result["gate_accuracy"] >= result["static_gate_accuracy"] + 0.05
    assert result["dynamic_filters"] > 0.5


def test_prediction_is_near_what_was_reached(default_run):
    result, printed = default_run
    assert abs(result["predicted_macs_reduction"] - result["macs_reduction"]) < 0.1
    assert printed.index("predicted MACs reduction") < printed.index("gated ")
