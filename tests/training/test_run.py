"""What a workdir's networks are is said before anything is computed with them."""

import shutil

from ftwt_jax.training.settings import BASELINE, GATED
from tests.conftest import TINY, TINY_STEPS
from tests.helpers.weight_files import run, steps


def test_a_network_that_is_not_trained_to_the_end_is_named_with_its_step(capsys, tiny_run, tmp_path):
    workdir, early = shutil.copytree(tiny_run[0], tmp_path / "run"), tmp_path / "early"
    run("evaluate", f"--workdir={workdir}")
    assert capsys.readouterr().err == ""
    for stage in (BASELINE, GATED):
        shutil.rmtree(workdir / "checkpoints" / stage / str(TINY_STEPS))
        step = max(steps(workdir, stage))
        assert 0 < step < TINY_STEPS
    run("evaluate", f"--workdir={workdir}")
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"ftwt: warning: {workdir}: the {stage} network is that of step {max(steps(workdir, stage))} of {TINY_STEPS}"
        for stage in (BASELINE, GATED)
    ]
    run("export", f"--workdir={workdir}", f"--out={tmp_path}/net.safetensors")
    assert f"note: the gated network is that of step {step} of {TINY_STEPS}" in capsys.readouterr().out
    shutil.rmtree(workdir / "checkpoints" / GATED)
    asked = *TINY, "--config.gates.epochs=0", f"--config.init_from={workdir}"
    run("train", *asked, f"--workdir={early}")
    baseline = f"the baseline network is that of step {max(steps(workdir, BASELINE))} of {TINY_STEPS}"
    assert f"baseline of {workdir}: {baseline}" in capsys.readouterr().out
    # From then on it is this run's own, as finished as it was taken.
    run("evaluate", f"--workdir={early}")
    assert capsys.readouterr().err == ""
