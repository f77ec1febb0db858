"""The gate head, its settings, and what a gate gives back (sections 3.1 and 3.2 of the paper)."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

from ftwt_jax.errors import UserError, unknown_name
from ftwt_jax.ops.reductions import max_pool_all, mean_pool_all

# Name of the head among the parameters of its unit.
HEAD_NAME = "gate_head"
MODES = ("decoupled", "joint")
POOLS = ("max", "mean")
NORMS = ("softmax", "layer")
DEPTHWISE = ("full", "own")
# Added to the variance.
NORM_EPSILON = 1e-5
MASK_SOURCES = ("heads", "targets", "open")


def check_r(r: float) -> float:
    """Returns `r` if it is a mass threshold, a number in (0, 1]; raises `UserError` otherwise."""
    if isinstance(r, (bool, np.bool_)) or not isinstance(r, (int, float, np.number)) or not 0 < r <= 1:
        raise UserError(f"r is the share of heatmap mass to keep and must lie in (0, 1]; got {r!r}")
    return float(r)


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """How every unit of a network is gated.

    Attributes:
      r: mass threshold of the targets, in (0, 1]; smaller keeps fewer filters.
      mode: `decoupled`: the heads read their input through stop_gradient, so that the gate loss never moves the
        backbone; `joint`: it does.
      pool: how a head sums up a feature map: `max` (the paper) or `mean` (the published code).
      softmax: normalise the pooled channels; off: read them as they are.
      norm: by what: `softmax`, times their number; `layer`: to mean 0 and deviation 1 over the channels of each sample
        (a layer norm without parameters), from which heads learn sooner.
      depthwise: what the heads of depthwise convolutions read: `full`: all channels, as every other head does; `own`:
        each gate the one channel that its filter sees, with C weights in place of C * C.
      after_block: in residual blocks of two 3x3 units, rank and mask after the addition and its activation instead of
        before it. Bottlenecks and inverted residuals have no unit that ends with the addition; nothing changes there.
      min_filters: fewest filters a target keeps in a sample that is not all zero (0: the published rule).
    """

    r: float = 0.9
    mode: Literal["decoupled", "joint"] = "decoupled"
    pool: Literal["max", "mean"] = "max"
    softmax: bool = True
    after_block: bool = False
    min_filters: int = 1
    norm: Literal["softmax", "layer"] = "softmax"
    depthwise: Literal["full", "own"] = "full"

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
        for name in ("softmax", "after_block"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} is True or False; got {getattr(self, name)!r}")
        if not isinstance(self.min_filters, int) or isinstance(self.min_filters, bool) or self.min_filters < 0:
            raise UserError(f"min_filters is a number of filters, 0 or more; got {self.min_filters!r}")

    @property
    def normalization(self) -> str:
        """What a head does with the pooled channels: `softmax`, `layer` or `none`."""
        return self.norm if self.softmax else "none"

    def reads_own(self, inputs: int, features: int, groups: int) -> bool:
        """Whether each gate of a convolution with so many channels, filters and groups reads its own channel alone."""
        return self.depthwise == "own" and groups == inputs == features


@struct.dataclass
class GateControl:
    """What may change from one call of a gated network to the next; travels with the activations.

    Attributes:
      r: mass threshold to use in place of the config's; a scalar, traced under jit, so a sweep does not recompile.
      masks: where masks come from. `heads`: the gate logits; `targets`: the targets themselves, which needs no trained
        head (a dense network's variables will do); `open`: every filter on.
      targets: compute targets. Off, `GateOutput.target` is None and ranking costs nothing.
      offset: added to all gate logits: a larger one turns more filters on, and so one trained network serves any
        budget. A scalar, traced under jit.
    """

    r: Float[Array, ""] | float | None = None
    masks: str = struct.field(pytree_node=False, default="heads")
    targets: bool = struct.field(pytree_node=False, default=True)
    offset: Float[Array, ""] | float | None = None

    def __post_init__(self):
        if isinstance(self.r, (int, float)):
            check_r(self.r)
        if self.masks not in MASK_SOURCES:
            raise unknown_name("source of masks", self.masks, MASK_SOURCES)
        if self.masks == "targets" and not self.targets:
            raise UserError("masks='targets' needs the targets: leave targets=True")


@struct.dataclass
class GateOutput:
    """What one gate said of a batch.

    Attributes:
      logits: float32 [N, C], the gate logits P; None when the masks did not come from the heads.
      mask: bool [N, C], the filters that are on.
      target: bool [N, C], the filters that carry the heatmap mass; None when targets were not asked for.
    """

    logits: Float[Array, "N C"] | None
    mask: Bool[Array, "N C"]
    target: Bool[Array, "N C"] | None


def gate_pool(pool: str) -> Callable[[Array], Array]:
    """The pool by its name in `GateConfig`: [N, H, W, C] -> [N, C]."""
    return {"max": max_pool_all, "mean": mean_pool_all}[pool]


def normalized(pooled: Float[Array, "N C_in"], norm: str) -> Float[Array, "N C_in"]:
    """What a head reads of the pooled channels, by `GateConfig.normalization`."""
    if norm == "softmax":
        return jax.nn.softmax(pooled, axis=-1) * pooled.shape[-1]
    return jax.nn.standardize(pooled, axis=-1, epsilon=NORM_EPSILON) if norm == "layer" else pooled


class GateHead(nn.Module):
    """Predicts which filters of a unit will matter from the unit's input: P = e W + b.

    e is the global pool of the input per channel, then `softmax(e) * C_in`, or another norm. The factor C_in is not in
    the paper: a plain softmax hands the head numbers of size 1 / C_in, from which it learns little but each filter's
    average at the published learning rate. It is the same class of functions: a published kernel divided by C_in gives
    the published logits.

    The first logits lie near 1, that is, every filter is on: a gated network starts as the dense one it was made from.
    They are not quite 1, so that in `joint` mode the gate loss reaches the backbone from the first step.

    Attributes:
      features: number of filters of the unit, C.
      pool, softmax, norm: see `GateConfig`.
      own: gate c reads channel c alone, `P_c = e_c W_c + b_c`; there are as many gates as channels then.
    """

    features: int
    pool: Literal["max", "mean"] = "max"
    softmax: bool = True
    norm: Literal["softmax", "layer"] = "softmax"
    own: bool = False

    @nn.compact
    def __call__(self, inputs: Float[Array, "N H W C_in"]) -> Float[Array, "N C"]:
        settings = GateConfig(pool=self.pool, softmax=self.softmax, norm=self.norm)
        summary = normalized(gate_pool(self.pool)(inputs.astype(jnp.float32)), settings.normalization)
        # A softmax may put all of C_in on one channel; even then no first logit strays far from the bias.
        kernel_init = nn.initializers.normal(min(1e-3, 0.1 / summary.shape[-1]))
        if self.own:
            return _Scale(kernel_init, name="dense")(summary)
        dense = nn.Dense(
            self.features, kernel_init=kernel_init, bias_init=nn.initializers.ones, dtype=jnp.float32, name="dense"
        )
        return dense(summary)


class _Scale(nn.Module):
    """A dense layer whose matrix has nothing but a diagonal, under the names of one: kernel [1, C], bias [C]."""

    kernel_init: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Float[Array, "N C"]) -> Float[Array, "N C"]:
        kernel = self.param("kernel", self.kernel_init, (1, x.shape[-1]))
        return x * kernel[0] + self.param("bias", nn.initializers.ones, (x.shape[-1],))


def current_fields(fields: dict) -> dict:
    """Placeholder until the branch with the real one is merged."""
    fields = {"norm": "softmax", "depthwise": "full", **fields}
    softmax = fields.pop("softmax", True)
    return fields if softmax else {**fields, "norm": "none"}
