"""Checkpoints with Orbax: network and optimizer together, the newest and the best kept."""

import pathlib
import shutil
import time
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding
from orbax.checkpoint.checkpoint_managers import preservation_policy

from ftwt_jax.errors import UserError, shortened
from ftwt_jax.parallel.processes import barrier, broadcast, is_first, raise_if_lost
from ftwt_jax.training.step import TrainState
from ftwt_jax.workdir.integrity import MISSING, damage, write_list

FOLDER = "checkpoints"
# Items of a checkpoint; the network is by itself so that it can be read without knowing how it was trained.
NETWORK, OPTIMIZER, DATASET = "network", "optimizer", "dataset"
# Among what is kept of the data: that the network of step 0 is only what training starts from.
UNFINISHED = "unfinished"
# The newest, and the one before, which is what is left if storage damages the newest.
KEPT = 2
# Before the number of a checkpoint that was found damaged, and is kept aside.
DAMAGED = "damaged-"


class _Manager(ocp.CheckpointManager):
    """Leaves preemption to the training loop, whose steps have other numbers."""

    def reached_preemption(self, step: int) -> bool:
        return False


def set_damaged_aside(workdir: pathlib.Path, stage: str) -> list[str]:
    """Takes damaged checkpoints of a stage out of the way, so that training goes on from the one before.

    They are renamed, not deleted, unless it was a deletion that was cut off: an older one with files missing. Every
    process of a run has to call this.

    Returns:
      What was found, a sentence each; on the first process alone.
    """
    notes = []
    intact = 0
    if is_first():
        for path in _complete(workdir / FOLDER / stage):
            found = damage(path)
            if not found:
                intact += 1
            elif intact >= KEPT and found.endswith(MISSING):
                # Enough newer ones are there: the process was killed while it deleted this one.
                shutil.rmtree(path)
            else:
                aside, again = path.with_name(DAMAGED + path.name), 1
                while aside.exists():
                    again += 1
                    aside = path.with_name(f"{DAMAGED}{path.name}-{again}")
                path.rename(aside)
                notes.append(f"checkpoint {path} is damaged: {found}; it is now {aside.name}, and not used")
    barrier(f"{stage} looked through")
    return notes


def has_checkpoint(workdir: pathlib.Path, stage: str) -> bool:
    """Whether a stage of a run has a complete checkpoint."""
    return bool(_complete(workdir / FOLDER / stage))


def _complete(folder: pathlib.Path) -> list[pathlib.Path]:
    """The complete checkpoints of a stage, the newest first; those being written have other names."""
    found = [path for path in folder.glob("*") if path.name.isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: -int(path.name))


class Checkpoints:
    """The checkpoints of one stage (`baseline` or `gated`) of a run, in `workdir/checkpoints/STAGE/STEP`.

    Args:
      dataset: what is kept of the data with each network, see `Dataset.describe`.
      create: make the folder if it is missing; off, that is a `UserError`.
    """

    def __init__(self, workdir: pathlib.Path, stage: str, dataset: dict[str, Any], create: bool = False):
        self.path, self._dataset = workdir / FOLDER / stage, dataset
        self._intact: set[int] = set()
        if not create and not self.path.is_dir():
            raise self._missing()
        best = preservation_policy.BestN(
            get_metric_fn=lambda metrics: metrics["accuracy"], n=1, keep_checkpoints_without_metrics=False
        )
        keep = preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(KEPT), best])
        # Saving returns when the files are complete: what is reported as saved survives a kill in the next moment.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            best_fn=lambda metrics: metrics["accuracy"],
            enable_async_checkpointing=False,
            cleanup_tmp_directories=create,
        )
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for item in (NETWORK, OPTIMIZER):
            handler = ocp.StandardCheckpointHandler()
            registry.add(item, ocp.args.StandardSave, handler)
            registry.add(item, ocp.args.StandardRestore, handler)
        description = ocp.JsonCheckpointHandler()
        registry.add(DATASET, ocp.args.JsonSave, description)
        registry.add(DATASET, ocp.args.JsonRestore, description)
        try:
            self._manager = _Manager(self.path, options=options, handler_registry=registry)
        except (ValueError, OSError) as error:
            raise_if_lost(error)
            for path in _complete(self.path):
                self._check_intact(int(path.name))
            raise UserError(f"the checkpoints in {self.path} cannot be read: {shortened(error)}") from error

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def step(self, best: bool = False) -> int | None:
        """The newest step, or the best of those whose accuracy is known; None if there is none."""
        found = self.best_step() if best else None
        return self.latest_step() if found is None else found

    def best_step(self) -> int | None:
        """Step of the checkpoint with the highest accuracy; None if there is none."""
        return self._manager.best_step()

    def save(self, state: TrainState, metrics: dict[str, float] | None = None) -> None:
        """Saves the state; `metrics["accuracy"]`, if it is known, says which checkpoint is the best."""
        items = {
            NETWORK: ocp.args.StandardSave(state.variables),
            OPTIMIZER: ocp.args.StandardSave({"step": state.step, "state": state.opt_state}),
        }
        self._save(int(state.step), items, metrics)

    def save_network(self, variables: Any, finished: bool = True) -> None:
        """Saves a network from elsewhere as step 0; if it is not `finished`, training starts from it."""
        items = {NETWORK: ocp.args.StandardSave(variables)}
        self._save(0, items, None, None if finished else {UNFINISHED: True})

    def is_unfinished(self) -> bool:
        """Whether the newest network is only what training starts from."""
        return bool(self.kept_dataset().get(UNFINISHED))

    def is_finished(self, total: int) -> bool:
        """Whether a network is there that `total` steps of training would not change."""
        step = self.latest_step()
        return step is not None and (step >= total or (step == 0 and not self.is_unfinished()))

    def _save(
        self, step: int, items: dict[str, Any], metrics: dict[str, float] | None, notes: dict[str, Any] | None = None
    ) -> None:
        items[DATASET] = ocp.args.JsonSave({**self._dataset, **(notes or {})})
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)
            if is_first():
                write_list(self.path / str(step))
        except (ValueError, OSError) as error:
            raise_if_lost(error)
            self._remove_unfinished()
            newest = self.latest_step()
            older = "there is no older one" if newest is None else f"the one of step {newest} is kept"
            raise UserError(
                f"the checkpoint of step {step} cannot be written to {self.path}: {shortened(error)}; "
                f"{older}; make room, then give the same command again"
            ) from error

    def restore(self, state: TrainState) -> TrainState:
        """The newest state, in the shapes, dtypes and shardings of `state`."""
        step = self.latest_step()
        if step is not None:
            self._check_size(step)
            self._check_classes(step)
        items = {
            NETWORK: ocp.args.StandardRestore(state.variables),
            OPTIMIZER: ocp.args.StandardRestore({"step": state.step, "state": state.opt_state}),
        }
        found = self._restore(step, items)
        network, optimizer = found[NETWORK], found[OPTIMIZER]
        return TrainState(optimizer["step"], network["params"], network["batch_stats"], optimizer["state"])

    def restore_network(
        self, variables: Any, sharding: NamedSharding, best: bool = False, other_classes: bool = False
    ) -> dict[str, Any]:
        """The newest (or best) network, shaped like `variables`; raises `UserError` if there is none that fits.

        Args:
          other_classes: take one that was trained to tell other classes apart.
        """
        step = self.step(best)
        if step is not None:
            if not other_classes:
                self._check_classes(step)
            self._check_shapes(self.network_shapes(best), variables)
        return self._restore(step, {NETWORK: ocp.args.StandardRestore(_targets(variables, sharding))})[NETWORK]

    def network_shapes(self, best: bool = False) -> Any:
        """Shapes and dtypes of the newest (or best) network, as it was saved."""
        step = self.step(best)
        if step is None:
            raise self._missing()
        self._check_intact(step)
        try:
            found = self._manager.item_metadata(step)[NETWORK]
        except (ValueError, KeyError, OSError) as error:
            raise self._unreadable(step, error) from error
        if found is None:
            raise UserError(f"checkpoint {self.path / str(step)} has no network in it")
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), found.tree)

    def kept_dataset(self, step: int | None = None) -> dict[str, Any]:
        """What a checkpoint (the newest) keeps of its data, see `Dataset.describe`; empty if it keeps nothing."""
        step = self.latest_step() if step is None else step
        if not (self.path / str(step) / DATASET).is_dir():
            return {}
        return self._restore(step, {DATASET: ocp.args.JsonRestore()})[DATASET]

    def _check_intact(self, step: int) -> None:
        """Raises `UserError` if a checkpoint is not as it was written."""
        if step in self._intact:
            return
        found = damage(self.path / str(step)) if is_first() else None
        if broadcast(found is not None):
            raise UserError(
                f"checkpoint {self.path / str(step)} is damaged: {found or 'the first process says how'}; `train` with "
                "this workdir goes on from the one before"
            )
        self._intact.add(step)

    def _check_size(self, step: int) -> None:
        """Raises `UserError` if an epoch now has another length, so that the input position means nothing."""
        kept, here = self.kept_dataset(step).get("train_size"), self._dataset["train_size"]
        if kept not in (None, here):
            raise UserError(
                f"{self.path / str(step)} was written while there were {kept} training images, and now there are "
                f"{here}: bring the data back to what they were, or start in a new workdir with config.init_from"
            )

    def _check_classes(self, step: int) -> None:
        """Raises `UserError` if the network was trained to tell other classes apart, or the same in another order."""
        kept, here = self.kept_dataset(step).get("class_names"), self._dataset["class_names"]
        if kept and here and kept != here:
            differing = [f"{old!r} there, {new!r} here" for old, new in zip(kept, here, strict=False) if old != new]
            first = differing[0] if differing else f"{len(kept)} classes there, {len(here)} here"
            raise UserError(
                f"the network in {self.path} was trained on other classes: {first}; compare config.data, or the folders"
            )

    def _check_shapes(self, saved: Any, variables: Any) -> None:
        here, wanted = (
            {name: tuple(leaf.shape) for name, leaf in flatten_dict(tree, sep="/").items()}
            for tree in (saved, variables)
        )
        for name in (*wanted, *here):
            if here.get(name) != wanted.get(name):
                there, mine = (shapes.get(name, "nothing") for shapes in (here, wanted))
                raise UserError(
                    f"the network in {self.path} is another one: {name} is {there} there and {mine} in this config; "
                    "compare config.model and config.data of both"
                )

    def _restore(self, step: int | None, items: dict[str, Any]) -> Any:
        if step is None:
            raise self._missing()
        self._check_intact(step)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError) as error:
            raise_if_lost(error)
            raise self._unreadable(step, error) from error

    def _remove_unfinished(self) -> None:
        """Gives back the room that a save which failed has taken."""
        # For a second, in which tasks that Orbax has left behind may still be writing.
        for _ in range(10):
            for path in self.path.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(0.1)

    def _unreadable(self, step: int, error: Exception) -> UserError:
        path = self.path / str(step)
        return UserError(
            f"checkpoint {path} cannot be restored: {shortened(error)}; move it away to use the one before"
        )

    def _missing(self) -> UserError:
        return UserError(f"no trained {self.path.name} network in {self.path}: run `train` with this workdir first")

    def close(self) -> None:
        """Waits for whatever is still being written."""
        self._manager.close()


def _targets(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
