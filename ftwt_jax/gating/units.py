"""The gated unit, and the two layers that carry no gate but whose work counts: plain convolution and classifier."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from ftwt_jax.errors import UserError
from ftwt_jax.gating.activations import (
    Activations,
    LayerRecord,
    Layers,
    as_activations,
    fingerprint,
    merge_layers,
)
from ftwt_jax.gating.contract import effect
from ftwt_jax.gating.convolutions import Convolution, Padding, Sizes
from ftwt_jax.gating.gates import HEAD_NAME, GateConfig, GateHead, GateOutput
from ftwt_jax.gating.norms import Act, Norm, activated, folds, normalized_maps
from ftwt_jax.gating.ranking import topk_mass_mask
from ftwt_jax.ops.reductions import max_pool_all, mean_pool_all


@struct.dataclass
class Routes:
    """The way of each image of a batch through a network of subnets.

    Attributes:
      logits: float32 [N, K], of the router.
      choice: the subnet that each image was run in.
    """

    logits: Float[Array, "N K"]
    choice: Int[Array, " N"]


@struct.dataclass
class Outputs:
    """What a network returns.

    Attributes:
      logits: float32 [N, classes].
      layers: record of every layer, in forward order; `ftwt.macs` counts them.
      routes: the subnets of the images; None for a network without such.
    """

    logits: Float[Array, "N classes"]
    layers: Sequence[LayerRecord]
    routes: Routes | None = None

    @property
    def gates(self) -> tuple[GateOutput, ...]:
        """The gates in forward order; empty for a dense network."""
        return tuple(layer.gate for layer in self.layers if layer.gate is not None)

    @property
    def gate_names(self) -> tuple[str, ...]:
        """The names of the gated units, in the order of `gates`."""
        return tuple(layer.name for layer in self.layers if layer.gate is not None)


def over_pixels(mask: Array, ndim: int) -> Array:
    """[N, C] as it broadcasts to maps [N, ..., C] of `ndim` axes."""
    return jnp.expand_dims(mask, tuple(range(1, ndim - 1)))


def _call_of(layer: nn.Module, *inputs: Activations) -> str:
    """Tells this call of a layer from its others: by its number, and by what it is given.

    Within `nn.remat` and its like each call of the whole begins to count anew, but then on other activations.
    """
    counts = layer.scope.__dict__
    count = counts["_ftwt_calls"] = counts.get("_ftwt_calls", 0) + 1
    return fingerprint("/".join(layer.path), count, *(each.trail for each in inputs))


class _Convolved:
    """What the two layers with a convolution share: their fields are those of `Convolution`, and `norm`."""

    @property
    def convolution(self: Any) -> Convolution:
        """The convolution."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Convolution)}
        groups = getattr(self, "feature_group_count", None)
        return Convolution(**(fields if groups is None else {**fields, "groups": groups}))

    def folds(self: Any) -> bool:
        """Whether the norm is one number and one more for each filter in inference, or there is none."""
        return folds(self.norm)

    def _normed(self: Any, x: Activations, train: bool) -> Array:
        """The maps after convolution and norm; call it inside a method with `nn.compact`."""
        convolution = self.convolution
        convolution.check(x.values)
        y = convolution.layer(train)(x.values)
        if y.ndim > 2 and not all(y.shape[1:-1]):
            raise UserError(
                f"a kernel of {convolution.window} does not fit into maps of shape {x.shape}: pad them, or shrink it"
            )
        return normalized_maps(self.norm, y, train, self.dtype, x.control)

    def _record(self: Any, x: Activations, y: Array, *others: Activations, **more: Any) -> LayerRecord:
        """The record of a call that turned `x`, with others, into maps like `y`."""
        convolution = self.convolution
        return LayerRecord(
            name="/".join(self.path),
            positions=convolution.positions(x.shape, y.shape),
            kernel_area=convolution.kernel_area,
            in_features=x.shape[-1],
            out_features=self.features,
            groups=convolution.groups,
            active_in=x.active,
            call=_call_of(self, x, *others),
            **more,
        )


class GatedUnit(_Convolved, nn.Module):
    """Convolution, norm, activation, and a gate head beside them that chooses filters per image.

    Replaces `nn.Conv` + `nn.BatchNorm` + activation in any Linen network. With `gates=None` it is just those three,
    under the same parameter names, so a dense network's variables initialise a gated one.

    Attributes:
      features: number of filters, C.
      kernel_size: sides of the kernel as in `nn.Conv`, one number for each axis between images and channels; one alone:
        a square, for maps [N, H, W, channels].
      strides, kernel_dilation: for each of these axes, or one for all.
      groups: number of groups; `groups == C_in` makes the convolution depthwise.
      padding: as of `nn.Conv`: "SAME", "VALID" or another of its names, a number of rows, numbers or pairs by axis.
        None: (kernel_size - 1) // 2 zeros on each side, as in the published networks. "SAME" at stride 2 pads an even
        side by one row less, at its start.
      use_bias: bias in the convolution (before the norm).
      act: activation, a function or a Flax module; None: none.
      gates: settings of the gate, or None for a dense unit.
      dtype: of the computation; parameters, statistics, ranking and gate remain float32.
      norm: "batch"; "layer", "group" (Flax's, over the channels); None: none; a Flax module or a function that makes
        one. One that mixes channels needs all filters computed, so that gates save only what follows. A module that is
        made within a network, and given to several units, is one norm for all of them, as everywhere in Flax.
      transpose: a transposed convolution, as `nn.ConvTranspose`.
      feature_group_count: the same as `groups`, as `nn.Conv` calls it.
    """

    features: int
    kernel_size: Sizes | None = 3
    strides: Sizes = 1
    groups: int = 1
    padding: Padding = None
    use_bias: bool = False
    act: Act | None = nn.relu
    gates: GateConfig | None = None
    dtype: Any = None
    norm: Norm = "batch"
    kernel_dilation: Sizes = 1
    transpose: bool = False
    feature_group_count: int | None = None

    @nn.compact
    def __call__(
        self, inputs: Activations | Array, train: bool = False, shortcut: Activations | Array | None = None
    ) -> Activations:
        """Runs the unit on [N, H, W, C_in]; returns [N, H', W', C] with the filters that are off at zero.

        Args:
          inputs: feature maps, plain or as `Activations`.
          train: use the batch's statistics and update the running ones.
          shortcut: added after the norm and before the activation, so that ranking and mask come after the addition.

        Raises:
          UserError: the sizes of the unit do not fit the maps.
        """
        x = as_activations(inputs)
        y = self._normed(x, train)
        layers = x.layers
        added = None
        if shortcut is not None:
            added = as_activations(shortcut)
            y = y + check_shortcut(added.values, y.shape)
            layers = merge_layers(layers, added.layers)
        y = activated(self.act, y)

        gate = None if self.gates is None else self._gate(self.gates, x, y)
        record = self.record(x, y, gate, gate is not None and self.computes_all(y), added)
        out = x.made(values=y, active=None, layers=Layers((*layers, record)), trail=record.call)
        if self.gates is None or gate is None:
            return out
        out = out.made(values=jnp.where(over_pixels(gate.mask, y.ndim), y, 0), active=gate.mask)
        if self.gates.pool == "mean" or not x.control.targets:
            return out
        # The pass over the maps is the one that the targets take: XLA sees that behind a ReLU both are the same.
        maxima = max_pool_all(jax.lax.stop_gradient(y)).astype(jnp.float32)
        return out.with_maxima(jnp.where(gate.mask, maxima, 0))

    def computes_all(self, y: Array | jax.ShapeDtypeStruct) -> bool:
        """Whether every filter has to be computed, since norm or activation (of maps like `y`) mix them."""
        return not self.folds() or not (self.act is None or self.act is nn.relu or effect(self.act, y).own)

    def record(
        self, x: Activations, y: Array, gate: GateOutput | None, whole: bool, shortcut: Activations | None = None
    ) -> LayerRecord:
        """The record of a call that turned `x` into maps like `y`; `whole`: every filter had to be computed."""
        own = self.gates is not None and self.gates.reads_own(x.shape[-1], self.features, self.convolution.groups)
        return self._record(
            x,
            y,
            *([] if shortcut is None else [shortcut]),
            unit=True,
            bias_terms=self.features if self.use_bias else 0,
            active_out=None if gate is None or whole else gate.mask,
            gate=gate,
            head_inputs=0 if x.control.masks == "subnets" else 1 if own else None,
        )

    def _gate(self, gates: GateConfig, x: Activations, y: Array) -> GateOutput:
        control = x.control
        logits: Array | None = None
        target: Array | None = None
        if control.targets:
            r = gates.r if control.r is None else control.r
            target = topk_mass_mask(jax.lax.stop_gradient(y), r, gates.min_filters)
        if control.masks == "heads" or (self.is_initializing() and control.masks != "subnets"):
            joint = gates.mode == "joint"
            source = x.values if joint else jax.lax.stop_gradient(x.values)
            own = gates.reads_own(source.shape[-1], self.features, self.convolution.groups)
            logits = GateHead(self.features, gates.pool, gates.norm, own, name=HEAD_NAME)(
                source, None if joint else x.maxima
            )
            logits = logits if control.offset is None else logits + control.offset
        mask = control.subnet_mask("/".join(self.path))
        if control.masks == "heads" and logits is not None:
            mask = logits > 0
        elif control.masks == "targets" and target is not None:
            mask = target
        elif mask is None:
            mask = jnp.ones((y.shape[0], self.features), bool)
        return GateOutput(logits, mask, target)


def check_shortcut(values: Array, shape: tuple[int, ...]) -> Array:
    """A shortcut that can be added to maps of this shape; raises `UserError` if their sum would have another one."""
    fits = values.ndim == len(shape) and all(
        size in (1, wanted) for size, wanted in zip(values.shape, shape, strict=True)
    )
    if not fits:
        raise UserError(
            f"a shortcut of shape {values.shape} cannot be added to a unit's output, {shape}: give it as many images, "
            "pixels and channels"
        )
    return values


class GatedDense(GatedUnit):
    """A dense layer that is a unit: `nn.Dense`, activation, gate head; on rows [N, C_in], tokens [N, T, C_in] or maps.

    A neuron is a filter and tokens are pixels: an image has one mask for all its tokens.
    """

    kernel_size: Sizes | None = None
    use_bias: bool = True
    norm: Norm = None


class PlainConv(_Convolved, nn.Module):
    """Convolution and norm without a gate, whose work counts: a projection shortcut, the last step of a bottleneck.

    Subnets leave out filters that are added to a unit's, as those of a projection shortcut are.

    Attributes:
      kernel_size: as of `GatedUnit`; None: a dense layer.
      act: activation; None: none.
      Others as of `GatedUnit`.
    """

    features: int
    strides: Sizes = 1
    dtype: Any = None
    kernel_size: Sizes | None = 1
    groups: int = 1
    padding: Padding = None
    use_bias: bool = False
    norm: Norm = "batch"
    act: Act | None = None
    kernel_dilation: Sizes = 1
    transpose: bool = False

    @nn.compact
    def __call__(self, inputs: Activations | Array, train: bool = False) -> Activations:
        """Runs on [N, H, W, C_in]; every filter is computed, and can be non-zero (batch norm adds its bias)."""
        x = as_activations(inputs)
        y = activated(self.act, self._normed(x, train))
        mask = x.control.subnet_mask("/".join(self.path))
        record = self.record(x, y, mask)
        y = y if mask is None else jnp.where(over_pixels(mask, y.ndim), y, 0)
        return x.made(values=y, active=mask, layers=Layers((*x.layers, record)), trail=record.call)

    def record(self, x: Activations, y: Array, mask: Bool[Array, "N C"] | None = None) -> LayerRecord:
        """The record of a call that turned `x` into maps like `y`; `mask`: the filters of each image's subnet."""
        return self._record(x, y, active_out=mask)


class Classifier(nn.Module):
    """Global average pool and one linear layer: the end of every network here.

    Attributes:
      num_classes: number of logits.
      counted_pool: whether the published dense total of this network counts the pool's outputs.
      dtype: of the computation; logits come back in float32.
    """

    num_classes: int
    counted_pool: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, inputs: Activations | Array) -> Outputs:
        """Turns activations [N, H, W, C], or rows [N, C], into `Outputs` with logits [N, num_classes]."""
        x = as_activations(inputs)
        pooled = mean_pool_all(x.values)
        dense = nn.Dense(self.num_classes, kernel_init=nn.initializers.lecun_normal(), dtype=self.dtype, name="dense")
        return Outputs(dense(pooled).astype(jnp.float32), Layers((*x.layers, self.record(x))))

    def record(self, x: Activations) -> LayerRecord:
        """The record of a call on `x`."""
        features = x.shape[-1]
        return LayerRecord(
            name="/".join(self.path),
            positions=1,
            kernel_area=1,
            in_features=features,
            out_features=self.num_classes,
            bias_terms=features if self.counted_pool else 0,
            active_in=x.active,
            call=_call_of(self, x),
        )
