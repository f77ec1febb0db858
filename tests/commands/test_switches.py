"""JAX's own switches, which users set for all of their programs: a run works under each."""

import json

import pytest

from tests.conftest import TINY, Program, read_metrics

SHORT = (*TINY, "--config.baseline.epochs=1", "--config.gates.epochs=1")
STRICT = {"JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_DEBUG_NANS": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@pytest.mark.parametrize(
    "switches",
    [
        STRICT,
        {"JAX_ENABLE_X64": "1"},
        # Nobody can write there, not even root.
        {"XDG_CACHE_HOME": "/proc/nothing", "JAX_COMPILATION_CACHE_DIR": "/proc/nothing"},
    ],
    ids=["strict", "64 bits", "cache cannot be written"],
)
def test_a_run_works_under_each_switch(program, tmp_path, switches):
    workdir = tmp_path / "run"
    Program(program.cwd, program.environment | switches).run("train", *SHORT, f"--workdir={workdir}")
    found = json.loads((workdir / "evaluation.json").read_text())
    assert found["samples"] == 450
    assert found["macs_reduction"] == pytest.approx(found["predicted_macs_reduction"], abs=0.1)
    assert [row["stage"] for row in read_metrics(workdir)] == sorted(row["stage"] for row in read_metrics(workdir))
