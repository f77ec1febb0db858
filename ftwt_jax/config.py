"""The fields of a config with their defaults, how a config is read, and what older ones called or lacked.

The files in `configs/` say what differs for a data set; every field is a flag, `--config.gates.r=0.8`.
"""

import importlib.util
import pathlib
import re
import traceback
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from ftwt_jax.errors import UserError, one_line, unknown_name
from ftwt_jax.gating.gates import current_fields
from ftwt_jax.models import AMBIGUOUS, is_cifar_resnet, options_of

# Where the code lies: a checkout, or the folder that packages are installed in.
REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# What fields mean in a config that was written before there were such fields.
BEFORE = {
    "accumulate": 1,
    "fine_tune": False,
    "shard_optimizer": False,
    "steps_per_call": None,
    "data": {"on_device": None, "class_order": None, "max_pixels": None},
    "gates": {"calibrate": False, "static": False, "budgets": None},
}
# Side in pixels from which images are too large for CIFAR's networks, unless these are asked for.
LARGE_IMAGES = 128
# How messages call the types of fields.
_KINDS = {"bool": "True or False", "int": "a whole number", "float": "a number", "str": "text", "tuple": "a tuple"}
_OVERRIDE = re.compile(
    r"Could not override field '(\w+)' .*?\. (.*) is of original type <class '(\w+)'> .*<class '(\w+)'>"
)
# Sections of which a config need not have every field: what is missing is left to the data set, or to the network.
_OPEN_SECTIONS = ("data", "model")


def _stage() -> dict:
    """How a stage is trained: the CIFAR recipe of the authors' code, for baseline and gates alike."""
    return {
        "epochs": 200,
        "lr": 0.1,
        # "step": times lr_factor at these epochs; "cosine": to 0 at the end.
        "schedule": "step",
        "lr_boundaries": (81, 122, 151),
        "lr_factor": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
    }


def default_config(arch: str, stem: str) -> ConfigDict:
    """A config with every field; `data.name` and `data.image_size` are left for the caller to set.

    Args:
      arch: the network by its name in `ftwt_jax.models`.
      stem: `cifar` for small images, `imagenet` for large ones; for the networks that have both.
    """
    config = ConfigDict(
        {
            "seed": 1,
            # A workdir whose baseline is taken instead of training one.
            "init_from": "",
            # Trains that baseline, or one that was converted, further: baseline.epochs more.
            "fine_tune": False,
            "data": {
                # digits, fashion_mnist, tfds:NAME or folder:PATH.
                "name": "",
                # Side in pixels of the network's input. For this and all below, None leaves the choice to the data set.
                "image_size": placeholder(int),
                # crop (small images, held in memory), resized_crop (large ones, read as needed) or none.
                "augment": placeholder(str),
                # Whether training images are mirrored at random.
                "flip": placeholder(bool),
                # Split expressions of TFDS, or the names of a folder's two parts.
                "train_split": placeholder(str),
                "test_split": placeholder(str),
                # Where TFDS, or the package of Fashion-MNIST, keeps its files.
                "data_dir": placeholder(str),
                # Share held out of a folder that is one tree of classes.
                "test_fraction": placeholder(float),
                # How a folder's classes are sorted: bytes (0, 1, 10, 2; torchvision) or natural (0, 1, 2, 10; timm).
                "class_order": placeholder(str),
                # Most pixels of an image file that are decoded at once; larger images are skipped.
                "max_pixels": placeholder(int),
                # Whether training images are kept on the devices; None: if they are in memory and fit.
                "on_device": placeholder(bool),
            },
            "model": {
                "name": arch,
                "plan": placeholder(tuple),
                "width": 1.0,
                "stem": stem if "stem" in options_of(arch) else placeholder(str),
                "dtype": "float32",
            },
            # Over all devices and processes.
            "batch_size": 128,
            "eval_batch_size": 256,
            # Parts of a batch that run one after the other, where the whole does not fit in memory.
            "accumulate": 1,
            # Shards the optimizer's state over the devices.
            "shard_optimizer": False,
            # Most steps of one call, with images on the devices; None: what takes half a second.
            "steps_per_call": placeholder(int),
            # Steps between two reports, and between two evaluations with a checkpoint.
            "log_every": 50,
            "checkpoint_every": 1000,
            "baseline": _stage(),
            "gates": {
                # Mass threshold; or, in `budget`, the wanted MACs reduction, for which r is solved.
                "r": 0.9,
                "budget": placeholder(float),
                # A study's: lowest and highest MACs reduction, such as (0.3, 0.8). Once the heads are frozen, each
                # batch is trained at a budget in between, and one network serves them all.
                "budgets": placeholder(tuple),
                "mode": "decoupled",
                # The heads: the best of results/README.md. The paper's are max, softmax, full; its code pools by mean.
                "pool": "max",
                # softmax, layer or none.
                "norm": "layer",
                "depthwise": "own",
                # The published code's own: masks after a block's addition, and 0 for the fewest filters of a target.
                "after_block": False,
                "min_filters": 1,
                **_stage(),
                "lr": 0.01,
                "head_lr": 0.1,
                # Weight lambda of the gate loss, its mean over units (the paper: sum), and the share of training after
                # which it no longer counts.
                "loss_weight": 1.0,
                "loss_reduction": "mean",
                "cooldown": 0.5,
                # Brings the work to what was predicted, or to the budget, by one offset added to all gate logits, when
                # the heads freeze and at the end.
                "calibrate": True,
                # A study's: when the gates freeze, fixed masks of the same work take their place: static pruning.
                "static": False,
            },
        }
    )
    config.lock()  # A field that is misspelt in a config file is an error there, not a new field.
    return config


def missing_fields(config: ConfigDict) -> list[str]:
    """The fields of `default_config` that a config lacks, such as "gates.r"."""
    wanted = default_config("resnet20", stem="cifar")
    missing = [name for name in wanted if name not in config]
    for section, fields in wanted.items():
        if isinstance(fields, ConfigDict) and section in config:
            there = config[section] if isinstance(config[section], ConfigDict) else {}
            names = ("name",) if section in _OPEN_SECTIONS else fields
            missing += [f"{section}.{name}" for name in names if name not in there]
    return missing


def updated(config: dict[str, Any]) -> dict[str, Any]:
    """A config as an older version wrote it, with today's fields in today's names."""
    gates, model = config.get("gates"), config.get("model")
    if isinstance(gates, dict):
        config = {**config, "gates": current_fields(gates)}
    if isinstance(model, dict) and model.get("name") in AMBIGUOUS and model.get("stem") is None:
        config = {**config, "model": {**model, "stem": "cifar"}}
    return _filled(config, BEFORE)


def _filled(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    sections = {
        key: _filled(config[key], value) for key, value in defaults.items() if isinstance(config.get(key), dict)
    }
    return {**defaults, **config, **sections}


def config_folder() -> pathlib.Path:
    """The folder of the bundled configs: beside the code in a checkout, within the package where it is installed."""
    checkout = REPOSITORY / "configs"
    return checkout if (checkout / "digits.py").exists() else pathlib.Path(__file__).parent / "configs"


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts `--config…` flags from other arguments; a value that follows after a blank is joined by "="."""
    chosen: list[str] = []
    others: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and (name == "config" or name.startswith("config.")):
            if not equals and rest:
                value = rest.pop(0)
            chosen.append(f"--{name}={value}")
        else:
            others.append(argument)
    return chosen, others


def read(arguments: Sequence[str]) -> ConfigDict:
    """Reads a config from its flags, as `split_flags` gives them.

    Args:
      arguments: `--config=NAME`, `--config=FILE` or `--config=FILE:ARCH`, and any number of `--config.FIELD=VALUE`.
        A bare NAME is a bundled config; a relative FILE is searched for in the current directory, then beside the code.

    Raises:
      UserError: no such file, network or field, a value that the field cannot take, or an error in the file.
    """
    given = [argument.removeprefix("--").partition("=") for argument in arguments]
    files = [value for name, _, value in given if name == "config"]
    if not files:
        raise UserError("--config is missing, for example --config=configs/digits.py")
    file, _, arch = files[-1].partition(":")
    config = _run_config_file(_find(file), arch)
    for name, _, text in given:
        if name == "config.gates.softmax":
            # A field of version 0.1: True left the choice to `norm`, False was what `norm=none` says today.
            if text.lower() in ("false", "0"):
                config.gates.norm = "none"
        elif name != "config":
            _set_field(config, name.split(".")[1:], name, text)
    _check_small(config)
    return config


def _check_small(config: ConfigDict) -> None:
    """Raises `UserError` if CIFAR's network is to see large images and was not asked for by its stem."""
    model, data = config.get("model"), config.get("data")
    if not (isinstance(model, ConfigDict) and isinstance(data, ConfigDict)):
        return
    name, size = str(model.get("name")), data.get("image_size") or 0
    if is_cifar_resnet(name) and model.get("stem") != "cifar" and size >= LARGE_IMAGES:
        raise UserError(
            f"{name} is one of CIFAR's networks, with 16, 32 and 64 filters, and config.data.image_size is {size}: "
            "choose resnet18, 34, 50, 101 or 152, or say with config.model.stem=cifar that it is meant"
        )


def _find(file: str) -> pathlib.Path:
    folder = config_folder()
    for place in (pathlib.Path(file), folder.parent / file, folder / f"{file}.py"):
        if place.is_file():
            return place
    raise unknown_name("config file", file, [f"configs/{path.name}" for path in sorted(folder.glob("*.py"))])


def _run_config_file(path: pathlib.Path, arch: str) -> ConfigDict:
    """What `get_config` of a config file returns; of an error in it, the message says in which line."""
    name = f"ftwt_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config: Any = module.get_config
        config = get_config(arch) if arch else get_config()
    except UserError:
        raise
    except Exception as error:
        # A config file is anybody's code: whatever it raises is told with its place.
        raise UserError(f"{_place(path, error)}: {_explained(error)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config must return a ConfigDict, not {type(config).__name__}")
    return config


def _place(path: pathlib.Path, error: Exception) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    return f"{path}, line {line}" if line else str(path)


def _explained(error: Exception) -> str:
    text = one_line(error)
    # "Could not override field 'r' (reference). 0.85 is of original type <class 'str'> and cannot be casted to type
    # <class 'float'>"
    found = _OVERRIDE.match(text) if isinstance(error, TypeError) else None
    if found:
        field, value, given, wanted = found.groups()
        return f"the field {field} takes {_KINDS.get(wanted, wanted)}; got {value!r} ({_KINDS.get(given, given)})"
    # 'Key "rr" does not exist and cannot be added since the config is locked. Other fields present: …'
    if isinstance(error, AttributeError) and "config is locked" in text:
        return f"there is no field {text.split(chr(34))[1]!r} in the config"
    return f"{type(error).__name__}: {text}"


def _set_field(config: ConfigDict, path: list[str], name: str, text: str) -> None:
    """Sets one field of a config from the text of its flag."""
    node: Any = config
    for key in path[:-1]:
        node = _child(node, key)
    field = path[-1]
    before = _child(node, field)
    if isinstance(before, ConfigDict):
        raise UserError(f"--{name} is a section: set its fields, such as --{name}.{next(iter(before))}")
    values, arguments = flags.FlagValues(), ["ftwt", f"--{name}={text}"]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
        values(arguments)
    except (flags.Error, TypeError, ValueError, SyntaxError):
        raise UserError(f"--{name} takes {_wanted(node, field)}; got {text!r}") from None


def _child(node: Any, key: str) -> Any:
    known = list(node) if isinstance(node, ConfigDict) else []
    if key not in known:
        raise unknown_name("config field", key, known)
    return node[key]


def _wanted(node: ConfigDict, field: str) -> str:
    name = node.get_type(field).__name__
    return "a number in (0, 1]" if field == "r" else _KINDS.get(name, name)
