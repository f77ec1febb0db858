"""The budget that is solved for a time."""

import json
import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftwt_jax.__main__ import main
from ftwt_jax.budget import latency
from ftwt_jax.budget.latency import Latency, Stopwatch, search
from ftwt_jax.errors import UserError
from ftwt_jax.training.run import load_run
from tests.conftest import TINY, config_of, fails


def at(share: float) -> Latency:
    return Latency("onnxruntime", 1, 10.0, 10 * share)


@given(
    wanted=st.floats(0.25, 0.95),
    floor=st.floats(0.0, 0.2),
    bend=st.floats(0.7, 1.5),
    step=st.floats(0.001, 0.02),
    near=st.none() | st.floats(0, 0.95),
)
def test_a_time_that_falls_in_steps_is_met(wanted, floor, bend, step, near):
    def measure(budget):
        return at(floor + (1 - floor) * (1 - math.floor(budget / step) * step) ** bend)

    reduction, found = search(measure, lambda one: one.share, wanted, 0.0, 0.97, near)
    assert abs(found.share / wanted - 1) <= 0.1
    assert found == measure(reduction)


def test_a_time_out_of_reach_is_told_with_what_can_be_had():
    with pytest.raises(UserError, match=r"latency_ms asks for, 0\.3: .* take 0\.7.* the dense network takes 10 ms"):
        search(lambda budget: at(0.9 - 0.2 * budget), lambda one: one.share, 0.3, 0.0, 0.9, asked_by="latency_ms")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.gates.latency=0.5"], "set config.subnets.count too"),
        (["--config.gates.latency=0.5", "--config.gates.budget=0.5"], "config.gates.budget both"),
        (["--config.gates.latency=0.5", "--config.gates.latency_ms=2"], "config.gates.latency_ms both"),
        (["--config.gates.latency_ms=2", "--config.gates.budgets=(0.3,0.8)"], "config.gates.budgets both"),
        (["--config.gates.latency=0.5", "--config.subnets.count=2", "--config.subnets.engine=openvine"], "openvino"),
        (["--config.gates.latency=1.5"], "config.gates.latency takes a number between 0 and 1; got 1.5"),
        (["--config.gates.latency_ms=0"], "config.gates.latency_ms takes a number above 0"),
        (["--config.subnets.batch_size=0"], "config.subnets.batch_size takes a whole number, at least 1"),
    ],
)
def test_what_cannot_be_met_is_refused_before_training(capsys, tmp_path, flags, message):
    assert message in fails(capsys, "train", *TINY, f"--workdir={tmp_path / 'run'}", *flags)
    assert not (tmp_path / "run").exists()


def test_an_engine_that_is_missing_is_named_with_its_remedy(monkeypatch):
    config = config_of([*TINY, "--config.gates.latency=0.5", "--config.subnets.count=2"])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        UserError, match=r"config\.subnets\.engine=onnxruntime needs onnxruntime: pip install .*\[bench\]"
    ):
        latency.check_latency(config)


@pytest.mark.long
def test_a_run_is_trained_to_a_time_and_keeps_it(tmp_path, monkeypatch, capsys, quick_compilation):
    """Times are made up here: a tenth of the dense network's, and the rest in proportion to MACs."""
    asked = []

    def measure(self, network, variables):
        macs = network.subnets.macs[network.subnets.assignment].mean() / network.subnets.dense_macs
        asked.append(network.subnets.macs_reduction)
        return Latency("onnxruntime", 1, 10.0, 10 * (0.1 + 0.9 * macs))

    monkeypatch.setattr(Stopwatch, "measure", measure)
    folder = tmp_path / "run"
    flags = ["--config.gates.latency=0.7", "--config.subnets.count=2", "--config.subnets.multiple=1"]
    assert main(["train", *TINY, *flags, f"--workdir={folder}"]) == 0
    found = json.loads((folder / "evaluation.json").read_text())["subnets"]
    assert abs(found["latency"]["share"] / 0.7 - 1) <= 0.1
    assert found["latency"]["wanted"] == 0.7
    assert found["latency"]["dense_ms"] == 10
    # Gates are trained for the reduction that the time asked for, and subnets are cut at it.
    estimate = json.loads((folder / "estimate.json").read_text())
    assert abs(estimate["macs_reduction"] - (1 - 0.6 / 0.9)) < 0.1
    assert "of the dense network's 10, in onnxruntime at batch 1, for a MACs reduction of" in capsys.readouterr().out
    times = len(asked)
    assert main(["train", *TINY, *flags, f"--workdir={folder}"]) == 0
    assert len(asked) == times + 1, "a run that goes on is measured by its evaluation alone"

    # On a machine without the engine, all but the time is measured.
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    capsys.readouterr()
    assert main(["evaluate", str(folder)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "time not measured: config.subnets.engine=onnxruntime needs onnxruntime" in printed
    again = json.loads((folder / "evaluation.json").read_text())["subnets"]
    assert again["latency"].keys() == {"wanted", "wanted_ms", "missing"}
    assert again["accuracy"] == found["accuracy"]


@pytest.mark.parametrize("engine", ["xla", "onnxruntime", "openvino"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_what_is_timed_are_the_networks_themselves(tiny_subnets, monkeypatch, engine, batch_size):
    pytest.importorskip("onnxruntime" if engine == "xla" else engine)
    run = load_run(str(tiny_subnets[0]))
    with run.config.unlocked():
        run.config.subnets.engine, run.config.subnets.batch_size = engine, batch_size
    seen = {}

    def take(functions, batches):
        seen["logits"] = [np.concatenate([np.asarray(run(batch)) for batch in batches]) for run in functions]
        seen["batches"] = batches
        return [[3.5, 3.0], *([9.0, 2.0 + index] for index in range(len(functions) - 1))]

    monkeypatch.setattr(latency, "time_engines_in_turns", take)
    model, variables = run.models["subnets"], run.trained("subnets")
    found = Stopwatch(run, run.trained("baseline")).measure(model, variables)
    assert (found.engine, found.batch_size, found.dense_ms, found.ms) == (engine, batch_size, 3.0, 2.0)
    images = np.concatenate(seen["batches"])
    assert all(len(batch) == batch_size for batch in seen["batches"])
    dense, *subnets = seen["logits"]
    whole = run.models["baseline"].apply(run.trained("baseline"), images).logits
    np.testing.assert_allclose(dense, whole, atol=1e-4 * np.abs(whole).max())
    assert len(subnets) == (2 if batch_size == 1 and engine != "xla" else 1)
    routed = model.apply(variables, images).logits
    for logits in subnets:
        np.testing.assert_allclose(logits, routed, atol=1e-4 * np.abs(routed).max())
