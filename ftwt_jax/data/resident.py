"""A training set that is kept in the memory of the devices, so that no step waits for the host."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from ftwt_jax.data.source import ArraySource, Dataset
from ftwt_jax.errors import UserError
from ftwt_jax.parallel.processes import broadcast
from ftwt_jax.parallel.sharding import AXIS, put_whole, replicated, split

# Share of a device's free memory that images may take; the rest is for the network and its activations.
SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Resident:
    """Images and labels on the devices of a mesh: whole on each, or split over them.

    Attributes:
      arrays: `image` uint8 [n, H, W, channels] and `label` int32 [n]; split over the devices, n is rounded up.
    """

    mesh: Mesh
    arrays: dict[str, jax.Array]

    @property
    def sharding(self) -> NamedSharding:
        """Of both arrays."""
        return self.arrays["image"].sharding  # type: ignore[return-value]

    def gather(self, arrays: dict[str, Array], indices: Int32[Array, " B"]) -> dict[str, Array]:
        """The images of these indices with their labels, split over the devices; for use under jit.

        Args:
          arrays: the attribute, traced.
          indices: the same on every device.
        """
        if self.sharding.is_fully_replicated:
            places = lax.with_sharding_constraint(indices, split(self.mesh))
            found = {name: values[places] for name, values in arrays.items()}
            return lax.with_sharding_constraint(found, split(self.mesh))

        def exchanged(values: Array, indices: Array) -> Array:
            # Every device puts in what it has, zeros for the rest, and takes out the sum of its own part of the batch.
            places = indices - lax.axis_index(AXIS) * len(values)
            here = (places >= 0) & (places < len(values))
            rows = values[jnp.where(here, places, 0)]
            rows = jnp.where(here.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0)
            return lax.psum_scatter(rows, AXIS, scatter_dimension=0, tiled=True)

        parts, whole = PartitionSpec(AXIS), PartitionSpec()
        gather = jax.shard_map(exchanged, mesh=self.mesh, in_specs=(parts, whole), out_specs=parts)
        return {name: gather(values, indices) for name, values in arrays.items()}


def place(dataset: Dataset, mesh: Mesh, wanted: bool | None = None) -> Resident | None:
    """Puts the training set on the devices, if it is in memory and fits beside the held-out one.

    Whole on each device if that takes no more than `SHARE` of the free memory, else split over the devices, which then
    exchange a batch of images in every step.

    Args:
      wanted: whether to: True, even if it takes more; None, if it fits; False, not.

    Raises:
      UserError: it is wanted, but images are read from files.
    """
    source = dataset.arrays(dataset.train)
    if wanted and source is None:
        raise UserError(
            "config.data.on_device=True needs images that are held in memory: set config.data.augment=crop or none, or "
            "leave config.data.on_device to be chosen"
        )
    if source is None or wanted is False:
        return None
    held_out = dataset.arrays(dataset.test)
    size, free = source.images.nbytes + (held_out.images.nbytes if held_out else 0), SHARE * free_memory(mesh)
    whole, parts = size <= free, size <= free * mesh.size
    if not broadcast(int(wanted or parts)):
        return None
    return put(source, mesh, shard=not broadcast(int(whole)))


def put(source: ArraySource, mesh: Mesh, shard: bool) -> Resident:
    """Puts a set on the devices: whole on each, or with `shard` split over them."""
    arrays: dict[str, Any] = {"image": source.images, "label": source.labels.astype(np.int32)}
    if not shard:
        return Resident(mesh, put_whole(arrays, replicated(mesh)))
    missing = -len(source) % mesh.size

    def filled(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values, np.zeros((missing, *values.shape[1:]), values.dtype)]) if missing else values

    return Resident(mesh, put_whole({name: filled(values) for name, values in arrays.items()}, split(mesh)))


def free_memory(mesh: Mesh) -> float:
    """Bytes that are free on each device of this process; of CPUs, their part of what the machine has."""
    devices = mesh.local_devices
    found = [device.memory_stats() for device in devices]
    if all(stats and "bytes_limit" in stats for stats in found):
        return min(stats["bytes_limit"] - stats.get("bytes_in_use", 0) for stats in found)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(devices)
