"""The command `export`: a workdir's network as a file for PyTorch, as a program, or for engines that read ONNX."""

import pathlib

from absl import flags
from rich.console import Console

from ftwt_jax.commands.command import (
    WORKDIR,
    Arguments,
    Command,
    define_best,
    define_data,
    define_workdir,
    file_to_write,
)
from ftwt_jax.commands.export import graph
from ftwt_jax.commands.export.network import choose_network
from ftwt_jax.commands.export.program import SUFFIX, export_program
from ftwt_jax.commands.export.subnets import export_subnets
from ftwt_jax.commands.export.weights import export_weights
from ftwt_jax.engines.packages import imported
from ftwt_jax.errors import UserError
from ftwt_jax.weights.files import SAFETENSORS

FORMATS = {"safetensors": SAFETENSORS, "stablehlo": SUFFIX, "onnx": graph.SUFFIX}
FORMAT_MEANING = {
    "safetensors": "weights for PyTorch",
    "stablehlo": "a program that needs JAX alone",
    "onnx": "for ONNX Runtime, OpenVINO and TensorRT",
}


def _define(values: flags.FlagValues) -> None:
    define_workdir(values)
    flags.DEFINE_string(
        "out",
        None,
        "file to write, such as resnet34.safetensors; of subnets, with --format, a folder",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "format",
        None,
        list(FORMATS),
        "weights for PyTorch, a program that runs without this package, or a graph for engines; by default as the "
        "ending of --out says",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "compact",
        False,
        "of a program or graph: filters left out; a program then takes one image at a time",
        flag_values=values,
    )
    flags.DEFINE_float(
        "budget", None, "of a program or graph: MACs reduction to bring the gates to", flag_values=values
    )
    flags.DEFINE_string(
        "layout", None, "names of tensors: published, torchvision, huggingface, timm or kuangliu", flag_values=values
    )
    flags.DEFINE_bool("baseline", False, "the dense baseline, not the gated network", flag_values=values)
    define_data(values)
    define_best(values)


def run(arguments: Arguments, console: Console) -> None:
    """Runs the command."""
    values = arguments.flags
    folder, out = arguments.workdir(), arguments.need("out", "--out=resnet34.safetensors")
    kind = values.format or next((name for name, suffix in FORMATS.items() if out.endswith(suffix)), None)
    if kind in ("stablehlo", "onnx") and not pathlib.PurePath(out).suffix:
        for flag in ("budget", "compact", "data", "baseline", "layout"):
            if values[flag].value:
                raise UserError(f"--{flag} does not go with the subnets that a folder is written of: leave it out")
        export_subnets(folder, out, kind, console, values.best)
        return
    if kind is None or not out.endswith(FORMATS[kind]):
        known = [f"{suffix} ({FORMAT_MEANING[name]})" for name, suffix in FORMATS.items() if kind in (None, name)]
        raise UserError(f"--out takes a file that ends in {' or '.join(known)}; got {out}")
    if kind != "safetensors":
        if values.layout is not None:
            raise UserError("--layout names tensors, and a program shows none: leave it out")
        target = file_to_write(out, new=True)
        if kind == "onnx":
            imported("onnx", "--format=onnx", "onnx")  # Before anything is loaded.
        write = export_program if kind == "stablehlo" else graph.export_graph
        options = values.compact, values.baseline, values.best, values.budget, values.data
        write(choose_network(folder, *options), target, console)
        return
    for flag in ("budget", "compact", "data"):
        if values[flag].value:
            raise UserError(f"--{flag} belongs to a program: name one with --out=FILE{SUFFIX} or FILE{graph.SUFFIX}")
    export_weights(folder, out, console, values.layout, values.baseline, values.best)


COMMAND = Command(_define, run, WORKDIR)
