"""The command `export` to StableHLO: a program that runs where this package is not."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftwt_jax.budget.trained import trained_subject
from ftwt_jax.gating.gates import GateControl
from tests.conftest import ROOT, fails

# All that a user needs; the second line stands for a machine without the package.
SCRIPT = """
import sys
sys.modules["ftwt_jax"] = None
import jax
import numpy as np
from jax import export

with open(sys.argv[1], "rb") as file:
    network = export.deserialize(bytearray(file.read()))
images = np.load(sys.argv[2])
logits = jax.jit(network.call)(images)
np.save(sys.argv[3], logits)
print(network.platforms, logits.shape)
"""


@pytest.fixture(scope="module")
def expected(tiny_run):
    """Images uint8, and the masked network's logits for them."""
    subject = trained_subject(str(tiny_run[0]))
    images = np.random.default_rng(0).integers(0, 256, (5, *subject.held_out.shape[1:]), np.uint8)
    outputs = jax.jit(lambda x: subject.gated.apply(subject.gated_variables, x, control=GateControl(targets=False)))(
        subject.normalize(jnp.asarray(images))
    )
    return images, np.asarray(outputs.logits)


def run_elsewhere(tmp_path, program: str, images: np.ndarray) -> tuple[str, np.ndarray]:
    given, out = tmp_path / "images.npy", tmp_path / "logits.npy"
    np.save(given, images)
    command = [sys.executable, "-c", SCRIPT, program, given, out]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, np.load(out)


def close(logits: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.max(np.abs(logits - expected)) <= 1e-4 * np.max(np.abs(expected)))


def test_a_masked_program_runs_any_number_of_images_elsewhere(program, tiny_run, tmp_path, expected):
    images, logits = expected
    file = tmp_path / "network.stablehlo"
    said = program.run("export", f"--workdir={tiny_run[0]}", f"--out={file}")
    assert str(file) in said.replace("\n", "")
    for samples in (5, 2):
        printed, found = run_elsewhere(tmp_path, str(file), images[:samples])
        assert close(found, logits[:samples])
    assert all(platform in printed for platform in ("cpu", "cuda", "tpu"))
    # The reader that the documentation shows, as it stands there.
    (reader,) = re.findall(r"^```py\n(.*?)^```", (ROOT / "docs" / "speed.md").read_text(), re.DOTALL | re.MULTILINE)
    command = [sys.executable, "-c", f"{reader}\nprint(logits.shape)"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "(1, 10)", done.stderr


def test_a_compact_program_runs_one_image_elsewhere(program, tiny_run, tmp_path, expected):
    images, logits = expected
    file = tmp_path / "network.stablehlo"
    said = program.run("export", f"--workdir={tiny_run[0]}", f"--out={file}", "--compact", "--format=stablehlo")
    told = re.search(r"one image takes (\S+) ms, and (\S+) ms in the masked program \((\S+) and (\S+) MB\)", said)
    assert told is not None, said
    quick, plain, size, _ = map(float, told.groups())
    assert size == pytest.approx(file.stat().st_size / 1e6, rel=0.01)
    if quick != plain:
        assert ("leave out --compact" in said) == (quick > plain)
    # Random images are nothing that calibration has seen: the way back to the masked network is in the file too.
    for index in range(2):
        assert close(run_elsewhere(tmp_path, str(file), images[index : index + 1])[1], logits[index : index + 1])


def test_the_baseline_is_exported_too_and_nothing_is_overwritten(program, capsys, tiny_run, tmp_path):
    file = tmp_path / "network.stablehlo"
    program.run("export", f"--workdir={tiny_run[0]}", f"--out={file}", "--baseline")
    before = file.read_bytes()
    assert "already exists" in fails(capsys, "export", f"--workdir={tiny_run[0]}", f"--out={file}")
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_flags_that_do_not_go_together_are_refused(capsys, tiny_run, tmp_path):
    workdir, file = f"--workdir={tiny_run[0]}", tmp_path / "network.stablehlo"
    assert "--layout" in fails(capsys, "export", workdir, f"--out={file}", "--layout=timm")
    assert "--baseline" in fails(capsys, "export", workdir, f"--out={file}", "--compact", "--baseline")
    assert "--compact" in fails(capsys, "export", workdir, f"--out={tmp_path / 'a.safetensors'}", "--compact")
    assert ".stablehlo" in fails(capsys, "export", workdir, f"--out={tmp_path / 'a.txt'}", "--format=stablehlo")
