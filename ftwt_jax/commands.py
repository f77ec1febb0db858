"""The commands and their flags. Each command has flags of its own, so that a flag of another is an unknown one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from ftwt_jax.errors import UserError

# Flag that holds a field of a config that is not known yet.
FIELD = "field"


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: one line of help, its flags, what it runs once they are parsed, and whether it takes one word besides.

    That word is handed on under the name `operand`, which is also how `--help` calls it.
    """

    summary: str
    define: Callable[[flags.FlagValues, list[str]], None]
    run: Callable[[flags.FlagValues, Console], Any]
    operand: str = ""


def _define_workdir(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)


def _define_distributed(values: flags.FlagValues) -> None:
    flags.DEFINE_bool(
        "distributed",
        None,
        "join the other processes of this run; by itself under srun, mpirun and JAX_COORDINATOR_ADDRESS",
        flag_values=values,
    )


def _define_config(values: flags.FlagValues, arguments: list[str]) -> None:
    config_flags.DEFINE_config_file(
        "config",
        None,
        "configs/DATA.py or configs/DATA.py:ARCH; fields by --config.FIELD=VALUE",
        flag_values=values,
        sys_argv=["ftwt", *arguments],
    )


def _define_train(values: flags.FlagValues, arguments: list[str]) -> None:
    _define_workdir(values)
    _define_distributed(values)
    _define_config(values, arguments)


def _define_estimate(values: flags.FlagValues, arguments: list[str]) -> None:
    _define_workdir(values)
    flags.DEFINE_string("r", None, "mass thresholds to predict for, such as 0.8,0.9,1", flag_values=values)
    flags.DEFINE_float("budget", None, "MACs reduction to find r for, such as 0.5", flag_values=values)
    _define_distributed(values)


def _define_evaluate(values: flags.FlagValues, arguments: list[str]) -> None:
    _define_workdir(values)
    flags.DEFINE_bool("best", False, "the checkpoint of highest accuracy, not the newest", flag_values=values)
    _define_distributed(values)


def _define_prepare(values: flags.FlagValues, arguments: list[str]) -> None:
    flags.DEFINE_string(
        "data_dir", None, "where TFDS keeps its data, if not where it does by itself", flag_values=values
    )


def _define_benchmark(values: flags.FlagValues, arguments: list[str]) -> None:
    _define_workdir(values)
    flags.DEFINE_string("arch", None, "a network with synthetic gates, in place of a trained one", flag_values=values)
    flags.DEFINE_float("budget", None, "with --arch: the MACs reduction of its gates", flag_values=values)
    flags.DEFINE_integer(
        "image_size", None, "with --arch: side of the pictures; 32 or 224", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer("batch", 1, "pictures at once", flag_values=values)
    flags.DEFINE_bool("torch", False, "time PyTorch's dense network too", flag_values=values)
    flags.DEFINE_bool("train", False, "time a dense and a gated training step too", flag_values=values)
    _define_config(values, arguments)
    flags.DEFINE_bool("input", False, "time the input of training alone; needs --config", flag_values=values)
    flags.DEFINE_float("seconds", 10.0, "with --input: how long to measure", flag_values=values)


def _define_convert(values: flags.FlagValues, arguments: list[str]) -> None:
    flags.DEFINE_string("arch", None, "the network, such as resnet34", flag_values=values)
    flags.DEFINE_string("checkpoint", None, "file to read: .safetensors, or what torch.save wrote", flag_values=values)
    flags.DEFINE_string("out", None, "folder to write", flag_values=values)
    flags.DEFINE_list("mean", None, "mean of the pictures it was trained on, such as 0.5,0.5,0.5", flag_values=values)
    flags.DEFINE_list("std", None, "their standard deviation", flag_values=values)
    # Without --config, which is then chosen by what the checkpoint holds, its fields are kept until it is.
    flags.DEFINE_multi_string(FIELD, [], "a field of the config, as FIELD=VALUE", flag_values=values)
    _define_config(values, arguments)


def _define_export(values: flags.FlagValues, arguments: list[str]) -> None:
    _define_workdir(values)
    flags.DEFINE_string("out", None, "file to write, such as resnet34.safetensors", flag_values=values)
    flags.DEFINE_enum(
        "format",
        None,
        ["safetensors", "stablehlo"],
        "weights for PyTorch, or a program that runs without this package; by itself what --out ends in",
        flag_values=values,
    )
    flags.DEFINE_bool("compact", False, "of a program: filters left out, one picture at a time", flag_values=values)
    flags.DEFINE_string(
        "layout", None, "names: published, torchvision, huggingface or timm; if not as it came", flag_values=values
    )
    flags.DEFINE_bool("baseline", False, "the dense baseline, not the gated network", flag_values=values)
    flags.DEFINE_bool("best", False, "the checkpoint of highest accuracy, not the newest", flag_values=values)


def _define_plan(values: flags.FlagValues, arguments: list[str]) -> None:
    flags.DEFINE_string("topology", None, "the TPU slice: v4, v5e, v5p or v6e and its shape", flag_values=values)
    _define_config(values, arguments)
    flags.DEFINE_integer("num_classes", None, "of a data set that is not here", lower_bound=2, flag_values=values)
    _define_workdir(values)
    flags.DEFINE_string("out", None, "file to write, if not plan.json in --workdir", flag_values=values)


def _train(values: flags.FlagValues, console: Console) -> None:
    from ftwt_jax.train import train

    _need(values, "config", "--config=configs/digits.py")
    folder = _workdir(values)
    train(values.config, folder, _joined(values, console))


def _estimate(values: flags.FlagValues, console: Console) -> None:
    from ftwt_jax.estimate import estimate, parse_rs

    if values.r is not None and values.budget is not None:
        raise UserError("give --r or --budget, not both")
    folder, rs = _workdir(values), parse_rs(values.r) if values.r else None
    estimate(folder, rs, values.budget, _joined(values, console))


def _evaluate(values: flags.FlagValues, console: Console) -> None:
    from ftwt_jax.evaluate import evaluate

    folder = _workdir(values)
    evaluate(folder, values.best, _joined(values, console))


def _prepare(values: flags.FlagValues, console: Console) -> None:
    from ftwt_jax.data.tfds_sets import PREFIX, prepare

    kind, _, name = str(values["dataset"].value).partition(":")
    if f"{kind}:" != PREFIX or not name:
        raise UserError(f"prepare takes {PREFIX}NAME, such as {PREFIX}cifar10; other data sets need no preparation")
    prepare(name, values.data_dir, console)


def _benchmark(values: flags.FlagValues, console: Console) -> None:
    from ftwt_jax.benchmark import benchmark, synthetic_subject, trained_subject
    from ftwt_jax.input_benchmark import benchmark_input

    if values.input:
        if values.workdir or values.arch is not None:
            raise UserError("--input times what a config reads, and no network: leave --workdir and --arch out")
        benchmark_input(_need(values, "config", "--config=configs/imagenet.py"), values.seconds, console)
        return
    if values.arch is None and not values.workdir:
        raise UserError(
            "benchmark times a trained network, --workdir=DIR, or --arch=vgg16_bn --budget=0.73, or --input"
        )
    if values.arch is None:
        if values.budget is not None or values.image_size is not None:
            raise UserError("--budget and --image_size belong to --arch: a trained network brings its own")
        subject = trained_subject(values.workdir)
    else:
        subject = synthetic_subject(values.arch, _need(values, "budget", "--budget=0.73"), values.image_size)
    benchmark(subject, values.batch, console, values.torch, values.train, values.workdir)


def _convert(values: flags.FlagValues, console: Console) -> None:
    from ftwt_jax.command_line import parse
    from ftwt_jax.convert import Wanted, convert

    checkpoint = _need(values, "checkpoint", "--checkpoint=resnet34.safetensors")
    out = _need(values, "out", "--out=workdirs/resnet34")
    if values.config is None:
        _need(values, "arch", "--arch=resnet34")
    if (values.mean is None) != (values.std is None):
        raise UserError("give --mean and --std together")
    statistics = None if values.mean is None else (_rgb(values, "mean"), _rgb(values, "std"))
    fields = [f"--config.{field}" for field in values[FIELD].value or []]
    given = [*(field.removeprefix("--") for field in fields), *values]

    def usual(name: str) -> ConfigDict:
        found = parse("train", [f"--config=configs/{name}.py:{values.arch}", *fields])
        assert found is not None
        return found.config

    explicit = frozenset(name.partition("=")[0].removeprefix("config.") for name in given)
    convert(Wanted(checkpoint, out, values.arch, values.config, usual, explicit, statistics), console)


def _rgb(values: flags.FlagValues, name: str) -> list[float]:
    given: list[str] = values[name].value or []
    try:
        found = [float(part) for part in given]
    except ValueError:
        found = []
    if len(found) != 3 or not np.isfinite(found).all() or (name == "std" and min(found) <= 0):
        raise UserError(f"--{name} takes three numbers, such as 0.5,0.5,0.5; got {','.join(given)!r}")
    return found


def _export(values: flags.FlagValues, console: Console) -> None:
    from ftwt_jax.deploy import SUFFIX, export_program
    from ftwt_jax.export import export_weights

    out = _need(values, "out", "--out=resnet34.safetensors")
    if values.format == "stablehlo" or (values.format is None and out.endswith(SUFFIX)):
        if values.layout is not None:
            raise UserError("--layout names tensors, of which a program has none to see: leave it out")
        export_program(_workdir(values), out, console, values.compact, values.baseline, values.best)
        return
    if values.compact:
        raise UserError(f"--compact belongs to a program: name one with --out=FILE{SUFFIX}")
    export_weights(_workdir(values), out, console, values.layout, values.baseline, values.best)


def _plan(values: flags.FlagValues, console: Console) -> None:
    from ftwt_jax.plan import PLAN, plan
    from ftwt_jax.workdir import absolute

    topology = _need(values, "topology", "--topology=v5e:16x16")
    config = _need(values, "config", "--config=configs/imagenet.py:resnet34")
    out = absolute(values.out) if values.out else absolute(values.workdir) / PLAN if values.workdir else None
    plan(config, topology, console, values.num_classes, out)


COMMANDS = {
    "train": Command("train a baseline, then its gates; goes on by itself where it stopped", _define_train, _train),
    "estimate": Command("predict the MACs reduction from a trained baseline", _define_estimate, _estimate),
    "evaluate": Command("accuracy, work and gates on the held-out split", _define_evaluate, _evaluate),
    "plan": Command(
        "memory, collectives and the shortest step on a TPU slice that need not be there", _define_plan, _plan
    ),
    "prepare": Command(
        "download a TFDS data set, once, in the format that training reads", _define_prepare, _prepare, "dataset"
    ),
    "convert": Command("a workdir from a PyTorch checkpoint, dense or gated", _define_convert, _convert),
    "export": Command("a workdir's network as a file for PyTorch, or as a program", _define_export, _export),
    "benchmark": Command(
        "time saved by gates, cost of training them, or images/s of the input", _define_benchmark, _benchmark
    ),
}


def _need(values: flags.FlagValues, name: str, example: str) -> Any:
    value = values[name].value
    if value is None or value == "":
        raise UserError(f"--{name} is missing, for example {example}")
    return value


def _workdir(values: flags.FlagValues) -> str:
    return _need(values, "workdir", "--workdir=workdirs/digits")


def _joined(values: flags.FlagValues, console: Console) -> Console:
    """Joins the other processes of a run, if there are any; the console of all but the first is silent."""
    from ftwt_jax.distributed import is_first, join

    join(values.distributed)
    return console if is_first() else Console(quiet=True)
