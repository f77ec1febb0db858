"""What a data set is to the rest of the program: two random-access sequences and a few numbers."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, TypedDict

import numpy as np


class Example(TypedDict):
    """One picture, uint8 [H, W, channels], and its class, int32."""

    image: np.ndarray
    label: np.ndarray


class Source(Protocol):
    """A random-access sequence of examples."""

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
      image_shape: (H, W, channels) of every picture.
      mean, std: per channel of the training pictures scaled to [0, 1]; the network sees (x / 255 - mean) / std.
      crop_padding: training pictures are padded by so many zero pixels and cropped at random.
      flip: training pictures are mirrored at random.
    """

    train: Source
    test: Source
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: Sequence[float]
    std: Sequence[float]
    crop_padding: int = 0
    flip: bool = False
