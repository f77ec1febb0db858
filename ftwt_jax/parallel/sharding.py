"""Placement of arrays: one mesh with a `data` axis over all devices; batches are split, networks replicated."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ftwt_jax.errors import UserError
from ftwt_jax.ops.compiling import compiler_options

AXIS = "data"


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with one axis over these devices; by default over all devices of all processes."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One axis, by default the leading one, split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def split_largest(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """The largest axis whose size is a multiple of the devices, split over them; replicated if there is none."""
    axes = [axis for axis, size in enumerate(shape) if size and size % mesh.size == 0]
    return split(mesh, max(axes, key=lambda axis: shape[axis])) if axes else replicated(mesh)


def traced_on(mesh: Mesh, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` with the mesh set during tracing, for code that depends on the number of devices that share a batch."""

    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fn(*args)

    return traced


def jit_on(mesh: Mesh, fn: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit` for the devices of a mesh, with compiler options that make it fast there."""
    platform = mesh.devices.flat[0].platform
    return jax.jit(traced_on(mesh, fn), compiler_options=compiler_options(platform), **options)


def check_batch_size(batch_size: int, mesh: Mesh, field: str, parts: int = 1) -> None:
    """Raises `UserError` unless every device gets the same number of images, in `parts` equal parts."""
    if batch_size < 1 or batch_size % (mesh.size * parts):
        factor = f"{mesh.size}, the number of devices"
        if parts > 1:
            factor = f"{mesh.size * parts}: {mesh.size} devices times config.accumulate={parts}"
        raise UserError(f"{field}={batch_size} must be a positive multiple of {factor}")


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Makes global arrays, split over the mesh, of this process's share of a batch, unless they are there."""
    sharding = split(mesh)

    def put(x: Any) -> jax.Array:
        there = isinstance(x, jax.Array) and x.sharding == sharding
        return x if there else jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(put, batch)


def put_whole(tree: Any, shardings: Any) -> Any:
    """Makes global arrays of arrays that every process holds whole.

    Args:
      shardings: one for all arrays, or a tree with the structure of `tree`.
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


def shapes_of(tree: Any, sharding: NamedSharding) -> Any:
    """Shapes and dtypes of arrays, with one sharding, to compile for."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def each_batch(mesh: Mesh, step: Callable[[Any], Any], batches: Iterable[Any]) -> list[Any]:
    """The results of a program for each batch.

    One batch ahead is enough to keep the device busy; with more, the process could not be stopped between two of them.
    """
    found: list[Any] = []
    for batch in batches:
        if len(found) > 1:
            jax.block_until_ready(found[-2])
        found.append(in_order(mesh, step(batch)))
    return found


def in_order(mesh: Mesh, result: Any) -> Any:
    """Returns `result`; with several processes on CPUs, waits for it first.

    On CPUs, XLA runs independent programs concurrently, so that processes could run their collectives in different
    orders and deadlock.
    """
    several_on_cpu = jax.process_count() > 1 and mesh.devices.flat[0].platform == "cpu"
    return jax.block_until_ready(result) if several_on_cpu else result
