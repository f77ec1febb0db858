"""A config's training step, compiled for a TPU slice that you need not have.

The step is the real one, compiled ahead of time by Google's compiler for the slice. From the compiled program come its
memory, its floating point operations, its traffic with HBM and its collectives; from these and the published peaks of
the chips, the shortest time that a step can take.
"""

import dataclasses
import functools
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from ftwt_jax.data.described import describe_dataset
from ftwt_jax.errors import UserError, one_line
from ftwt_jax.parallel.sharding import data_mesh
from ftwt_jax.plan import hlo
from ftwt_jax.plan.collectives import OTHER, Collective, collectives
from ftwt_jax.plan.cost import flops, traffic
from ftwt_jax.plan.roofline import GIB, Bound, Slice, bound
from ftwt_jax.training.run import BASELINE, Run, make_run
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


def planned_run(config: ConfigDict, where: Slice, num_classes: int | None = None) -> Run:
    """A run on a slice that is not there, with data that need not be; it can be compiled and nothing else."""
    # What has to be computed on the way is little, and must not take a TPU from those who train on it.
    jax.config.update("jax_platforms", "cpu")
    mesh = data_mesh(slice_devices(where))
    dataset = describe_dataset(num_classes=num_classes, **config.data)
    return make_run(config, mesh=mesh, dataset=dataset)


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
    return UserError(f"the {label(name)} step cannot be compiled for {where}: {text[:600]}")


def _too_large(name: str, where: Slice, needed: float, available: float) -> UserError:
    return UserError(
        f"the {label(name)} step does not fit: it needs {needed / GIB:.2f} GiB on each chip of {where}, which has "
        f"{available / GIB:.2f} GiB: take {MEND}"
    )


def label(name: str) -> str:
    """What tables call a stage's step."""
    return "dense" if name == BASELINE else name
