"""`export` of a network with subnets: a folder of its router and of each subnet, as ONNX or as StableHLO programs."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import export
from rich.console import Console

from ftwt_jax.budget.subnets import subnet_network
from ftwt_jax.commands.export.program import PLATFORMS
from ftwt_jax.engines.folder import write_folder
from ftwt_jax.engines.packages import imported
from ftwt_jax.engines.routed import ONE_IMAGE, Function, subnet_functions, subnet_graphs
from ftwt_jax.errors import UserError
from ftwt_jax.files import AnyPath, in_bucket
from ftwt_jax.inference.subnets import CompactSubnets
from ftwt_jax.printing import say
from ftwt_jax.training.run import load_run
from ftwt_jax.training.settings import SUBNETS
from ftwt_jax.workdir import absolute


def export_subnets(folder: str, out: str, kind: str, console: Console, best: bool = False) -> AnyPath:
    """Writes a workdir's subnets and their router into a new folder, with a `manifest.json` that says what they are.

    Each takes images uint8 [N, H, W, channels] as the data set gives them, normalises them itself, and returns logits
    float32, the router's [N, K], a subnet's [N, classes]; N is open. One more file takes a single image, routes it and
    runs its subnet.

    Args:
      kind: `onnx` or `stablehlo`.

    Raises:
      UserError: the workdir has no subnets, the package onnx is missing, or the folder exists or cannot be written.
    """
    target = absolute(out)
    if in_bucket(target) or not target.parent.is_dir():
        raise UserError(f"--out={out} cannot be written: {target.parent} is not a folder")
    if target.exists():
        raise UserError(f"{target} already exists: choose another folder with --out")
    if kind == "onnx":
        imported("onnx", "--format=onnx", "onnx")
    run = load_run(folder, images=False)
    if not run.has(SUBNETS):
        raise UserError(f"{run.workdir} holds no subnets, which --out=FOLDER is for: name a file with --out")
    model = subnet_network(run)
    if model.router is None:
        raise UserError("a single subnet has no router, and --out=FOLDER is for several: train more of them")
    network = CompactSubnets(model, run.trained(SUBNETS, best))
    network.route(run.example_images)
    shape, name = run.dataset.image_shape, run.config.model.name
    write = _onnx if kind == "onnx" else _stablehlo
    written = write(subnet_functions(network, run.normalize), shape, name)
    write_folder(
        target,
        {f"{part}.{kind}": contents for part, contents in written.items()},
        {
            "model": name,
            "image": {"shape": list(shape), "dtype": "uint8"},
            "classes": list(run.dataset.class_names) or None,
            "dense_macs": model.subnets.dense_macs,
            "router_macs": network.router_macs,
            "subnet_macs": [float(macs) for macs in network.macs],
        },
    )
    say(console, f"{name}, a router and {network.count} subnets as {kind}: written to {target}")
    return target


def _onnx(functions: Mapping[str, Function], shape: tuple[int, ...], name: str) -> dict[str, bytes]:
    graphs = subnet_graphs(functions, shape, jnp.uint8, name)
    return {part: graph.SerializeToString() for part, graph in graphs.items()}


def _stablehlo(functions: Mapping[str, Function], shape: tuple[int, ...], name: str) -> dict[str, bytes]:
    (any_number,) = export.symbolic_shape("samples")
    written = {}
    for part, function in functions.items():
        images = jax.ShapeDtypeStruct((1 if part == ONE_IMAGE else any_number, *shape), jnp.uint8)
        written[part] = bytes(export.export(jax.jit(function), platforms=PLATFORMS)(images).serialize())
    return written
