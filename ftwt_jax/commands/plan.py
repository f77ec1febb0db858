"""The command `plan`: what a config's training steps, and its subnets, need on a TPU slice that you need not have."""

from typing import Any

from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from ftwt_jax.commands.command import Arguments, Command, define_workdir
from ftwt_jax.files import AnyPath
from ftwt_jax.plan.compile import Step, compile_step, label, make_run_on
from ftwt_jax.plan.inference import add_subnets, compile_inference, inference_figures
from ftwt_jax.plan.roofline import Slice, list_slices, parse_slice
from ftwt_jax.plan.tables import print_plan
from ftwt_jax.printing import say
from ftwt_jax.training.settings import BASELINE, GATED, SUBNETS
from ftwt_jax.workdir import PLAN, absolute, write_json


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("topology", None, "the TPU slice: v4, v5e, v5p or v6e and its shape", flag_values=values)
    flags.DEFINE_integer(
        "num_classes", None, "of a data set that is not on this machine", lower_bound=2, flag_values=values
    )
    define_workdir(values)
    flags.DEFINE_string("out", None, "file to write, if not plan.json in --workdir", flag_values=values)


def run(arguments: Arguments, console: Console) -> None:
    """Runs the command."""
    values = arguments.flags
    topology = arguments.need("topology", "--topology=v5e:16x16")
    config = arguments.config("--config=configs/imagenet.py:resnet34")
    workdir = absolute(values.workdir) if values.workdir else None
    out = absolute(values.out) if values.out else workdir / PLAN if workdir else None
    plan(config, topology, console, values.num_classes, out, workdir)


COMMAND = Command(_define, run, takes_config=True)


def plan(
    config: ConfigDict,
    topology: str,
    console: Console,
    num_classes: int | None = None,
    out: AnyPath | None = None,
    workdir: AnyPath | None = None,
) -> dict[str, Any]:
    """Compiles a config's training steps for a slice; prints what they need and how fast they can be.

    With `config.subnets.count`, also inference: of the dense network, and of a subnet and its router.

    Args:
      topology: the slice, such as v5e:16x16.
      num_classes: number of classes, for a data set that is not on this machine and whose description is unknown.
      out: file to write the figures to, as JSON.
      workdir: the folder of a run; if there are subnets in it, these are planned for.

    Returns:
      The figures, as written to `out`.

    Raises:
      UserError: the slice does not exist, its compiler is not installed, the config cannot work there, the subnets in
        the workdir are of another network, or a step does not fit into the memory of the chips.
    """
    tpu_slice = parse_slice(topology)
    run = make_run_on(config, tpu_slice, num_classes)
    stages = [GATED, BASELINE] if config.gates.epochs > 0 else [BASELINE]
    budget = None
    if config.subnets.count:
        budget = add_subnets(run, workdir)
        stages.append(SUBNETS)
    steps = []
    for name in stages:
        with console.status(f"compiling the {label(name)} step for {tpu_slice.size} chips; this can take minutes"):
            steps.append(compile_step(run, name, tpu_slice))
    result = _result(config, tpu_slice, steps)
    if config.subnets.count:
        with console.status(f"compiling inference for {tpu_slice.size} chips; this can take minutes"):
            result["inference"] = inference_figures(run, compile_inference(run, tpu_slice), budget, tpu_slice)
    print_plan(result, tpu_slice, console)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, result)
        say(console, f"wrote {out}")
    return result


def _result(config: ConfigDict, tpu_slice: Slice, steps: list[Step]) -> dict[str, Any]:
    """All figures that are printed, as JSON data: times in seconds, sizes in bytes, shares in [0, 1]."""
    batch = config.batch_size // tpu_slice.size

    def timed(step: Step, other: Slice) -> dict[str, Any]:
        found = step.compute_bound(other)
        return {
            "topology": str(other),
            "chips": other.size,
            "batch_size": batch * other.size,
            "compute_s": found.compute,
            "hbm_s": found.memory,
            "interconnect_s": found.interconnect,
            "step_s": found.step,
            "images_per_second": batch * other.size / found.step,
            "limit": found.limit,
            "efficiency": found.efficiency,
        }

    return {
        "arch": config.model.name,
        "dtype": config.model.dtype,
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "topology": str(tpu_slice),
        "chips": tpu_slice.size,
        "hbm_bytes": tpu_slice.chip.memory,
        "steps": {
            label(step.name): {
                "argument_bytes": step.arguments,
                "output_bytes": step.outputs,
                "temporary_bytes": step.temporaries,
                "program_bytes": step.program,
                "memory_bytes": step.memory,
                "flops": step.flops,
                "hbm_traffic_bytes": step.traffic,
                "accessed_bytes": step.accessed,
                "collectives": step.group_collectives(),
                "bound": timed(step, tpu_slice),
                "growth": [timed(step, other) for other in list_slices(tpu_slice)],
            }
            for step in steps
        },
    }
