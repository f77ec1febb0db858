"""The command `prepare`: downloads a TFDS data set once, in the format that training reads."""

from absl import flags
from rich.console import Console

from ftwt_jax.commands.command import Arguments, Command, Operand
from ftwt_jax.data.tfds_sets import PREFIX, prepare
from ftwt_jax.errors import UserError


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("data_dir", None, "where TFDS keeps its data, if not in its usual place", flag_values=values)


def run(arguments: Arguments, console: Console) -> None:
    """Runs the command."""
    kind, _, name = arguments.words[0].partition(":")
    if f"{kind}:" != PREFIX or not name:
        raise UserError(f"prepare takes {PREFIX}NAME, such as {PREFIX}cifar10; other data sets need no preparation")
    prepare(name, arguments.flags.data_dir, console)


COMMAND = Command(_define, run, Operand("dataset", "tfds:cifar10"))
