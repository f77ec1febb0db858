"""Ctrl-C, and a reader that goes away, while the program starts: one line at most, never a traceback."""

import signal
import subprocess
import sys

import pytest

LOADING = [sys.executable, "-X", "importtime", "-m", "ftwt_jax", "train", "--config=digits", "--workdir=w"]


# Each is reported as soon as it is loaded: our first one, and one of those that answer Ctrl-C in their own way.
@pytest.mark.parametrize("after", ["ftwt_jax.ctrl_c", "numpy"])
def test_ctrl_c_while_libraries_are_loaded_is_one_line(program, after):
    process = subprocess.Popen(
        LOADING, cwd=program.cwd, env=program.environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.rpartition("|")[2].strip() == after:
            break
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    said = [line for line in errors.splitlines() if not line.startswith("import time:")]
    assert (process.returncode, printed, said) == (130, "", ["ftwt: interrupted"])


def test_in_a_program_of_someone_else_ctrl_c_is_theirs(program):
    code = "import signal, ftwt_jax; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], cwd=program.cwd, env=program.environment, check=True)


def test_a_closed_pipe_ends_the_program_quietly(program):
    process = program.start("train", "--help", bufsize=0)
    process.stdout.close()
    process.stdout = None
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 141
