"""What `plan` says of a network with subnets: their training step, and inference beside the dense network's."""

import dataclasses
import json

import numpy as np
import pytest

from ftwt_jax.__main__ import main
from ftwt_jax.errors import UserError
from ftwt_jax.plan.collectives import GRADIENTS, METRICS, STATISTICS
from ftwt_jax.plan.compile import Step, make_run_on
from ftwt_jax.plan.inference import add_subnets, compile_inference, inference_figures
from ftwt_jax.plan.roofline import CHIPS, parse_slice
from ftwt_jax.subnets.network import make_router, router_macs
from ftwt_jax.training.settings import SUBNETS
from ftwt_jax.training.subnets_file import write_subnets
from tests.conftest import config_of, fails, needs_libtpu

SMALL = ("--config=configs/digits.py", "--config.model.plan=(32,'M',64)", "--config.batch_size=128")
TWO = ("--config.subnets.count=2", "--config.gates.budget=0.4")
pytestmark = [pytest.mark.long, needs_libtpu]


def run_of(*flags: str, topology: str = "v5e:2x2"):
    return make_run_on(config_of([*SMALL, *flags]), parse_slice(topology))


def step_of(name: str, flops: int, traffic: int) -> Step:
    return Step(name, 1, 2, 3, 4, flops, traffic, traffic, [], frozenset())


@pytest.fixture(scope="module")
def planned(program, tmp_path_factory):
    """What the command prints, and plan.json."""
    workdir = tmp_path_factory.mktemp("plan") / "run"
    process = program.start("plan", *SMALL, *TWO, "--topology=v5e:2x2", f"--workdir={workdir}")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert [path.name for path in workdir.iterdir()] == ["plan.json"]
    return out, json.loads((workdir / "plan.json").read_text())


def test_the_training_step_of_subnets_is_planned_beside_the_others(planned):
    steps = planned[1]["steps"]
    assert list(steps) == ["gated", "dense", "subnets"]
    # Every filter is computed in training; the router is what comes in addition.
    assert steps["dense"]["flops"] < steps["subnets"]["flops"] < 1.1 * steps["dense"]["flops"]
    assert {group["carries"] for group in steps["subnets"]["collectives"]} == {GRADIENTS, STATISTICS, METRICS}


def test_inference_saves_the_flops_that_the_macs_promise(planned):
    out, found = planned[0], planned[1]["inference"]
    assert (found["batch_per_chip"], found["count"], found["masks"]) == (32, 2, "random")
    assert (found["budget"], found["budget_assumed"]) == (0.4, False)
    assert found["macs_reduction"] == pytest.approx(0.4, abs=0.02)
    assert found["saved"]["flops"] == pytest.approx(found["macs_reduction"], abs=0.03)
    networks = found["networks"]
    assert list(networks) == ["dense", "router", "subnet", "subnets"]
    for name in ("flops", "hbm_traffic_bytes", "bound_s"):
        assert networks["subnets"][name] == networks["router"][name] + networks["subnet"][name]
        assert found["saved"][name] == 1 - networks["subnets"][name] / networks["dense"][name]
    for one in networks.values():
        assert one["images_per_second"] == pytest.approx(32 / one["bound_s"])
    for text in ("Inference per chip", "subnets, router included", "saved by subnets", "random masks"):
        assert text in out
    assert "assumed" not in out


def test_dense_inference_computes_what_the_network_costs():
    run = run_of(*TWO)
    add_subnets(run)
    steps = compile_inference(run, parse_slice("v5e:2x2"))
    dense = steps["dense"]
    # 32 filters on 8x8 pixels, 64 on 4x4, classifier; along an axis of 8, three taps meet 3 * 8 - 2 pixels.
    assert dense.flops == 2 * 32 * (22**2 * 32 + 10**2 * 32 * 64 + 64 * 10)
    assert all(step.collectives == [] for step in steps.values())
    # The images of a chip, and all weights, are read.
    assert dense.traffic > 32 * 8 * 8 * 4
    assert dense.memory < CHIPS["v5e"].memory


def test_of_both_parts_the_times_are_added_and_a_single_subnet_needs_no_router():
    where = parse_slice("v5e:2x2")
    run = run_of("--config.subnets.count=1")
    assert add_subnets(run) == 0.5
    found = inference_figures(run, {"dense": step_of("dense", 100, 8), "subnet": step_of("subnet", 50, 4)}, 0.5, where)
    assert found["budget_assumed"]
    assert list(found["networks"]) == ["dense", "subnet", "subnets"]
    assert found["saved"] == {"flops": 0.5, "hbm_traffic_bytes": 0.5, "bound_s": 0.5}
    subnets = run.models[SUBNETS].subnets
    assert found["macs_reduction"] == pytest.approx(1 - subnets.macs[0] / subnets.dense_macs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_subnets_cut_from_random_masks_meet_the_budget_with_their_router(dtype):
    run = run_of(*TWO, f"--config.model.dtype={dtype}")
    assert add_subnets(run) == 0.4
    subnets, shape = run.models[SUBNETS].subnets, run.dataset.image_shape
    extra = router_macs(make_router(2, shape, subnets.dense_macs), shape)
    assert extra > 0
    assert 1 - (subnets.macs + extra) / subnets.dense_macs == pytest.approx(np.full(2, 0.4), abs=0.02)
    assert len(subnets.assignment) == len(run.dataset.train)
    again = run_of(*TWO)
    add_subnets(again)
    assert all(np.array_equal(mask, again.models[SUBNETS].subnets.masks[name]) for name, mask in subnets.masks.items())


def test_the_subnets_of_a_workdir_are_planned_for(tmp_path):
    run = run_of(*TWO, "--config.gates.budget=0.6")
    assert add_subnets(run, tmp_path) == 0.6
    write_subnets(tmp_path, run.models[SUBNETS].subnets)
    other = run_of(*TWO)
    assert add_subnets(other, tmp_path) is None
    assert np.array_equal(other.models[SUBNETS].subnets.macs, run.models[SUBNETS].subnets.macs)
    figures = {name: step_of(name, 100, 8) for name in ("dense", "router", "subnet")}
    found = inference_figures(other, figures, None, parse_slice("v5e:2x2"))
    assert (found["masks"], found["budget"], found["budget_assumed"]) == ("subnets.safetensors", None, False)
    assert found["macs_reduction"] == pytest.approx(0.6, abs=0.02)
    for flags in (("--config.subnets.count=3",), ("--config.model.plan=(32,'M',32)",)):
        with pytest.raises(UserError, match=r"does not hold . subnets of this network"):
            add_subnets(run_of(*TWO, *flags), tmp_path)


def test_what_subnets_cannot_save_is_refused(capsys):
    error = fails(capsys, "plan", *SMALL, *TWO, "--config.gates.budget=0.999", "--topology=v5e:2x2")
    assert "no subnets have a MACs reduction of 0.999" in error


def test_inference_that_does_not_fit_names_its_own_batch(monkeypatch):
    run = run_of(*TWO)
    add_subnets(run)
    monkeypatch.setitem(CHIPS, "v5e", dataclasses.replace(CHIPS["v5e"], memory=1))
    with pytest.raises(UserError, match=r"inference \(dense\) does not fit .* --config\.eval_batch_size"):
        compile_inference(run, parse_slice("v5e:2x2"))


def test_without_subnets_nothing_is_added(capsys, tmp_path):
    out = tmp_path / "plan.json"
    assert main(["plan", *SMALL, "--config.gates.epochs=0", "--topology=v5e:2x2", f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    assert list(found["steps"]) == ["dense"]
    assert "inference" not in found
    assert "Inference" not in capsys.readouterr().out
