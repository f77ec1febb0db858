"""Images from the devices, many steps in a call: the same training as one batch after the other from the host."""

import json

import numpy as np
import pytest

from ftwt_jax.__main__ import main
from ftwt_jax.data import resident
from ftwt_jax.parallel.sharding import put_whole
from ftwt_jax.training import feed as feeds
from ftwt_jax.training.feed import DeviceFeed, HostFeed, Pace
from ftwt_jax.training.settings import BASELINE, GATED
from ftwt_jax.training.stage import make_stage
from ftwt_jax.training.step import create_state
from tests.conftest import TINY, fails, random_like, read_metrics
from tests.helpers.ten_steps import STEPS, TEN_STEPS, R, assert_close, make, named

# Steps of each call; the last one's arrays have room for more.
CALLS = ((1,) * STEPS, (4, 6), (7, 3))
# Held-out images, budgets, and both calibrations are part of the command that is compared.
RUN = ("train", *TINY, "--config.baseline.epochs=1", "--config.gates.epochs=1", "--config.gates.budgets=(.3,.5)")


@pytest.fixture(scope="module")
def run():
    return make((*TEN_STEPS, "--config.model.plan=(4,'M',8)"))


@pytest.fixture(scope="module", params=[BASELINE, GATED])
def stage(run, request):
    return make_stage(run, request.param)


def trained(run, stage, feed, calls):
    """State and metrics of ten steps; the offset of the gates differs from step to step."""
    state = put_whole(create_state(random_like(run.abstract_variables(stage.name)), stage.optimizer), stage.shardings)
    rows, step = [], 0
    for count in calls:
        offsets = [0.01 * (step + index) for index in range(count)]
        state, found = feed.run(state, feed.inputs(step, count), R, offsets)
        rows += [{name: np.ravel(values)[:steps] for name, values in part.items()} for part, steps in found]
        step += count
    metrics = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    return metrics | named(state)


@pytest.fixture(scope="module")
def from_host(run, stage):
    return trained(run, stage, HostFeed(run, stage, 0), (1,) * STEPS)


def test_images_from_the_device_train_as_those_from_the_host_to_the_bit(run, stage, from_host):
    feed = DeviceFeed(run, stage, run.resident, most=8, in_loop=False)
    for calls in CALLS:
        found = trained(run, stage, feed, calls)
        assert found.keys() == from_host.keys()
        for name, wanted in from_host.items():
            np.testing.assert_array_equal(found[name], wanted, err_msg=name)
    assert feed._program._cache_size() == 1


@pytest.mark.usefixtures("quick_compilation")
def test_a_program_of_many_steps_trains_as_single_ones_whatever_their_number(run, stage, from_host):
    feed = DeviceFeed(run, stage, resident.put(run.dataset.train, run.mesh, shard=True), most=8, in_loop=True)
    several = [trained(run, stage, feed, calls) for calls in CALLS]
    for found in several:
        assert_close(found, from_host, 1e-5)
        for name, wanted in several[0].items():
            np.testing.assert_array_equal(found[name], wanted, err_msg=name)
    assert feed._program._cache_size() == 1


@pytest.fixture(scope="module")
def by_command(tmp_path_factory):
    """The same training with images from the host, from the device, and with three steps in a call."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in (
        ("host", ["--config.data.on_device=False"]),
        ("device", []),
        ("calls", ["--config.data.on_device=True", "--config.steps_per_call=3"]),
    ):
        assert main([*RUN, *flags, f"--workdir={folder / name}"]) == 0
    return folder


@pytest.mark.parametrize("name", ["device", "calls"])
def test_a_run_is_the_same_wherever_its_images_are(by_command, name):
    def figures(folder):
        timed = ("images_per_second", "input_wait")
        return [{key: row[key] for key in row if key not in timed} for row in read_metrics(folder)]

    assert figures(by_command / name) == figures(by_command / "host")
    assert all(0 <= row["input_wait"] <= 1 for row in read_metrics(by_command / name))
    for file in ("evaluation.json", "estimate.json", "offsets.json"):
        assert json.loads((by_command / name / file).read_text()) == json.loads(
            (by_command / "host" / file).read_text()
        )


def test_many_steps_from_the_host_are_refused(capsys, tmp_path):
    error = fails(
        capsys, *RUN, "--config.data.on_device=False", "--config.steps_per_call=4", f"--workdir={tmp_path / 'run'}"
    )
    assert "config.steps_per_call=4 needs the images on the devices" in error


@pytest.mark.parametrize(
    ("wanted", "seconds", "steps"), [(None, 0.01, [1, 2, 4, 8, 10, 10]), (None, 1, [1, 1]), (3, 0, [3, 3])]
)
def test_calls_grow_until_they_are_long_enough(monkeypatch, wanted, seconds, steps):
    now = [0.0]
    monkeypatch.setattr(feeds.time, "perf_counter", lambda: now[0])
    pace, seen = Pace(10, wanted), []
    for _ in steps:
        seen.append(pace.steps)
        now[0] += seconds
        pace.ended(pace.steps)
    assert seen == steps


def test_a_call_that_ended_early_tells_nothing(monkeypatch):
    monkeypatch.setattr(feeds.time, "perf_counter", lambda: 0.0)
    pace = Pace(8, None)
    pace.ended(1)
    assert pace.steps == 2
    pace.ended(1)
    assert pace.steps == 2
