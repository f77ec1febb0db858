"""Where arrays live: one mesh with a `data` axis over all devices; batches are split along it, state is replicated."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ftwt_jax.errors import UserError


def data_mesh() -> Mesh:
    """All devices of all processes in one row."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """Leading axis divided over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch_size(batch_size: int, mesh: Mesh, field: str) -> None:
    """Raises `UserError` unless every device gets the same number of examples."""
    if batch_size < 1 or batch_size % mesh.size:
        raise UserError(f"{field}={batch_size} must be a positive multiple of the number of devices, {mesh.size}")


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's part of a batch, as global arrays split over the mesh."""
    sharding = split(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
