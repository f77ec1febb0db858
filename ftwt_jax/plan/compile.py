"""The command `plan`: what a config's training step needs on a TPU slice, which need not be there.

The step is the real one, compiled ahead of time by Google's compiler for the slice. From the compiled program come its
memory, its floating point operations, its traffic with HBM and its collectives; from these and the published peaks of
the chips, the shortest time that a step can take.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console

from ftwt_jax import workdir
from ftwt_jax.data import describe_dataset
from ftwt_jax.errors import UserError, one_line, shortened
from ftwt_jax.parallel.sharding import data_mesh
from ftwt_jax.plan import hlo
from ftwt_jax.plan.collectives import OTHER, Collective, collectives
from ftwt_jax.plan.cost import flops, traffic
from ftwt_jax.plan.roofline import GIB, Bound, Slice, bound, parse_slice, slices_up_to
from ftwt_jax.plan.tables import print_plan
from ftwt_jax.printing import say
from ftwt_jax.training.run import BASELINE, GATED, Run, make_run
from ftwt_jax.training.stage import make_stage

PLAN = "plan.json"
# Of a machine with a TPU these are known. On any other, libtpu asks the network for them, or complains without.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Nothing runs, so that other programs may use libtpu at the same time.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
MEND = (
    "a smaller --config.batch_size, --config.accumulate=2 or more (parts of a batch, one after the other), "
    "--config.model.dtype=bfloat16, or more chips"
)


@dataclasses.dataclass(frozen=True)
class Step:
    """What a compiled training step needs of one chip.

    Attributes:
      name: "gated" or "baseline".
      arguments, outputs, temporaries, program: bytes of HBM; outputs without those that take the place of arguments.
      flops: floating point operations of convolutions and matrix products.
      traffic: bytes to and from HBM.
      accessed: the same with what stays in the chip's own memory.
      parameters: number of elements of each parameter.
    """

    name: str
    arguments: int
    outputs: int
    temporaries: int
    program: int
    flops: int
    traffic: int
    accessed: int
    collectives: list[Collective]
    parameters: frozenset[int]

    @property
    def memory(self) -> int:
        """Bytes of HBM in all."""
        return self.arguments + self.outputs + self.temporaries + self.program

    def bound(self, where: Slice) -> Bound:
        """The shortest time of a step on a slice, with the same batch on each chip."""
        return bound(self.flops, self.traffic, self.collectives, where)

    def groups(self) -> list[dict[str, Any]]:
        """Collectives of one kind that carry the same: how many run in a step, and the bytes of their results."""
        found: dict[tuple[str, str, str], dict[str, Any]] = {}
        for one in self.collectives:
            for what, arrays in one.carries(self.parameters).items():
                dtypes = "/".join(sorted({array.dtype for array in arrays}))
                empty = {
                    "kind": one.kind,
                    "carries": what,
                    "dtype": dtypes,
                    "collectives": 0,
                    "bytes": 0,
                    "sources": [],
                }
                group = found.setdefault((one.kind, what, dtypes), empty)
                group["collectives"] += one.times
                group["bytes"] += one.times * sum(array.bytes for array in arrays)
                if what == OTHER:
                    group["sources"].append(f"{one.op_name} ({one.source})")
        return sorted(found.values(), key=lambda group: -group["bytes"])


def plan(
    config: ConfigDict, topology: str, console: Console, num_classes: int | None = None, out: pathlib.Path | None = None
) -> dict[str, Any]:
    """Compiles the gated and the dense training step for a slice, and prints what they need and how fast they can be.

    Args:
      topology: the slice, such as v5e:16x16.
      num_classes: of a data set that is not here and says nothing of itself.
      out: file to write the figures into, as JSON.

    Raises:
      UserError: no such slice, no compiler for it, a config that cannot work there, or one that does not fit into the
        chips' memory.
    """
    where = parse_slice(topology)
    run = planned_run(config, where, num_classes)
    steps = []
    for name in (GATED, BASELINE) if config.gates.epochs > 0 else (BASELINE,):
        with console.status(f"compiling the {_step(name)} step for {where.size} chips; this can take minutes"):
            steps.append(compile_step(run, name, where))
    result = _result(config, where, steps)
    print_plan(result, where, console)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        workdir.write_json(out, result)
        say(console, f"wrote {out}")
    return result


def planned_run(config: ConfigDict, where: Slice, num_classes: int | None = None) -> Run:
    """A run on a slice that is not there, with data that need not be; it can be compiled and nothing else."""
    # What has to be computed on the way is little, and must not take a TPU from those who train on it.
    jax.config.update("jax_platforms", "cpu")
    mesh = data_mesh(slice_devices(where))
    dataset = describe_dataset(num_classes=num_classes, **config.data)
    return make_run(config, pathlib.Path(os.devnull) / "plan", mesh, dataset)


@functools.cache
def slice_devices(where: Slice) -> Sequence[Any]:
    """The chips of a slice, for the compiler alone; raises `UserError` if there is none, or it is too old for them."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("plan needs Google's compiler for TPUs, which runs on any Linux: pip install -e '.[plan]'")
    from jax.experimental import topologies

    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        found = topologies.get_topology_desc(str(where), "tpu", **where.chip.options).devices
    except (RuntimeError, ValueError) as error:
        raise UserError(f"libtpu cannot compile for {where}: {one_line(error)}") from None
    if len(found) != where.size:
        raise UserError(f"libtpu has {len(found)} devices in {where} instead of {where.size}: install a newer one")
    return found


def compile_step(run: Run, name: str, where: Slice) -> Step:
    """Compiles a stage's training step; raises `UserError` if it does not fit into the memory of a chip."""
    stage = make_stage(run, name)
    try:
        compiled = stage.step.lower(stage.state, stage.batch, stage.control).compile()
    except jax.errors.JaxRuntimeError as error:
        raise _refused(error, name, where) from None
    memory = compiled.memory_analysis()
    text = hlo.parse(compiled.as_text())
    found = Step(
        name=name,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        program=memory.generated_code_size_in_bytes,
        flops=flops(text),
        traffic=traffic(text),
        accessed=traffic(text, on_chip=True),
        collectives=collectives(text),
        parameters=frozenset(leaf.size for leaf in jax.tree.leaves(stage.state.params)),
    )
    if found.memory > where.chip.memory:
        raise _too_large(name, where, found.memory, where.chip.memory)
    return found


def _refused(error: Exception, name: str, where: Slice) -> UserError:
    """What the compiler says of a program that it cannot make."""
    text = one_line(error)
    sizes = [float(number) * _UNITS[unit] for number, unit in re.findall(r"\b([\d.]+)([KMGT])i?B?\b", text)]
    if "RESOURCE_EXHAUSTED" in text and len(sizes) > 1:
        return _too_large(name, where, sizes[0], sizes[1])
    return UserError(f"the {_step(name)} step cannot be compiled for {where}: {shortened(error, 600)}")


def _too_large(name: str, where: Slice, needed: float, available: float) -> UserError:
    return UserError(
        f"the {_step(name)} step does not fit: it needs {needed / GIB:.2f} GiB on each chip of {where}, which has "
        f"{available / GIB:.2f} GiB: take {MEND}"
    )


def _step(name: str) -> str:
    return "dense" if name == BASELINE else name


def _result(config: ConfigDict, where: Slice, steps: list[Step]) -> dict[str, Any]:
    """Everything that is printed, as JSON data; seconds, bytes, and shares."""
    batch = config.batch_size // where.size

    def timed(step: Step, place: Slice) -> dict[str, Any]:
        found = step.bound(place)
        return {
            "topology": str(place),
            "chips": place.size,
            "batch_size": batch * place.size,
            "compute_s": found.compute,
            "hbm_s": found.memory,
            "interconnect_s": found.interconnect,
            "step_s": found.step,
            "images_per_second": batch * place.size / found.step,
            "limit": found.limit,
            "efficiency": found.efficiency,
        }

    return {
        "arch": config.model.name,
        "dtype": config.model.dtype,
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "topology": str(where),
        "chips": where.size,
        "hbm_bytes": where.chip.memory,
        "steps": {
            _step(step.name): {
                "argument_bytes": step.arguments,
                "output_bytes": step.outputs,
                "temporary_bytes": step.temporaries,
                "program_bytes": step.program,
                "memory_bytes": step.memory,
                "flops": step.flops,
                "hbm_traffic_bytes": step.traffic,
                "accessed_bytes": step.accessed,
                "collectives": step.groups(),
                "bound": timed(step, where),
                "growth": [timed(step, place) for place in slices_up_to(where)],
            }
            for step in steps
        },
    }
