"""A workdir records the environments in which its run was trained."""

import importlib.metadata
import json

import jax
import pytest

import ftwt_jax.workdir.environment as environments
from ftwt_jax.errors import UserError
from ftwt_jax.workdir import ENVIRONMENT as FILE
from ftwt_jax.workdir.environment import environment, record_environment, recorded_environments


def test_versions_and_devices_are_those_of_this_process():
    here = environment()
    assert here["jax"] == importlib.metadata.version("jax")
    assert here["devices"].startswith(f"{jax.device_count()} x ")
    assert all(here.values())


def test_training_records_it(tiny_run):
    (there,) = json.loads((tiny_run[0] / FILE).read_text())
    here = environment()
    assert {**there, "git commit": None} == {**here, "git commit": None}


def test_a_run_that_moves_records_every_move_in_order(tmp_path, monkeypatch):
    assert recorded_environments(tmp_path) == []
    for device in ("cpu", "cpu", "tpu", "tpu", "cpu"):
        monkeypatch.setattr(environments, "environment", lambda device=device: {"devices": device})
        record_environment(tmp_path)
    assert recorded_environments(tmp_path) == [{"devices": device} for device in ("cpu", "tpu", "cpu")]


@pytest.mark.parametrize("text", ["{}", "[1]", "[", ""])
def test_a_broken_file_is_named(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match=FILE):
        record_environment(tmp_path)
    assert (tmp_path / FILE).read_text() == text
