"""Dynamic channel pruning for JAX/Flax, after "Fire Together Wire Together" (CVPR 2022, arXiv 2110.08232)."""

import ftwt_jax.ctrl_c  # noqa: F401 (the first import: those below take seconds)
from ftwt_jax.errors import CompositionWarning, UserError, WeightsWarning
from ftwt_jax.gating.activations import Activations, LayerRecord
from ftwt_jax.gating.composition import (
    concatenate,
    flatten,
    permute_channels,
    pixel_shuffle,
    pixel_unshuffle,
    residual_add,
)
from ftwt_jax.gating.gates import GateConfig, GateControl, GateHead, GateOutput
from ftwt_jax.gating.losses import gate_loss
from ftwt_jax.gating.macs import dense_macs, layer_macs, macs
from ftwt_jax.gating.naming import suggest_names
from ftwt_jax.gating.ranking import filter_mass, topk_mass_mask
from ftwt_jax.gating.summary import GateReport, count_gates, summarize_gates
from ftwt_jax.gating.units import Classifier, GatedDense, GatedUnit, Outputs, PlainConv, Routes
from ftwt_jax.gating.variables import fix_gates, init_from_dense, shift_gates
from ftwt_jax.inference.compact import CompactNetwork, compact
from ftwt_jax.inference.subnets import CompactSubnets
from ftwt_jax.models import create_model
from ftwt_jax.subnets.find import Subnets, find_subnets
from ftwt_jax.subnets.network import Router, SubnetNetwork, init_subnets, make_router
from ftwt_jax.version import __version__
from ftwt_jax.weights.state import from_torch, to_torch

__all__ = [
    "Activations",
    "Classifier",
    "CompactNetwork",
    "CompactSubnets",
    "CompositionWarning",
    "GateConfig",
    "GateControl",
    "GateHead",
    "GateOutput",
    "GateReport",
    "GatedDense",
    "GatedUnit",
    "LayerRecord",
    "Outputs",
    "PlainConv",
    "Router",
    "Routes",
    "SubnetNetwork",
    "Subnets",
    "UserError",
    "WeightsWarning",
    "__version__",
    "compact",
    "concatenate",
    "count_gates",
    "create_model",
    "dense_macs",
    "filter_mass",
    "find_subnets",
    "fix_gates",
    "flatten",
    "from_torch",
    "gate_loss",
    "init_from_dense",
    "init_subnets",
    "layer_macs",
    "macs",
    "make_router",
    "permute_channels",
    "pixel_shuffle",
    "pixel_unshuffle",
    "residual_add",
    "shift_gates",
    "suggest_names",
    "summarize_gates",
    "to_torch",
    "topk_mass_mask",
]
