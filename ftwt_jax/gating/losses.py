"""The self-supervised loss of the gate heads (equation 4 of the paper)."""

from collections.abc import Sequence

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ftwt_jax.errors import UserError, unknown_name
from ftwt_jax.gating.gates import GateOutput

REDUCTIONS = ("mean", "sum")


def gate_loss(gates: Sequence[GateOutput], reduction: str = "mean") -> Float[Array, ""]:
    """Binary cross-entropy between gate logits and targets: summed over filters, averaged over images.

    Args:
      gates: `outputs.gates` of a call with targets.
      reduction: over gated units: `mean`, as the published code does, or `sum`, as the paper writes.

    Returns:
      float32 scalar; 0 for a network without gates.
    """
    if reduction not in REDUCTIONS:
        raise unknown_name("reduction", reduction, REDUCTIONS)
    total = jnp.zeros((), jnp.float32)
    for gate in gates:
        if gate.target is None or gate.logits is None:
            raise UserError("gate_loss needs gate logits and targets: call the model with the default GateControl")
        losses = optax.sigmoid_binary_cross_entropy(gate.logits, gate.target.astype(jnp.float32))
        total = total + jnp.mean(jnp.sum(losses, axis=-1))
    return total / len(gates) if gates and reduction == "mean" else total
