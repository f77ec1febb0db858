"""`export` to .safetensors: a workdir's network under PyTorch names."""

import contextlib
import dataclasses
import json
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from rich.console import Console

from ftwt_jax import workdir
from ftwt_jax.budget.estimate import read_estimate
from ftwt_jax.commands.command import file_to_write
from ftwt_jax.errors import UserError
from ftwt_jax.files import AnyPath
from ftwt_jax.models import create_model
from ftwt_jax.parallel.sharding import data_mesh, replicated
from ftwt_jax.printing import say
from ftwt_jax.training.run import BACKBONE, cut_short, is_gated_backbone
from ftwt_jax.training.settings import BASELINE, GATED, arch_options, gate_config
from ftwt_jax.version import __version__
from ftwt_jax.weights.adapt import CLASSIFIER
from ftwt_jax.weights.conversion import Conversion
from ftwt_jax.weights.files import OWN, SAFETENSORS, write_safetensors
from ftwt_jax.weights.names import default_layout
from ftwt_jax.weights.state import export_state, layout_called
from ftwt_jax.workdir.checkpoints import Checkpoints, has_checkpoint


def export_weights(
    folder: str, out: str, console: Console, layout: str | None = None, baseline: bool = False, best: bool = False
) -> AnyPath:
    """Writes the newest (or best) network of a workdir as safetensors, under PyTorch names.

    A network that was converted and not trained since keeps the names that it came with, bit for bit; tensors of half
    or double precision become float32.

    Args:
      layout: names to use, see `ftwt_jax.weights.names`; None: those that it came with, else its usual ones.
      baseline: the dense baseline instead of the gated network.

    Raises:
      UserError: there is no such network, or the file already exists or cannot be written.
    """
    path, config = workdir.load(folder)
    target = file_to_write(out, new=True)
    if target.suffix != SAFETENSORS:
        raise UserError(f"--out takes a file that ends in {SAFETENSORS}; got {out}")
    stage = BASELINE if baseline or not has_checkpoint(path, GATED) else GATED
    variables, step, kept = _network(path, stage, best)
    gates = gate_config(config.gates) if stage == GATED else None
    if gates is not None and (path / workdir.ESTIMATE).exists():
        gates = dataclasses.replace(gates, r=read_estimate(path)["r"])
    classes = flatten_dict(variables)[(*CLASSIFIER, "kernel")].shape[1]
    model = create_model(num_classes=classes, gates=gates, **arch_options(config.model))
    conversion = Conversion.load(path) if step == 0 else None
    if conversion and conversion.holds_heads == (gates is not None) and layout in (None, conversion.layout):
        arrays, names = conversion.restore(model, variables), conversion.layout
    else:
        names = layout or default_layout(model)
        arrays = export_state(model, variables, layout_called(model, names, gates is not None))
    write_safetensors(target, arrays, {OWN: json.dumps(_description(config, classes, gates, kept))})
    kind = "dense" if gates is None else "gated"
    what = f"{config.model.name}, {kind}, step {step}, {len(arrays)} tensors under {names} names"
    say(console, f"{what}: written to {target}")
    notes = [cut_short(config, stage, step, kept.get("train_size")) if step else ""]
    if stage == BASELINE and is_gated_backbone(path):
        notes.append(BACKBONE)
    for note in filter(None, notes):
        say(console, f"note: {note}")
    return target


def _network(path: AnyPath, stage: str, best: bool) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """A network as it was saved, its step, and what was kept of its data."""
    with contextlib.closing(Checkpoints(path, stage, {"class_names": []})) as checkpoints:
        variables = checkpoints.restore_network(checkpoints.network_shapes(best), replicated(data_mesh()), best)
        return jax.tree.map(np.asarray, variables), checkpoints.step(best) or 0, checkpoints.kept_dataset()


def _description(config: ConfigDict, classes: int, gates: Any, kept: dict[str, Any]) -> dict[str, Any]:
    """What a reader must know of the network besides its tensors."""
    return {
        "version": __version__,
        "model": {name: value for name, value in workdir.as_dict(config.model).items() if value is not None},
        "num_classes": classes,
        "gates": None if gates is None else dataclasses.asdict(gates),
        **{name: kept[name] for name in ("class_names", "mean", "std") if name in kept},
    }
