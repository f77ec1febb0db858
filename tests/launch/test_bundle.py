"""launch/bundle.sh: which wheels it takes, and what it refuses."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

from tests.conftest import ROOT


def load_bundle():
    spec = importlib.util.spec_from_file_location("bundle", ROOT / "launch" / "bundle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bundle = load_bundle()


@pytest.fixture
def index(tmp_path, monkeypatch) -> pathlib.Path:
    """The only place where pip finds wheels."""
    folder = tmp_path / "index"
    folder.mkdir()
    for key, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": folder, "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(key, str(value))
    return folder


def put(index: pathlib.Path, name: str, version: str, *needs: str, tag: str = "py3-none-any") -> None:
    with zipfile.ZipFile(index / f"{name}-{version}-{tag}.whl", "w") as wheel:
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {need}" for need in needs]
        wheel.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")
        wheel.writestr(f"{name}-{version}.dist-info/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
        wheel.writestr(f"{name}-{version}.dist-info/RECORD", "")


def taken(tmp_path, asked, installed=None, python="3.12", tags=("manylinux_2_28_x86_64",)) -> set[str]:
    """Name and version of each wheel for what is asked for."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheels = bundle.Wheels(folder, installed or {}, python, list(tags))
    wheels.add(bundle.Requirement(text) for text in asked)
    return {"-".join(path.name.split("-")[:2]) for path in folder.iterdir()}


def test_the_newest_version_that_everything_allows_is_taken(tmp_path, index):
    put(index, "first", "1.0", "second", "third")
    put(index, "second", "1.0")
    put(index, "second", "2.0")
    put(index, "third", "1.0", "fourth", "second<2")
    put(index, "fourth", "3.0")
    assert taken(tmp_path, ["first"]) == {"first-1.0", "second-1.0", "third-1.0", "fourth-3.0"}


def test_what_the_target_has_is_left_out_unless_it_is_too_old(tmp_path, index):
    put(index, "first", "1.0", "second>=2", "third>=2", "fourth")
    put(index, "second", "2.5")
    assert taken(tmp_path, ["first"], {"second": "1.0", "third": "2.0", "fourth": None}) == {"first-1.0", "second-2.5"}


def test_the_target_is_described_by_pip_freeze_or_by_names_alone(tmp_path):
    lines = ["ml_dtypes==0.5.4", "torch==2.11.0+cu130", "flax", "-e git+ssh://host/a#egg=a", "b @ file:///b", "# c==1"]
    (tmp_path / "installed.txt").write_text("\n".join(lines))
    found = bundle.read_installed(str(tmp_path / "installed.txt"))
    assert found == {"ml-dtypes": "0.5.4", "torch": "2.11.0+cu130", "flax": None}


def test_extras_of_what_the_target_has_are_followed(tmp_path, index):
    put(index, "first", "1.0", "second[more]")
    put(index, "second", "1.0", "third; extra == 'more'", "fourth; extra == 'most'")
    put(index, "third", "1.0")
    assert taken(tmp_path, ["first"], {"second": "1.0"}) == {"first-1.0", "third-1.0"}


def test_markers_are_those_of_the_target(tmp_path, index):
    needs = ("old; python_version < '3.12'", "new; python_version >= '3.12'", "arm; platform_machine == 'aarch64'")
    put(index, "first", "1.0", *needs, "windows; sys_platform == 'win32'")
    for name in ("old", "new", "arm"):
        put(index, name, "1.0")
    assert taken(tmp_path, ["first"], python="3.12") == {"first-1.0", "new-1.0"}


def test_the_wheel_is_one_for_the_target(tmp_path, index):
    for tag in ("cp312-cp312-manylinux_2_17_x86_64", "cp311-cp311-manylinux_2_17_x86_64"):
        put(index, "first", "1.0", tag=tag)
    put(index, "first", "2.0", tag="cp312-cp312-manylinux_2_17_aarch64")
    assert taken(tmp_path, ["first"], tags=bundle.platform_tags(["x86_64"])) == {"first-1.0"}


def test_only_what_training_needs_is_asked_for_unless_all_is():
    def names(**options) -> set[str]:
        return {bundle.canonicalize_name(one.name) for one in bundle.requirements(**options)}

    few, everything = names(everything=False, cuda=False), names(everything=True, cuda=False)
    assert everything - few == set(bundle.OPTIONAL)
    assert {"jax", "flax", "ml-collections", "setuptools", "pytest"} <= few
    with_cuda = bundle.requirements(everything=False, cuda=True)
    assert any(one.name == "jax" and any("cuda" in extra for extra in one.extras) for one in with_cuda)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "bundle"),
        (["there", "--pyton=3.12"], "--pyton"),
        (["there", "--python=3"], "--python"),
        (["there", "--python=3.9"], "--python"),
        (["there", "--platform=linux"], "--platform"),
        (["there", "--installed=nowhere.txt"], "nowhere.txt"),
        (["there", "--installed=empty.txt"], "pip freeze"),
        (["there", "--data=nowhere"], "dataset-fashion-mnist"),
        (["full"], "there already"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, arguments, named):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bundle.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        bundle.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert named in error
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"empty.txt", "full"}


def test_the_launcher_hands_a_mistake_on(tmp_path):
    command = [ROOT / "launch" / "bundle.sh", "--python=3", "there"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("ftwt_jax: --python takes")
