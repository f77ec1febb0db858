"""A config's training step, compiled for a TPU slice that you need not have.

The step that training runs is compiled ahead of time for the slice, by Google's TPU compiler. The compiled program
gives its memory, floating point operations, HBM traffic and collectives; with the published peaks of the chips, these
give a lower bound on the time of a step.
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

from ftwt_jax.data import describe_dataset
from ftwt_jax.errors import UserError, one_line, shortened
from ftwt_jax.parallel.sharding import data_mesh
from ftwt_jax.plan import hlo
from ftwt_jax.plan.collectives import OTHER, Collective, find_collectives
from ftwt_jax.plan.cost import count_flops, count_traffic
from ftwt_jax.plan.roofline import GIB, Bound, Slice, compute_bound
from ftwt_jax.training.run import BASELINE, Run, make_run
from ftwt_jax.training.stage import make_stage

# A machine with a TPU sets these. On any other, libtpu would ask the network for them, and print warnings.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Nothing runs on a TPU, so other programs can use libtpu at the same time.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
REMEDY = (
    "use a smaller --config.batch_size, --config.accumulate=2 or more (splits each batch into parts), "
    "--config.model.dtype=bfloat16, or a slice with more chips"
)


@dataclasses.dataclass(frozen=True)
class Step:
    """What a compiled step, of training or of inference, needs on each chip.

    Attributes:
      name: a stage of training ("baseline", "gated" or "subnets"), or a network of `inference.compile_inference`.
      arguments, outputs, temporaries, program: bytes of HBM; outputs without those that overwrite arguments.
      flops: floating point operations of convolutions and matrix products.
      traffic: bytes to and from HBM.
      accessed: bytes to and from HBM and on-chip memory.
      parameters: number of elements of each parameter that is trained.
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
        """Total bytes of HBM."""
        return self.arguments + self.outputs + self.temporaries + self.program

    def compute_bound(self, tpu_slice: Slice) -> Bound:
        """The lower bound on the time of a step on a slice, with the same batch per chip."""
        return compute_bound(self.flops, self.traffic, self.collectives, tpu_slice)

    def group_collectives(self) -> list[dict[str, Any]]:
        """Collectives by kind, content and dtype, largest first: their number per step and bytes of results."""
        found: dict[tuple[str, str, str], dict[str, Any]] = {}
        for one in self.collectives:
            for content, arrays in one.carries(self.parameters).items():
                dtypes = "/".join(sorted({array.dtype for array in arrays}))
                empty = {
                    "kind": one.kind,
                    "carries": content,
                    "dtype": dtypes,
                    "collectives": 0,
                    "bytes": 0,
                    "sources": [],
                }
                group = found.setdefault((one.kind, content, dtypes), empty)
                group["collectives"] += one.times
                group["bytes"] += one.times * sum(array.bytes for array in arrays)
                if content == OTHER:
                    group["sources"].append(f"{one.op_name} ({one.source})")
        return sorted(found.values(), key=lambda group: -group["bytes"])


def make_run_on(config: ConfigDict, tpu_slice: Slice, num_classes: int | None = None) -> Run:
    """A run on a slice that need not exist here, with data that need not either: it can only be compiled."""
    # The little that is computed on the way must not occupy a TPU that somebody trains on.
    jax.config.update("jax_platforms", "cpu")
    mesh = data_mesh(find_devices(tpu_slice))
    dataset = describe_dataset(num_classes=num_classes, **config.data)
    return make_run(config, mesh=mesh, dataset=dataset)


@functools.cache
def find_devices(tpu_slice: Slice) -> Sequence[Any]:
    """The chips of a slice as compile targets; raises `UserError` if libtpu is missing or too old for them."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "plan needs Google's TPU compiler (libtpu), which runs on any Linux machine: pip install -e '.[plan]'"
        )
    from jax.experimental import topologies

    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        found = topologies.get_topology_desc(str(tpu_slice), "tpu", **tpu_slice.chip.options).devices
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"libtpu cannot compile for {tpu_slice}: {one_line(error)}; choose another --topology, or update libtpu"
        ) from None
    if len(found) != tpu_slice.size:
        raise UserError(
            f"libtpu finds {len(found)} chips in {tpu_slice} instead of {tpu_slice.size}; install a newer libtpu"
        )
    return found


def compile_step(run: Run, name: str, tpu_slice: Slice) -> Step:
    """Compiles the training step of a stage; raises `UserError` if it does not fit into the memory of a chip."""
    stage = make_stage(run, name)
    lowered = stage.step.lower(stage.state, stage.batch, stage.control)
    parameters = frozenset(leaf.size for leaf in jax.tree.leaves(stage.state.params))
    return compile_lowered(lowered, name, f"the {label(name)} step", REMEDY, tpu_slice, parameters)


def compile_lowered(
    lowered: Any, name: str, what: str, remedy: str, tpu_slice: Slice, parameters: frozenset[int] = frozenset()
) -> Step:
    """Compiles a step that was lowered for the chips of a slice.

    Args:
      lowered: what `jax.jit(…).lower(…)` returns.
      name, parameters: see `Step`.
      what, remedy: of the message where it does not fit: what that is, and what would help.

    Raises:
      UserError: it does not fit into the memory of a chip, or the compiler refuses it.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise _explain_refusal(error, what, remedy, tpu_slice) from None
    memory = compiled.memory_analysis()
    text = hlo.parse(compiled.as_text())
    found = Step(
        name=name,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        program=memory.generated_code_size_in_bytes,
        flops=count_flops(text),
        traffic=count_traffic(text),
        accessed=count_traffic(text, on_chip=True),
        collectives=find_collectives(text),
        parameters=parameters,
    )
    if found.memory > tpu_slice.chip.memory:
        raise _too_large(what, remedy, tpu_slice, found.memory, tpu_slice.chip.memory)
    return found


def _explain_refusal(error: Exception, what: str, remedy: str, tpu_slice: Slice) -> UserError:
    """The error to raise when the compiler refuses a program."""
    text = one_line(error)
    # RESOURCE_EXHAUSTED: ... Used 17.21G of 15.75G hbm. Exceeded hbm capacity by 1.46G.
    sizes = [float(number) * _UNITS[unit] for number, unit in re.findall(r"\b([\d.]+)([KMGT])i?B?\b", text)]
    if "RESOURCE_EXHAUSTED" in text and len(sizes) > 1:
        return _too_large(what, remedy, tpu_slice, sizes[0], sizes[1])
    return UserError(f"cannot compile {what} for {tpu_slice}: {shortened(error, 600)}")


def _too_large(what: str, remedy: str, tpu_slice: Slice, needed: float, available: float) -> UserError:
    return UserError(
        f"{what} does not fit on {tpu_slice}: it needs {needed / GIB:.2f} GiB per chip, "
        f"and a chip has {available / GIB:.2f} GiB; {remedy}"
    )


def label(name: str) -> str:
    """The name of a stage's step in tables and messages."""
    return "dense" if name == BASELINE else name
