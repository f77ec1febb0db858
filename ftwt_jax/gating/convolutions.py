"""The convolution of a layer, spelled as `nn.Conv` spells it, and what its sizes are."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from ftwt_jax.errors import UserError, unknown_name
from ftwt_jax.ops.convolution import conv_general_dilated, training_convolution

PADDINGS = ("SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL")
Sizes = int | Sequence[int]
Pairs = tuple[tuple[int, int], ...]
# Sides of a window, strides, zeros before and after; along two axes.
Plane = tuple[tuple[int, ...], tuple[int, ...], Pairs]
Padding = str | int | Sequence[int | tuple[int, int]] | None


def _whole(what: str, value: Any, least: int = 1) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or value < least:
        raise UserError(f"{what} is a whole number, {least} or more; got {value!r}")
    return int(value)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution or, with `kernel_size=None`, a dense layer at every position.

    Attributes:
      features: number of filters, C.
      kernel_size: sides of the kernel, one number for each axis of the maps; one alone is the side of a square in two.
      strides, kernel_dilation: for each of these axes, or one for all.
      padding: as of `nn.Conv`; None: (kernel_size - 1) // 2 zeros on each side, times the dilation, as in the published
        networks (of a transposed one: SAME).
      groups: number of groups; with as many as input channels it is depthwise.
      transpose: a transposed convolution, `nn.ConvTranspose`.
    """

    features: int
    kernel_size: Sizes | None = 3
    strides: Sizes = 1
    groups: int = 1
    padding: Padding = None
    use_bias: bool = False
    kernel_dilation: Sizes = 1
    transpose: bool = False
    dtype: Any = None

    @property
    def name(self) -> str:
        """Of the layer among the parameters of its unit."""
        return "dense" if self.kernel_size is None else "conv"

    @property
    def window(self) -> tuple[int, ...]:
        """The sides of the kernel; empty for a dense layer."""
        if self.kernel_size is None:
            return ()
        size = self.kernel_size
        sides = tuple(size) if isinstance(size, Sequence) else (size, size)
        return tuple(_whole("a side of kernel_size", side) for side in sides)

    @property
    def steps(self) -> tuple[int, ...]:
        """The strides, one for each axis."""
        return self._each("strides", self.strides)

    @property
    def dilation(self) -> tuple[int, ...]:
        """The dilation of the kernel, one number for each axis."""
        return self._each("kernel_dilation", self.kernel_dilation)

    def _each(self, what: str, sizes: Any) -> tuple[int, ...]:
        each = tuple(sizes) if isinstance(sizes, Sequence) else (sizes,) * len(self.window)
        if len(each) != len(self.window):
            raise UserError(f"{what} has a number for each side of the kernel, {self.window}; got {sizes!r}")
        return tuple(_whole(what, size) for size in each)

    @property
    def pads(self) -> str | tuple[tuple[int, int], ...]:
        """The padding as XLA takes it: a name, or what is added before and after along each axis."""
        padding = self.padding
        if padding is None:
            if self.transpose:
                return "SAME"
            rows = [(side - 1) // 2 * step for side, step in zip(self.window, self.dilation, strict=True)]
            return tuple((row, row) for row in rows)
        if isinstance(padding, str):
            known: Sequence[str] = PADDINGS[:-1] if len(self.window) != 1 else PADDINGS
            known = ("SAME", "VALID", "CIRCULAR") if self.transpose else known
            if padding not in known:
                raise unknown_name("padding", padding, known)
            return padding
        each = tuple(padding) if isinstance(padding, Sequence) else (padding,) * len(self.window)
        pairs: list[Any] = [pad if isinstance(pad, Sequence) else (pad, pad) for pad in each]
        numbers: list[Any] = [rows for pair in pairs for rows in pair]
        whole = all(isinstance(rows, (int, np.integer)) and not isinstance(rows, bool) for rows in numbers)
        if len(pairs) != len(self.window) or any(len(pair) != 2 for pair in pairs) or not whole:
            raise UserError(
                f"padding is a name ({', '.join(PADDINGS)}), a number of rows, or one or a pair of them for each side "
                f"of the kernel, {self.window}; got {padding!r}"
            )
        return tuple((int(before), int(after)) for before, after in pairs)

    def check(self, maps: Array) -> None:
        """Raises `UserError` unless this convolution fits maps of this shape, [N, ..., C_in]."""
        _whole("features", self.features)
        _whole("groups", self.groups)
        window, inputs = self.window, maps.shape[-1]
        if self.kernel_size is None:
            if maps.ndim < 2:
                raise UserError(f"a dense unit takes [N, ..., channels]; got shape {maps.shape}")
            plain = Convolution(self.features, None, use_bias=self.use_bias, dtype=self.dtype)
            if self != plain:
                raise UserError(
                    "a dense unit has no strides, groups, padding, dilation or transposition: leave them out"
                )
            return
        if maps.ndim != len(window) + 2:
            axes = ", ".join(["N", *["H", "W", "D"][: len(window)], "channels"])
            raise UserError(
                f"a kernel of {window} takes maps [{axes}]; got shape {maps.shape}: give kernel_size a number for each "
                "axis between images and channels"
            )
        if inputs % self.groups or self.features % self.groups:
            raise UserError(f"groups={self.groups} does not divide both {inputs} channels and {self.features} filters")
        if self.transpose and self.groups > 1:
            raise UserError("a transposed convolution has no groups: leave groups=1")
        _ = self.steps, self.dilation, self.pads

    def layer(self, train: bool = False, **changes: Any) -> nn.Conv | nn.ConvTranspose | nn.Dense:
        """The layer itself; call it inside a method with `nn.compact`.

        Args:
          changes: other fields than these; `parent=None`: as a module of its own.
        """
        parent = {"parent": changes.pop("parent")} if "parent" in changes else {}
        spec = dataclasses.replace(self, **changes)
        common: dict[str, Any] = {"use_bias": spec.use_bias, "dtype": spec.dtype, "name": spec.name, **parent}
        common["kernel_init"] = nn.initializers.he_normal()
        if spec.kernel_size is None:
            return nn.Dense(spec.features, **common)
        common |= {"strides": spec.steps, "padding": spec.pads, "kernel_dilation": spec.dilation}
        if spec.transpose:
            return nn.ConvTranspose(spec.features, spec.window, **common)
        convolve: Callable = training_convolution if train else conv_general_dilated
        return nn.Conv(
            spec.features, spec.window, feature_group_count=spec.groups, conv_general_dilated=convolve, **common
        )

    def run(self, maps: Array, kernel: Array, bias: Array, groups: int | None = None) -> Array:
        """Runs the layer with the given weights, which may cover only some of its channels and filters."""
        groups = self.groups if groups is None else groups
        layer = self.layer(features=kernel.shape[-1], groups=groups, use_bias=True, parent=None)
        return jnp.asarray(layer.apply({"params": {"kernel": kernel, "bias": bias}}, maps))

    def in_a_plane(self, sides: Sequence[int]) -> Plane | None:
        """Window, strides and zeros around the maps of the same convolution of [N, H, W, C]; None if there is none.

        Args:
          sides: of the maps. Those of one axis are columns of width 1, as `ops.reductions.as_maps` makes them.
        """
        if self.kernel_size is None:
            return (1, 1), (1, 1), ((0, 0), (0, 0))
        window, steps, pads = self.window, self.steps, self.pads
        if self.transpose or any(step != 1 for step in self.dilation) or len(window) > 2:
            return None
        if isinstance(pads, str):
            if pads not in ("SAME", "SAME_LOWER", "VALID"):
                return None
            pads = tuple((int(a), int(b)) for a, b in lax.padtype_to_pads(sides, window, steps, pads))
        if any(rows < 0 for pair in pads for rows in pair):
            return None
        if len(window) == 1:
            return (*window, 1), (*steps, 1), (*pads, (0, 0))
        return window, steps, pads

    def positions(self, before: tuple[int, ...], after: tuple[int, ...]) -> int:
        """Pixels at which the kernel is applied, from the shapes of the maps before and after."""
        return math.prod((before if self.transpose else after)[1:-1])

    @property
    def kernel_area(self) -> int:
        """Pixels under the kernel."""
        return math.prod(self.window)
