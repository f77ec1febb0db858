"""Where a layer of ours sits in a PyTorch network."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import flax.linen as nn

# The only module of a gate head in the published code.
HEAD = "mask.model.1Conv2dMask"


@dataclasses.dataclass(frozen=True)
class Place:
    """The PyTorch modules of one layer.

    Attributes:
      conv: the convolution or linear layer; a tensor that belongs to no layer, by its whole name.
      bn: its norm, or a norm that stands alone.
      head: its gate head.
      copy: a module with the same convolution and batch norm once more, in the published gated networks.
      ones: axes of size 1 that a tensor which belongs to no layer has behind ours.
    """

    conv: str = ""
    bn: str = ""
    head: str = ""
    copy: str = ""
    ones: int = 0


class Naming(NamedTuple):
    """A layout.

    Attributes:
      classifier: name of the classifier.
      place: the place of any other layer from (its path, network, whether gated).
      left_out: what the names of parts begin with that our network does not have, with what they are called.
    """

    classifier: str
    place: Callable[[str, nn.Module, bool], Place]
    left_out: Mapping[str, str] = MappingProxyType({})


def beside(conv: str, bn: str) -> Place:
    """The place of a unit that has no published name for its gate head: it becomes a child of the convolution."""
    return Place(conv, bn, head=f"{conv}.{HEAD}")


def numbers(unit: str) -> list[int]:
    """The numbers in a name: stage1_block0/conv2 has 1, 0 and 2."""
    return [int(digits) for digits in re.findall(r"\d+", unit)]


def staged(index: int, stages: Sequence[int]) -> str:
    """`STAGE.BLOCK` of the block at `index`, with this many blocks in each stage."""
    stage = 0
    while index >= stages[stage]:
        index -= stages[stage]
        stage += 1
    return f"{stage}.{index}"
