"""A network run in packed form, layer by layer: what all ways of compact execution stand on."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict
from jaxtyping import Array

from ftwt_jax.errors import UserError, one_line
from ftwt_jax.gating.activations import Activations
from ftwt_jax.gating.gates import GateControl
from ftwt_jax.inference.packed import Channels, PackedActivations, plain
from ftwt_jax.inference.packing import SEEN, PackedLayers, Weights
from ftwt_jax.subnets.network import subnet_variables


@dataclasses.dataclass(frozen=True)
class Execution:
    """What a compact network computes.

    Attributes:
      kept: the filters held ready, ascending, for each unit that leaves some out for good.
      per_image: whether each image computes, of those, only the ones that its own masks turn on, by kernels for a CPU.
      fixed: whether `kept` is all that there is, for every image: a subnet, without gates.
    """

    kept: Mapping[str, Channels] = dataclasses.field(default_factory=dict)
    per_image: bool = False
    fixed: bool = False


EVERYTHING = Execution()


def copied(variables: Any) -> dict[str, Any]:
    """The variables as they are now, on the host: later training may change or donate them."""
    if not isinstance(variables, Mapping) or "params" not in variables:
        got = (
            f"entries {', '.join(map(str, variables))}" if isinstance(variables, Mapping) else type(variables).__name__
        )
        raise UserError(f"compact execution takes all variables, {{'params': …, 'batch_stats': …}}; got {got}")
    try:
        return jax.tree.map(np.array, unfreeze(dict(variables)))
    except jax.errors.TracerArrayConversionError:
        raise UserError("compact execution needs concrete variables: make the network outside of jax.jit") from None
    except RuntimeError as error:
        raise UserError(f"compact execution cannot read the variables: {one_line(error)}") from error


class Forward:
    """A network run layer by layer in packed form."""

    def __init__(self, model: nn.Module, variables: Any, options: Mapping[str, Any]):
        if options.get("control") is not None:
            raise UserError("compact execution runs the masks of the gate heads: leave control out")
        self._model = model
        self._variables = copied(variables)
        self._options = options
        self._masks: Mapping[str, np.ndarray] | None = None

    def in_subnet(self, masks: Mapping[str, np.ndarray], subnet: int, count: int) -> "Forward":
        """One of K subnets of the same network: its batch norms, and of the layers by name these filters, bool [C].

        The other variables are shared, not copied.
        """
        other = copy.copy(self)
        other._masks, other._variables = masks, subnet_variables(self._variables, subnet, count)
        return other

    def pack(self, execution: Execution, images: Array) -> PackedLayers:
        """The weights for these filters; nothing is run."""
        layers = PackedLayers(self._variables, execution.kept, execution.per_image, fixed=execution.fixed)
        jax.eval_shape(lambda images: self._apply(layers, images), images)
        if not layers.weights:
            raise UserError("this network has no units: build it from ftwt.GatedUnit, or by ftwt.create_model")
        return layers

    def __call__(self, execution: Execution, weights: Weights, images: Array) -> tuple[Any, dict[str, Any]]:
        """The network's outputs, and what its units wrote into `SEEN`: {"unit/kind": (first call, second, ...)}."""
        layers = PackedLayers(self._variables, execution.kept, execution.per_image, weights, execution.fixed)
        return self._apply(layers, images)

    def _apply(self, layers: PackedLayers, images: Array) -> tuple[Any, dict[str, Any]]:
        inputs: Any = images
        if self._masks is not None:
            subnets = {name: jnp.asarray(mask)[None] for name, mask in self._masks.items()}
            choice = jnp.zeros(images.shape[0], jnp.int32)
            control = GateControl(masks="subnets", targets=False, subnets=subnets, choice=choice)
            inputs = Activations(images, control=control)
        with nn.intercept_methods(layers):
            outputs, seen = self._model.apply(self._variables, inputs, mutable=[SEEN], **self._options)
        outputs = jax.tree.map(plain, outputs, is_leaf=lambda x: isinstance(x, PackedActivations))
        return outputs, flatten_dict(seen.get(SEEN, {}), sep="/")
