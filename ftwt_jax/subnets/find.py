"""Cuts a network into subnets: groups of images that want the same filters share one mask for every layer."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Bool, Float, Int

from ftwt_jax.errors import UserError
from ftwt_jax.gating.gates import HEAD_NAME, GateControl, check_r
from ftwt_jax.ops.compiling import compiler_options
from ftwt_jax.subnets.masks import choose_groups
from ftwt_jax.subnets.ties import Ties, call_network, find_ties

# Images of a batch that is looked at.
_BATCH = 64
# What numbers of filters are rounded to.
MULTIPLE = 8
# From this many images on, k-means looks at some of them at a time.
_MANY = 20_000
_STARTS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Subnets:
    """K dense networks within one.

    Attributes:
      masks: for each layer that loses filters, by name, those that each subnet keeps.
      macs: exact MACs of each subnet, without a router.
      dense_macs: exact MACs of the whole network.
      assignment: the subnet of each of the images that they were found on.
      centers: for each subnet, the share of its images that want each group of filters.
      weights: what a group counts for when images are compared, by the MACs that it costs.
      source: whose masks the images were grouped by: `heads` or `targets`.
    """

    masks: Mapping[str, Bool[np.ndarray, "K C"]]
    macs: Float[np.ndarray, " K"]
    dense_macs: float
    assignment: Int[np.ndarray, " S"]
    centers: Float[np.ndarray, "K G"]
    weights: Float[np.ndarray, " G"]
    source: str

    @property
    def count(self) -> int:
        """The number of subnets."""
        return len(self.macs)

    @property
    def macs_reduction(self) -> float:
        """The mean over the images of the share of the dense network's MACs that their subnets save."""
        return float(1 - np.mean(self.macs[self.assignment]) / self.dense_macs)


def find_subnets(
    model: nn.Module,
    variables: Any,
    images: Any,
    count: int = 8,
    budget: float = 0.5,
    *,
    r: float | None = None,
    source: str | None = None,
    multiple: int = MULTIPLE,
    seed: int = 0,
    extra_macs: float = 0.0,
    **options: Any,
) -> Subnets:
    """Finds subnets by what a network's own filters say, without labels; nothing is trained.

    Each image is described by the filters that it wants: those of its gate heads, or its targets. k-means puts images
    that want the same filters into groups, a filter counting for as much as it costs. Each group's subnet keeps the
    filters that its images want most often, at the budget. Filters that are added to each other along a residual
    stream are kept or left out together, so that each subnet is an ordinary, narrower dense network.

    Args:
      model: a network of `GatedUnit`s with gates.
      variables: its parameters and batch statistics; without gate heads, a dense network's.
      images: prepared as the network receives them, [S, H, W, channels], or an iterable of such batches: some
        thousand, or all, of the training images, without augmentation.
      count: number of subnets, K; 1 is static pruning.
      budget: the exact MACs reduction of each subnet.
      r: mass threshold of the targets; None: the model's own.
      source: `heads` or `targets`; None: `heads` if the variables have them.
      multiple: keep a multiple of this many filters in every layer, which suits vectors: ResNet-56 at 60 % takes ONNX
        Runtime 1.5 ms with widths of 8 and 16, 2.4 ms with widths of 9 to 12. In layers of fewer than twice as many, a
        multiple of half of them; 1: any number.
      seed: of k-means; the same seed finds the same subnets.
      extra_macs: what each image costs besides, such as a router; counted in the budget.
      **options: further arguments of the model's `__call__`.

    Raises:
      UserError: there are fewer images than subnets, no subnet can have this reduction, or the network has no gates.
    """
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
        raise UserError(f"count is the number of subnets, 1 or more; got {count!r}")
    if not 0 < budget < 1:
        raise UserError(f"budget is the MACs reduction of each subnet, between 0 and 1; got {budget!r}")
    if multiple < 1:
        raise UserError(f"multiple is a number of filters, 1 or more; got {multiple!r}")
    if r is not None:
        check_r(r)
    heads = any(HEAD_NAME in path for path in flatten_dict(variables["params"]))
    source = source or ("heads" if heads else "targets")
    if source not in ("heads", "targets") or (source == "heads" and not heads):
        raise UserError(f"source is 'targets', or 'heads' for variables with gate heads; got {source!r}")

    batches = list(_batches(images))
    example = jax.ShapeDtypeStruct((1, *batches[0].shape[1:]), batches[0].dtype) if batches else None
    if example is None or sum(map(len, batches)) < count:
        raise UserError(f"{count} subnets need as many images or more; got {sum(map(len, batches))}")
    ties = find_ties(model, variables, example, **options)
    look = jax.jit(
        lambda variables, images, r: wanted_groups(model, variables, images, ties, source, r, **options),
        compiler_options=compiler_options(),
    )
    threshold = None if r is None else jnp.float32(r)
    wanted = np.concatenate([np.asarray(look(variables, jnp.asarray(batch), threshold)) for batch in batches])
    return cut(wanted, ties, count, budget, source, multiple=multiple, seed=seed, extra_macs=extra_macs)


def cut(
    wanted: Float[np.ndarray, "S G"],
    ties: Ties,
    count: int,
    budget: float,
    source: str,
    *,
    multiple: int = MULTIPLE,
    seed: int = 0,
    extra_macs: float = 0.0,
) -> Subnets:
    """Groups images by the filters that they want, as `wanted_groups` tells it, and cuts the network; see there."""
    weights, dense = ties.costs(), ties.dense_macs
    assignment = _clustered(wanted, weights, int(count), seed)
    centers = np.stack([wanted[assignment == subnet].mean(axis=0) for subnet in range(count)]).astype(np.float32)
    masks, macs = _keep(centers, ties, budget, multiple, extra_macs)
    return Subnets(masks, macs, dense, assignment, centers, weights, source)


def cut_again(
    subnets: Subnets, ties: Ties, budget: float, *, multiple: int = MULTIPLE, extra_macs: float = 0.0
) -> Subnets:
    """The subnets of the same groups of images at another budget; arguments and errors are those of `find_subnets`."""
    masks, macs = _keep(subnets.centers, ties, budget, multiple, extra_macs)
    return dataclasses.replace(subnets, masks=masks, macs=macs)


def _keep(
    centers: Float[np.ndarray, "K G"], ties: Ties, budget: float, multiple: int, extra_macs: float
) -> tuple[dict[str, Bool[np.ndarray, "K C"]], Float[np.ndarray, " K"]]:
    """Masks and MACs, without the extra ones, of subnets whose images want groups of filters as often as this."""
    kept = choose_groups(
        centers, ties.blocks(), lambda kept: ties.macs(kept) + extra_macs, ties.dense_macs, budget, multiple
    )
    return ties.masks(kept), ties.macs(kept)


def wanted_groups(
    model: nn.Module,
    variables: Any,
    images: Float[Array, "N H W channels"],
    ties: Ties,
    source: str,
    r: Float[Array, ""] | float | None = None,
    **options: Any,
) -> Float[Array, "N G"]:
    """For each image and group of filters, the share of the group's units that want it on."""
    control = GateControl(r=r, masks=source, targets=source == "targets")
    outputs = call_network(model, variables, images, control, **options)
    total, members = jnp.zeros((images.shape[0], ties.count + 1)), np.zeros(ties.count + 1)
    for name, gate in zip(outputs.gate_names, outputs.gates, strict=True):
        if name in ties.groups:
            # -1, always kept, is the last column, which is dropped.
            total = total.at[:, ties.groups[name]].add(gate.mask)
            np.add.at(members, ties.groups[name], 1)
    return total[:, :-1] / np.maximum(members[:-1], 1)


def nearest(wanted: Float[Array, "N G"], centers: Float[Array, "K G"], weights: Float[Array, " G"]) -> Int[Array, " N"]:
    """The subnet whose images want the most similar filters."""
    scaled, targets = wanted * jnp.sqrt(weights), centers * jnp.sqrt(weights)
    distances = jnp.sum(targets**2, axis=-1) - 2 * scaled @ targets.T
    return jnp.argmin(distances, axis=-1)


def _clustered(wanted: np.ndarray, weights: np.ndarray, count: int, seed: int) -> Int[np.ndarray, " S"]:
    """The group of each image, those with the most images first."""
    if count == 1:
        return np.zeros(len(wanted), np.int32)
    from sklearn.cluster import KMeans, MiniBatchKMeans

    kind = MiniBatchKMeans if len(wanted) > _MANY else KMeans
    features = (wanted * np.sqrt(weights)).astype(np.float32)
    labels = kind(count, n_init=_STARTS, random_state=seed).fit(features).labels_
    images = np.bincount(labels, minlength=count)
    if not images.all():
        raise UserError(
            f"the images differ too little for {count} subnets: they fall into {np.count_nonzero(images)} groups; "
            "choose a smaller count, or more images"
        )
    rank = np.argsort(np.argsort(-images, kind="stable"))
    return rank[labels].astype(np.int32)


def _batches(images: Any) -> Iterator[Any]:
    given = [images] if hasattr(images, "shape") else images
    for batch in given:
        for start in range(0, len(batch), _BATCH):
            yield batch[start : start + _BATCH]
