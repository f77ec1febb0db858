"""The launchers: from any folder, twice, with arguments; and from a bare clone."""

import json
import os
import pathlib
import shutil
import signal
import subprocess

import pytest

from tests.conftest import ROOT, TINY, read_metrics
from tests.helpers.processes import wait_until

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


# In place of the environment's Python: installs at once, and trains until it is told to stop, or ends with STATUS.
PYTHON = """#!/bin/bash
case "$*" in
    *"ftwt_jax train"*)
        if [ -n "${STATUS:-}" ]; then exit "$STATUS"; fi
        trap 'echo saved; exit 75' TERM
        touch started
        while :; do sleep 0.05; done
        ;;
esac
"""


@pytest.fixture
def checkout(tmp_path) -> pathlib.Path:
    """A copy of the launchers with an environment that only looks like one."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("status", [0, 2, 76])
def test_local_says_how_the_environment_is_entered_and_passes_the_status_on(checkout, status):
    done = launch(checkout / "launch" / "local.sh", cwd=checkout, env=os.environ | {"STATUS": str(status)})
    assert done.returncode == status
    assert f". {checkout}/.venv/bin/activate" in done.stderr
    assert not done.stdout


def test_local_told_to_stop_stops_the_training_and_waits_for_it(checkout):
    script = checkout / "launch" / "local.sh"
    process = subprocess.Popen([script], cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until((checkout / "started").exists, process)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert printed == "saved\n"


@pytest.mark.parametrize("name", ["local.sh", "tpu_pod.sh", "slurm.sbatch"])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_a_launcher_asked_for_help_prints_its_usage_and_does_nothing(tmp_path, name, flag):
    """There is nothing but the launchers, so that one that went on to set anything up would fail."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    done = launch("bash", tmp_path / "launch" / name, flag, cwd=tmp_path)
    head = [line.removeprefix("# ") for line in (ROOT / "launch" / name).read_text().splitlines()[1:]]
    printed = done.stdout.splitlines()
    assert (done.returncode, done.stderr, printed) == (0, "", head[: len(printed)])
    assert printed[1].startswith("usage: ")
    assert not any(line.startswith("#SBATCH") or line.startswith("set -") for line in printed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["launch"]


@pytest.mark.parametrize("missing", ["Python", "packages"])
def test_the_newest_part_is_skipped_with_a_line_where_it_cannot_run(checkout, missing):
    """A folder stands for the programs that are found; its python3.13 makes no environment."""
    programs = checkout / "programs"
    programs.mkdir()
    for name in ("bash", "dirname", "env", "cat", "cksum"):
        (programs / name).symlink_to(shutil.which(name))
    if missing == "packages":
        (programs / "python3.13").write_text('#!/bin/bash\ncase "$*" in *-m*) exit 1 ;; esac\n')
        (programs / "python3.13").chmod(0o755)
    done = launch(checkout / "launch" / "newest.sh", cwd=checkout, env={"PATH": str(programs), "HOME": str(checkout)})
    assert done.returncode == 0
    assert "skipped" in done.stderr.splitlines()[-1]


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
    elsewhere = [ROOT / ".ci" / "run", ROOT / "results" / "gpu.sh"]
    scripts = sorted([*folder.glob("*.sh"), *folder.glob("*.sbatch"), *elsewhere])
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT / "launch", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
