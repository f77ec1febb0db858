"""Which filters of a unit fire together: rates by class, correlations, and similar ones side by side."""

import dataclasses

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

# Up to this many filters, the leaves of the tree are ordered optimally, which is slow.
MOST_ORDERED = 256


@dataclasses.dataclass(frozen=True)
class CoActivation:
    """Statistics of the masks of a unit with C filters, in the order: always on, dynamic by similarity, always off.

    Attributes:
      order: int64 [C], the filter at each place.
      rates: float64 [classes, C], share of a class's images in which a filter is on; NaN for a class without images.
      counts: int64 [classes], images of a class.
      dynamic: bool [C], the D filters that are on for some images and off for others.
      correlation: float64 [D, D], of the masks of the dynamic filters over all images.
      within: float64 [D, D], the same with the class means subtracted: what the class does not explain.
      explained: share of the dynamic filters' variance that the class explains; 0 where nothing varies.
      largest: int64 [k], the labels of the classes with the most images.
      both: float64 [k, D, D], share of the images of these classes in which two dynamic filters are both on.
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


def measure_co_activation(masks: np.ndarray, labels: np.ndarray, classes: int, most_classes: int) -> CoActivation:
    """Computes the statistics of masks.

    Args:
      masks: bool [n, C].
      labels: int [n], the class of each image.
      classes: number of classes.
      most_classes: largest number of classes in `both`.
    """
    on = masks.sum(axis=0)
    dynamic = (on > 0) & (on < len(masks))
    values = masks[:, dynamic].astype(np.float32)
    counts = np.bincount(labels, minlength=classes)
    centred = values - values.mean(axis=0)
    means = _mean_by_class(values, labels, counts)
    rest = values - means[labels]
    correlation = _correlate(centred)
    places = _order_by_similarity(correlation)
    order = np.concatenate([np.flatnonzero(on == len(masks)), np.flatnonzero(dynamic)[places], np.flatnonzero(on == 0)])
    grid = np.ix_(places, places)
    total = float(np.sum(centred**2))
    largest = np.sort(np.argsort(-counts, kind="stable")[:most_classes])
    return CoActivation(
        order=order,
        rates=_mean_by_class(masks.astype(np.float32), labels, counts)[:, order],
        counts=counts,
        dynamic=dynamic[order],
        correlation=correlation[grid],
        within=_correlate(rest)[grid],
        explained=1 - float(np.sum(rest**2)) / total if total else 0.0,
        largest=largest,
        both=np.array([_share_both_on(values[labels == label])[grid] for label in largest]),
    )


def _mean_by_class(values: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means by class, float64 [classes, C]; NaN for a class without images."""
    sums = np.zeros((len(counts), values.shape[1]))
    np.add.at(sums, labels, values)
    with np.errstate(invalid="ignore"):
        return sums / counts[:, None]


def _correlate(centred: np.ndarray) -> np.ndarray:
    """Correlations [D, D] of columns with mean 0; 0 where a column does not vary."""
    product = (centred.T @ centred).astype(np.float64)
    scale = np.sqrt(np.diag(product))
    scale[scale < 0.1] = np.inf  # Rounding errors: a single image that differs from its class gives at least 0.7.
    return (product / scale[:, None] / scale).clip(-1, 1)


def _share_both_on(values: np.ndarray) -> np.ndarray:
    return (values.T @ values).astype(np.float64) / max(len(values), 1)


def _order_by_similarity(correlation: np.ndarray) -> np.ndarray:
    """An order of the filters in which those that fire together are neighbors: leaves of an average-linkage tree."""
    count = len(correlation)
    if count < 3:
        return np.arange(count)
    distance = 1 - (correlation + correlation.T) / 2
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=count <= MOST_ORDERED)
    return leaves_list(tree)


def average_blocks(matrix: np.ndarray, most: int) -> tuple[np.ndarray, int]:
    """Reduces a matrix [D, D] to at most `most` rows by averaging blocks; also returns the side of a block."""
    side = -(-len(matrix) // most)
    if side <= 1:
        return matrix, 1
    edges = np.arange(0, len(matrix), side)
    sums = np.add.reduceat(np.add.reduceat(matrix, edges, axis=0), edges, axis=1)
    sizes = np.diff([*edges, len(matrix)])
    return sums / sizes[:, None] / sizes, side
