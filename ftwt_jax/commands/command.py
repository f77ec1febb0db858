"""What a command is made of: its flags, the arguments that it is given, and the flags that several share."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from ftwt_jax import config
from ftwt_jax.errors import UserError
from ftwt_jax.files import AnyPath, in_bucket
from ftwt_jax.parallel.processes import is_first, join
from ftwt_jax.workdir import absolute


@dataclasses.dataclass(frozen=True)
class Operand:
    """A word that a command takes besides its flags, or several.

    Attributes:
      name: what `--help` calls it.
      example: stands in the message for one that is missing.
      flag: the flag that may be given in its place.
      optional: whether it may be left out.
    """

    name: str
    example: str
    several: bool = False
    flag: str | None = None
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What a command was given.

    Attributes:
      flags: its flags, parsed.
      config_flags: `--config=…` and `--config.FIELD=…`, unread.
      words: its operands.
    """

    flags: flags.FlagValues
    config_flags: tuple[str, ...] = ()
    words: tuple[str, ...] = ()

    def need(self, name: str, example: str) -> Any:
        """A flag's value; raises `UserError`, with an example, if it was not given."""
        value = self.flags[name].value
        if value is None or value == "":
            raise UserError(f"--{name} is missing, for example {example}")
        return value

    def workdir(self) -> str:
        """The value of `--workdir`, which must be given."""
        return self.need("workdir", "--workdir=workdirs/digits")

    @property
    def names_config(self) -> bool:
        """Whether `--config=FILE` was given."""
        return any(flag.startswith("--config=") for flag in self.config_flags)

    def config(self, example: str) -> ConfigDict:
        """The config; raises `UserError` if none was given, or it cannot be read."""
        if not self.names_config:
            raise UserError(f"--config is missing, for example {example}")
        return config.read(self.config_flags)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
      define: declares its flags.
      run: does the work, once flags are parsed.
      operand: the words that it takes besides.
      takes_config: whether `--config` and `--config.FIELD` are among its flags.
    """

    define: Callable[[flags.FlagValues], None]
    run: Callable[[Arguments, Console], Any]
    operand: Operand | None = None
    takes_config: bool = False


# The folder of a run, which may be named without its flag.
WORKDIR = Operand("dir", "workdirs/digits", flag="workdir")


def define_workdir(values: flags.FlagValues) -> None:
    """Declares `--workdir`."""
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)


def define_best(values: flags.FlagValues) -> None:
    """Declares `--best`."""
    flags.DEFINE_bool("best", False, "the checkpoint of highest accuracy, not the newest", flag_values=values)


def define_data(values: flags.FlagValues) -> None:
    """Declares `--data`."""
    flags.DEFINE_string(
        "data",
        None,
        "images to use, if not those of the run's config: folder:PATH or tfds:NAME, with the same classes",
        flag_values=values,
    )


def define_distributed(values: flags.FlagValues) -> None:
    """Declares `--distributed`."""
    flags.DEFINE_bool(
        "distributed",
        None,
        "join the other processes of this run; automatic under srun, mpirun, torchrun, JAX_COORDINATOR_ADDRESS",
        flag_values=values,
    )


def join_processes(arguments: Arguments, console: Console) -> Console:
    """Joins the other processes of a run, if there are any; the console of all but the first is silent."""
    join(arguments.flags.distributed)
    return console if is_first() else Console(quiet=True)


def file_to_write(text: str, new: bool = False) -> AnyPath:
    """The file that `--out` names, checked before any work is done for it.

    Args:
      new: whether it must not exist yet.

    Raises:
      UserError: it cannot be written there, or exists already.
    """
    path = absolute(text)
    if path.is_dir():
        raise UserError(f"--out={text} is a folder: name a file in it")
    if new and path.exists():
        raise UserError(f"{path} already exists: choose another file with --out")
    if not (in_bucket(path) or path.parent.is_dir()):
        raise UserError(f"--out={text} cannot be written: {path.parent} is not a folder")
    return path


def parse_numbers(text: str | Sequence[str], flag: str, wanted: str, check: Callable[[float], bool]) -> list[float]:
    """Reads a list such as "0.3,0.5".

    Args:
      flag, wanted: for the message: the flag's name, and what it takes, with an example.
      check: whether a number will do.

    Raises:
      UserError: the list is empty, or holds anything else.
    """
    parts = text.split(",") if isinstance(text, str) else list(text)
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if not numbers or not all(math.isfinite(number) and check(number) for number in numbers):
        raise UserError(f"--{flag} takes {wanted}; got {','.join(parts)!r}")
    return numbers
