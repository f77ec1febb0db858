"""The command `evaluate`: accuracy, work and gates on the held-out split; at other budgets; on corrupted images."""

from absl import flags
from rich.console import Console

from ftwt_jax.commands.command import (
    WORKDIR,
    Arguments,
    Command,
    define_best,
    define_data,
    define_distributed,
    define_workdir,
    file_to_write,
    join_processes,
    parse_numbers,
)
from ftwt_jax.commands.evaluate.budgets import evaluate_budgets
from ftwt_jax.commands.evaluate.corruptions import evaluate_corruptions
from ftwt_jax.commands.evaluate.held_out import evaluate_run
from ftwt_jax.errors import UserError
from ftwt_jax.training.run import load_run


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
    define_data(values)
    flags.DEFINE_string(
        "out",
        None,
        "file to write, if not evaluation.json, budgets.json or corruptions.json in the workdir; of other data, none",
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
    out = file_to_write(values.out) if values.out else None
    console = join_processes(arguments, console)
    made = load_run(folder, values.data)
    if values.corruptions:
        evaluate_corruptions(made, values.best, values.corruptions_from, console, out)
    elif budgets is not None:
        evaluate_budgets(made, budgets, values.best, console, out)
    else:
        evaluate_run(made, console, values.best, out)


COMMAND = Command(_define, run, WORKDIR)
