"""What the rest of the program knows of a data set: two random-access sequences and a few numbers."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np

from ftwt_jax.data.skipped import Skipped
from ftwt_jax.errors import UserError


class Example(TypedDict):
    """One image and its class.

    `image` is uint8 [H, W, channels], or a file of a format in `decoding.EXTENSIONS` as bytes or path; `label` is the
    number of the class, from 0; `name` is what warnings call the image.
    """

    image: np.ndarray | bytes | pathlib.Path
    label: int | np.integer
    name: NotRequired[str]


class Source(Protocol):
    """A random-access sequence of images with labels; several threads read it at once."""

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
class NoImages:
    """A source of known length that cannot be read."""

    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        raise UserError(f"image {index} cannot be read: this data set was described without its images")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set.

    Attributes:
      train, test: the sources; `test` is the held-out split on which accuracy is reported.
      num_classes: number of classes.
      image_shape: (H, W, channels) of the network's input.
      mean, std: per channel of the training images scaled to [0, 1]; the network sees (x / 255 - mean) / std.
      crop_padding: zero pixels added on each side of a training image before it is cropped at random.
      flip: training images are mirrored at random.
      resized_crop: images vary in size, and a region is resized to `image_shape`: a random one for training, the
        central one for evaluation.
      class_names: in the order of the labels; empty if classes are only numbers.
      skipped: images that could not be decoded.
      order_doubt: a sentence on how else the classes may be numbered, if neither order was chosen; empty if there is
        only one.
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
    order_doubt: str = ""

    def arrays(self, source: Source) -> ArraySource | None:
        """`source` if it holds its images in memory as the network takes them, so that none has to be decoded."""
        return source if isinstance(source, ArraySource) and not self.resized_crop else None

    def describe(self) -> dict[str, Any]:
        """The facts about the data that are kept with a trained network, as plain JSON data."""
        return {
            "class_names": list(self.class_names),
            **({"order_doubt": self.order_doubt} if self.order_doubt else {}),
            "train_size": len(self.train),
            "image_shape": list(self.image_shape),
            "mean": [float(value) for value in self.mean],
            "std": [float(value) for value in self.std],
        }
