"""The command `prepare`: downloads a TFDS data set once, or sorts a folder of images by class."""

from absl import flags
from rich.console import Console

from ftwt_jax.commands.command import Arguments, Command, Operand
from ftwt_jax.data.flat_folder import sort_by_class
from ftwt_jax.data.tfds_sets import PREFIX, prepare
from ftwt_jax.errors import UserError


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("data_dir", None, "where TFDS keeps its data, if not in its usual place", flag_values=values)
    flags.DEFINE_string("annotations", None, "file with the class of each image of a folder", flag_values=values)
    flags.DEFINE_string("numbers", None, "file of the classes that numbers stand for there", flag_values=values)
    flags.DEFINE_string("out", None, "new folder for the sorted images", flag_values=values)


def run(arguments: Arguments, console: Console) -> None:
    """Runs the command."""
    kind, _, name = arguments.words[0].partition(":")
    values = arguments.flags
    sorting = {"annotations": values.annotations, "numbers": values.numbers, "out": values.out}
    if name and kind == "folder":
        sort_by_class(name, **sorting, console=console)
        return
    if f"{kind}:" != PREFIX or not name:
        raise UserError(
            f"prepare takes {PREFIX}NAME, such as {PREFIX}cifar10, or folder:PATH; other data sets need no preparation"
        )
    for flag in (flag for flag, value in sorting.items() if value is not None):
        raise UserError(f"--{flag} is for folder:PATH; {PREFIX}{name} needs none")
    prepare(name, values.data_dir, console)


COMMAND = Command(_define, run, Operand("dataset", "tfds:cifar10"))
