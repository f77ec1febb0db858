"""Reads a command line, `COMMAND WORD ... --FLAG=VALUE ...`; every mistake is one line."""

import difflib
import importlib
from collections.abc import Sequence

from absl import flags

from ftwt_jax import config
from ftwt_jax.commands import COMMANDS
from ftwt_jax.commands.command import Arguments, Command, Operand
from ftwt_jax.config.fields import FIELDS, KINDS, describe_fields
from ftwt_jax.errors import UserError, one_line, unknown_name

HELP = ("--help", "-help", "-h", "--helpfull")


def usage() -> str:
    """How to call the program."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(["usage: ftwt COMMAND [--FLAG=VALUE ...]", *lines, "COMMAND --help lists its flags"])


def load_command(name: str) -> Command:
    """A command by its name; raises `UserError` if there is none."""
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    return importlib.import_module(f"ftwt_jax.commands.{name}").COMMAND


def parse(name: str, arguments: list[str]) -> Arguments | None:
    """Reads a command's arguments; None if they ask for help, which is then printed.

    Raises:
      UserError: an unknown command or flag, a value that a flag cannot take, or a word too many or too few.
    """
    command = load_command(name)
    asked = [argument for argument in arguments if argument not in HELP]
    config_flags, others = config.split_flags(asked) if command.takes_config else ([], asked)
    if len(asked) < len(arguments):
        print(describe(name, command, config_flags))
        return None
    values = flags.FlagValues()
    command.define(values)
    try:
        words = tuple(values([name, *others])[1:])
    except flags.UnrecognizedFlagError as error:
        raise _unknown_flag(error.flagname, values, command) from None
    except flags.IllegalFlagValueError as error:
        raise _bad_value(error, values) from None
    except flags.Error as error:
        raise UserError(one_line(error)) from None
    for flag in values:
        value = values[flag].value
        if isinstance(value, str) and value.startswith("--"):
            raise UserError(f"--{flag} lacks its value: --{flag}=VALUE, and not {value}")
    return Arguments(values, tuple(config_flags), _operands(name, command.operand, words, values))


def _operands(name: str, operand: Operand | None, words: tuple[str, ...], values: flags.FlagValues) -> tuple[str, ...]:
    """The words of a command; where a flag says the same, either gives the other its value."""
    if operand is None:
        if words:
            raise UserError(f"{name} takes flags only; got {words[0]!r}")
        return ()
    if operand.flag:
        flag = values[operand.flag]
        if words and flag.value:
            raise UserError(f"name the {operand.name} once; got {' '.join(words)} and --{operand.flag}={flag.value}")
        if flag.value:
            words = (flag.value,)
        elif len(words) == 1:
            flag.value = words[0]
    # A flag's own command says what it is needed for.
    too_few = not (words or operand.optional) and (operand.several or not operand.flag)
    if too_few or (len(words) > 1 and not operand.several):
        wanted = f"one {operand.name}" + (" or more" if operand.several else "")
        raise UserError(f"{name} takes {wanted}, such as {operand.example}; got {' '.join(words) or 'none'}")
    return words


def describe(name: str, command: Command, config_flags: Sequence[str] = ()) -> str:
    """What `COMMAND --help` prints; with a config, its fields have the values that they have there."""
    values = flags.FlagValues()
    if command.takes_config:
        more = "" if name == "train" else "; `ftwt train --help` lists them"
        what = f"NAME, FILE.py or FILE.py:ARCH; its fields by --config.FIELD=VALUE{more}"
        flags.DEFINE_string("config", None, what, flag_values=values)
    command.define(values)
    operand = command.operand
    words = "" if operand is None else f" {operand.name.upper()}{' ...' if operand.several else ''}"
    lines = [f"{name}{words}: {COMMANDS[name]}", *(_help_of(values[flag]) for flag in sorted(values))]
    if name == "train" or config_flags:
        title = f"fields, as in {' '.join(config_flags)}" if config_flags else "fields of a config, and their defaults"
        lines += [title, describe_fields(config.read(config_flags) if config_flags else None)]
    return "\n".join(lines)


def _help_of(flag: flags.Flag) -> str:
    default = "" if flag.default in (None, False) else f" (default: {flag.default})"
    shown = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}=…"
    return f"  {shown}\n      {flag.help}{default}"


def _unknown_flag(name: str, values: flags.FlagValues, command: Command) -> UserError:
    known = [*values, *(["config"] if command.takes_config else [])]
    if command.takes_config and name in {*FIELDS, *(field.partition(".")[0] for field in FIELDS)}:
        return UserError(f"unknown flag --{name}; did you mean --config.{name}?")
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean --{near[0]}? " if near else ""
    return UserError(f"unknown flag --{name}; {hint}known: {', '.join(f'--{flag}' for flag in sorted(known))}")


def _bad_value(error: flags.IllegalFlagValueError, values: flags.FlagValues) -> UserError:
    # "flag --seconds=x: could not convert string to float: 'x'"
    name, equals, rest = one_line(error).removeprefix("flag --").partition("=")
    if not equals or name not in values:
        return UserError(one_line(error))
    flag, value = values[name], rest.partition(": ")[0]
    choices = getattr(flag.parser, "enum_values", None)
    wanted = f"one of {', '.join(choices)}" if choices else KINDS.get(flag.flag_type())
    return UserError(f"--{name} takes {wanted}; got {value!r}" if wanted else one_line(error))
