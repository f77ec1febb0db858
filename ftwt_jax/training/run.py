"""A run: its data, its two networks and its devices, as a config describes them."""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ftwt_jax.data import absolute_paths, describe_dataset, load_dataset, other_options
from ftwt_jax.data.build import for_channels
from ftwt_jax.data.pipeline import eval_batches
from ftwt_jax.data.resident import Resident, place
from ftwt_jax.data.source import Dataset, NoImages
from ftwt_jax.errors import RunWarning, UserError
from ftwt_jax.files import AnyPath
from ftwt_jax.models import create_model
from ftwt_jax.parallel.preemption import Preemption
from ftwt_jax.parallel.processes import is_first
from ftwt_jax.parallel.sharding import data_mesh, put_batch, put_whole, replicated, split
from ftwt_jax.subnets.find import Subnets
from ftwt_jax.subnets.network import SubnetNetwork, make_router
from ftwt_jax.training.evaluator import Evaluator
from ftwt_jax.training.settings import (
    BASELINE,
    GATED,
    STAGES,
    SUBNETS,
    arch_options,
    check_settings,
    gate_config,
    stage_settings,
    total_steps,
)
from ftwt_jax.training.step import Normalize, normalizer
from ftwt_jax.training.subnets_file import read_subnets
from ftwt_jax.weights.adapt import CLASSIFIER, adapt, can_adapt, has_fresh_classifier
from ftwt_jax.weights.conversion import Conversion
from ftwt_jax.workdir import CONFIG, absolute, as_dict, differing_fields, load, read_json
from ftwt_jax.workdir import SUBNETS as SUBNETS_FILE
from ftwt_jax.workdir.checkpoints import Checkpoints, has_checkpoint, newest_step

# Said of a workdir that was converted from a gated network.
BACKBONE = "its dense network is the gated one with every filter on: the file it was converted from held no other"
# Mean and deviation of each channel, which images are normalised with.
Statistics = tuple[Sequence[float], Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Adopted:
    """A network of another workdir.

    Attributes:
      notes: what was changed to make it fit, a sentence each.
      finished: whether it is trained; where it is not, its classifier is new, or it is to be trained further.
    """

    variables: dict[str, Any]
    notes: tuple[str, ...]
    finished: bool


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run, made once from its config.

    Attributes:
      config: a copy of the run's own, with absolute paths.
      folder: the workdir; None for a run that is only planned.
      models: the same network under "baseline" (dense), "gated" and, where it has been cut, "subnets".
      preemption: ends whatever the run does between two batches.
    """

    config: ConfigDict
    folder: AnyPath | None
    dataset: Dataset
    mesh: Mesh
    normalize: Normalize
    models: dict[str, nn.Module]
    preemption: Preemption = dataclasses.field(default_factory=Preemption)
    _evaluators: dict[tuple[str, str], Evaluator] = dataclasses.field(default_factory=dict)

    @property
    def workdir(self) -> AnyPath:
        """The workdir of a run that has one."""
        assert self.folder is not None
        return self.folder

    @property
    def example_images(self) -> jax.Array:
        """One blank image, for shapes."""
        return jnp.zeros((1, *self.dataset.image_shape), jnp.float32)

    def key(self, stage: str) -> jax.Array:
        """The key from which a stage's parameters are made."""
        return jax.random.fold_in(jax.random.key(self.config.seed), STAGES.index(stage))

    def settings(self, stage: str) -> ConfigDict:
        """The config of one stage."""
        return stage_settings(self.config, stage)

    def add_subnets(self, subnets: Subnets) -> None:
        """Gives the run its third network, once its subnets are known."""
        router = make_router(subnets.count, self.dataset.image_shape, subnets.dense_macs)
        self.models[SUBNETS] = SubnetNetwork(self.models[GATED], subnets, router)

    def abstract_variables(self, stage: str) -> Any:
        """Shapes and dtypes of a network's variables."""
        variables = jax.eval_shape(self.models[stage].init, self.key(stage), self.example_images)
        # As a training state holds them: networks without batch norm have no statistics.
        return {"batch_stats": {}, **variables}

    def replicated(self, tree: Any) -> Any:
        """Arrays put whole on every device, as all programs of the run are given theirs, so that none recompiles."""
        return put_whole(tree, replicated(self.mesh))

    def has(self, stage: str) -> bool:
        """Whether there is a network of this stage."""
        return stage in self.models and has_checkpoint(self.workdir, stage)

    def trained(self, stage: str, best: bool = False) -> dict[str, Any]:
        """A trained network from its newest (or best) checkpoint."""
        with contextlib.closing(self.checkpoints(stage)) as checkpoints:
            return checkpoints.restore_network(self.abstract_variables(stage), replicated(self.mesh), best)

    def adopted(self, workdir: AnyPath) -> Adopted:
        """The baseline of another workdir, fitted to this run's classes and channels where they differ."""
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
            # Flat, an empty collection is lost.
            abstract = {"batch_stats": {}, **unflatten_dict(read)}
            found = checkpoints.restore_network(abstract, replicated(self.mesh), other_classes=fresh)
            variables, notes = adapt(found, shapes)
            if not fresh and not checkpoints.kept_dataset().get("class_names"):
                notes.append(
                    f"its classes have no names; they are taken for those of {self.config.data.name}, in order"
                )
            step, unfinished = checkpoints.latest_step() or 0, checkpoints.is_unfinished()
            if (step or unfinished) and (workdir / CONFIG).exists():
                _, there = load(str(workdir))
                notes += filter(None, [cut_short(there, BASELINE, step, checkpoints.kept_dataset().get("train_size"))])
            if is_gated_backbone(workdir):
                notes.append(BACKBONE)
            return Adopted(variables, tuple(notes), finished=not (fresh or unfinished or self.config.fine_tune))
        except UserError as error:
            raise UserError(f"{error}{self._other_model(workdir)}") from None
        finally:
            checkpoints.close()

    def _other_model(self, workdir: AnyPath) -> str:
        """How another workdir's network differs from this run's by its config, for the end of a message."""
        if not (workdir / CONFIG).exists():
            return ""
        there = read_json(workdir / CONFIG, "config")
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
            self._evaluators[stage, masks] = Evaluator(
                self.models[stage], self.normalize, self.mesh, masks, self.preemption
            )
        return self._evaluators[stage, masks]

    @functools.cached_property
    def resident(self) -> Resident | None:
        """The training images on the devices; None where they do not fit or are not wanted there."""
        return place(self.dataset, self.mesh, self.config.data.on_device)

    @property
    def eval_batch_size(self) -> int:
        """The config's, rounded up to a multiple of the number of devices."""
        return -(-self.config.eval_batch_size // self.mesh.size) * self.mesh.size

    @property
    def eval_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a batch that `eval_batches` gives, on all processes together."""

        def example(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.eval_batch_size, *shape), dtype, sharding=split(self.mesh))

        image = example(jnp.uint8, *self.dataset.image_shape)
        return {"image": image, "label": example(jnp.int32), "weight": example(jnp.float32)}

    def test_batches(self) -> Any:
        """The held-out split, as `eval_batches` gives it."""
        return eval_batches(self.dataset, self.dataset.test, self.eval_batch_size)

    @functools.cached_property
    def placed_test_batches(self) -> list[Any]:
        """The same on the devices, for a training that evaluates often and keeps its own images there."""
        return [put_batch(batch, self.mesh) for batch in self.test_batches()]


def make_run(
    config: ConfigDict,
    folder: AnyPath | None = None,
    mesh: Mesh | None = None,
    dataset: Dataset | None = None,
    statistics: Statistics | None = None,
    hint: str = "",
) -> Run:
    """Builds the parts of a run; raises `UserError` for whatever in the config cannot work.

    Args:
      folder: the workdir; nothing is read from it. None: the run can be compiled and nothing else.
      mesh: the devices; None: all there are.
      dataset: in place of the one that the config names.
      statistics: mean and deviation to normalise images with, in place of the data set's.
      hint: what to add to the message where the data cannot be loaded.
    """
    config = config.copy_and_resolve_references()
    mesh = data_mesh() if mesh is None else mesh
    check_settings(config, mesh)
    config.data.update(absolute_paths(config.data))
    if config.init_from:
        config.init_from = str(absolute(config.init_from))
    if dataset is None:
        try:
            dataset = load_dataset(**config.data)
        except UserError as error:
            raise UserError(f"{error}{hint}") from None
    if statistics is not None:
        mean, std = (for_channels(values, dataset.image_shape[-1]) for values in statistics)
        dataset = dataclasses.replace(dataset, mean=mean, std=std)
    models = {
        stage: create_model(num_classes=dataset.num_classes, gates=gates, **arch_options(config.model))
        for stage, gates in ((BASELINE, None), (GATED, gate_config(config.gates)))
    }
    run = Run(config, folder, dataset, mesh, normalizer(dataset), models)
    run.abstract_variables(BASELINE)  # Refuses images that the network cannot take, before anything is written.
    return run


def open_run(config: ConfigDict, folder: AnyPath, dataset: Dataset | None = None, hint: str = "") -> Run:
    """The run of a config in a workdir; images are normalised as its baseline, or the one it starts from, was given."""
    places = [folder, *([absolute(config.init_from)] if config.get("init_from") else [])]
    found = (trained_statistics(place) for place in places if has_checkpoint(place, BASELINE))
    run = make_run(config, folder, dataset=dataset, statistics=next(filter(None, found), None), hint=hint)
    if run.config.subnets.count and (folder / SUBNETS_FILE).exists():
        run.add_subnets(read_subnets(folder))
    return run


def load_run(folder: str, data: str | None = None, images: bool = True) -> Run:
    """The run of a workdir; raises `UserError` if it holds none.

    A `RunWarning` says if training stopped early, or if no dense network of its own is there.

    Args:
      data: name of a data set to use in place of the config's, prepared as that was.
      images: whether images are needed. If not, the data set is described as the checkpoints record it, and it need not
        be on this machine; only where a workdir of an older version does not record enough is it loaded.
    """
    path, config = load(folder)
    kept = {} if data is None else _kept_dataset(path)
    if data is not None:
        config.data.update(other_options(config.data, data, kept.get("image_shape")))
    dataset = None if images else _recorded_dataset(path, config)
    hint = "; if its data are elsewhere now, name them with --data=folder:PATH or --data=tfds:NAME"
    run = open_run(config, path, dataset, "" if data else hint)
    # Of other images, there may be more or fewer than the network was trained on.
    # All processes open checkpoints together; one alone would wait for the others.
    found = list(_warnings(run, kept.get("train_size") or len(run.dataset.train)))
    if is_first():
        for warning in found:
            warnings.warn(f"{path}: {warning}", RunWarning, stacklevel=2)
    return run


def _recorded_dataset(workdir: AnyPath, config: ConfigDict) -> Dataset | None:
    """A workdir's data set without images, as its checkpoints record it; None where they do not say enough."""
    with contextlib.closing(Checkpoints(workdir, _first_stage(workdir), {})) as checkpoints:
        kept, saved = checkpoints.kept_dataset(), flatten_dict(checkpoints.network_shapes())
    if not kept.get("mean"):
        return None
    classes, shape = saved[(*CLASSIFIER, "kernel")].shape[1], kept.get("image_shape")
    if shape is None:
        side = config.data.get("image_size")
        try:
            side = side or describe_dataset(**{**config.data, "num_classes": classes}).image_shape[0]
        except (UserError, ImportError):
            return None
        shape = [side, side, len(kept["mean"])]
    nothing = NoImages(kept.get("train_size", 0))
    names = tuple(kept.get("class_names", ()))
    return Dataset(nothing, nothing, classes, tuple(shape), kept["mean"], kept["std"], class_names=names)


def _first_stage(workdir: AnyPath) -> str:
    """The first stage of a workdir with a network; the baseline if there is none."""
    return next((stage for stage in STAGES if has_checkpoint(workdir, stage)), BASELINE)


def _kept_dataset(workdir: AnyPath) -> dict[str, Any]:
    with contextlib.closing(Checkpoints(workdir, _first_stage(workdir), {})) as checkpoints:
        return checkpoints.kept_dataset()


def _warnings(run: Run, images: int) -> Iterator[str]:
    for stage in STAGES:
        step = newest_step(run.workdir, stage)
        if (step or step == 0) and stage not in run.models:
            yield f"its {stage} cannot be run: {SUBNETS_FILE} is missing; restore it"
        elif step or (step == 0 and not run.is_finished(stage)):
            yield from filter(None, [cut_short(run.config, stage, step, images)])
    if is_gated_backbone(run.workdir):
        yield BACKBONE


def cut_short(config: ConfigDict, stage: str, step: int, images: int | None) -> str:
    """Says that a network of this step is not trained to the end; empty if it is, or the number of images unknown."""
    total = total_steps(config, stage, images or 0)
    return f"the {stage} network is that of step {step:,} of {total:,}" if step < total else ""


def is_gated_backbone(workdir: AnyPath) -> bool:
    """Whether what a workdir has as its dense network is its converted gated one, every filter on."""
    if newest_step(workdir, BASELINE) != 0 or newest_step(workdir, GATED) != 0:
        return False
    conversion = Conversion.load(workdir)
    return conversion is not None and conversion.holds_heads


def trained_statistics(workdir: AnyPath) -> Statistics | None:
    """Mean and deviation that a workdir's baseline was trained with; None if its checkpoint does not tell."""
    with contextlib.closing(Checkpoints(workdir, BASELINE, {})) as checkpoints:
        kept = checkpoints.kept_dataset()
    return (kept["mean"], kept["std"]) if kept else None
