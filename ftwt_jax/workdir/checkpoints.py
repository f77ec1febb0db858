"""Checkpoints with Orbax: network and optimizer together; the newest ones and the best are kept."""

import contextlib
import errno
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from orbax.checkpoint.checkpoint_managers import preservation_policy

from ftwt_jax.errors import UserError, one_line, shortened, storage_errors
from ftwt_jax.files import AnyPath, in_bucket, list_folder, remove_folder
from ftwt_jax.parallel.processes import barrier, broadcast, is_first, raise_if_lost
from ftwt_jax.workdir.fitting import check_classes, check_shapes, check_size
from ftwt_jax.workdir.integrity import LIST, MISSING, damage, write_list

FOLDER = "checkpoints"
# Items of a checkpoint. The network is an item of its own, to be read without knowing how it was trained.
NETWORK, OPTIMIZER, DATASET = "network", "optimizer", "dataset"
# Key in the dataset item: the network of step 0 is only the start of a training.
UNFINISHED = "unfinished"
# The newest, and the previous one in case storage damages the newest.
KEPT = 2
# Prefix of the folder name of a checkpoint that was found damaged.
DAMAGED = "damaged-"
# Orbax writes this file last, where a folder cannot be renamed.
_COMMITTED = "commit_success.txt"
# Errors of the operating system that tell the user enough by themselves.
_SYSTEM_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)

_Read = TypeVar("_Read")


class _Manager(ocp.CheckpointManager):
    """Leaves preemption to the training loop, which numbers the steps of both stages in one row."""

    def reached_preemption(self, step: int) -> bool:
        return False


def set_damaged_aside(workdir: AnyPath, stage: str) -> list[str]:
    """Renames the damaged checkpoints of a stage, so that training continues from an intact one.

    Only a checkpoint whose deletion was cut off is deleted: an older one with files missing. Every process of a run
    must call this.

    Returns:
      A sentence for each damaged checkpoint, on the first process; an empty list on the others.
    """
    notes = []
    intact = 0
    if is_first():
        for path in _complete(workdir / FOLDER / stage):
            found = damage(path)
            if not found:
                intact += 1
                if in_bucket(path):
                    _commit(path)
            elif intact >= KEPT and found.endswith(MISSING):
                # There are enough newer ones, so the process was killed while it deleted this one.
                remove_folder(path)
            else:
                aside, again = path.with_name(DAMAGED + path.name), 1
                while aside.exists():
                    again += 1
                    aside = path.with_name(f"{DAMAGED}{path.name}-{again}")
                path.rename(aside)
                notes.append(f"checkpoint {path} is damaged: {found}; it was renamed to {aside.name} and is not used")
    barrier(f"{stage} checked")
    return notes


def cut_off(stage: str) -> str:
    """Where the states of a stage are kept whose evaluation or calibration was cut off, beside its checkpoints."""
    return f"{stage}-cut-off"


def has_checkpoint(workdir: AnyPath, stage: str) -> bool:
    """Whether a stage of a run has a complete checkpoint."""
    return bool(_complete(workdir / FOLDER / stage))


def newest_step(workdir: AnyPath, stage: str) -> int | None:
    """Step of a stage's newest complete checkpoint; None if it has none."""
    found = _complete(workdir / FOLDER / stage)
    return int(found[0].name) if found else None


def _complete(folder: AnyPath) -> list[AnyPath]:
    """The complete checkpoints of a stage, the newest first."""
    found = [path for path in list_folder(folder) if path.name.isdigit() and _is_complete(path)]
    return sorted(found, key=lambda path: -int(path.name))


def _is_complete(path: AnyPath) -> bool:
    """Whether a checkpoint was written to its end; on a file system, its folder has a temporary name until then."""
    if not in_bucket(path):
        return path.is_dir()
    return not {_COMMITTED, LIST}.isdisjoint(file.name for file in list_folder(path))


def _commit(path: AnyPath) -> None:
    """Marks a checkpoint as complete that was copied into a bucket from a disk, where Orbax needs no mark."""
    found = list_folder(path)
    if _COMMITTED not in {file.name for file in found}:
        for folder in (path, *(item for item in found if item.is_dir())):
            (folder / _COMMITTED).write_text("")
        write_list(path)


class Checkpoints:
    """The checkpoints of one stage (`baseline` or `gated`) of a run, in `workdir/checkpoints/STAGE/STEP`.

    Args:
      dataset: the description of the data saved with each network, see `Dataset.describe`.
      create: make the folder if it is missing; otherwise a missing folder is a `UserError`.
    """

    def __init__(self, workdir: AnyPath, stage: str, dataset: dict[str, Any], create: bool = False):
        self.path, self._dataset = workdir / FOLDER / stage, dataset
        self._intact: set[int] = set()
        if not create and not self.path.is_dir():
            raise self._missing()
        best = preservation_policy.BestN(
            get_metric_fn=lambda metrics: metrics["accuracy"], n=1, keep_checkpoints_without_metrics=False
        )
        keep = preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(KEPT), best])
        # Synchronous: once a checkpoint is reported as saved, it survives a kill.
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
        except storage_errors(ValueError) as error:
            raise_if_lost(error)
            for path in _complete(self.path):
                self._check_intact(int(path.name))
            raise UserError(f"cannot read the checkpoints in {self.path}: {_reason(error)}") from error

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def step(self, best: bool = False) -> int | None:
        """The newest step, or the step with the highest accuracy if any was measured; None without checkpoints."""
        found = self.best_step() if best else None
        return self.latest_step() if found is None else found

    def best_step(self) -> int | None:
        """Step of the checkpoint with the highest accuracy; None if there is none."""
        return self._manager.best_step()

    def save(self, state: Any, metrics: dict[str, float] | None = None) -> None:
        """Saves a training state.

        Args:
          state: a `training.step.TrainState`.
          metrics: `accuracy` decides which checkpoint is the best; None if it was not measured.

        Raises:
          UserError: the files cannot be written; older checkpoints are unchanged.
        """
        items = {
            NETWORK: ocp.args.StandardSave(state.variables),
            OPTIMIZER: ocp.args.StandardSave({"step": state.step, "state": state.opt_state}),
        }
        self._save(int(state.step), items, metrics)

    def save_network(self, variables: Any, finished: bool = True) -> None:
        """Saves an imported network as step 0; unless it is `finished`, training starts from it."""
        # As training states hold them: networks without batch norm have no statistics.
        items = {NETWORK: ocp.args.StandardSave({"batch_stats": {}, **variables})}
        self._save(0, items, None, None if finished else {UNFINISHED: True})

    def is_unfinished(self) -> bool:
        """Whether the newest network is only the start of a training."""
        return bool(self.kept_dataset().get(UNFINISHED))

    def is_finished(self, total: int) -> bool:
        """Whether the newest network has all `total` steps of training behind it, or needs none."""
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
        except storage_errors(ValueError) as error:
            raise_if_lost(error)
            self._remove_unfinished()
            newest = self.latest_step()
            older = "there is no older one" if newest is None else f"the checkpoint of step {newest} is intact"
            raise UserError(
                f"cannot write the checkpoint of step {step} to {self.path}: {_reason(error)}; {older}; free some "
                "space, then run the same command again"
            ) from error

    def restore(self, state: Any) -> Any:
        """The newest training state, in the shapes, dtypes and shardings of `state`.

        Raises:
          UserError: there is none, it is damaged, or it belongs to other data.
        """
        step = self.latest_step()
        if step is not None:
            kept = self.kept_dataset(step)
            check_size(self.path / str(step), kept, self._dataset)
            check_classes(self.path, kept, self._dataset)
        items = {
            NETWORK: ocp.args.StandardRestore(state.variables),
            OPTIMIZER: ocp.args.StandardRestore({"step": state.step, "state": state.opt_state}),
        }
        found = self._restore(step, items)
        network, optimizer = found[NETWORK], found[OPTIMIZER]
        return state.replace(
            step=optimizer["step"],
            params=network["params"],
            batch_stats=network.get("batch_stats", {}),
            opt_state=optimizer["state"],
        )

    def restore_network(
        self, variables: Any, sharding: NamedSharding, best: bool = False, other_classes: bool = False
    ) -> dict[str, Any]:
        """The newest (or best) network, shaped like `variables`; raises `UserError` if there is none that fits.

        Args:
          other_classes: accept a network that was trained on other classes.
        """

        def read(step: int | None) -> dict[str, Any]:
            if step is not None:
                if not other_classes:
                    check_classes(self.path, self.kept_dataset(step), self._dataset)
                check_shapes(self.path, self._shapes(step), variables)
            return self._restore(step, {NETWORK: ocp.args.StandardRestore(_targets(variables, sharding))})[NETWORK]

        return self._read(read, best)

    def network_shapes(self, best: bool = False) -> Any:
        """Shapes and dtypes of the newest (or best) network, as it was saved."""
        return self._read(self._shapes, best)

    def _shapes(self, step: int | None) -> Any:
        if step is None:
            raise self._missing()
        self._check_intact(step)
        try:
            found = self._manager.item_metadata(step)[NETWORK]
        except storage_errors(ValueError, KeyError) as error:
            raise self._unreadable(step, error) from error
        if found is None:
            raise UserError(
                f"checkpoint {self.path / str(step)} holds no network; rename its folder to use the previous checkpoint"
            )
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), found.tree)

    def kept_dataset(self, step: int | None = None) -> dict[str, Any]:
        """The description of the data saved with a checkpoint (None: the newest); empty if there is none."""
        if step is None:
            return self._read(self.kept_dataset) if self.latest_step() is not None else {}
        path = self.path / str(step)
        if path.is_dir() and not (path / DATASET).is_dir():
            return {}
        return self._restore(step, {DATASET: ocp.args.JsonRestore()})[DATASET]

    def _read(self, read: Callable[[Any], _Read], best: bool = False) -> _Read:
        """What `read` finds at the newest (or best) step; once more if a run that trains here replaced that step."""
        step = self.step(best)
        while True:
            try:
                return read(step)
            except UserError:
                if jax.process_count() > 1:
                    raise
                self._manager.reload()
                step, before = self.step(best), step
                if step == before:
                    raise

    def _check_intact(self, step: int) -> None:
        """Raises `UserError` if a checkpoint is damaged; each is checked once."""
        if step in self._intact:
            return
        found = damage(self.path / str(step)) if is_first() else None
        if broadcast(found is not None):
            raise UserError(
                f"checkpoint {self.path / str(step)} is damaged: {found or 'see the output of process 0'}; run `train` "
                "with this workdir to continue from the previous one"
            )
        self._intact.add(step)

    def _restore(self, step: int | None, items: dict[str, Any]) -> Any:
        if step is None:
            raise self._missing()
        self._check_intact(step)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except storage_errors(ValueError, KeyError) as error:
            raise_if_lost(error)
            raise self._unreadable(step, error) from error

    def _remove_unfinished(self) -> None:
        """Frees the space that a failed save has taken."""
        # For one second, because tasks of Orbax may still be writing.
        for _ in range(10):
            for path in self._unfinished():
                remove_folder(path, ignore_errors=True)
            time.sleep(0.1)

    def _unfinished(self) -> list[AnyPath]:
        if in_bucket(self.path):
            with contextlib.suppress(*storage_errors()):
                return [path for path in list_folder(self.path) if path.name.isdigit() and not _is_complete(path)]
            return []
        return list(self.path.glob("*.orbax-checkpoint-tmp*"))

    def _unreadable(self, step: int, error: Exception) -> UserError:
        path = self.path / str(step)
        return UserError(
            f"cannot restore checkpoint {path}: {_reason(error)}; rename its folder to use the previous checkpoint"
        )

    def _missing(self) -> UserError:
        return UserError(f"no trained {self.path.name} network in {self.path}; run `train` with this workdir first")

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.close()


def _reason(error: Exception) -> str:
    """What the operating system says, if the error quotes it; otherwise the error on one line, its middle left out."""
    text = one_line(error)
    for message in map(os.strerror, _SYSTEM_ERRORS):
        if message in text:
            return message.lower()
    return shortened(error)


def _targets(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
