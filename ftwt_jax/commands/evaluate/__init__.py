"""The command `evaluate`: accuracy, work and gates on the held-out split; at other budgets; on corrupted images."""

from absl import flags
from rich.console import Console

from ftwt_jax.commands.command import (
    Arguments,
    Command,
    define_best,
    define_distributed,
    define_workdir,
    join_processes,
    parse_numbers,
)
from ftwt_jax.commands.evaluate.budgets import evaluate_budgets
from ftwt_jax.commands.evaluate.corruptions import evaluate_corruptions
from ftwt_jax.commands.evaluate.held_out import evaluate
from ftwt_jax.errors import UserError


def _define(values: flags.FlagValues) -> None:
    define_workdir(values)
    define_best(values)
    flags.DEFINE_string("budgets", None, "MACs reductions to bring the network to, such as 0.3,0.5", flag_values=values)
    flags.DEFINE_bool(
        "corruptions",
        False,
        "also under noise, blur, contrast, brightness and JPEG, five severities each",
        flag_values=values,
    )
    flags.DEFINE_string(
        "corruptions_from",
        None,
        "with --corruptions: images that are already corrupted, tfds:cifar10_corrupted",
        flag_values=values,
    )
    define_distributed(values)


def run(arguments: Arguments, console: Console) -> None:
    """Runs the command."""
    values, folder = arguments.flags, arguments.workdir()
    if values.corruptions_from is not None and not values.corruptions:
        raise UserError("--corruptions_from names the images that --corruptions takes: give both")
    if values.corruptions and values.budgets is not None:
        raise UserError("give --budgets or --corruptions, not both")
    budgets = None
    if values.budgets is not None:
        wanted = "MACs reductions between 0 and 1, such as 0.3,0.5,0.7"
        budgets = parse_numbers(values.budgets, "budgets", wanted, lambda budget: 0 < budget < 1)
    console = join_processes(arguments, console)
    if values.corruptions:
        evaluate_corruptions(folder, values.best, values.corruptions_from, console)
    elif budgets is not None:
        evaluate_budgets(folder, budgets, values.best, console)
    else:
        evaluate(folder, values.best, console)


COMMAND = Command(_define, run)
