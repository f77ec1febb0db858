"""An ONNX graph in the making: nodes, constants, and arrays that know in which order their axes are stored."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ftwt_jax.errors import UserError


class NoOperatorError(Exception):
    """ONNX has no operator, or none of ours, for what an equation does; the message says what that is."""


class UnknownOperatorError(UserError):
    """An engine has no function for an operator of a graph; the message names it."""


# The size of an axis; text for one that is open, such as "N".
Size = int | str
# Images are stored channels first, as engines want them; the function itself counts its axes channels last.
CHANNELS_FIRST = (0, 3, 1, 2)
# What LayerNormalization and the reductions with axes as attributes need, and engines of several years take.
OPSET, IR_VERSION = 17, 8


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array that depends on the images.

    Attributes:
      name: of the node's output.
      shape: as the function sees it.
      order: axis `order[i]` of the function's array is stored as axis i.
      held: as `shape`, but 1 along axes that are broadcast when they are needed.
      dtype: as stored: float32, or that of integers and of booleans.
    """

    name: str
    shape: tuple[Size, ...]
    order: tuple[int, ...]
    held: tuple[Size, ...]
    dtype: np.dtype

    @property
    def stored(self) -> tuple[Size, ...]:
        """Sizes of the stored axes."""
        return tuple(self.held[axis] for axis in self.order)

    def place(self, axis: int) -> int:
        """Where an axis of the function's array is stored."""
        return self.order.index(axis)


@dataclasses.dataclass(frozen=True)
class Node:
    """A node of the graph; `label` is the layer it comes from."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...]
    label: str

    def get(self, attribute: str, default: Any = None) -> Any:
        """The value of an attribute."""
        return dict(self.attributes).get(attribute, default)


class Graph:
    """Nodes in the order in which they were made; a node that is there already is not made again.

    Args:
      outer: the graph in which this one is a branch; it may use the other's nodes, and leaves constants to it.
    """

    def __init__(self, outer: "Graph | None" = None):
        self.nodes: list[Node] = []
        self.label = ""
        self._outer = outer
        self._names: dict[str, int] = {} if outer is None else outer._names
        self._known: dict[Any, Node] = {} if outer is None else dict(outer._known)
        self._makers: dict[str, Node] = {} if outer is None else dict(outer._makers)
        self.constants: dict[str, np.ndarray] = {} if outer is None else outer.constants
        self._constant_names: dict[Any, str] = {} if outer is None else outer._constant_names

    def node(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Node:
        """A node of this kind."""
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in attributes.items()}
        key = (kind, inputs, outputs, tuple(sorted(values.items())))
        # Branches of an If hold graphs, which are never the same.
        if kind == "If" or key not in self._known:
            names = tuple(self._new_name(kind) for _ in range(outputs))
            made = Node(kind, inputs, names, tuple(sorted(values.items())), self.label)
            self.nodes.append(made)
            self._known[key] = made
            self._makers |= dict.fromkeys(names, made)
            return made
        return self._known[key]

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """The only output of a node of this kind."""
        return self.node(kind, *inputs, **attributes).outputs[0]

    def constant(self, array: Any) -> str:
        """The name of a constant; floats are held in float32."""
        array = stored_dtype(np.asarray(array))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constant_names:
            self._constant_names[key] = name = self._new_name("constant")
            self.constants[name] = array
        return self._constant_names[key]

    def maker(self, name: str, kind: str) -> Node | None:
        """The node that makes an output, if it is of this kind."""
        node = self._makers.get(name)
        return node if node is not None and node.kind == kind else None

    def scalar(self, name: str) -> float | None:
        """The number that a constant holds, if it is one."""
        array = self.constants.get(name)
        return float(array.reshape(())) if array is not None and array.size == 1 else None

    def _new_name(self, kind: str) -> str:
        base = f"{self.label}/{kind}" if self.label and kind != "constant" else kind
        count = self._names[base] = self._names.get(base, 0) + 1
        return base if count == 1 else f"{base}_{count}"

    # What keeps axes in mind.

    def stored_as(self, x: Tensor, order: Sequence[int]) -> Tensor:
        """The same array, its axes stored in another order."""
        order = tuple(order)
        if order == x.order:
            return x
        real = [axis for axis in x.order if x.held[axis] != 1]
        if real == [axis for axis in order if x.held[axis] != 1]:
            return self.restored(x, x.shape, order, x.held)
        name = self.op("Transpose", x.name, perm=[x.order.index(axis) for axis in order])
        return dataclasses.replace(x, name=name, order=order)

    def restored(self, x: Tensor, shape: tuple[Size, ...], order: tuple[int, ...], held: tuple[Size, ...]) -> Tensor:
        """The same numbers in the same order with other axes of size 1 between them."""
        wanted = tuple(held[axis] for axis in order)
        name, stored = x.name, x.stored
        before = self.maker(name, "Unsqueeze") or self.maker(name, "Squeeze")
        if before is not None and wanted != stored:
            # Straight from where the numbers come from.
            axes = self.constants[before.inputs[1]].tolist()
            name = before.inputs[0]
            if before.kind == "Unsqueeze":
                stored = tuple(size for place, size in enumerate(stored) if place not in axes)
            else:
                sizes = iter(stored)
                stored = tuple(1 if at in axes else next(sizes) for at in range(len(stored) + len(axes)))
        bare = tuple(size for size in stored if size != 1)
        if wanted == stored:
            pass
        elif stored == bare:
            name = self.unsqueezed(name, [place for place, size in enumerate(wanted) if size == 1])
        elif wanted == bare:
            axes = [place for place, size in enumerate(stored) if size == 1]
            name = self.op("Squeeze", name, self.constant(np.array(axes, np.int64)))
        else:
            name = self._reshaped(name, stored, wanted)
        return Tensor(name, shape, order, held, x.dtype)

    def unsqueezed(self, name: str, axes: list[int]) -> str:
        """An array with axes of size 1 at these places."""
        for kind in ("ReduceMean", "ReduceMax", "ReduceMin"):
            node = self.maker(name, kind)
            if node is not None and list(node.get("axes")) == axes:
                return self.op(kind, node.inputs[0], axes=axes, keepdims=1)
        return self.op("Unsqueeze", name, self.constant(np.array(axes, np.int64)))

    def _reshaped(self, name: str, stored: tuple[Size, ...], wanted: tuple[Size, ...]) -> str:
        sizes = [
            size if isinstance(size, int) else 0 if stored[place : place + 1] == (size,) else -1
            for place, size in enumerate(wanted)
        ]
        return self.op("Reshape", name, self.constant(np.array(sizes, np.int64)))

    def full(self, x: Tensor) -> Tensor:
        """The same array with nothing left to broadcast."""
        if x.held == x.shape:
            return x
        for held, size in zip(x.held, x.shape, strict=True):
            if held != size and isinstance(size, str):
                raise NoOperatorError("an array is repeated for every image")
        sizes = [size if isinstance(size, int) else 1 for size in (x.shape[axis] for axis in x.order)]
        name = self.op("Expand", x.name, self.constant(np.array(sizes, np.int64)))
        return dataclasses.replace(x, name=name, held=x.shape)

    def reshaped(self, x: Tensor, shape: tuple[Size, ...]) -> Tensor:
        """The array in another shape, as `jnp.reshape`."""
        held = _held_alike(x, shape)
        if held is not None:
            axes = dict(
                zip(
                    [axis for axis, size in enumerate(x.shape) if size != 1],
                    [axis for axis, size in enumerate(shape) if size != 1],
                    strict=True,
                )
            )
            return self.restored(x, shape, natural_order([axes[a] for a in x.order if a in axes], len(shape)), held)
        x = self.full(self.stored_as(x, range(len(x.shape))))
        if sum(isinstance(size, str) and x.shape[i : i + 1] != (size,) for i, size in enumerate(shape)) > 1:
            raise NoOperatorError("a reshape leaves two sizes open")
        return Tensor(self._reshaped(x.name, x.shape, shape), shape, tuple(range(len(shape))), shape, x.dtype)


def _held_alike(x: Tensor, shape: tuple[Size, ...]) -> tuple[Size, ...] | None:
    """What is held of `shape` if it differs from that of x in axes of size 1 alone; None if it does not."""
    if [size for size in x.shape if size != 1] != [size for size in shape if size != 1]:
        return None
    held = iter([held for held, size in zip(x.held, x.shape, strict=True) if size != 1])
    return tuple(1 if size == 1 else next(held) for size in shape)


def natural_order(kept: Sequence[int], rank: int) -> tuple[int, ...]:
    """An order for `rank` axes in which those of `kept` follow each other like that: channels first where it may be."""
    for order in (CHANNELS_FIRST if rank == 4 else tuple(range(rank)), tuple(range(rank))):
        if [axis for axis in order if axis in kept] == list(kept):
            return order
    return (*kept, *(axis for axis in range(rank) if axis not in kept))


def stored_dtype(array: np.ndarray) -> np.ndarray:
    """The array as a graph holds it: numbers with a fraction in float32."""
    whole = array.dtype == bool or np.issubdtype(array.dtype, np.integer)
    return array if whole else array.astype(np.float32)


def count(sizes: Sequence[Size]) -> int:
    """The product of sizes, none of them open."""
    if any(isinstance(size, str) for size in sizes):
        raise NoOperatorError("a number of images is part of a computation")
    return math.prod(int(size) for size in sizes)
