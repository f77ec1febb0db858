"""The shape of the code: the method stands by itself."""

import pathlib
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# What the trainer needs and the method does not.
TRAINER = {
    "absl": "flags",
    "grain": "input",
    "ml_collections": "configs",
    "orbax.checkpoint": "checkpoints",
    "rich.progress": "the progress bar",
    "cv2": "images",
    "safetensors": "files of weights",
    "torch": "checkpoints",
    "simplejpeg": "images",
    "sklearn": "the bundled data",
    "tensorflow_datasets": "data sets",
    "tensorboardX": "event files",
    "ftwt_jax.data": "data sets",
    "ftwt_jax.training": "the trainer",
    "matplotlib": "plots",
    "jinja2": "the report",
    "ftwt_jax.commands": "the command line",
    "ftwt_jax.parallel": "processes",
}
FLOOR = ("gating", "models", "weights", "ops", "inference", "files")


def modules_after(code: str) -> set[str]:
    """Names of the modules that are loaded once `code` has run in a process of its own."""
    script = f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_method_imports_nothing_of_the_trainer():
    # Flax itself loads Orbax, and Orbax absl: only what we add to Flax and Optax counts.
    allowed = modules_after("import flax.linen, optax, jaxtyping")
    loaded = modules_after("import ftwt_jax")
    assert "ftwt_jax.gating.ranking" in loaded
    for name, purpose in TRAINER.items():
        assert name not in loaded - allowed, f"import ftwt_jax loads {name} ({purpose})"


@pytest.mark.parametrize("name", FLOOR)
def test_files_of_the_method_name_no_file_of_the_trainer(name):
    path = ROOT / "ftwt_jax" / name
    files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    for file in files:
        used = set(re.findall(r"from ftwt_jax\.(\w+)", file.read_text()))
        assert used <= {*FLOOR, "errors"}, file


def test_a_target_is_computed_in_one_place():
    users = [p for p in (ROOT / "ftwt_jax").rglob("*.py") if "topk_mass_mask(" in p.read_text()]
    assert {path.name for path in users} == {"ranking.py", "units.py"}
    sorts = [p for p in (ROOT / "ftwt_jax").rglob("*.py") if "jnp.sort" in p.read_text()]
    assert [path.name for path in sorts] == ["ranking.py"]


def test_nothing_in_the_repository_leans_on_one_machine():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [pathlib.Path(ROOT, name) for name in done.stdout.split() if not name.endswith(".npz")]
    home = str(ROOT.parent)
    for file in files:
        text = file.read_text()
        assert home in ("/", "/tmp") or f"{home}/" not in text, file
        assert file.stat().st_size < 100_000, file
