"""The launchers: from any folder, twice, with arguments; and from a bare clone."""

import json
import os
import shutil
import subprocess

import pytest

from tests.conftest import ROOT, TINY, read_metrics

needs_environment = pytest.mark.skipif(
    not (ROOT / ".venv" / "bin" / "python").exists(), reason="launch/test.sh makes the environment that is used here"
)


def launch(script, *arguments, cwd, env=None):
    return subprocess.run(
        [script, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True, timeout=1200
    )


@needs_environment
def test_local_passes_arguments_on_from_any_folder_twice(program, tmp_path):
    script = ROOT / "launch" / "local.sh"
    for _ in range(2):
        done = launch(script, *TINY, "--workdir=mine", cwd=tmp_path, env=program.environment)
        assert done.returncode == 0, done.stderr
        assert "MACs reduction, exact" in done.stdout
    assert json.loads((tmp_path / "mine" / "evaluation.json").read_text())["samples"] == 450
    assert len(read_metrics(tmp_path / "mine")) == 22


@needs_environment
def test_local_hands_on_the_status_of_a_mistake(program, tmp_path):
    done = launch(
        ROOT / "launch" / "local.sh", "--workdir=mine", "--config.seeed=1", cwd=tmp_path, env=program.environment
    )
    assert done.returncode == 2
    assert "did you mean 'seed'" in done.stderr


@pytest.mark.slow
def test_a_bare_clone_sets_itself_up_and_trains(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    bare = {
        key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LANG") or key.startswith("PIP_")
    }
    for _ in range(2):
        done = launch(clone / "launch" / "local.sh", *TINY, "--workdir=mine", cwd=tmp_path, env=bare)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine" / "evaluation.json").exists()
    done = launch(clone / "launch" / "test.sh", "tests/gating/test_golden.py", cwd=tmp_path, env=bare)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    folder = ROOT / "launch"
    scripts = sorted([*folder.glob("*.sh"), *folder.glob("*.sbatch"), ROOT / ".ci" / "run"])
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT / "launch", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
