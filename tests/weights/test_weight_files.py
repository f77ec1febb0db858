"""Checkpoints may come from strangers: errors take one line, and nothing in them is run or written."""

import dataclasses
import json
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from ftwt_jax.training.settings import BASELINE, GATED
from tests.conftest import ROOT, fails
from tests.helpers import torch_networks as theirs
from tests.helpers.weight_files import contents, convert, save, tensors, variables

ARCH = "--arch=resnet8"
MARKER = "it-ran"


class Harmful:
    """Unpickling it creates a file."""

    def __reduce__(self):
        return os.system, (f"touch {MARKER}",)


def cut(path: pathlib.Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def cut_network(path: pathlib.Path) -> None:
    cut(save(theirs.ResNet(), path))


def cut_old_format(path: pathlib.Path) -> None:
    torch.save(theirs.ResNet().state_dict(), path, _use_new_zipfile_serialization=False)
    cut(path)


def archive(path: pathlib.Path) -> None:
    with path.open("wb") as file:
        np.savez(file, kernel=np.ones(3))


def bare_pickle(protocol: int):
    return lambda path: path.write_bytes(pickle.dumps({"state_dict": {}, "hook": Harmful()}, protocol))


def scripted(path: pathlib.Path) -> None:
    torch.jit.script(nn.Conv2d(3, 4, 3)).save(path)


SYSTEM = f"{os.system.__module__}.system"
REFUSED = "torch.load(weights_only=True)"
BROKEN = {
    "code.pth.tar": (lambda path: torch.save({"state_dict": {}, "hook": Harmful()}, path), SYSTEM),
    "code_old_format.pth": (
        lambda path: torch.save({"hook": Harmful()}, path, _use_new_zipfile_serialization=False),
        SYSTEM,
    ),
    "code_pickled.pkl": (bare_pickle(2), SYSTEM),
    "code_pickled_now.pkl": (bare_pickle(pickle.DEFAULT_PROTOCOL), REFUSED),
    "module.pth": (lambda path: torch.save(nn.Sequential(nn.Conv2d(3, 4, 3)), path), "nn.modules.container.Sequential"),
    "module_within.pth": (lambda path: torch.save({"model": nn.Conv2d(3, 4, 3)}, path), "nn.modules.conv.Conv2d"),
    "scripted.pt": (scripted, "TorchScript"),
    "junk.pth": (lambda path: path.write_bytes(b"This is not a checkpoint."), "no file of torch.save"),
    "noise.pth": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(4096)), REFUSED),
    "empty.pth": (pathlib.Path.touch, "is empty: download or save it again"),
    "arrays.npz.pt": (archive, "no file of torch.save"),
    "cut.pth": (cut_network, "cut off: download or save it again"),
    "cut_old_format.pth": (cut_old_format, REFUSED),
    "folder.pth": (pathlib.Path.mkdir, "is a folder"),
    "missing.pth": (lambda path: None, "does not exist"),
    "list.pth": (lambda path: torch.save([torch.zeros(1)], path), "contains a list"),
    "nothing.pth": (lambda path: torch.save({"epoch": 3}, path), "it contains no tensors, only epoch"),
    "sparse.pth": (
        lambda path: torch.save({"fc.weight": torch.eye(3).to_sparse()}, path),
        "is not a dense array",
    ),
    "lines.pth": (lambda path: torch.save({"fc.weight": torch.ones(10, 64), "a\nb\x1b[2J": torch.ones(1)}, path), "a"),
    "junk.safetensors": (lambda path: path.write_bytes(b"junk" * 100), "not a complete safetensors file"),
    "empty.safetensors": (pathlib.Path.touch, "is empty: download or save it again"),
    "cut.safetensors": (cut_network, "not a complete safetensors file"),
    "folder.safetensors": (pathlib.Path.mkdir, "is a folder"),
    "missing.safetensors": (lambda path: None, "does not exist"),
}


@pytest.fixture
def torch_load(monkeypatch) -> list[dict]:
    """What `torch.load` is asked for."""
    calls = []
    load = torch.load

    def recording(*arguments, **options):
        calls.append(options)
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", recording)
    return calls


@pytest.mark.filterwarnings("ignore")  # PyTorch's, of what it is made to write here.
@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_not_a_network_is_refused_on_one_line(capsys, monkeypatch, tmp_path, torch_load, name):
    write, says = BROKEN[name]
    write(tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    error = fails(capsys, "convert", ARCH, f"--checkpoint={name}", "--out=run")
    assert name in error
    assert says in error
    assert error.rstrip("\n").isprintable()
    assert sorted(tmp_path.rglob("*")) == before
    assert all(options["weights_only"] is True for options in torch_load)


def test_a_checkpoint_is_read_only_as_weights(torch_load, tmp_path):
    convert(save(theirs.ResNet(), tmp_path / "net.pth.tar"), tmp_path / "run", ARCH)
    assert [options["weights_only"] for options in torch_load] == [True]
    for path in (ROOT / "ftwt_jax").rglob("*.py"):
        for call in re.findall(r"torch\.load\([^)]*\)", path.read_text()):
            assert "weights_only=True)" in call, path
        assert not re.search(r"\b(import|from) pickle\b|allow_pickle=True", path.read_text()), path


METADATA = [
    *("{", "[1]", "[" * 100_000),
    *({"gates": gates} for gates in ("x", {"pool": "avg"}, {"r": 7}, {"softmax": "no"}, {"min_filters": 1.5})),
    *({"mean": mean, "std": [1.0]} for mean in (None, "abc", [], [None], [float("nan")], [0.5] * 4)),
    *({"mean": [0.5], "std": std} for std in ([0], [float("inf")])),
]


@pytest.mark.parametrize("said", METADATA, ids=lambda said: str(said)[:40])
def test_what_an_exported_file_says_about_itself_is_not_trusted(capsys, tmp_path, said):
    text = said if isinstance(said, str) else json.dumps(said)
    save_file(tensors(theirs.ResNet(gated=True)), tmp_path / "net.safetensors", metadata={"ftwt_jax": text})
    error = fails(capsys, "convert", ARCH, f"--checkpoint={tmp_path}/net.safetensors", f"--out={tmp_path}/run")
    assert "net.safetensors" in error
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


def test_every_tensor_that_does_not_fit_is_named(capsys, tmp_path):
    state = theirs.ResNet().state_dict()
    del state["layer1.0.bn2.bias"], state["layer3.0.conv1.weight"]
    state |= {"extra.weight": torch.zeros(3), "bn1.weight": torch.zeros(5), "layer2.0.bn1.bias": torch.zeros(32).int()}
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "net.pth")
    error = fails(capsys, "convert", ARCH, f"--checkpoint={tmp_path}/net.pth", f"--out={tmp_path}/run")
    missing, unexpected, wrong = (error.index(word) for word in ("missing: ", "unexpected: ", "wrong: "))
    assert missing < error.index("layer1.0.bn2.bias") < error.index("layer3.0.conv1.weight") < unexpected
    assert unexpected < error.index("extra.weight") < wrong
    assert "bn1.weight is 5, not 16" in error[wrong:]
    assert "layer2.0.bn1.bias is 32 of int32, not 32" in error[wrong:]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_existing_target_is_not_changed(capsys, tmp_path, kind):
    out = tmp_path / "run"
    kept = out / "notes.txt" if kind == "folder" else out
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    checkpoint = save(theirs.ResNet(), tmp_path / "net.safetensors")
    error = fails(capsys, "convert", ARCH, f"--checkpoint={checkpoint}", f"--out={out}")
    assert "already exists: choose another folder with --out" in error
    assert contents(tmp_path).keys() == {"net.safetensors", str(kept.relative_to(tmp_path))}
    assert kept.read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "run").mkdir()
    assert_whole(convert(save(theirs.ResNet(), tmp_path / "net.safetensors"), tmp_path / "run", ARCH), [BASELINE])
    assert {path.name for path in tmp_path.iterdir()} == {"run", "net.safetensors"}


def assert_whole(workdir: pathlib.Path, stages: list[str]) -> None:
    assert {path.name for path in workdir.iterdir()} == {"config.json", "conversion.safetensors", "checkpoints"}
    for stage in stages:
        assert variables(workdir, stage)


@pytest.fixture(scope="module")
def gated(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("gated")
    save(theirs.ResNet(gated=True), folder / "net.pth")
    return save(theirs.ResNet(gated=True), folder / "net.safetensors")


def test_without_pytorch_safetensors_are_read_and_others_say_what_to_install(program, gated, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('there is no PyTorch here')\n")
    paths = os.pathsep.join([str(tmp_path), program.environment["PYTHONPATH"]])
    program = dataclasses.replace(program, environment=program.environment | {"PYTHONPATH": paths})
    program.run("convert", ARCH, f"--checkpoint={gated}", f"--out={tmp_path / 'run'}")
    assert_whole(tmp_path / "run", [BASELINE, GATED])
    old = ARCH, f"--checkpoint={gated.with_suffix('.pth')}", f"--out={tmp_path / 'other'}"
    error = program.run("convert", *old, status=2)
    assert "[convert]" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("moment", ["*", "checkpoints/baseline/0", "checkpoints/gated"])
def test_a_killed_conversion_leaves_a_complete_folder_or_none(program, gated, tmp_path, moment):
    """Killed as soon as a file appears in the folder that becomes the workdir."""
    arguments = "convert", ARCH, f"--checkpoint={gated}", f"--out={tmp_path / 'run'}"
    process = program.start(*arguments)
    deadline = time.monotonic() + 300
    while not [*tmp_path.glob(f".run.*/{moment}"), *tmp_path.glob("run")]:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if not (tmp_path / "run").exists():
        convert(gated, tmp_path / "run", ARCH)
    assert_whole(tmp_path / "run", [BASELINE, GATED])


@pytest.fixture(scope="module")
def on_small_disk(program, tmp_path_factory):
    """Runs a command where the folder `disk` has this much room, and lists its contents afterwards."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "disk").mkdir()
    # Mounted in a separate namespace, which ends with the process.
    mounting = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        'mount -t tmpfs -o size="$0" none disk && "$@"; s=$?; ls -A disk; exit $s',
    ]
    if not shutil.which("unshare") or subprocess.run([*mounting, "1m", "true"], cwd=folder, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")

    def start(size: str, *arguments: str) -> subprocess.CompletedProcess:
        command = [*mounting, size, *program.command(*arguments)]
        return subprocess.run(command, cwd=folder, env=program.environment, capture_output=True, text=True, check=False)

    return start


@pytest.mark.parametrize("size", ["200k", "450k"], ids=["baseline", "gated"])
def test_a_conversion_without_enough_disk_space_is_refused(on_small_disk, gated, size):
    done = on_small_disk(size, "convert", ARCH, f"--checkpoint={gated}", "--out=disk/run")
    assert done.returncode == 2
    assert done.stdout == "", "nothing is left there"
    said = r"ftwt: error: cannot write to .*disk: 0 MiB are free, and \d+ MiB are needed\n"
    assert re.fullmatch(said, done.stderr), done.stderr


def test_an_export_to_a_full_disk_is_refused(on_small_disk, gated, tmp_path):
    convert(gated, tmp_path / "run", ARCH)
    done = on_small_disk("100k", "export", f"--workdir={tmp_path / 'run'}", "--out=disk/net.safetensors")
    assert done.returncode == 2
    assert done.stdout == "", "nothing is left there"
    assert re.fullmatch(r"ftwt: error: cannot write .*disk/net\.safetensors: no space left on device\n", done.stderr)
