"""Files of weights, and helpers to check what becomes of them."""

import contextlib
import pathlib
from typing import Any

import jax
import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

from ftwt_jax.__main__ import main
from ftwt_jax.parallel.sharding import data_mesh, replicated
from ftwt_jax.training.settings import BASELINE
from ftwt_jax.workdir.checkpoints import Checkpoints
from tests.helpers import torch_networks as theirs

# That of TINY.
TINY_PLAN = (8, "M", 16)


def tiny(**options) -> theirs.VGG:
    return theirs.randomize(theirs.VGG(plan=TINY_PLAN, **options), seed=1)


def tensors(net: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in net.state_dict().items()}


def save(net: nn.Module, path: pathlib.Path) -> pathlib.Path:
    """Saves as safetensors, or as the published code does."""
    if path.suffix == ".safetensors":
        save_file(tensors(net), path)
    else:
        torch.save(theirs.published_checkpoint(net), path)
    return path


def run(command: str, *arguments: str) -> None:
    assert main([command, *map(str, arguments)]) == 0


def convert(checkpoint: pathlib.Path, out: pathlib.Path, *arguments: str) -> pathlib.Path:
    run("convert", f"--checkpoint={checkpoint}", f"--out={out}", *arguments)
    return out


def checkpoints(workdir: pathlib.Path, stage: str) -> contextlib.AbstractContextManager[Checkpoints]:
    return contextlib.closing(Checkpoints(workdir, stage, {"class_names": []}))


def steps(workdir: pathlib.Path, stage: str) -> set[int]:
    return {int(path.name) for path in (workdir / "checkpoints" / stage).iterdir() if path.name.isdigit()}


def kept(workdir: pathlib.Path) -> dict[str, Any]:
    """What the newest baseline records about its data."""
    with checkpoints(workdir, BASELINE) as saved:
        return saved.kept_dataset()


def variables(workdir: pathlib.Path, stage: str) -> Any:
    """The newest network of a stage, even if its data are missing."""
    with checkpoints(workdir, stage) as saved:
        return jax.device_get(saved.restore_network(saved.network_shapes(), replicated(data_mesh())))


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
