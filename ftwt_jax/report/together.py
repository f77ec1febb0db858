"""Which filters of a unit fire together: rates by class, correlations, and an order that puts like beside like."""

import dataclasses

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

# Up to so many filters the leaves of the tree are turned so that neighbours are as alike as can be, which takes long.
MOST_TURNED = 256


@dataclasses.dataclass(frozen=True)
class Together:
    """The masks of a unit summed up; its C filters in order: always on, dynamic by likeness, always off.

    Attributes:
      order: int64 [C], the number of the filter in each place.
      rates: float64 [classes, C], share of a class's images in which a filter is on; NaN for a class without any.
      counts: int64 [classes], images of a class.
      dynamic: bool [C], the filters that are neither on nor off for every image, D of them.
      correlation: float64 [D, D], of the masks of the dynamic filters over all images.
      within: float64 [D, D], the same after each class's mean was taken away: what the class does not explain.
      explained: share of the dynamic filters' variance that the class explains; 0 where nothing varies.
      largest: int64 [k], the classes with most images, by their labels.
      both: float64 [k, D, D], share of their images in which two dynamic filters are both on.
    """

    order: np.ndarray
    rates: np.ndarray
    counts: np.ndarray
    dynamic: np.ndarray
    correlation: np.ndarray
    within: np.ndarray
    explained: float
    largest: np.ndarray
    both: np.ndarray


def fire_together(masks: np.ndarray, labels: np.ndarray, classes: int, most_classes: int) -> Together:
    """Sums up masks, bool [n, C], of images with labels, int [n].

    Args:
      classes: how many there are.
      most_classes: `both` is of so many at most.
    """
    on = masks.sum(axis=0)
    dynamic = (on > 0) & (on < len(masks))
    values = masks[:, dynamic].astype(np.float32)
    counts = np.bincount(labels, minlength=classes)
    centred = values - values.mean(axis=0)
    means = _by_class(values, labels, counts)
    rest = values - means[labels]
    correlation = _correlation(centred)
    places = _likeness_order(correlation)
    order = np.concatenate([np.flatnonzero(on == len(masks)), np.flatnonzero(dynamic)[places], np.flatnonzero(on == 0)])
    grid = np.ix_(places, places)
    total = float(np.sum(centred**2))
    largest = np.sort(np.argsort(-counts, kind="stable")[:most_classes])
    return Together(
        order=order,
        rates=_by_class(masks.astype(np.float32), labels, counts)[:, order],
        counts=counts,
        dynamic=dynamic[order],
        correlation=correlation[grid],
        within=_correlation(rest)[grid],
        explained=1 - float(np.sum(rest**2)) / total if total else 0.0,
        largest=largest,
        both=np.array([_both_on(values[labels == label])[grid] for label in largest]),
    )


def _by_class(values: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means by class, float64 [classes, C]; NaN for a class without images."""
    sums = np.zeros((len(counts), values.shape[1]))
    np.add.at(sums, labels, values)
    with np.errstate(invalid="ignore"):
        return sums / counts[:, None]


def _correlation(centred: np.ndarray) -> np.ndarray:
    """[D, D] of columns whose mean is 0; 0 where one of them does not vary."""
    product = (centred.T @ centred).astype(np.float64)
    scale = np.sqrt(np.diag(product))
    scale[scale < 0.1] = np.inf  # One image that differs from the others of its class makes 0.7.
    return (product / scale[:, None] / scale).clip(-1, 1)


def _both_on(values: np.ndarray) -> np.ndarray:
    return (values.T @ values).astype(np.float64) / max(len(values), 1)


def _likeness_order(correlation: np.ndarray) -> np.ndarray:
    """Places of [D, D] such that filters that fire together are neighbours: the leaves of a tree of average linkage."""
    count = len(correlation)
    if count < 3:
        return np.arange(count)
    distance = 1 - (correlation + correlation.T) / 2
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=count <= MOST_TURNED)
    return leaves_list(tree)


def in_blocks(matrix: np.ndarray, most: int) -> tuple[np.ndarray, int]:
    """A matrix [D, D] with at most so many rows: means over blocks of neighbours, and the side of a block."""
    side = -(-len(matrix) // most)
    if side <= 1:
        return matrix, 1
    edges = np.arange(0, len(matrix), side)
    sums = np.add.reduceat(np.add.reduceat(matrix, edges, axis=0), edges, axis=1)
    sizes = np.diff([*edges, len(matrix)])
    return sums / sizes[:, None] / sizes, side
