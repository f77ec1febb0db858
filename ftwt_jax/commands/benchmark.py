"""The command `benchmark`: time saved by gates, cost of training them, or images/s of the input."""

import dataclasses

from absl import flags
from rich.console import Console

from ftwt_jax import workdir
from ftwt_jax.benchmark.engines import ENGINES, check_engines, time_engines
from ftwt_jax.benchmark.inference import benchmark
from ftwt_jax.benchmark.input import benchmark_input
from ftwt_jax.benchmark.subnets import synthetic_subnets
from ftwt_jax.benchmark.synthetic import synthetic_subject
from ftwt_jax.budget.trained import trained_subject
from ftwt_jax.commands.command import WORKDIR, Arguments, Command, define_data, define_workdir
from ftwt_jax.errors import UserError

# What each kind of benchmark takes.
INPUT, SYNTHETIC, TRAINED = "--input", "--arch", "a trained network"
TAKES = {
    INPUT: {"seconds", "config"},
    SYNTHETIC: {"arch", "budget", "image_size", "batch", "torch", "train", "engines", "workdir"},
    TRAINED: {"workdir", "data", "budget", "batch", "torch", "train", "engines"},
}


def _define(values: flags.FlagValues) -> None:
    define_workdir(values)
    define_data(values)
    flags.DEFINE_string("arch", None, "a network with synthetic gates, instead of a trained one", flag_values=values)
    flags.DEFINE_float("budget", None, "MACs reduction to bring the gates to; --arch needs one", flag_values=values)
    flags.DEFINE_integer(
        "image_size", None, "with --arch: side of the images, 32 or 224", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer("batch", 1, "images at once", flag_values=values)
    flags.DEFINE_bool("torch", False, "also time PyTorch's dense network", flag_values=values)
    flags.DEFINE_bool("train", False, "also time a dense and a gated training step", flag_values=values)
    flags.DEFINE_list("engines", [], f"also time networks in these engines: {', '.join(ENGINES)}", flag_values=values)
    flags.DEFINE_bool("input", False, "time the input of training alone; needs --config", flag_values=values)
    flags.DEFINE_float("seconds", 10.0, "with --input: how long to measure", flag_values=values)


def run(arguments: Arguments, console: Console) -> None:
    """Runs the command."""
    values = arguments.flags
    kind = INPUT if values.input else SYNTHETIC if values.arch is not None else TRAINED
    if kind == TRAINED and not values.workdir:
        raise UserError("benchmark needs a trained network, DIR, or --arch=vgg16_bn --budget=0.73, or --input")
    given = {name for name in set().union(*TAKES.values()) - {"config"} if values[name].value != values[name].default}
    for name in sorted((given | ({"config"} if arguments.config_flags else set())) - TAKES[kind]):
        kinds = " or ".join(one for one, takes in TAKES.items() if name in takes)
        raise UserError(f"--{name} belongs to {kinds}, and this is a benchmark of {kind}: leave it out")
    if kind == INPUT:
        benchmark_input(arguments.config("--config=configs/imagenet.py"), values.seconds, console)
        return
    # Before anything is loaded.
    check_engines(values.engines)
    if kind == TRAINED:
        subject = trained_subject(values.workdir, budget=values.budget, data=values.data)
    else:
        if values.workdir and (workdir.absolute(values.workdir) / workdir.CONFIG).exists():
            raise UserError(
                f"--arch times a network with synthetic gates, and {values.workdir} holds a run of its own: leave out "
                "--arch to time that, or name another folder"
            )
        subject = synthetic_subject(values.arch, arguments.need("budget", "--budget=0.73"), values.image_size)
    result = benchmark(subject, values.batch, console, values.torch, values.train, values.workdir)
    if values.engines:
        if kind == SYNTHETIC:
            subject = dataclasses.replace(subject, subnets=synthetic_subnets(subject, values.budget))
        result["engines"] = time_engines(subject, result["macs_reduction"], values.engines, console)
        if values.workdir:
            workdir.write_json(workdir.absolute(values.workdir) / workdir.BENCHMARK, result)


COMMAND = Command(_define, run, WORKDIR, takes_config=True)
