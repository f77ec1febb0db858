"""Scikit-learn's bundled scans of handwritten digits: 1,797 images of 8x8 grey pixels. Needs no network."""

import jax
import numpy as np

from ftwt_jax.data.build import mean_and_std
from ftwt_jax.data.source import ArraySource, Dataset
from ftwt_jax.errors import UserError

SIDE = 8
TEST_SHARE = 4  # every fourth image of the shuffled set is held out


def load_digits(image_size: int = SIDE) -> Dataset:
    """Loads the digits; the split does not depend on the seed of a run.

    Args:
      image_size: side in pixels; if it is not 8, the scans are enlarged by linear interpolation.

    Raises:
      UserError: `image_size` is smaller than the scans.
    """
    if image_size < SIDE:
        raise UserError(f"the digits are {SIDE}x{SIDE} pixels: config.data.image_size must be at least {SIDE}")
    from sklearn.datasets import load_digits as load_scans

    scans = load_scans()
    images = np.asarray(scans.images / 16 * 255, np.float32)[..., None]
    if image_size != SIDE:
        shape = (len(images), image_size, image_size, 1)
        images = np.asarray(jax.image.resize(images, shape, "linear"))
    images = np.rint(images).clip(0, 255).astype(np.uint8)
    labels = scans.target.astype(np.int32)

    # The scans are ordered by writer, so they are shuffled before the split.
    order = np.random.default_rng(0).permutation(len(images))
    held_out = np.arange(len(order)) % TEST_SHARE == 0
    train, test = order[~held_out], order[held_out]
    mean, std = mean_and_std(images[train])
    return Dataset(
        train=ArraySource(images[train], labels[train]),
        test=ArraySource(images[test], labels[test]),
        num_classes=10,
        image_shape=(image_size, image_size, 1),
        mean=mean,
        std=std,
        crop_padding=image_size // SIDE,
        class_names=tuple(map(str, range(10))),
    )
