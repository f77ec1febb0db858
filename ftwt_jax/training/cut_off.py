"""States whose step was taken, while what follows it, an evaluation or a calibration, was cut off."""

import contextlib

from ftwt_jax.files import remove_folder
from ftwt_jax.parallel.processes import is_first
from ftwt_jax.training.run import Run
from ftwt_jax.training.stage import Stage
from ftwt_jax.training.step import TrainState
from ftwt_jax.workdir.checkpoints import FOLDER, Checkpoints, cut_off, has_checkpoint


class CutOff:
    """The state of a stage after a step that is not finished, kept beside the stage's checkpoints.

    A checkpoint holds the state after everything that follows its step, with the accuracy. So a stop in between must
    not leave one: the resumed run does what was cut off, and saves the checkpoint as an undisturbed run does.
    """

    def __init__(self, run: Run, stage: Stage):
        self._run, self._stage, self._name = run, stage, cut_off(stage.name)

    def step(self) -> int:
        """The step after which the stage was cut off; 0 if it was not."""
        return self._run.steps_of(self._name) if has_checkpoint(self._run.workdir, self._name) else 0

    def restore(self) -> TrainState:
        """The state after that step."""
        with contextlib.closing(self._checkpoints()) as checkpoints:
            return checkpoints.restore(self._stage.state)

    def save(self, state: TrainState) -> None:
        """Keeps the state after a step."""
        with contextlib.closing(self._checkpoints(create=True)) as checkpoints:
            checkpoints.save(state)

    def forget(self) -> None:
        """Deletes what was kept, once there is a newer checkpoint."""
        folder = self._run.workdir / FOLDER / self._name
        if is_first() and folder.exists():
            remove_folder(folder)

    def _checkpoints(self, create: bool = False) -> Checkpoints:
        return self._run.checkpoints(self._name, create)
