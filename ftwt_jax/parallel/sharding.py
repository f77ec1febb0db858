"""Where arrays live: one mesh with a `data` axis over all devices; batches are split along it, the network is whole."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ftwt_jax.errors import UserError
from ftwt_jax.ops.compiling import compiler_options

AXIS = "data"


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """All devices of all processes in one row; or these."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One axis, the leading one, divided over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def split_largest(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """The largest axis that the devices can share evenly divided over them; replicated if there is none."""
    axes = [axis for axis, size in enumerate(shape) if size and size % mesh.size == 0]
    return split(mesh, max(axes, key=lambda axis: shape[axis])) if axes else replicated(mesh)


def traced_on(mesh: Mesh, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, with the mesh set while it is traced: what depends on how many devices share a batch can then know."""

    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fn(*args)

    return traced


def jit_on(mesh: Mesh, fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit` for the devices of a mesh, with what is fast on them."""
    platform = mesh.devices.flat[0].platform
    return jax.jit(traced_on(mesh, fn), compiler_options=compiler_options(platform), **options)


def check_batch_size(batch_size: int, mesh: Mesh, field: str, parts: int = 1) -> None:
    """Raises `UserError` unless every device gets the same number of examples, in so many equal parts."""
    if batch_size < 1 or batch_size % (mesh.size * parts):
        product = f"the number of devices, {mesh.size}"
        if parts > 1:
            product += f", times config.accumulate, {parts}"
        raise UserError(f"{field}={batch_size} must be a positive multiple of {product}")


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's part of a batch, as global arrays split over the mesh."""
    sharding = split(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def put_whole(tree: Any, shardings: Any) -> Any:
    """Arrays that every process holds whole, as global arrays.

    Args:
      shardings: one for all, or a tree of them like `tree`.
    """
    if isinstance(shardings, NamedSharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, tree)

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        values = np.asarray(x)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(put, tree, shardings)


def in_order(mesh: Mesh, result: Any) -> Any:
    """`result`, once it is there if the processes of a run could otherwise exchange things in different orders.

    XLA's CPU runs programs that do not need each other side by side, in each process as it comes.
    """
    several_on_cpu = jax.process_count() > 1 and mesh.devices.flat[0].platform == "cpu"
    return jax.block_until_ready(result) if several_on_cpu else result
