"""Dynamic channel pruning for JAX/Flax, after "Fire Together Wire Together" (CVPR 2022, arXiv 2110.08232)."""

from ftwt_jax.activations import Activations, LayerRecord, residual_add
from ftwt_jax.compact import CompactNetwork, compact
from ftwt_jax.errors import UserError, WeightsWarning
from ftwt_jax.gate_stats import GateReport, count_gates, summarize_gates
from ftwt_jax.gates import GateConfig, GateControl, GateHead, GateOutput
from ftwt_jax.losses import gate_loss
from ftwt_jax.macs import dense_macs, layer_macs, macs
from ftwt_jax.models import create_model
from ftwt_jax.offsets import fix_gates, shift_gates
from ftwt_jax.ranking import filter_mass, topk_mass_mask
from ftwt_jax.transfer import init_from_dense
from ftwt_jax.units import Classifier, GatedUnit, Outputs, PlainConv
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
