"""The command `plan`: a training step compiled for a TPU slice that this machine does not have."""

import dataclasses
import importlib.util
import json

import jax
import pytest

from ftwt_jax.plan.collectives import GRADIENTS, METRICS, STATISTICS
from ftwt_jax.plan.compile import compile_step, make_run_on
from ftwt_jax.plan.roofline import CHIPS, parse_slice
from ftwt_jax.training.settings import BASELINE, GATED
from tests.conftest import config_of, fails, needs_libtpu

SMALL = ("--config=configs/digits.py", "--config.model.plan=(8,'M',16)", "--config.batch_size=128")
DIGITS = ("plan", *SMALL)
pytestmark = [pytest.mark.long, needs_libtpu]


def step(topology: str, *flags: str, name: str = GATED):
    config = config_of([*SMALL, *flags])
    where = parse_slice(topology)
    return compile_step(make_run_on(config, where, num_classes=10), name, where)


@pytest.fixture(scope="module")
def small():
    """The small network's gated step on 8 chips."""
    return step("v5e:2x4")


@pytest.fixture(scope="module")
def planned(program, tmp_path_factory):
    """What the command prints, and plan.json."""
    workdir = tmp_path_factory.mktemp("plan") / "run"
    process = program.start(*DIGITS, "--topology=v5e:2x4", f"--workdir={workdir}")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err == ""
    assert [path.name for path in workdir.iterdir()] == ["plan.json"]
    return out, json.loads((workdir / "plan.json").read_text())


def test_a_plan_has_memory_work_collectives_and_a_bound_for_both_steps(planned):
    out, found = planned
    assert (found["chips"], found["batch_size"]) == (8, 128)
    assert list(found["steps"]) == ["gated", "dense"]
    for one in found["steps"].values():
        parts = ("argument", "output", "temporary", "program")
        assert one["memory_bytes"] == sum(one[f"{part}_bytes"] for part in parts)
        assert 0 < one["memory_bytes"] < found["hbm_bytes"]
        assert one["flops"] > 0
        assert 0 < one["hbm_traffic_bytes"] < one["accessed_bytes"]
        assert {group["carries"] for group in one["collectives"]} == {GRADIENTS, STATISTICS, METRICS}
        bound = one["bound"]
        assert bound["step_s"] >= max(bound["compute_s"], bound["hbm_s"])
        assert bound["images_per_second"] == pytest.approx(128 / bound["step_s"])
    gated, dense = (found["steps"][name] for name in ("gated", "dense"))
    assert gated["flops"] > dense["flops"]
    assert "not measurements" in out
    assert "warning" not in out


def test_on_larger_slices_the_batch_per_chip_stays_and_collectives_take_longer(planned):
    rows = planned[1]["steps"]["gated"]["growth"]
    assert [row["chips"] for row in rows] == [8, 16, 32, 64, 128, 256]
    assert {row["batch_size"] // row["chips"] for row in rows} == {16}
    assert len({(row["compute_s"], row["hbm_s"]) for row in rows}) == 1
    waits = [row["interconnect_s"] for row in rows]
    assert waits == sorted(waits)
    assert waits[0] < waits[-1]
    assert all(0 < row["efficiency"] < 1 for row in rows)


def test_tables_in_a_pipe_are_not_cut_off(planned):
    out = planned[0]
    assert "…" not in out
    for text in ("v5e:16x16", "images/s", "efficiency", "batch statistics", "interconnect"):
        assert text in out


def test_with_the_same_batch_per_chip_the_program_is_the_same_on_more_chips(small):
    more = step("v5e:4x4", "--config.batch_size=256")
    assert more.flops == small.flops
    assert more.memory == pytest.approx(small.memory, rel=0.1)
    assert more.traffic == pytest.approx(small.traffic, rel=0.1)
    assert more.group_collectives() == small.group_collectives()
    assert {one.devices for one in small.collectives} == {8}
    assert {one.devices for one in more.collectives} == {16}


@pytest.mark.parametrize("chip", sorted({*CHIPS} - {"v5e"}))
def test_other_chips_can_be_planned_for(chip):
    where = CHIPS[chip].shapes[1]
    found = step(f"{chip}:{where}", name=BASELINE)
    assert 0 < found.memory < CHIPS[chip].memory
    assert {one.devices for one in found.collectives} == {parse_slice(f"{chip}:{where}").size}


def test_a_step_that_does_not_fit_is_refused_with_remedies(small, monkeypatch, capsys):
    tight = dataclasses.replace(CHIPS["v5e"], memory=small.memory - 1)
    monkeypatch.setitem(CHIPS, "v5e", tight)
    error = fails(capsys, *DIGITS, "--topology=v5e:2x4")
    assert "the gated step does not fit on v5e:2x4: it needs 0.00" in error
    assert "--config.batch_size" in error
    assert "--config.accumulate" in error


def test_memory_that_the_compiler_lacks_is_stated_in_gib(capsys):
    error = fails(
        capsys,
        *(
            "plan",
            "--config=configs/folder.py:vgg_bn",
            "--config.model.plan=(128,)",
            "--config.data.name=folder:nowhere",
        ),
        *("--num_classes=5", "--config.data.image_size=1024", "--config.batch_size=128", "--topology=v5e:2x2"),
        *("--config.eval_batch_size=128", "--config.gates.epochs=0"),
    )
    assert "the dense step does not fit on v5e:2x2: it needs" in error
    assert "a chip has 15.75 GiB" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--topology is missing, for example --topology=v5e:16x16"),
        (["--topology=v5:2x4"], "unknown TPU 'v5'"),
        (["--topology=v5e:3x5"], "v5e has no slice of size 3x5; use 1x1, 2x2"),
        (["--topology=v5e:2x4", "--config.batch_size=100"], "must be a positive multiple of 8, the number of devices"),
        (["--topology=v5e:2x4", "--config.accumulate=3"], "multiple of 24: 8 devices times config.accumulate=3"),
        (["--topology=v5e:2x4", "--config.data.name=folder:nowhere"], "set --num_classes"),
        (["--topology=v5e:2x4", "--config.data.name=tfds:cifar11"], "did you mean 'cifar10"),
        (["--topology=v5e:2x4", "--config.data.name=digit"], "did you mean 'digits'"),
        (["--topology=v5e:2x4", "--num_classes=1"], "num_classes"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(capsys, arguments, says):
    assert says in fails(capsys, *DIGITS, *arguments)


def test_without_the_compiler_the_extra_is_named(capsys, monkeypatch):
    from ftwt_jax.plan.compile import find_devices

    find_devices.cache_clear()
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else there(name))
    assert "pip install -e '.[plan]'" in fails(capsys, *DIGITS, "--topology=v5e:2x4")


@pytest.mark.parametrize(
    ("config", "shape", "classes"),
    [
        ("configs/imagenet.py:resnet18", (224, 224, 3), 1000),
        ("configs/cifar100.py:resnet20", (32, 32, 3), 100),
        ("configs/fashion_mnist.py:resnet20", (32, 32, 1), 10),
        ("configs/digits.py:resnet20", (32, 32, 1), 10),
    ],
)
def test_shapes_and_classes_are_known_without_the_data(config, shape, classes):
    where = parse_slice("v5e:2x4")
    run = make_run_on(config_of([f"--config={config}"]), where)
    assert run.dataset.image_shape == shape
    assert run.dataset.num_classes == classes
    assert run.mesh.size == 8


def test_a_folder_of_images_is_described_by_the_names_in_it(tmp_path):
    for split in ("train", "val"):
        for name in ("bat", "cat", "rat"):
            (tmp_path / split / name).mkdir(parents=True)
    config = config_of(["--config=configs/folder.py:resnet18", f"--config.data.name=folder:{tmp_path}"])
    run = make_run_on(config, parse_slice("v5e:2x2"))
    assert (run.dataset.num_classes, run.dataset.image_shape) == (3, (224, 224, 3))
    assert len(jax.tree.leaves(run.abstract_variables(GATED))) > 0
    # Where there are images, an empty folder is not a class, as in training.
    for name in ("bat", "cat"):
        (tmp_path / "train" / name / "1.png").touch()
    assert make_run_on(config, parse_slice("v5e:2x2")).dataset.num_classes == 2
