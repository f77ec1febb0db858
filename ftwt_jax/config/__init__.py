"""How a config is read, from a file and from flags, and what older ones called or lacked.

`fields` declares what there is to set. The files in `configs/` say what differs for a data set; every field is a flag,
`--config.gates.r=0.8`.
"""

import difflib
import importlib.util
import pathlib
import re
import traceback
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from ftwt_jax.config.fields import FIELDS, KINDS, default_config, missing_fields, unknown_fields
from ftwt_jax.errors import UserError, one_line, unknown_name
from ftwt_jax.gating.gates import current_fields
from ftwt_jax.models import AMBIGUOUS, is_cifar_resnet

__all__ = ["config_folder", "default_config", "missing_fields", "read", "split_flags", "updated"]

# Where the code lies: a checkout, or the folder that packages are installed in.
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# What fields mean in a config that was written before there were such fields.
BEFORE = {
    "accumulate": 1,
    "fine_tune": False,
    "shard_optimizer": False,
    "steps_per_call": None,
    "data": {"on_device": None, "class_order": None, "max_pixels": None},
    "gates": {"calibrate": False, "static": False, "budgets": None, "latency": None, "latency_ms": None},
    "subnets": {"count": 0, "epochs": None, "multiple": 8, "engine": "onnxruntime", "batch_size": 1},
}
# Side in pixels from which images are too large for CIFAR's networks, unless these are asked for.
LARGE_IMAGES = 128
_BOOLEANS = ("true", "false", "1", "0")
# A flag, and not a negative number: --workdir=w
_FLAG = re.compile("--|-[a-zA-Z]")
_OVERRIDE = re.compile(
    r"Could not override field '(\w+)' .*?\. (.*) is of original type <class '(\w+)'> .*<class '(\w+)'>"
)


def updated(config: dict[str, Any]) -> dict[str, Any]:
    """A config as an older version wrote it, with today's fields in today's names."""
    gates, model = config.get("gates"), config.get("model")
    if isinstance(gates, dict):
        config = {**config, "gates": current_fields(gates)}
    if isinstance(model, dict) and model.get("name") in AMBIGUOUS and model.get("stem") is None:
        config = {**config, "model": {**model, "stem": "cifar"}}
    return _filled({"subnets": {}, **config}, BEFORE)


def _filled(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    sections = {
        key: _filled(config[key], value) for key, value in defaults.items() if isinstance(config.get(key), dict)
    }
    return {**defaults, **config, **sections}


def config_folder() -> pathlib.Path:
    """The folder of the bundled configs: beside the code in a checkout, within the package where it is installed."""
    checkout = REPOSITORY / "configs"
    return checkout if (checkout / "digits.py").exists() else pathlib.Path(__file__).parents[1] / "configs"


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts `--config…` flags from other arguments and spells all of them `--config.FIELD=VALUE`.

    A value may follow after a blank. A field that is True or False may be given by its name alone, or as
    `--noconfig.FIELD`.

    Raises:
      UserError: a flag lacks its value, or a field that is not True or False was given with "no".
    """
    chosen: list[str] = []
    others: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.lstrip("-").partition("=")
        negated = name.startswith("noconfig.")
        field = FIELDS.get(name.partition(".")[2])
        if not argument.startswith("-") or not (negated or name == "config" or name.startswith("config.")):
            others.append(argument)
            continue
        if negated:
            if equals or (field and field.type is not bool):
                raise UserError(f"--{name} is not a flag: set the field, --{name.removeprefix('no')}=VALUE")
            name, value = name.removeprefix("no"), "False"
        elif not equals and field and field.type is bool:
            value = rest.pop(0) if rest and rest[0].lower() in _BOOLEANS else "True"
        elif not equals:
            if not rest or _FLAG.match(rest[0]):
                raise UserError(f"--{name} lacks its value: --{name}=VALUE")
            value = rest.pop(0)
        chosen.append(f"--{name}={value}")
    return chosen, others


def read(arguments: Sequence[str]) -> ConfigDict:
    """Reads a config from its flags, as `split_flags` gives them.

    Args:
      arguments: `--config=NAME`, `--config=FILE` or `--config=FILE:ARCH`, and any number of `--config.FIELD=VALUE`.
        A bare NAME is a bundled config; a relative FILE is searched for in the current directory, then beside the code
        and among the bundled ones.

    Raises:
      UserError: no such file, network or field, a value that the field cannot take, or an error in the file.
    """
    given = [argument.removeprefix("--").partition("=") for argument in arguments]
    files = [value for name, _, value in given if name == "config"]
    if not files:
        raise UserError("--config is missing, for example --config=configs/digits.py")
    config = _run_config_file(*_find(files[-1]))
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


def _find(text: str) -> tuple[pathlib.Path, str]:
    """The file that FILE or FILE:ARCH names, and ARCH, empty if there is none. A path may have colons of its own."""
    file, colon, arch = text.rpartition(":")
    if not colon or "/" in arch or arch.endswith(".py"):
        file, arch = text, ""
    folder = config_folder()
    for place in (pathlib.Path(file), folder.parent / file, folder / file, folder / f"{file}.py"):
        if place.is_file():
            return place, arch
    known = sorted(folder.glob("*.py"))
    bare = "/" not in file and not file.endswith(".py")
    raise unknown_name("config file", file, [path.stem if bare else f"configs/{path.name}" for path in known])


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
    for field in unknown_fields(config):
        raise UserError(f"{path}: {_no_field(field)}")
    return config


def _no_field(name: str) -> str:
    """What is said of a field that does not exist, with its section or by its own name alone."""
    known = FIELDS if "." in name else [field.rpartition(".")[2] for field in FIELDS]
    closest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {closest[0]!r}?" if closest else "; `ftwt train --help` lists them"
    return f"there is no field {name!r} in the config{hint}"


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
        return f"the field {field} takes {KINDS.get(wanted, wanted)}; got {value!r} ({KINDS.get(given, given)})"
    # 'Key "rr" does not exist and cannot be added since the config is locked. Other fields present: …'
    if isinstance(error, (AttributeError, KeyError)) and "config is locked" in text:
        return _no_field(text.split(chr(34))[1])
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
        kind = node.get_type(field).__name__
        wanted = FIELDS[".".join(path)].wanted if ".".join(path) in FIELDS else KINDS.get(kind, kind)
        raise UserError(f"--{name} takes {wanted}; got {text!r}") from None


def _child(node: Any, key: str) -> Any:
    known = list(node) if isinstance(node, ConfigDict) else []
    if key not in known:
        raise unknown_name("config field", key, known)
    return node[key]
