"""The gated unit, and the two layers that carry no gate but whose work counts: shortcut convolution and classifier."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from ftwt_jax.gating.activations import Activations, LayerRecord, as_activations, merge_layers
from ftwt_jax.gating.gates import HEAD_NAME, GateConfig, GateHead, GateOutput
from ftwt_jax.gating.ranking import topk_mass_mask
from ftwt_jax.ops.batch_norm import BatchNorm
from ftwt_jax.ops.convolution import conv_general_dilated, training_convolution
from ftwt_jax.ops.reductions import max_pool_all, mean_pool_all


@struct.dataclass
class Outputs:
    """What a network returns.

    Attributes:
      logits: float32 [N, classes].
      layers: record of every layer, in forward order; `ftwt.macs` counts them.
    """

    logits: Float[Array, "N classes"]
    layers: tuple[LayerRecord, ...]

    @property
    def gates(self) -> tuple[GateOutput, ...]:
        """The gates in forward order; empty for a dense network."""
        return tuple(layer.gate for layer in self.layers if layer.gate is not None)

    @property
    def gate_names(self) -> tuple[str, ...]:
        """The names of the gated units, in the order of `gates`."""
        return tuple(layer.name for layer in self.layers if layer.gate is not None)


def _convolution(features: int, kernel_size: int, strides: int, train: bool, **options: Any) -> nn.Conv:
    """The convolution of every layer in this file; call it inside a method with `nn.compact`."""
    init = nn.initializers.he_normal()
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        strides=strides,
        kernel_init=init,
        conv_general_dilated=training_convolution if train else conv_general_dilated,
        name="conv",
        **options,
    )


class GatedUnit(nn.Module):
    """Convolution, batch norm, activation, and a gate head beside them that chooses filters per image.

    Replaces `nn.Conv` + `nn.BatchNorm` + activation in any Linen network. With `gates=None` it is just those three,
    under the same parameter names, so a dense network's variables initialise a gated one.

    Attributes:
      features: number of filters, C.
      kernel_size: side of the square kernel.
      strides: step in both directions.
      groups: number of groups; `groups == C_in` makes the convolution depthwise.
      padding: rows of zeros on each side; None: (kernel_size - 1) // 2, as in the published networks.
      use_bias: bias in the convolution (before batch norm).
      act: activation, applied to each value separately; None: none.
      gates: settings of the gate, or None for a dense unit.
      dtype: of the computation; parameters, statistics, ranking and gate remain float32.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    groups: int = 1
    padding: int | None = None
    use_bias: bool = False
    act: Callable[[Array], Array] | None = nn.relu
    gates: GateConfig | None = None
    dtype: Any = None

    @nn.compact
    def __call__(
        self, inputs: Activations | Array, train: bool = False, shortcut: Activations | Array | None = None
    ) -> Activations:
        """Runs the unit on [N, H, W, C_in]; returns [N, H', W', C] with the filters that are off at zero.

        Args:
          inputs: feature maps, plain or as `Activations`.
          train: use the batch's statistics and update the running ones.
          shortcut: added after batch norm and before the activation, so that ranking and mask come after the addition.
        """
        x = as_activations(inputs)
        y = _convolution(
            self.features,
            self.kernel_size,
            self.strides,
            train,
            padding=self.rows_added,
            feature_group_count=self.groups,
            use_bias=self.use_bias,
            dtype=self.dtype,
        )(x.values)
        y = BatchNorm(use_running_average=not train, dtype=self.dtype, name="bn")(y)
        layers = x.layers
        if shortcut is not None:
            shortcut = as_activations(shortcut)
            y = y + shortcut.values
            layers = merge_layers(layers, shortcut.layers)
        if self.act is not None:
            y = self.act(y)

        if self.gates is None:
            return x.replace(values=y, active=None, layers=(*layers, self.record(x, y.shape, None)))
        gate = self._gate(self.gates, x, y)
        masked = x.replace(
            values=jnp.where(gate.mask[:, None, None, :], y, 0),
            active=gate.mask,
            layers=(*layers, self.record(x, y.shape, gate)),
        )
        if self.gates.pool == "mean" or not x.control.targets:
            return masked
        # The pass over the maps is the one that the targets take: XLA sees that behind a ReLU both are the same.
        maxima = max_pool_all(jax.lax.stop_gradient(y)).astype(jnp.float32)
        return masked.with_maxima(jnp.where(gate.mask, maxima, 0))

    @property
    def rows_added(self) -> int:
        """Rows of zeros on each side of the input."""
        return (self.kernel_size - 1) // 2 if self.padding is None else self.padding

    def record(self, x: Activations, shape: tuple[int, ...], gate: GateOutput | None) -> LayerRecord:
        """The record of a call that turned `x` into maps of this shape."""
        inputs = x.values.shape[-1]
        return LayerRecord(
            name="/".join(self.path),
            positions=shape[1] * shape[2],
            kernel_area=self.kernel_size**2,
            in_features=inputs,
            out_features=self.features,
            groups=self.groups,
            unit=True,
            bias_terms=self.features if self.use_bias else 0,
            active_in=x.active,
            active_out=None if gate is None else gate.mask,
            gate=gate,
            head_inputs=1 if self.gates and self.gates.reads_own(inputs, self.features, self.groups) else None,
        )

    def _gate(self, gates: GateConfig, x: Activations, y: Array) -> GateOutput:
        control = x.control
        logits: Array | None = None
        target: Array | None = None
        if control.targets:
            r = gates.r if control.r is None else control.r
            target = topk_mass_mask(jax.lax.stop_gradient(y), r, gates.min_filters)
        if control.masks == "heads" or self.is_initializing():
            joint = gates.mode == "joint"
            source = x.values if joint else jax.lax.stop_gradient(x.values)
            own = gates.reads_own(source.shape[-1], self.features, self.groups)
            logits = GateHead(self.features, gates.pool, gates.norm, own, name=HEAD_NAME)(
                source, None if joint else x.maxima
            )
            logits = logits if control.offset is None else logits + control.offset
        if control.masks == "heads" and logits is not None:
            mask = logits > 0
        elif control.masks == "targets" and target is not None:
            mask = target
        else:
            mask = jnp.ones((y.shape[0], self.features), bool)
        return GateOutput(logits, mask, target)


class PlainConv(nn.Module):
    """1x1 convolution and batch norm without a gate: a projection shortcut, or the last step of a bottleneck."""

    features: int
    strides: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, inputs: Activations | Array, train: bool = False) -> Activations:
        """Runs on [N, H, W, C_in]; every filter is computed, and can be non-zero (batch norm adds its bias)."""
        x = as_activations(inputs)
        y = _convolution(self.features, 1, self.strides, train, padding=0, use_bias=False, dtype=self.dtype)(x.values)
        y = BatchNorm(use_running_average=not train, dtype=self.dtype, name="bn")(y)
        return x.replace(values=y, active=None, layers=(*x.layers, self.record(x, y.shape)))

    def record(self, x: Activations, shape: tuple[int, ...]) -> LayerRecord:
        """The record of a call that turned `x` into maps of this shape."""
        return LayerRecord(
            name="/".join(self.path),
            positions=shape[1] * shape[2],
            kernel_area=1,
            in_features=x.values.shape[-1],
            out_features=self.features,
            active_in=x.active,
        )


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
        """Turns activations [N, H, W, C] into `Outputs` with logits [N, num_classes]."""
        x = as_activations(inputs)
        pooled = mean_pool_all(x.values)
        dense = nn.Dense(self.num_classes, kernel_init=nn.initializers.lecun_normal(), dtype=self.dtype, name="dense")
        return Outputs(dense(pooled).astype(jnp.float32), (*x.layers, self.record(x)))

    def record(self, x: Activations) -> LayerRecord:
        """The record of a call on `x`."""
        features = x.values.shape[-1]
        return LayerRecord(
            name="/".join(self.path),
            positions=1,
            kernel_area=1,
            in_features=features,
            out_features=self.num_classes,
            bias_terms=features if self.counted_pool else 0,
            active_in=x.active,
        )
