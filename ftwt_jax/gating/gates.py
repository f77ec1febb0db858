"""The gate head, its settings, and what a gate returns (sections 3.1 and 3.2 of the paper)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from ftwt_jax.errors import UserError, unknown_name
from ftwt_jax.ops.reductions import max_pool_all, mean_pool_all

# Name of the head among the parameters of its unit.
HEAD_NAME = "gate_head"
MODES = ("decoupled", "joint")
POOLS = ("max", "mean")
# In this order for the C++ kernel too: `Norm` in inference/native/head.h.
NORMS = ("none", "softmax", "layer")
DEPTHWISE = ("full", "own")
# Added to the variance, here and in inference/native/head.h.
NORM_EPSILON = 1e-5
MASK_SOURCES = ("heads", "targets", "open", "subnets")


def check_r(r: float) -> float:
    """Returns `r` if it is a mass threshold, a number in (0, 1]; raises `UserError` otherwise."""
    if isinstance(r, (bool, np.bool_)) or not isinstance(r, (int, float, np.number)) or not 0 < r <= 1:
        raise UserError(f"r is the share of heatmap mass to keep and must lie in (0, 1]; got {r!r}")
    return float(r)


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """How every unit of a network is gated. The defaults are the head that our configs train, each with its own r.

    Attributes:
      r: mass threshold of the targets, in (0, 1]; smaller keeps fewer filters.
      mode: `decoupled`: the heads read their input through stop_gradient, so that the gate loss never moves the
        backbone; `joint`: it does.
      pool: how a head summarises a feature map: `max` (the paper) or `mean` (the published code).
      norm: how a head normalises the pooled channels of each image: `softmax` (the paper), times the number of
        channels; `layer`, to mean 0 and standard deviation 1 (a layer norm without parameters), from which heads learn
        faster; `none`, as they are.
      depthwise: what the heads of depthwise convolutions read: `full`: all channels, as every other head does; `own`:
        each gate only the channel that its filter sees, with C weights in place of C * C.
      min_filters: fewest filters that a target keeps in an image that is not all zero. A setting for comparisons: 0 is
        the published rule.
      after_block: in residual blocks of two 3x3 units, rank and mask after the addition and its activation instead of
        before it. A setting for studies: bottlenecks and inverted residuals do not end with a unit, and nothing
        changes there.
    """

    r: float = 0.9
    mode: Literal["decoupled", "joint"] = "decoupled"
    pool: Literal["max", "mean"] = "max"
    norm: Literal["none", "softmax", "layer"] = "layer"
    depthwise: Literal["full", "own"] = "own"
    min_filters: int = 1
    after_block: bool = False

    def __post_init__(self):
        object.__setattr__(self, "r", check_r(self.r))
        if self.mode not in MODES:
            raise unknown_name("gate mode", self.mode, MODES)
        if self.pool not in POOLS:
            raise unknown_name("gate pool", self.pool, POOLS)
        if self.norm not in NORMS:
            raise unknown_name("norm of the gate heads", self.norm, NORMS)
        if self.depthwise not in DEPTHWISE:
            raise unknown_name("kind of depthwise head", self.depthwise, DEPTHWISE)
        if not isinstance(self.after_block, bool):
            raise UserError(f"after_block is True or False; got {self.after_block!r}")
        if not isinstance(self.min_filters, int) or isinstance(self.min_filters, bool) or self.min_filters < 0:
            raise UserError(f"min_filters is a number of filters, 0 or more; got {self.min_filters!r}")

    @classmethod
    def paper(cls, **changes: Any) -> "GateConfig":
        """The gate head of the paper: softmax over the channels, and depthwise heads that read all channels.

        The authors' code differs from their paper: `GateConfig.paper(pool="mean", min_filters=0)` are its gates.

        Args:
          **changes: other fields than the paper's, by name.
        """
        return cls(**{"pool": "max", "norm": "softmax", "depthwise": "full", **changes})

    def reads_own(self, inputs: int, features: int, groups: int) -> bool:
        """Whether each gate of a convolution with this many channels, filters and groups reads only its own channel."""
        return self.depthwise == "own" and groups == inputs == features


def current_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of gates as any version of this library wrote them, as the fields of today's `GateConfig`.

    Files written earlier have a switch `softmax` beside `norm`: off, the pooled channels were not normalised, whatever
    `norm` said. The oldest have neither `norm` nor `depthwise`, which meant `softmax` and `full`.

    Args:
      fields: by name; fields that `GateConfig` does not have pass through.

    Raises:
      UserError: `softmax` is neither True nor False.
    """
    current = {"norm": "softmax", "depthwise": "full", **fields}
    switch = current.pop("softmax", True)
    if not isinstance(switch, bool):
        raise UserError(f"softmax is True or False; got {switch!r}")
    return current if switch else {**current, "norm": "none"}


@struct.dataclass
class GateControl:
    """What may change from one call of a gated network to the next; travels with the activations.

    Attributes:
      r: mass threshold to use in place of the config's; a scalar, traced under jit, so a sweep does not recompile.
      masks: where masks come from. `heads`: the gate logits; `targets`: the targets themselves, which needs no trained
        head (a dense network's variables will do); `open`: every filter on; `subnets`: those of `subnets`, and the
        network needs no heads.
      targets: whether to compute targets. Off, `GateOutput.target` is None and no time goes into ranking.
      offset: added to all gate logits. A larger one turns more filters on, so that one trained network serves any
        budget. A scalar, traced under jit.
      subnets: for layers by name, the mask of each subnet; a layer that is missing has every filter on.
      choice: the subnet of each image.
    """

    r: Float[Array, ""] | float | None = None
    masks: str = struct.field(pytree_node=False, default="heads")
    targets: bool = struct.field(pytree_node=False, default=True)
    offset: Float[Array, ""] | float | None = None
    subnets: Mapping[str, Bool[Array, "K C"]] | None = None
    choice: Int[Array, " N"] | None = None

    def __post_init__(self):
        if isinstance(self.r, (int, float)):
            check_r(self.r)
        if self.masks not in MASK_SOURCES:
            raise unknown_name("source of masks", self.masks, MASK_SOURCES)
        if self.masks == "targets" and not self.targets:
            raise UserError("masks='targets' needs the targets: leave targets=True")

    def subnet_mask(self, layer: str) -> Bool[Array, "N C"] | None:
        """The mask of a layer in each image's subnet; None: every filter is on.

        Raises:
          UserError: masks are to come from subnets, and these, or the choice among them, are not there.
        """
        if self.masks != "subnets":
            return None
        mask = self._subnets()[0].get(layer)
        return None if mask is None else jnp.asarray(mask)[self.choice]

    def own_subnets(self) -> tuple[int, Int[Array, " N"]]:
        """How many subnets there are, and that of each image, where masks come from subnets; errors as above."""
        subnets, choice = self._subnets()
        return len(next(iter(subnets.values()), [None])), choice

    def _subnets(self) -> tuple[Mapping[str, Bool[Array, "K C"]], Int[Array, " N"]]:
        if self.subnets is None or self.choice is None:
            raise UserError("masks='subnets' needs subnets= and choice=: ftwt.SubnetNetwork gives both")
        return self.subnets, self.choice


@struct.dataclass
class GateOutput:
    """What one gate returned for a batch.

    Attributes:
      logits: float32 [N, C], the gate logits P; None when the masks did not come from the heads.
      mask: bool [N, C], the filters that are on.
      target: bool [N, C], the filters that carry the heatmap mass; None when targets were not asked for.
    """

    logits: Float[Array, "N C"] | None
    mask: Bool[Array, "N C"]
    target: Bool[Array, "N C"] | None


def pooled(maps: Float[Array, "N H W C"], pool: str) -> Float[Array, "N C"]:
    """What a head sums up of each channel, in float32, by `GateConfig.pool`."""
    return {"max": max_pool_all, "mean": mean_pool_all}[pool](maps.astype(jnp.float32))


def normalized(channels: Float[Array, "N C_in"], norm: str) -> Float[Array, "N C_in"]:
    """What a head reads of the pooled channels, by `GateConfig.norm`."""
    if norm == "softmax":
        return jax.nn.softmax(channels, axis=-1) * channels.shape[-1]
    return jax.nn.standardize(channels, axis=-1, epsilon=NORM_EPSILON) if norm == "layer" else channels


class GateHead(nn.Module):
    """Predicts which filters of a unit will matter from the unit's input: P = e W + b.

    e is the global pool of each input channel, normalised over the channels. The paper's norm is a softmax; here it is
    `softmax(e) * C_in`, since a plain softmax hands the head numbers of size 1 / C_in, from which it learns little more
    than each filter's average at the published learning rate. It is the same class of functions: a published kernel
    divided by C_in gives the published logits.

    The first logits lie near 1, that is, every filter is on: a gated network starts as the dense one it was made from.
    They are not quite 1, so that in `joint` mode the gate loss reaches the backbone from the first step.

    Attributes:
      features: number of filters of the unit, C.
      pool, norm: see `GateConfig`.
      own: gate c reads channel c alone, `P_c = e_c W_c + b_c`; there are as many gates as channels then.
    """

    features: int
    pool: Literal["max", "mean"] = "max"
    norm: Literal["none", "softmax", "layer"] = "layer"
    own: bool = False

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "N H W C_in"], maxima: Float[Array, "N C_in"] | None = None
    ) -> Float[Array, "N C"]:
        """Gate logits; `maxima` of the inputs, where they are known, save a pass over them."""
        summary = self.summary(inputs, maxima)
        # A softmax may put all of C_in on one channel; even then no first logit strays far from the bias.
        kernel_init = nn.initializers.normal(min(1e-3, 0.1 / summary.shape[-1]))
        if self.own:
            return _Scale(kernel_init, name="dense")(summary)
        dense = nn.Dense(
            self.features, kernel_init=kernel_init, bias_init=nn.initializers.ones, dtype=jnp.float32, name="dense"
        )
        return dense(summary)

    @nn.nowrap
    def summary(
        self, inputs: Float[Array, "N H W C_in"], maxima: Float[Array, "N C_in"] | None = None
    ) -> Float[Array, "N C_in"]:
        """e, which the head multiplies by its kernel; float32."""
        known = maxima if self.pool == "max" else None
        return normalized(pooled(inputs, self.pool) if known is None else known, self.norm)


class _Scale(nn.Module):
    """A dense layer with a diagonal matrix, under the parameter names of one: kernel [1, C], bias [C]."""

    kernel_init: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Float[Array, "N C"]) -> Float[Array, "N C"]:
        kernel = self.param("kernel", self.kernel_init, (1, x.shape[-1]), jnp.float32)
        return x * kernel + self.param("bias", nn.initializers.ones, (x.shape[-1],), jnp.float32)[None]
