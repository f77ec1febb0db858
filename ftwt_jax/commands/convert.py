"""The command `convert`: a workdir from a PyTorch checkpoint."""

import contextlib
import dataclasses
import pathlib
import shlex
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from rich.console import Console

from ftwt_jax import config as configs
from ftwt_jax import workdir
from ftwt_jax.commands.command import Arguments, Command, parse_numbers
from ftwt_jax.data import absolute_paths, load_dataset
from ftwt_jax.data.build import IMAGENET_MEAN, IMAGENET_STD, for_channels
from ftwt_jax.data.source import Dataset
from ftwt_jax.errors import UserError, one_line
from ftwt_jax.files import AnyPath, as_text, folder_written_whole, list_folder, remove_folder
from ftwt_jax.gating.gates import HEAD_NAME, GateConfig, current_fields
from ftwt_jax.models import options_of
from ftwt_jax.models.mobilenet import MobileNetV1
from ftwt_jax.parallel.sharding import data_mesh
from ftwt_jax.printing import say
from ftwt_jax.training.run import BACKBONE
from ftwt_jax.training.settings import BASELINE, GATED, arch_options, check_settings, gate_config
from ftwt_jax.weights.adapt import RGB, adapt, can_adapt
from ftwt_jax.weights.conversion import Conversion
from ftwt_jax.weights.entries import Shapes, parameter_shapes
from ftwt_jax.weights.files import own_metadata, read_checkpoint
from ftwt_jax.weights.fitting import width_of
from ftwt_jax.weights.names import CIFAR as CIFAR_LAYOUTS
from ftwt_jax.weights.names import CLASSIFIERS
from ftwt_jax.weights.source import Source, read_state
from ftwt_jax.weights.state import Imported, Variables, import_state
from ftwt_jax.workdir.checkpoints import Checkpoints

Statistics = tuple[Sequence[float], Sequence[float]]

# Mean and deviation of RGB that the published code gives its networks, and timm its MobileNetV1.
CIFAR: Statistics = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
HALF: Statistics = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# The config whose data networks with so many classes were most likely trained on.
USUAL_CONFIGS = {10: "cifar10", 100: "cifar100", 1000: "imagenet"}
# Bytes on disk besides the arrays, more than enough.
SPARE = 2**20


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a conversion is asked for.

    Attributes:
      checkpoint, out: file to read, and folder to write.
      arch: the network by its name in `ftwt_jax.models`; None: the config's.
      config: of the data that the network is for; None: of those that it was most likely trained on.
      fields: flags of single fields, `--config.gates.pool=mean`; nothing in the checkpoint changes these fields.
      statistics: mean and deviation of the images that it was trained on; None: the usual ones of its layout.
      weights: which network of a checkpoint that holds several; None: the one that was trained.
      file: what `--config` named; "" if it was left out.
    """

    checkpoint: str
    out: str
    arch: str | None
    config: ConfigDict | None
    fields: tuple[str, ...] = ()
    statistics: Statistics | None = None
    weights: str | None = None
    file: str = ""

    @property
    def explicit(self) -> frozenset[str]:
        """The names of `fields`, such as "gates.pool"."""
        return frozenset(flag.partition("=")[0].removeprefix("--config.") for flag in self.fields)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("arch", None, "the network, such as resnet34", flag_values=values)
    flags.DEFINE_string("checkpoint", None, "file to read: .safetensors, or what torch.save wrote", flag_values=values)
    flags.DEFINE_string("out", None, "folder to write", flag_values=values)
    flags.DEFINE_string(
        "weights", None, "which network of a checkpoint with several, such as state_dict_ema", flag_values=values
    )
    flags.DEFINE_list("mean", None, "mean of the images it was trained on, such as 0.5,0.5,0.5", flag_values=values)
    flags.DEFINE_list("std", None, "their standard deviation", flag_values=values)


def run(arguments: Arguments, console: Console) -> None:
    """Runs the command."""
    values = arguments.flags
    checkpoint = arguments.need("checkpoint", "--checkpoint=resnet34.safetensors")
    out = arguments.need("out", "--out=workdirs/resnet34")
    config = arguments.config("--config=configs/cifar10.py") if arguments.names_config else None
    if config is None:
        arguments.need("arch", "--arch=resnet34")
    if (values.mean is None) != (values.std is None):
        raise UserError("give --mean and --std together")
    statistics = None if values.mean is None else (_rgb(values.mean, "mean"), _rgb(values.std, "std"))
    fields = tuple(flag for flag in arguments.config_flags if flag.startswith("--config."))
    files = [flag.removeprefix("--config=") for flag in arguments.config_flags if flag not in fields]
    convert(
        Wanted(checkpoint, out, values.arch, config, fields, statistics, values.weights, files[-1] if files else ""),
        console,
    )


COMMAND = Command(_define, run, takes_config=True)


def _rgb(given: list[str], flag: str) -> list[float]:
    wanted = "three numbers, such as 0.5,0.5,0.5"
    found = parse_numbers(given, flag, wanted, lambda number: flag == "mean" or number > 0)
    if len(found) != RGB:
        raise UserError(f"--{flag} takes {wanted}; got {','.join(given)!r}")
    return found


def convert(wanted: Wanted, console: Console) -> AnyPath:
    """Writes a workdir with the network of a checkpoint as its baseline, and as its gated network if it has gates.

    If a config is given, its data are loaded, and the network is fitted to their classes and channels. Otherwise they
    need not be there before they are used.

    Raises:
      UserError: the checkpoint cannot be read or is of another network, or the folder is there; nothing is written.
    """
    path, folder = workdir.absolute(wanted.checkpoint), workdir.absolute(wanted.out)
    folder = folder.resolve() if isinstance(folder, pathlib.Path) else folder
    if folder.exists() and (not folder.is_dir() or list_folder(folder)):
        raise UserError(f"{folder} already exists: choose another folder with --out")
    if wanted.config is not None:
        _check(wanted.config, wanted.arch)
    state, metadata = read_checkpoint(path)
    try:
        said = _own_words(own_metadata(metadata))
        source = read_state(state, wanted.weights)
        config, dataset = _config(wanted, source)
        imported = _imported(wanted, source, config, dataset, said)
        shapes = _shapes(imported, config, dataset)
    except UserError as error:
        found = getattr(error, "looks_like", "")
        flag = f": --arch={found}" if not wanted.file else f": --config={wanted.file.partition(':')[0]}:{found}"
        raise UserError(f"{path.name}: {error}{flag if found else ''}") from None
    with _appearing(folder) as partial:
        statistics = wanted.statistics or said.statistics or _usual_statistics(imported)
        _write(partial, config, imported, dataset, shapes, statistics, console)
    _report(wanted, folder, config, imported, console)
    return folder


def _imported(wanted: Wanted, source: Source, config: ConfigDict, dataset: Dataset | None, said: "_Said") -> Imported:
    """The network of a state dict; sets in the config what the state dict tells of it."""
    classes = dataset.num_classes if dataset else _class_count(source)
    # Heads that were trained beside another classifier are trained again with the new one.
    is_gated = source.is_gated and classes == _class_count(source)
    if is_gated:
        _set_gates(config, said.gates, wanted.explicit)
    gates = gate_config(config.gates)
    options = arch_options(config.model)
    name = options.pop("name")
    if wanted.config is None:
        if "model.stem" not in wanted.explicit:
            options.pop("stem", None)  # Read off the names.
        if "model.width" not in wanted.explicit and "width" in options_of(name):
            options["width"] = config.model.width = width_of(name, source)
    imported = import_state(name, source, classes, gates if is_gated else None, **options)
    if "stem" in options_of(name):
        config.model.stem = imported.model.stem
    if dataset and not imported.fresh_classifier:
        _check_order(list(dataset.class_names), said.class_names, dataset.order_doubt)
    return imported


def _check_order(names: list[str], kept: list[str], doubt: str) -> None:
    """Raises `UserError` if the order of the classifier's classes is another than the data's, or is not certain."""
    remedy = "set --config.data.class_order to bytes or natural, as in the data that it was trained on"
    if kept != names and sorted(kept) == sorted(names):
        raise UserError(f"its classes are those of config.data in another order: {remedy}")
    if kept != names and doubt:
        raise UserError(f"it does not tell the order of its classes: {doubt}; {remedy}")


def _shapes(imported: Imported, config: ConfigDict, dataset: Dataset | None) -> Shapes:
    """The shapes that a network must have for its data; raises `UserError` if it cannot be brought to them."""
    channels = dataset.image_shape[-1] if dataset else RGB
    shapes = parameter_shapes(imported.model, channels)
    for path, array in flatten_dict(imported.variables).items():
        if array.shape != shapes[path] and not can_adapt(path, array.shape, shapes[path]):
            raise UserError(
                f"it was made for other images than those of {config.data.name}, which have {channels} channels"
            )
    return shapes


def _report(wanted: Wanted, folder: AnyPath, config: ConfigDict, imported: Imported, console: Console) -> None:
    """Says what was found, and what can be done with it."""
    name, gates = config.model.name, imported.model.gates
    kind = "dense" if gates is None else f"gated (pool={gates.pool}, norm={gates.norm}, r={gates.r:g})"
    classes = _class_count(imported.source)
    last = ", a new classifier" if imported.fresh_classifier else f", {classes} classes"
    say(console, f"{name}, {kind}, {imported.layout.name} names{last}: written to {folder}")
    if gates is not None:
        say(console, BACKBONE)
    elif getattr(imported.model, "projection", True) is False:
        say(console, "its shortcuts, of which the file tells nothing: 2x2 pixels averaged, and zero channels behind")
    say(console, f"its data: {config.data.name}; next, to evaluate it, and to train its gates:")
    if not imported.fresh_classifier:
        say(console, shlex.join(["ftwt", "evaluate", f"--workdir={folder}"]))
    asked = [f"--config={wanted.file or f'{USUAL_CONFIGS[classes]}:{name}'}", *wanted.fields]
    usual = configs.read(asked).model
    asked += [f"--config.model.{key}={value}" for key, value in config.model.items() if value != usual[key]]
    say(
        console,
        shlex.join(["ftwt", "train", *asked, f"--config.init_from={folder}", f"--workdir={folder}-gated"]),
    )


def _check(config: ConfigDict, arch: str | None) -> None:
    """Raises `UserError` for a config that no other command would take, or that is another network's."""
    check_settings(config, data_mesh())
    if arch not in (None, config.model.name):
        raise UserError(f"--arch={arch} differs from the config's network: give --config=FILE:{arch}")


@dataclasses.dataclass(frozen=True)
class _Said:
    """What one of our own exports says of its network; each None or empty where a checkpoint says nothing."""

    gates: dict[str, Any] | None
    statistics: Statistics | None
    class_names: list[str]


def _own_words(metadata: dict[str, Any]) -> _Said:
    """Reads the metadata of an export; raises `UserError` if it is not such as we write."""
    gates, statistics = metadata.get("gates"), None
    try:
        if gates is not None:
            gates = current_fields(gates)
            GateConfig(**gates)
        if "mean" in metadata or "std" in metadata:
            mean, std = (np.asarray(metadata[name], np.float64) for name in ("mean", "std"))
            whole = mean.shape == std.shape and mean.shape in ((1,), (RGB,))
            if not (whole and np.isfinite([mean, std]).all() and std.min() > 0):
                raise UserError(f"mean {mean} and standard deviation {std} cannot be those of images")
            statistics = mean.tolist(), std.tolist()
    except (UserError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"its own metadata cannot be used: {one_line(error)}; remove it from the file") from None
    names = metadata.get("class_names")
    return _Said(gates, statistics, [as_text(str(name)) for name in names] if isinstance(names, list) else [])


def _config(wanted: Wanted, source: Source) -> tuple[ConfigDict, Dataset | None]:
    """The config of the workdir, and its data if they were asked for."""
    if wanted.config is not None:
        wanted.config.data.update(absolute_paths(wanted.config.data))
        return wanted.config, load_dataset(**wanted.config.data)
    classes = _class_count(source)
    if classes not in USUAL_CONFIGS:
        raise UserError(f"no bundled data set has {classes} classes; name yours with --config=configs/FILE.py")
    config = configs.read([f"--config={USUAL_CONFIGS[classes]}:{wanted.arch}", *wanted.fields])
    config.data.update(absolute_paths(config.data))
    _check(config, wanted.arch)
    return config, None


def _class_count(source: Source) -> int:
    for name in CLASSIFIERS:
        weight = source.arrays.get(f"{name}.weight")
        if weight is not None and weight.ndim == 2:
            return len(weight)
    raise UserError(f"it has no classifier: none of {', '.join(f'{name}.weight' for name in CLASSIFIERS)}")


def _set_gates(config: ConfigDict, said: dict[str, Any] | None, explicit: frozenset[str]) -> None:
    """Sets how the heads of a checkpoint run: as our own export says, else as in the published code."""
    gates = {"pool": "mean", "norm": "softmax", "depthwise": "full"} | (said or {})
    config.gates.update({name: value for name, value in gates.items() if f"gates.{name}" not in explicit})


def _usual_statistics(imported: Imported) -> Statistics:
    if imported.layout.name in CIFAR_LAYOUTS:
        return CIFAR
    if imported.layout.name == "timm" and isinstance(imported.model, MobileNetV1):
        return HALF
    return IMAGENET_MEAN, IMAGENET_STD


@contextlib.contextmanager
def _appearing(folder: AnyPath) -> Iterator[AnyPath]:
    """A folder to write into, which becomes `folder` once all is written; in a bucket, `folder` itself."""
    if not isinstance(folder, pathlib.Path):
        try:
            yield folder
        except BaseException:
            remove_folder(folder)
            raise
        return
    with folder_written_whole(folder) as partial:
        try:
            yield partial
        except UserError as error:
            # The name of the unfinished folder would tell the user nothing.
            raise UserError(str(error).replace(str(partial), str(folder))) from None


def _write(
    folder: AnyPath,
    config: ConfigDict,
    imported: Imported,
    dataset: Dataset | None,
    shapes: Shapes,
    statistics: Statistics,
    console: Console,
) -> None:
    """Writes config, checkpoints, and those parts of the state dict that have no place in the network."""
    variables, notes = imported.variables, list(imported.notes)
    channels = dataset.image_shape[-1] if dataset else RGB
    finished = not (imported.fresh_classifier or config.fine_tune)
    if dataset:
        variables, changes = adapt(variables, shapes)
        notes += changes
    mean, std = (list(for_channels(values, channels)) for values in statistics)
    description = {"class_names": list(dataset.class_names) if dataset else [], "mean": mean, "std": std}
    workdir.prepare(folder, config)
    networks = {BASELINE: _without_heads(variables)}
    if imported.model.gates is not None:
        networks[GATED] = variables
    if isinstance(folder, pathlib.Path):
        _check_room(folder, networks)
    for stage, network in networks.items():
        with contextlib.closing(Checkpoints(folder, stage, description, create=True)) as checkpoints:
            checkpoints.save_network(network, finished)
    Conversion.of(imported).save(folder)
    for note in notes:
        say(console, f"note: {note}")
    rounded = [", ".join(f"{value:.4g}" for value in values) for values in (mean, std)]
    say(console, f"input mean {rounded[0]}, standard deviation {rounded[1]}")


def _check_room(folder: pathlib.Path, networks: dict[str, Variables]) -> None:
    """Raises `UserError` if the disk is too full; Orbax would fail half-way, with a long message."""
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(networks)) * np.float32().itemsize
    free = shutil.disk_usage(folder).free
    if free < 2 * size + SPARE:
        raise UserError(
            f"cannot write to {folder.parent}: {free >> 20} MiB are free, and {(2 * size + SPARE) >> 20} MiB are needed"
        )


def _without_heads(variables: Variables) -> Variables:
    flat = flatten_dict(variables)
    return unflatten_dict({path: np.asarray(value) for path, value in flat.items() if HEAD_NAME not in path})
