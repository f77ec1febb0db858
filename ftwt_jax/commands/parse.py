"""Reading a command line: `COMMAND --FLAG=VALUE ...` into the flags of the command, mistakes into one line."""

import pathlib
import re
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from ftwt_jax.commands import COMMANDS
from ftwt_jax.commands.command import FIELD, define_train
from ftwt_jax.errors import UserError, one_line, unknown_name

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def usage() -> str:
    """How to call the program."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: python -m ftwt_jax COMMAND [--FLAG=VALUE ...]", *lines, "COMMAND --help lists its flags"])


def parse(name: str, arguments: list[str]) -> flags.FlagValues | None:
    """Reads a command's flags; None if they ask for help. Raises `UserError` for what is no flag of the command."""
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    if any(argument in ("--help", "-help", "-h", "--helpfull") for argument in arguments):
        values = flags.FlagValues()
        COMMANDS[name].define(values, [])
        operand = COMMANDS[name].operand
        words = "" if operand is None else f" {operand.name.upper()}{' ...' if operand.several else ''}"
        print(f"{name}{words}: {COMMANDS[name].summary}\n{values.module_help(define_train.__module__)}")
        return None
    arguments = _find_config(arguments)
    if name == "convert" and not any(argument.startswith("--config=") for argument in arguments):
        arguments = [re.sub(r"^--?config\.", f"--{FIELD}=", argument) for argument in arguments]
    overrides = [argument for argument in arguments if argument.lstrip("-").startswith("config.")]
    try:
        without = _parse(name, [argument for argument in arguments if argument not in overrides])
        if overrides and "config" in without and without.config is not None:
            _check_fields(without.config, overrides)
        return _parse(name, arguments) if overrides else without
    except flags.Error as error:
        raise UserError(one_line(error)) from None
    except UserError:
        raise
    except Exception as error:
        # The config file is anybody's code, and ml_collections lets whatever it raises through as it is.
        raise UserError(f"bad config: {type(error).__name__}: {one_line(error)}") from error


def _parse(name: str, arguments: list[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    COMMANDS[name].define(values, arguments)
    rest = values([name, *arguments])[1:]
    operand = COMMANDS[name].operand
    if operand is not None:
        if not rest or (len(rest) > 1 and not operand.several):
            wanted = f"one {operand.name}" + (" or more" if operand.several else "")
            raise UserError(f"{name} takes {wanted}, such as {operand.example}; got {' '.join(rest) or 'none'}")
        flags.DEFINE_multi_string(operand.name, rest, "", flag_values=values)
        values.mark_as_parsed()
        rest = []
    if rest:
        raise UserError(f"{name} takes flags only; got {rest[0]!r}")
    return values


def _check_fields(config: ConfigDict, overrides: list[str]) -> None:
    """Raises `UserError` for a `--config.FIELD` that the config file does not have, naming the nearest one."""
    for argument in overrides:
        node: Any = config
        for key in argument.partition("=")[0].lstrip("-").split(".")[1:]:
            known = list(node) if isinstance(node, ConfigDict) else []
            if key not in known:
                raise unknown_name("config field", key, known)
            node = node[key]


def _find_config(arguments: list[str]) -> list[str]:
    """Lets `--config=configs/digits.py` be found beside the code from any current directory.

    Flags of the config that are written with a blank come back with "=", and the config itself comes first.
    """
    found: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name = argument.lstrip("-")
        if argument.startswith("-") and (name == "config" or name.startswith("config.")) and "=" not in name and rest:
            argument = f"--{name}={rest.pop(0)}"
        flag, _, value = argument.partition("=")
        if flag.lstrip("-") == "config":
            file, colon, arch = value.partition(":")
            argument = f"--config={_config_file(file)}{colon}{arch}"
        found.append(argument)
    return sorted(found, key=lambda argument: not argument.startswith("--config="))


def _config_file(file: str) -> str:
    if pathlib.Path(file).is_file():
        return file
    if (REPOSITORY / file).is_file():
        return str(REPOSITORY / file)
    known = sorted(path.name for path in (REPOSITORY / "configs").glob("*.py"))
    raise unknown_name("config file", file, [f"configs/{name}" for name in known])
