"""The configs: each makes runs that work, and every published row is a flag away. And `benchmark --input`."""

import importlib.util
import inspect
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
import types
import uuid

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ftwt_jax.commands.parse import parse
from ftwt_jax.config import missing_fields
from ftwt_jax.data import FAMILIES, REGISTRY
from ftwt_jax.errors import UserError
from ftwt_jax.gating.gates import GateConfig
from ftwt_jax.models import create_model
from ftwt_jax.parallel.processes import cpu_count
from ftwt_jax.training import optim
from ftwt_jax.training.settings import arch_options, gate_config
from tests.conftest import ROOT, config_of, fails

pytestmark = pytest.mark.long

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
ARCHS = (None, "vgg16_bn", "resnet18", "resnet56", "mobilenet_v1", "mobilenet_v2")
CIFAR, IMAGENET = ("cifar10", 10), ("imagenet", 1000)
# Data, network, how gates are trained, and r.
PUBLISHED = [
    (CIFAR, "vgg16_bn", "joint", 0.92),
    (CIFAR, "vgg16_bn", "decoupled", 0.92),
    (CIFAR, "vgg16_bn", "decoupled", 0.85),
    (CIFAR, "vgg16_bn", "joint", 0.88),
    (CIFAR, "resnet56", "decoupled", 0.8),
    (CIFAR, "resnet56", "joint", 0.88),
    (CIFAR, "mobilenet_v1", "decoupled", 1.0),
    (CIFAR, "mobilenet_v1", "joint", 1.0),
    (IMAGENET, "resnet34", "decoupled", 0.97),
    (IMAGENET, "resnet34", "decoupled", 0.95),
    (IMAGENET, "resnet34", "decoupled", 0.93),
    (IMAGENET, "resnet34", "decoupled", 0.92),
    (IMAGENET, "resnet18", "decoupled", 0.91),
    (IMAGENET, "mobilenet_v1", "decoupled", 1.0),
]
NETWORKS = list(dict.fromkeys((data, arch) for data, arch, _, _ in PUBLISHED))

IMAGES, BROKEN = 120, "cut.jpg"
needs_proc = pytest.mark.skipif(not pathlib.Path("/proc/self/environ").exists(), reason="looks processes up in /proc")


def module(path: pathlib.Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def commands(path: pathlib.Path) -> list[list[str]]:
    """Arguments of the commands that a config's docstring shows, without the remarks beside them."""
    shown = re.findall(r"python -m ftwt_jax ([^\n`]+)", module(path).__doc__)
    return [shlex.split(line, comments=True) for line in shown]


def marked(mark: str) -> list[int]:
    """Processes that inherited a mark, whoever is their parent by now."""
    found = []
    for folder in pathlib.Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Small JPEGs in two classes, and one that is cut off."""
    root, rng = tmp_path_factory.mktemp("jpegs"), np.random.default_rng(0)
    for number in range(IMAGES):
        path = root / ("cats", "dogs")[number % 2] / f"{number:03}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(path)
    (root / "cats" / BROKEN).write_bytes((root / "cats" / "000.jpg").read_bytes()[:500])
    return root


@pytest.fixture(scope="module")
def small(folder) -> list[str]:
    """Flags for a network that trains in seconds on the folder, read image by image."""
    return [
        "--config=configs/folder.py:vgg_bn",
        "--config.model.plan=(8,)",
        "--config.model.stem=cifar",
        f"--config.data.name=folder:{folder}",
        "--config.data.image_size=16",
        "--config.batch_size=16",
        "--config.eval_batch_size=16",
        "--config.log_every=1",
    ]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_makes_a_run_for_every_network(path, arch):
    get_config = module(path).get_config
    config = get_config(arch) if arch else get_config()
    assert not missing_fields(config)
    for stage in (config.baseline, config.gates):
        optim.check_stage(stage)
        assert stage.epochs > 0
    if arch:
        assert config.model.name == arch
    # `GateConfig()` is the head of the configs: what differs is r alone.
    assert gate_config(config.gates) == GateConfig(r=config.gates.r)
    for gates in (None, gate_config(config.gates)):
        create_model(num_classes=10, gates=gates, **arch_options(config.model))


@pytest.mark.parametrize(
    ("flags", "stages"),
    [
        (["--config=imagenet:resnet152"], (3, 8, 36, 3)),
        (["--config=cifar10:resnet56"], (9, 9, 9)),
        (["--config=cifar10:resnet26"], (4, 4, 4)),
        (["--config=imagenet:resnet56", "--config.model.stem=cifar"], (9, 9, 9)),
        (["--config=folder:resnet8", "--config.data.image_size=32"], (1, 1, 1)),
        (["--config=imagenet:resnet56"], None),
        (["--config=imagenet:resnet200"], None),
        (["--config=folder:resnet20"], None),
    ],
)
def test_a_config_of_large_images_never_trains_cifars_network_unasked(flags, stages):
    if stages is None:
        with pytest.raises(UserError, match=r"one of CIFAR's networks.*config\.model\.stem=cifar"):
            config_of(flags)
    else:
        options = arch_options(config_of(flags).model)
        assert create_model(num_classes=10, **options).stage_sizes == stages


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_gives_its_data_set_only_options_that_it_has(path):
    given = {name: value for name, value in module(path).get_config().data.items() if value is not None}
    kind, colon, place = given.pop("name").partition(":")
    load = (FAMILIES if colon else REGISTRY)[kind].load
    inspect.signature(load).bind(*([place] if colon else []), **given)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_opens_with_a_command_that_trains_it(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = commands(path)
    for name, *arguments in shown:
        values = parse(name, arguments)
        if name == "train":
            file, _, arch = next(a for a in arguments if a.startswith("--config=")).partition("=")[2].partition(":")
            assert file == f"configs/{path.name}"
            assert config_of(arguments).model.name == (arch or module(path).get_config().model.name)
            assert values.flags.workdir
    assert any(name == "train" for name, *_ in shown)


@pytest.mark.parametrize(("data", "arch", "mode", "r"), PUBLISHED)
def test_every_published_row_can_be_asked_for(data, arch, mode, r):
    config = config_of(
        [f"--config=configs/{data[0]}.py:{arch}", f"--config.gates.r={r:g}", f"--config.gates.mode={mode}"]
    )
    assert config.data.name.startswith(f"tfds:{data[0]}")
    gates = gate_config(config.gates)
    assert (config.model.name, gates.mode, gates.r) == (arch, mode, r)


@pytest.mark.parametrize(("data", "arch"), NETWORKS)
def test_a_published_network_is_built_and_starts_out_as_a_published_row(data, arch):
    name, classes = data
    config = config_of([f"--config=configs/{name}.py:{arch}"])
    gates = gate_config(config.gates)
    assert (data, arch, gates.mode, gates.r) in PUBLISHED
    model = create_model(num_classes=classes, gates=gates, **arch_options(config.model))
    side = {"cifar10": 32, "imagenet": 224}[name]
    assert config.data.image_size == side
    images = jnp.zeros((1, side, side, 3))
    outputs, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert outputs.logits.shape == (1, classes)
    assert outputs.gates
    groups = jax.tree.leaves(optim.parameter_groups(variables["params"]))
    assert groups.count(optim.HEADS) >= len(outputs.gates)


def test_benchmark_tells_images_a_second_and_per_core(program, folder, small):
    printed = program.run("benchmark", "--input", "--seconds=0.5", *small)
    assert f"input of folder:{folder} at 16x16, batch 16: " in printed
    figures = r"(\d+) images/s on (\d+) cores, (\d+) per core \(median of \d+ rounds, (\d+) to (\d+)\)"
    rate, cores, per_core, low, high = map(int, re.search(figures, printed).groups())
    assert 0 < low <= rate <= high
    assert cores == cpu_count()
    assert abs(per_core - rate / cores) <= 1
    assert f"1 of {IMAGES + 1} images cannot be decoded" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "or --input"),
        (["--input"], "--config is missing"),
        (["--input", "--seconds=0", "--config=configs/digits.py"], "--seconds is how long to measure"),
        (["--input", "--seconds=-1", "--config=configs/digits.py"], "--seconds is how long to measure"),
        (["--input", "--seconds=nan", "--config=configs/digits.py"], "--seconds is how long to measure"),
        (["--input", "--seconds=x", "--config=configs/digits.py"], "--seconds takes a number; got 'x'"),
        (["--input", "--config=configs/digits.py", "--workdir=w"], "--workdir belongs to --arch or a trained network"),
        (["--input", "--config=configs/folder.py"], "config.data.name=folder:PATH must name a folder"),
        (["--input", "--config=configs/folder.py", "--config.data.name=folder:missing"], "'missing' is not a folder"),
        (
            ["--input", "--config=configs/cifar10.py", "--config.data.data_dir=data"],
            "prepare tfds:cifar10 --data_dir=",
        ),
        (["--input", "--config=configs/digits.py", "--config.batch_size=0"], "config.batch_size"),
        (["--input", "--config=configs/digits.py", "--config.seed=-1"], "config.seed"),
    ],
)
def test_benchmark_used_wrongly(capsys, monkeypatch, tmp_path, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert says in fails(capsys, "benchmark", *arguments)
    assert not list(tmp_path.iterdir())


@needs_proc
@pytest.mark.parametrize(("kind", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
@pytest.mark.parametrize(
    ("command", "sign"),
    [
        # The cut image is met while the folder is opened: what follows is the reading.
        (["benchmark", "--input", "--seconds=60"], BROKEN),
        (["train", "--config.baseline.epochs=1000", "--workdir=run"], "baseline 1/"),
    ],
    ids=["benchmark", "train"],
)
def test_an_interrupted_command_leaves_nothing_behind(program, small, tmp_path, command, sign, kind, status):
    """No process, whoever has adopted it, and no shared memory, which would outlive even a killed one."""
    before, mark = shared_memory(), f"FTWT_TEST_MARK={uuid.uuid4()}"
    process = subprocess.Popen(
        program.command(command[0], *small, *command[1:]),
        cwd=tmp_path,
        env=program.environment | dict([mark.split("=")]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if sign in line:
                break
        time.sleep(1)
        assert process.pid in marked(mark), "".join(said)
        process.send_signal(kind)
        rest, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == status, rest
    if kind == signal.SIGINT:
        assert rest.splitlines()[-1].startswith("ftwt: interrupted")
        assert "Traceback" not in rest
    deadline = time.monotonic() + 10
    while (left := (marked(mark), shared_memory() - before)) != ([], set()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == ([], set())


# Ctrl-C while the garbage collector calls someone back, where Python drops exceptions.
DROPPED = """
import gc, signal, time
from ftwt_jax.__main__ import hook_unraisable
hook_unraisable()
gc.callbacks.append(lambda phase, info: signal.raise_signal(signal.SIGINT) if phase == "stop" else None)
gc.collect()
gc.callbacks.clear()
print("went on", flush=True)
time.sleep(20)
print("dropped")
"""


def test_an_interrupt_that_python_drops_comes_again(program):
    done = subprocess.run(
        [sys.executable, "-c", DROPPED], cwd=program.cwd, env=program.environment, capture_output=True, text=True
    )
    assert done.stdout == "went on\n"
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
