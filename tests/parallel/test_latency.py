"""A budget solved for a time by two processes: the first one measures, alone, and the other goes on with its result."""

import json
import sys

import pytest

from tests.conftest import TINY, Program
from tests.helpers.processes import evaluation, two_processes

pytestmark = pytest.mark.long

# Whatever the times on this machine are, some reduction is the nearest.
TIMED = """
import sys
from ftwt_jax.budget import latency
from ftwt_jax.__main__ import main
latency._ACCEPTED, latency._TRIES = float("inf"), 2
sys.exit(main(sys.argv[1:]))
"""


class Timed(Program):
    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-c", TIMED, *arguments]


def test_one_process_measures_for_both(program, tmp_path):
    flags = ["--config.gates.latency=0.9", "--config.subnets.count=2", "--config.subnets.engine=xla"]
    command = ["train", *TINY, *flags, "--config.batch_size=64", f"--workdir={tmp_path / 'run'}"]
    with two_processes(Timed(program.cwd, program.environment), *command) as started:
        printed = [process.communicate(timeout=400) for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    assert printed[0][0].count("latency: ") == 2
    assert "latency: " not in printed[1][0]
    found = evaluation(tmp_path / "run")["subnets"]
    assert found["latency"]["ms"] > 0
    assert found["latency"]["engine"] == "xla"
    estimate = json.loads((tmp_path / "run" / "estimate.json").read_text())
    assert 0 <= estimate["macs_reduction"] < 1
