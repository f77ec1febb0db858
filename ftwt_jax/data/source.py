"""What a data set is to the rest of the program: two random-access sequences and a few numbers."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np

from ftwt_jax.data.skipped import Skipped


class Example(TypedDict):
    """One image and its class.

    `image` is uint8 [H, W, channels], or a JPEG, PNG or WebP file, as its bytes or its path; `label` counts classes
    from 0; `name` is what a warning calls the image.
    """

    image: np.ndarray | bytes | pathlib.Path
    label: int | np.integer
    name: NotRequired[str]


class Source(Protocol):
    """A random-access sequence of examples; read from several threads at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """A source held in memory: images uint8 [n, H, W, channels], labels int32 [n]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": self.labels[index]}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set.

    Attributes:
      train, test: the sources; `test` is the held-out split on which accuracy is reported.
      num_classes: number of classes.
      image_shape: (H, W, channels) of every image that the network is given.
      mean, std: per channel of the training images scaled to [0, 1]; the network sees (x / 255 - mean) / std.
      crop_padding: training images are padded by so many zero pixels and cropped at random.
      flip: training images are mirrored at random.
      resized_crop: images come in sizes of their own: for training, a random region is resized to `image_shape`; for
        evaluation, the central one.
      class_names: in the order of the labels; empty where classes are only numbers.
      skipped: images that could not be decoded.
    """

    train: Source
    test: Source
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: Sequence[float]
    std: Sequence[float]
    crop_padding: int = 0
    flip: bool = False
    resized_crop: bool = False
    class_names: tuple[str, ...] = ()
    skipped: Skipped = dataclasses.field(default_factory=Skipped)

    def describe(self) -> dict[str, Any]:
        """What a trained network must remember of its data, as plain JSON data."""
        return {
            "class_names": list(self.class_names),
            "train_size": len(self.train),
            "image_shape": list(self.image_shape),
            "mean": [float(value) for value in self.mean],
            "std": [float(value) for value in self.std],
        }
