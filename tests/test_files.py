"""Files that appear whole or not at all, and what is said when one cannot be written."""

import errno
import os
import re

import pytest

from ftwt_jax.errors import UserError, one_line, shortened
from ftwt_jax.files import written_whole

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("before", [None, "old"], ids=["new", "replaced"])
def test_a_failed_write_names_the_file_and_the_reason_and_leaves_what_was_there(tmp_path, before):
    path = tmp_path / "benchmark.json"
    if before:
        path.write_text(before)
    intact = "; the previous file is intact" if before else ""
    message = f"cannot write {path}: no space left on device{intact}"

    def write():
        with written_whole(path) as temporary:
            temporary.write_text("half of ")
            raise FULL

    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        write()
    assert [file.read_text() for file in tmp_path.iterdir()] == ([before] if before else [])


def test_a_missing_folder_is_named_with_the_file_that_the_user_knows(tmp_path):
    path = tmp_path / "gone" / "benchmark.json"
    message = f"cannot write {path}: no such file or directory"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"), written_whole(path):
        pass


def test_a_write_that_fails_for_a_reason_of_its_own_is_not_renamed(tmp_path):
    with pytest.raises(OSError, match="the compiler failed"), written_whole(tmp_path / "library.so"):
        raise OSError("the compiler failed")
    assert not list(tmp_path.iterdir())


def test_no_error_number_is_shown(tmp_path):
    with pytest.raises(OSError) as caught:  # noqa: PT011
        (tmp_path / "gone").read_text()
    assert one_line(caught.value) == f"{tmp_path / 'gone'}: no such file or directory"
    assert one_line(FULL) == "no space left on device"


def test_a_long_error_keeps_its_beginning_and_its_end():
    error = ValueError(f"cannot save: {'x' * 1000}: no space left")
    text = shortened(error, 60)
    assert text.startswith("cannot save: x")
    assert text.endswith("x: no space left")
    assert len(text) == 65
    assert shortened(ValueError("short")) == "short"
