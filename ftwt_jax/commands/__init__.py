"""The commands. Each has flags of its own, so that a flag of another is an unknown one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from ftwt_jax.commands import command as flags_of
from ftwt_jax.commands.command import FIELD
from ftwt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Operand:
    """A word that a command takes besides its flags, or several; handed on under `name` as a list.

    `name` is also how `--help` calls it; `example` stands in the message for one that is missing.
    """

    name: str
    example: str
    several: bool = False


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: one line of help, its flags, what it runs once they are parsed, and which words it takes besides."""

    summary: str
    define: Callable[[flags.FlagValues, list[str]], None]
    run: Callable[[flags.FlagValues, Console], Any]
    operand: Operand | None = None


def _train(values: flags.FlagValues, console: Console) -> None:
    from ftwt_jax.training.loop import train

    _need(values, "config", "--config=configs/digits.py")
    folder = _workdir(values)
    train(values.config, folder, _joined(values, console))


def _estimate(values: flags.FlagValues, console: Console) -> None:
    from ftwt_jax.commands.estimate import estimate, parse_rs

    if values.r is not None and values.budget is not None:
        raise UserError("give --r or --budget, not both")
    folder, rs = _workdir(values), parse_rs(values.r) if values.r else None
    estimate(folder, rs, values.budget, _joined(values, console))


def _evaluate(values: flags.FlagValues, console: Console) -> None:
    from ftwt_jax.commands.evaluate.budgets import evaluate_budgets, parse_budgets
    from ftwt_jax.commands.evaluate.corruptions import evaluate_corruptions
    from ftwt_jax.commands.evaluate.held_out import evaluate

    folder = _workdir(values)
    if values.corruptions_from is not None and not values.corruptions:
        raise UserError("--corruptions_from says which images --corruptions is to take: give both")
    if values.corruptions and values.budgets is not None:
        raise UserError("give --budgets or --corruptions, not both")
    if values.corruptions:
        evaluate_corruptions(folder, values.best, values.corruptions_from, _joined(values, console))
        return
    if values.budgets is not None:
        evaluate_budgets(folder, parse_budgets(values.budgets), values.best, _joined(values, console))
        return
    evaluate(folder, values.best, _joined(values, console))


def _prepare(values: flags.FlagValues, console: Console) -> None:
    from ftwt_jax.data.tfds_sets import PREFIX, prepare

    kind, _, name = _words(values, "dataset")[0].partition(":")
    if f"{kind}:" != PREFIX or not name:
        raise UserError(f"prepare takes {PREFIX}NAME, such as {PREFIX}cifar10; other data sets need no preparation")
    prepare(name, values.data_dir, console)


def _benchmark(values: flags.FlagValues, console: Console) -> None:
    from ftwt_jax.benchmark.inference import benchmark, synthetic_subject, trained_subject
    from ftwt_jax.benchmark.input import benchmark_input

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
        if values.image_size is not None:
            raise UserError("--image_size belongs to --arch: a trained network brings its own")
        subject = trained_subject(values.workdir, budget=values.budget)
    else:
        subject = synthetic_subject(values.arch, _need(values, "budget", "--budget=0.73"), values.image_size)
    benchmark(subject, values.batch, console, values.torch, values.train, values.workdir)


def _convert(values: flags.FlagValues, console: Console) -> None:
    from ftwt_jax.commands.convert import Wanted, convert
    from ftwt_jax.commands.parse import parse

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
    from ftwt_jax.commands.export.program import SUFFIX, export_program
    from ftwt_jax.commands.export.weights import export_weights

    out = _need(values, "out", "--out=resnet34.safetensors")
    if values.format == "stablehlo" or (values.format is None and out.endswith(SUFFIX)):
        if values.layout is not None:
            raise UserError("--layout names tensors, of which a program has none to see: leave it out")
        export_program(_workdir(values), out, console, values.compact, values.baseline, values.best, values.budget)
        return
    if values.budget is not None:
        raise UserError(f"--budget belongs to a program: name one with --out=FILE{SUFFIX}")
    if values.compact:
        raise UserError(f"--compact belongs to a program: name one with --out=FILE{SUFFIX}")
    export_weights(_workdir(values), out, console, values.layout, values.baseline, values.best)


def _plan(values: flags.FlagValues, console: Console) -> None:
    from ftwt_jax.plan.compile import PLAN, plan
    from ftwt_jax.workdir import absolute

    topology = _need(values, "topology", "--topology=v5e:16x16")
    config = _need(values, "config", "--config=configs/imagenet.py:resnet34")
    out = absolute(values.out) if values.out else absolute(values.workdir) / PLAN if values.workdir else None
    plan(config, topology, console, values.num_classes, out)


def _report(values: flags.FlagValues, console: Console) -> None:
    from ftwt_jax.commands.report import report

    report(_words(values, "dir"), values.out, values.unit, console)


COMMANDS = {
    "train": Command(
        "train a baseline, then its gates; goes on by itself where it stopped", flags_of.define_train, _train
    ),
    "estimate": Command("predict the MACs reduction from a trained baseline", flags_of.define_estimate, _estimate),
    "evaluate": Command("accuracy, work and gates on the held-out split", flags_of.define_evaluate, _evaluate),
    "report": Command(
        "a page of what runs have reached, with plots, images and the commands to have it again",
        flags_of.define_report,
        _report,
        Operand("dir", "workdirs/digits", several=True),
    ),
    "plan": Command(
        "memory, collectives and the shortest step on a TPU slice that need not be there",
        flags_of.define_plan,
        _plan,
    ),
    "prepare": Command(
        "download a TFDS data set, once, in the format that training reads",
        flags_of.define_prepare,
        _prepare,
        Operand("dataset", "tfds:cifar10"),
    ),
    "convert": Command("a workdir from a PyTorch checkpoint, dense or gated", flags_of.define_convert, _convert),
    "export": Command("a workdir's network as a file for PyTorch, or as a program", flags_of.define_export, _export),
    "benchmark": Command(
        "time saved by gates, cost of training them, or images/s of the input",
        flags_of.define_benchmark,
        _benchmark,
    ),
}


def _need(values: flags.FlagValues, name: str, example: str) -> Any:
    value = values[name].value
    if value is None or value == "":
        raise UserError(f"--{name} is missing, for example {example}")
    return value


def _words(values: flags.FlagValues, operand: str) -> list[str]:
    """The words of a command, of which there is at least one."""
    found = values[operand].value
    assert found
    return found


def _workdir(values: flags.FlagValues) -> str:
    return _need(values, "workdir", "--workdir=workdirs/digits")


def _joined(values: flags.FlagValues, console: Console) -> Console:
    """Joins the other processes of a run, if there are any; the console of all but the first is silent."""
    from ftwt_jax.parallel.processes import is_first, join

    join(values.distributed)
    return console if is_first() else Console(quiet=True)
