"""Adapts a trained network to images of other channels or another size, or to other classes."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from ftwt_jax.gating.gates import HEAD_NAME
from ftwt_jax.gating.units import Classifier
from ftwt_jax.models.vit import resized_positions
from ftwt_jax.weights.entries import Path, Shape, Shapes

CLASSIFIER = ("params", "classifier", "dense")
# The embedding of positions of a transformer, whose second axis follows from the size of the images.
POSITIONS = ("params", "positions")
# The two names of the unit that takes the images.
FIRST_UNITS = ("stem", "unit0")
RGB = 3


def can_adapt(path: Path, have: Shape, need: Shape) -> bool:
    """Whether `adapt` can turn an array of shape `have` into one of shape `need`."""
    if path[:3] == CLASSIFIER:
        return have[:-1] == need[:-1]
    if path == POSITIONS:
        return have[2] == need[2]
    axis = channel_axis(path)
    if axis is None or len(have) != len(need):
        return False
    return have[axis] == RGB and need == (*have[:axis], 1, *have[axis + 1 :])


def channel_axis(path: Path) -> int | None:
    """Axis of an array over the channels of the images; None if it has none."""
    if path[1] not in FIRST_UNITS or path[-1] != "kernel":
        return None
    return 0 if HEAD_NAME in path else 2


def adapt(variables: Mapping[str, Any], shapes: Shapes) -> tuple[dict[str, Any], list[str]]:
    """Adapts variables to the same network with other classes, for grey images instead of RGB, or of another size.

    A classifier of another size is re-initialised. Embeddings of positions are resized for images of another size. From
    RGB to grey, kernels are summed over the channels, which equals showing the old network the grey image in all three,
    up to the channels' different means and deviations.

    Args:
      variables: {"params": ..., "batch_stats": ...}.
      shapes: the wanted shapes, by path; other differences than these are left as they are.

    Returns:
      The variables, and a sentence for each change.
    """
    arrays, notes = dict(flatten_dict(variables)), []
    kernel = (*CLASSIFIER, "kernel")
    features, classes = shapes[kernel]
    if arrays[kernel].shape[1] != classes:
        notes.append(f"it has {arrays[kernel].shape[1]:,} classes, not {classes:,}: the classifier is re-initialised")
        fresh = Classifier(classes).init(jax.random.key(0), jnp.zeros((1, 1, 1, features)))["params"]["dense"]
        arrays |= {(*CLASSIFIER, leaf): value for leaf, value in fresh.items()}
    summed = [path for path in shapes if channel_axis(path) is not None and arrays[path].shape != shapes[path]]
    for path in summed:
        arrays[path] = arrays[path].sum(axis=channel_axis(path), keepdims=True)
    if summed:
        notes.append(
            "it was trained on RGB and the images are grey: the kernels of its first unit are summed over the channels"
        )
    if POSITIONS in shapes and arrays[POSITIONS].shape != shapes[POSITIONS]:
        side = math.isqrt(shapes[POSITIONS][1] - 1)
        arrays[POSITIONS] = resized_positions(jnp.asarray(arrays[POSITIONS]), (side, side))
        notes.append("it was trained on images of another size: its embeddings of positions are resized")
    return unflatten_dict(arrays), notes


def has_fresh_classifier(variables: Mapping[Path, Any], shapes: Shapes) -> bool:
    """Whether `adapt` re-initialises the classifier for these shapes; both by path."""
    kernel = (*CLASSIFIER, "kernel")
    return variables[kernel].shape != shapes[kernel]
