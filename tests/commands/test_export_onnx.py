"""The command `export` to ONNX: a network that engines run without JAX."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftwt_jax.__main__ import main
from ftwt_jax.budget.trained import trained_subject
from ftwt_jax.engines.sessions import ENGINES, open_session
from ftwt_jax.gating.gates import GateControl
from tests.conftest import fails


@pytest.fixture(scope="module")
def expected(tiny_run):
    """Images uint8, and the logits of the dense and of the masked network for them."""
    subject = trained_subject(str(tiny_run[0]))
    images = np.random.default_rng(0).integers(0, 256, (5, *subject.held_out.shape[1:]), np.uint8)

    def logits(model, variables, **options):
        run = jax.jit(lambda x: model.apply(variables, subject.normalize(x), **options).logits)
        return np.asarray(run(jnp.asarray(images)))

    gated = logits(subject.gated, subject.gated_variables, control=GateControl(targets=False))
    return images, logits(subject.dense, subject.dense_variables), gated


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.max(np.abs(found - expected)) <= 1e-4 * np.max(np.abs(expected)))


@pytest.mark.parametrize("flags", [[], ["--baseline"], ["--compact", "--format=onnx"]], ids=str)
def test_engines_return_the_network_s_logits_for_any_number_of_images(capsys, tiny_run, tmp_path, expected, flags):
    images, dense, gated = expected
    file = tmp_path / "network.onnx"
    assert main(["export", f"--workdir={tiny_run[0]}", f"--out={file}", *flags]) == 0
    said = capsys.readouterr().out
    assert re.search(r", 2 convolutions, as ONNX: written to ", said), said
    for engine in ENGINES:
        run = open_session(engine, file, threads=1)
        for count in (5, 1):
            assert close(run(images[:count]), (dense if "--baseline" in flags else gated)[:count]), (engine, count)


def test_nothing_is_overwritten_and_flags_go_together(capsys, tiny_run, tmp_path, monkeypatch):
    workdir, file = f"--workdir={tiny_run[0]}", tmp_path / "network.onnx"
    assert "--layout" in fails(capsys, "export", workdir, f"--out={file}", "--layout=timm")
    assert "--baseline" in fails(capsys, "export", workdir, f"--out={file}", "--compact", "--baseline")
    assert ".onnx" in fails(capsys, "export", workdir, f"--out={tmp_path / 'a.txt'}", "--format=onnx")
    file.write_text("mine")
    assert "already exists" in fails(capsys, "export", workdir, f"--out={file}")
    assert file.read_text() == "mine"
    file.unlink()
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "pip install -e '.[onnx]'" in fails(capsys, "export", workdir, f"--out={file}")
    assert not list(tmp_path.iterdir())
