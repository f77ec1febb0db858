"""The command `benchmark`: time saved by gates, cost of training them, or images/s of the input."""

from absl import flags
from rich.console import Console

from ftwt_jax.benchmark.inference import benchmark
from ftwt_jax.benchmark.input import benchmark_input
from ftwt_jax.benchmark.synthetic import synthetic_subject
from ftwt_jax.budget.trained import trained_subject
from ftwt_jax.commands.command import Arguments, Command, define_workdir
from ftwt_jax.errors import UserError


def _define(values: flags.FlagValues) -> None:
    define_workdir(values)
    flags.DEFINE_string("arch", None, "a network with synthetic gates, instead of a trained one", flag_values=values)
    flags.DEFINE_float("budget", None, "MACs reduction to bring the gates to; --arch needs one", flag_values=values)
    flags.DEFINE_integer(
        "image_size", None, "with --arch: side of the images, 32 or 224", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer("batch", 1, "images at once", flag_values=values)
    flags.DEFINE_bool("torch", False, "also time PyTorch's dense network", flag_values=values)
    flags.DEFINE_bool("train", False, "also time a dense and a gated training step", flag_values=values)
    flags.DEFINE_bool("input", False, "time the input of training alone; needs --config", flag_values=values)
    flags.DEFINE_float("seconds", 10.0, "with --input: how long to measure", flag_values=values)


def run(arguments: Arguments, console: Console) -> None:
    """Runs the command."""
    values = arguments.flags
    if values.input:
        if values.workdir or values.arch is not None:
            raise UserError(
                "--input times how a config's images are read, without a network: drop --workdir and --arch"
            )
        benchmark_input(arguments.config("--config=configs/imagenet.py"), values.seconds, console)
        return
    if values.arch is None and not values.workdir:
        raise UserError(
            "benchmark needs a trained network, --workdir=DIR, or --arch=vgg16_bn --budget=0.73, or --input"
        )
    if values.arch is None:
        if values.image_size is not None:
            raise UserError("--image_size belongs to --arch: a trained network has its own")
        subject = trained_subject(values.workdir, budget=values.budget)
    else:
        subject = synthetic_subject(values.arch, arguments.need("budget", "--budget=0.73"), values.image_size)
    benchmark(subject, values.batch, console, values.torch, values.train, values.workdir)


COMMAND = Command(_define, run, takes_config=True)
