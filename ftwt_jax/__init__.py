"""Dynamic channel pruning for JAX/Flax, after "Fire Together Wire Together" (CVPR 2022, arXiv 2110.08232)."""

import ftwt_jax.ctrl_c  # noqa: F401 (the first import: those below take seconds)
from ftwt_jax.errors import UserError, WeightsWarning
from ftwt_jax.gating.activations import Activations, LayerRecord, residual_add
from ftwt_jax.gating.gates import GateConfig, GateControl, GateHead, GateOutput
from ftwt_jax.gating.losses import gate_loss
from ftwt_jax.gating.macs import dense_macs, layer_macs, macs
from ftwt_jax.gating.ranking import filter_mass, topk_mass_mask
from ftwt_jax.gating.summary import GateReport, count_gates, summarize_gates
from ftwt_jax.gating.units import Classifier, GatedUnit, Outputs, PlainConv
from ftwt_jax.gating.variables import fix_gates, init_from_dense, shift_gates
from ftwt_jax.inference.compact import CompactNetwork, compact
from ftwt_jax.models import create_model
from ftwt_jax.version import __version__
from ftwt_jax.weights.state import from_torch, to_torch

__all__ = [
    "Activations",
    "Classifier",
    "CompactNetwork",
    "GateConfig",
    "GateControl",
    "GateHead",
    "GateOutput",
    "GateReport",
    "GatedUnit",
    "LayerRecord",
    "Outputs",
    "PlainConv",
    "UserError",
    "WeightsWarning",
    "__version__",
    "compact",
    "count_gates",
    "create_model",
    "dense_macs",
    "filter_mass",
    "fix_gates",
    "from_torch",
    "gate_loss",
    "init_from_dense",
    "layer_macs",
    "macs",
    "residual_add",
    "shift_gates",
    "summarize_gates",
    "to_torch",
    "topk_mass_mask",
]
