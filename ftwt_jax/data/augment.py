"""Augmentation of batches of small images on the device, inside the jit-compiled training step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8, UInt32

from ftwt_jax.data.source import Dataset

Images = UInt8[Array, "n height width channels"]
Augment = Callable[[Images, UInt32[Array, " n"]], Images]


def crop_and_flip(images: Images, positions: UInt32[Array, " n"], key: Array, padding: int, flip: bool) -> Images:
    """Random crop of the zero-padded images, and random mirroring.

    Args:
      images: uint8 [n, H, W, channels].
      positions: number of each image in the stream of all epochs, uint32 [n]. With `key` it alone determines what is
        done to the image, whatever batch or device the image is in.
      key: random key of the run.
      padding: zero pixels added on each side before the crop.
      flip: whether to mirror half of the images left to right.
    """
    height, width, channels = images.shape[1:]

    def augment(image: Array, position: Array) -> Array:
        crop_key, flip_key = jax.random.split(jax.random.fold_in(key, position))
        if padding:
            padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
            top, left = jax.random.randint(crop_key, (2,), 0, 2 * padding + 1)
            image = jax.lax.dynamic_slice(padded, (top, left, 0), (height, width, channels))
        return jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image) if flip else image

    return jax.vmap(augment)(images, positions)


def make_augment(dataset: Dataset, seed: int) -> Augment | None:
    """What the training step does to its images; None if nothing, or if they arrive augmented already."""
    if dataset.resized_crop or not (dataset.crop_padding or dataset.flip):
        return None
    key = jax.random.key(seed)
    return lambda images, positions: crop_and_flip(images, positions, key, dataset.crop_padding, dataset.flip)
