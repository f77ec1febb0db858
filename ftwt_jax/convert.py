"""The command `convert`: a workdir from a PyTorch checkpoint."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from rich.console import Console

from ftwt_jax import workdir
from ftwt_jax.checkpoints import Checkpoints
from ftwt_jax.data import absolute_paths, load_dataset
from ftwt_jax.data.build import IMAGENET_MEAN, IMAGENET_STD, for_channels
from ftwt_jax.data.source import Dataset
from ftwt_jax.errors import UserError
from ftwt_jax.gates import HEAD_NAME, GateConfig
from ftwt_jax.models import options_of
from ftwt_jax.run import BASELINE, GATED, arch_options, gate_config
from ftwt_jax.weights.adapt import adapt
from ftwt_jax.weights.conversion import Conversion
from ftwt_jax.weights.entries import parameter_shapes
from ftwt_jax.weights.files import own_metadata, read_checkpoint
from ftwt_jax.weights.source import Source, read_state
from ftwt_jax.weights.state import Imported, Variables, import_state, width_of

Statistics = tuple[Sequence[float], Sequence[float]]

# Mean and deviation of RGB that the published code gives its networks, and timm its MobileNetV1.
CIFAR: Statistics = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
HALF: Statistics = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# The config whose data networks with so many classes were most likely trained on.
USUAL_CONFIGS = {10: "cifar10", 100: "cifar100", 1000: "imagenet"}
# Modules that are the classifier in one layout or another.
CLASSIFIERS = ("fc", "classifier", "classifier.1")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a conversion is asked for.

    Attributes:
      checkpoint, out: file to read, and folder to write.
      arch: the network by its name in `ftwt_jax.models`.
      config: of the data that the network is for; None: of those that it was most likely trained on.
      usual_config: loads the config of a name in `USUAL_CONFIGS` for a network.
      statistics: mean and deviation of the pictures that it was trained on; None: the usual ones of its layout.
    """

    checkpoint: str
    out: str
    arch: str
    config: ConfigDict | None
    usual_config: Callable[[str], ConfigDict]
    statistics: Statistics | None = None


def convert(wanted: Wanted, console: Console) -> pathlib.Path:
    """Writes a workdir with the network of a checkpoint as its baseline, and as its gated network if it has gates.

    If a config is given, its data are loaded, and the network is fitted to their classes and channels. Otherwise they
    need not be there before they are used.

    Raises:
      UserError: the checkpoint cannot be read or is of another network, or the folder is there; nothing is written.
    """
    path, folder = workdir.absolute(wanted.checkpoint), workdir.absolute(wanted.out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: choose another folder with --out")
    state, metadata = read_checkpoint(path)
    said = own_metadata(path, metadata)
    try:
        source = read_state(state)
        config, dataset = _config(wanted, source)
        _set_gates(config, source, said)
        gates = gate_config(config.gates) if source.is_gated else None
        options = arch_options(config.model)
        if wanted.config is None:
            options.pop("stem", None)  # Read off the names.
            options["width"] = config.model.width = width_of(wanted.arch, source)
        classes = dataset.num_classes if dataset else _class_count(source)
        imported = import_state(options.pop("name"), state, classes, gates, **options)
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from None
    if "stem" in options_of(wanted.arch):
        config.model.stem = imported.model.stem
    with _appearing(folder) as partial:
        _write(partial, config, imported, dataset, wanted.statistics or _statistics(imported, said), console)
    kind = "gated" if source.is_gated else "dense"
    names = f"{imported.layout.name} names"
    _say(console, f"{wanted.arch}, {kind}, {names}, {_class_count(source)} classes: now in {folder}")
    _say(console, f"its data: {config.data.name}; next: evaluate, estimate, or train --config.init_from={folder}")
    return folder


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _config(wanted: Wanted, source: Source) -> tuple[ConfigDict, Dataset | None]:
    """The config of the workdir, and its data if they were asked for."""
    if wanted.config is not None:
        wanted.config.data.update(absolute_paths(wanted.config.data))
        return wanted.config, load_dataset(**wanted.config.data)
    classes = _class_count(source)
    if classes not in USUAL_CONFIGS:
        raise UserError(f"{classes} classes are of no data set known here: name the data with --config=configs/FILE.py")
    return wanted.usual_config(USUAL_CONFIGS[classes]), None


def _class_count(source: Source) -> int:
    for name in CLASSIFIERS:
        weight = source.arrays.get(f"{name}.weight")
        if weight is not None and weight.ndim == 2:
            return len(weight)
    raise UserError(f"no classifier is in it: none of {', '.join(f'{name}.weight' for name in CLASSIFIERS)}")


def _set_gates(config: ConfigDict, source: Source, said: dict[str, Any]) -> None:
    """Sets how the heads in a checkpoint are to be run: as our own export says, else as the published code does."""
    fields = {field.name for field in dataclasses.fields(GateConfig)}
    gates = said.get("gates") or {"pool": "mean"}
    if source.is_gated:
        config.gates.update({name: value for name, value in gates.items() if name in fields})


def _statistics(imported: Imported, said: dict[str, Any]) -> Statistics:
    if "mean" in said and "std" in said:
        return said["mean"], said["std"]
    if imported.layout.name == "published":
        return CIFAR
    if imported.layout.name == "timm" and type(imported.model).__name__ == "MobileNetV1":
        return HALF
    return IMAGENET_MEAN, IMAGENET_STD


@contextlib.contextmanager
def _appearing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write into, which becomes `folder` once all is written."""
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        yield partial
        partial.chmod(0o755)
        os.replace(partial, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _write(
    folder: pathlib.Path,
    config: ConfigDict,
    imported: Imported,
    dataset: Dataset | None,
    statistics: Statistics,
    console: Console,
) -> None:
    """Writes config, checkpoints and what is left over of the state dict."""
    variables, notes = imported.variables, list(imported.notes)
    channels = dataset.image_shape[-1] if dataset else 3
    shapes = parameter_shapes(imported.model, channels)
    finished = not imported.fresh_classifier
    if dataset:
        variables, changes = adapt(variables, shapes)
        notes += changes
    mean, std = (list(for_channels(values, channels)) for values in statistics)
    description = {"class_names": list(dataset.class_names) if dataset else [], "mean": mean, "std": std}
    workdir.prepare(folder, config)
    networks = {BASELINE: _without_heads(variables)} | ({GATED: variables} if imported.source.is_gated else {})
    for stage, network in networks.items():
        checkpoints = Checkpoints(folder, stage, description, create=True)
        try:
            checkpoints.save_network(network, finished)
        finally:
            checkpoints.close()
    Conversion.of(imported).save(folder)
    for note in notes:
        _say(console, f"note: {note}")
    rounded = [", ".join(f"{value:.4g}" for value in values) for values in (mean, std)]
    _say(console, f"pictures are given to it less {rounded[0]}, over {rounded[1]}")


def _without_heads(variables: Variables) -> Variables:
    flat = flatten_dict(variables)
    return unflatten_dict({path: np.asarray(value) for path, value in flat.items() if HEAD_NAME not in path})
