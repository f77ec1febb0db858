"""The command `export`: a workdir's network as a file for PyTorch, or as a program."""

from absl import flags
from rich.console import Console

from ftwt_jax.commands.command import WORKDIR, Arguments, Command, define_best, define_data, define_workdir
from ftwt_jax.commands.export.program import SUFFIX, export_program
from ftwt_jax.commands.export.weights import export_weights
from ftwt_jax.errors import UserError
from ftwt_jax.weights.files import SAFETENSORS

FORMATS = {"safetensors": SAFETENSORS, "stablehlo": SUFFIX}
FORMAT_MEANING = {"safetensors": "weights for PyTorch", "stablehlo": "a program that needs JAX alone"}


def _define(values: flags.FlagValues) -> None:
    define_workdir(values)
    flags.DEFINE_string("out", None, "file to write, such as resnet34.safetensors", flag_values=values)
    flags.DEFINE_enum(
        "format",
        None,
        list(FORMATS),
        "weights for PyTorch, or a program that runs without this package; by default as the ending of --out says",
        flag_values=values,
    )
    flags.DEFINE_bool("compact", False, "of a program: filters left out, one image at a time", flag_values=values)
    flags.DEFINE_float("budget", None, "of a program: MACs reduction to bring the gates to", flag_values=values)
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
    if kind is None or not out.endswith(FORMATS[kind]):
        known = [f"{suffix} ({FORMAT_MEANING[name]})" for name, suffix in FORMATS.items() if kind in (None, name)]
        raise UserError(f"--out takes a file that ends in {' or '.join(known)}; got {out}")
    if kind == "stablehlo":
        if values.layout is not None:
            raise UserError("--layout names tensors, and a program shows none: leave it out")
        options = values.compact, values.baseline, values.best, values.budget, values.data
        export_program(folder, out, console, *options)
        return
    for flag in ("budget", "compact", "data"):
        if values[flag].value:
            raise UserError(f"--{flag} belongs to a program: name one with --out=FILE{SUFFIX}")
    export_weights(folder, out, console, values.layout, values.baseline, values.best)


COMMAND = Command(_define, run, WORKDIR)
