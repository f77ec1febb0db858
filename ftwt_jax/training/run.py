"""What a config means: the data, the two networks and the devices of a run."""

import contextlib
import dataclasses
import functools
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ftwt_jax.budget.batch_statistics import BatchStatistics
from ftwt_jax.budget.estimate import Calibrator, Estimator
from ftwt_jax.data import absolute_paths, load_dataset
from ftwt_jax.data.build import for_channels
from ftwt_jax.data.pipeline import eval_batches
from ftwt_jax.data.source import Dataset
from ftwt_jax.errors import UserError, unknown_name
from ftwt_jax.gating.gates import GateConfig
from ftwt_jax.models import create_model
from ftwt_jax.parallel.sharding import check_batch_size, data_mesh, replicated
from ftwt_jax.training import optim
from ftwt_jax.training.evaluator import Evaluator
from ftwt_jax.training.step import Normalize, normalizer
from ftwt_jax.weights.adapt import adapt, can_adapt, has_fresh_classifier
from ftwt_jax.workdir import CONFIG, as_dict, differing_fields, read_json
from ftwt_jax.workdir.checkpoints import Checkpoints, has_checkpoint

BASELINE, GATED = STAGES = "baseline", "gated"
# The section of the config that each stage follows.
SECTIONS = {BASELINE: "baseline", GATED: "gates"}
DTYPES = ("float32", "bfloat16")
MOST_SEED = 2**31
# Training images that work is predicted and gates are calibrated on; more of them change the third digit.
ESTIMATE_SAMPLES = 2048

# Fields that a config must have, by section.
_STAGE = ("epochs", "lr", "schedule", "lr_boundaries", "lr_factor", "momentum", "weight_decay")
_GATES = (
    *("r", "budget", "mode", "pool", "softmax", "norm", "depthwise", "after_block"),
    *("head_lr", "loss_weight", "loss_reduction", "cooldown", "calibrate", "static", "budgets"),
)
_RUN = (
    *("seed", "init_from", "batch_size", "eval_batch_size", "accumulate", "shard_optimizer"),
    *("log_every", "checkpoint_every"),
)
FIELDS = {"": _RUN, "data": ("name",), "model": ("name",), "baseline": _STAGE, "gates": (*_STAGE, *_GATES)}


@dataclasses.dataclass(frozen=True)
class Adopted:
    """A network from elsewhere.

    Attributes:
      notes: what was changed to make it fit, a sentence each.
      finished: whether it is trained; off, its classifier is new.
    """

    variables: dict[str, Any]
    notes: tuple[str, ...]
    finished: bool


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run, made once from its config.

    Attributes:
      models: the same network under "baseline" (dense) and "gated".
    """

    config: ConfigDict
    workdir: pathlib.Path
    dataset: Dataset
    mesh: Mesh
    normalize: Normalize
    models: dict[str, nn.Module]
    _evaluators: dict[tuple[str, str], Evaluator] = dataclasses.field(default_factory=dict)

    @property
    def example_images(self) -> jax.Array:
        """One blank image, for shapes."""
        return jnp.zeros((1, *self.dataset.image_shape), jnp.float32)

    def key(self, stage: str) -> jax.Array:
        """The key from which a stage's parameters are made."""
        return jax.random.fold_in(jax.random.key(self.config.seed), STAGES.index(stage))

    def settings(self, stage: str) -> ConfigDict:
        """The config of one stage."""
        return self.config[SECTIONS[stage]]

    def abstract_variables(self, stage: str) -> Any:
        """Shapes and dtypes of a network's variables."""
        return jax.eval_shape(self.models[stage].init, self.key(stage), self.example_images)

    def trained(self, stage: str, best: bool = False) -> dict[str, Any]:
        """A trained network from its newest (or best) checkpoint."""
        with contextlib.closing(self.checkpoints(stage)) as checkpoints:
            return checkpoints.restore_network(self.abstract_variables(stage), replicated(self.mesh), best)

    def adopted(self, workdir: pathlib.Path) -> Adopted:
        """The baseline of another workdir, fitted to this run's classes and channels where they are others."""
        checkpoints = Checkpoints(workdir, BASELINE, self.dataset.describe())
        try:
            wanted = flatten_dict(self.abstract_variables(BASELINE))
            saved = flatten_dict(checkpoints.network_shapes())
            # What can be adapted is read as it was saved; anything else that differs is an error there.
            read = {
                path: saved[path] if path in saved and can_adapt(path, saved[path].shape, leaf.shape) else leaf
                for path, leaf in wanted.items()
            }
            shapes = {path: leaf.shape for path, leaf in wanted.items()}
            fresh = has_fresh_classifier(saved, shapes)
            found = checkpoints.restore_network(unflatten_dict(read), replicated(self.mesh), other_classes=fresh)
            variables, notes = adapt(found, shapes)
            if not fresh and not checkpoints.kept_dataset().get("class_names"):
                notes.append(f"its classes have no names, and are taken for those of {self.config.data.name} in order")
            return Adopted(variables, tuple(notes), finished=not (fresh or checkpoints.is_unfinished()))
        except UserError as error:
            raise UserError(f"{error}{self._other_model(workdir)}") from None
        finally:
            checkpoints.close()

    def _other_model(self, workdir: pathlib.Path) -> str:
        """How another workdir's network differs from this run's by its config, for the end of a message."""
        if not (workdir / CONFIG).exists():
            return ""
        there = read_json(workdir / CONFIG, "run's config")
        found = differing_fields(there.get("model"), as_dict(self.config.model), "config.model")
        return f" ({'; '.join(found)}: folder -> this run)" if found else ""

    def steps_of(self, stage: str) -> int:
        """Steps that a stage has been trained for here; 0 for a network from elsewhere."""
        with contextlib.closing(self.checkpoints(stage)) as checkpoints:
            return checkpoints.latest_step() or 0

    def is_finished(self, stage: str) -> bool:
        """Whether a stage's newest network is more than what training starts from."""
        with contextlib.closing(self.checkpoints(stage)) as checkpoints:
            return not checkpoints.is_unfinished()

    def checkpoints(self, stage: str, create: bool = False) -> Checkpoints:
        """The checkpoints of one stage of this run."""
        return Checkpoints(self.workdir, stage, self.dataset.describe(), create)

    def evaluator(self, stage: str, masks: str = "heads") -> Evaluator:
        """Evaluation of one of the two networks; the same object each time, so that it compiles once."""
        if (stage, masks) not in self._evaluators:
            self._evaluators[stage, masks] = Evaluator(self.models[stage], self.normalize, self.mesh, masks)
        return self._evaluators[stage, masks]

    @property
    def eval_batch_size(self) -> int:
        """The config's, or a little more where the devices cannot share that evenly; no figure depends on it."""
        return -(-self.config.eval_batch_size // self.mesh.size) * self.mesh.size

    def test_batches(self) -> Any:
        """The held-out split."""
        return eval_batches(self.dataset, self.dataset.test, self.eval_batch_size)

    def estimator(self, variables: Any) -> Estimator:
        """Predictions for the dense network with these variables."""
        return Estimator(self.evaluator(GATED, masks="targets"), variables, self.calibration_batches)

    def calibrator(self, variables: Any, r: float, fixed: bool = False) -> Calibrator:
        """Offsets of the gates of a gated network with these variables.

        Args:
          fixed: masks do not depend on the image, so that a few of them tell the work.
        """
        return Calibrator(self.evaluator(GATED), variables, self.calibration_batches[: 1 if fixed else None], r)

    @functools.cached_property
    def batch_statistics(self) -> BatchStatistics:
        """Measures batch statistics of the gated network."""
        return BatchStatistics(self.models[GATED], self.normalize, self.mesh)

    @functools.cached_property
    def calibration_batches(self) -> list[dict[str, Any]]:
        """Training images without augmentation, to predict work from and to calibrate gates on."""
        return list(eval_batches(self.dataset, self.dataset.train, self.eval_batch_size, limit=ESTIMATE_SAMPLES))


def make_run(
    config: ConfigDict, workdir: pathlib.Path, mesh: Mesh | None = None, dataset: Dataset | None = None
) -> Run:
    """Builds the parts of a run; raises `UserError` for whatever in the config cannot work.

    Folders in `config.data` are made absolute there.

    Args:
      mesh: the devices; None: all that there are.
      dataset: in place of the one that the config names.
    """
    mesh = data_mesh() if mesh is None else mesh
    check_settings(config, mesh)
    config.data.update(absolute_paths(config.data))
    dataset = load_dataset(**config.data) if dataset is None else dataset
    dataset = _normalized_as_trained(
        dataset, [workdir, *([pathlib.Path(config.init_from)] if config.init_from else [])]
    )
    gates = gate_config(config.gates)
    models = {
        stage: create_model(num_classes=dataset.num_classes, gates=setting, **arch_options(config.model))
        for stage, setting in ((BASELINE, None), (GATED, gates))
    }
    run = Run(config, workdir, dataset, mesh, normalizer(dataset), models)
    run.abstract_variables(BASELINE)  # Refuses images that the network cannot take, before anything is written.
    return run


def _normalized_as_trained(dataset: Dataset, workdirs: list[pathlib.Path]) -> Dataset:
    """The data with the mean and deviation that a trained baseline was given, if one of these workdirs has one."""
    for place in workdirs:
        if has_checkpoint(place, BASELINE):
            checkpoints = Checkpoints(place, BASELINE, dataset.describe())
            kept = checkpoints.kept_dataset()
            checkpoints.close()
            if kept:
                mean, std = (for_channels(kept[name], dataset.image_shape[-1]) for name in ("mean", "std"))
                return dataclasses.replace(dataset, mean=mean, std=std)
    return dataset


def check_settings(config: ConfigDict, mesh: Mesh) -> None:
    """Raises `UserError` for a field that is missing, or a value that cannot work with any data or network."""
    _check_fields(config)
    if config.accumulate < 1:
        raise UserError(f"config.accumulate is a number of parts and must be at least 1; got {config.accumulate}")
    check_batch_size(config.batch_size, mesh, "config.batch_size", config.accumulate)
    if config.eval_batch_size < 1:
        raise UserError(f"config.eval_batch_size is a number of images; got {config.eval_batch_size}")
    if not 0 <= config.seed < MOST_SEED:
        raise UserError(f"config.seed must lie between 0 and {MOST_SEED - 1}; got {config.seed}")
    for field in ("log_every", "checkpoint_every"):
        if config[field] < 1:
            raise UserError(f"config.{field} is a number of steps and must be at least 1; got {config[field]}")
    for stage in (config.baseline, config.gates):
        optim.check_stage(stage)
    budget_range(config.gates)
    if config.gates.static and not config.gates.calibrate:
        raise UserError("config.gates.static fixes masks that calibration chooses: leave config.gates.calibrate on")


def _check_fields(config: ConfigDict) -> None:
    missing = []
    for section, names in FIELDS.items():
        node = config.get(section) if section else config
        fields = node if isinstance(node, ConfigDict) else {}
        missing += [f"{section}.{name}".lstrip(".") for name in names if name not in fields]
    if missing:
        raise UserError(f"the config lacks {', '.join(missing)}: compare it with configs/digits.py")


def arch_options(model: ConfigDict) -> dict[str, Any]:
    """Arguments of `create_model`; what the config leaves at None stays at the network's own default."""
    options = {key: value for key, value in model.items() if value is not None}
    if "plan" in options and options["name"] != "vgg_bn":
        raise UserError(f"config.model.plan belongs to vgg_bn: choose the network by --config=FILE:{options['name']}")
    if "dtype" in options:
        if options["dtype"] not in DTYPES:
            raise unknown_name("config.model.dtype", options["dtype"], DTYPES)
        options["dtype"] = jnp.dtype(options["dtype"])
    return options


def gate_config(gates: ConfigDict) -> GateConfig:
    """The gates' settings; r is checked even where a budget takes its place."""
    fields = {field.name for field in dataclasses.fields(GateConfig)}
    if gates.budget is not None and not 0 < gates.budget < 1:
        raise UserError(f"config.gates.budget is a MACs reduction between 0 and 1; got {gates.budget}")
    return GateConfig(**{key: value for key, value in gates.items() if key in fields})


def budget_range(gates: ConfigDict) -> tuple[float, float] | None:
    """The least and the most of `config.gates.budgets`, None where it is not set.

    Raises:
      UserError: it is not two MACs reductions in order, or gates are not to be calibrated.
    """
    if gates.budgets is None:
        return None
    budgets = tuple(gates.budgets)
    numbers = all(isinstance(budget, (int, float)) for budget in budgets)
    if len(budgets) != 2 or not numbers or not 0 < budgets[0] < budgets[1] < 1:
        raise UserError(f"config.gates.budgets is the least and the most MACs reduction, (0.3, 0.8); got {budgets}")
    if not gates.calibrate:
        raise UserError("config.gates.budgets are met by calibrating gates: leave config.gates.calibrate on")
    return budgets
