"""Checkpoints that are read while another process trains: it writes new ones and removes old ones at any moment."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from ftwt_jax.errors import UserError
from ftwt_jax.parallel.sharding import data_mesh, replicated
from ftwt_jax.training.settings import BASELINE
from tests.conftest import TINY_STEPS
from tests.helpers.weight_files import checkpoints


def steps(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in folder.iterdir() if path.name.isdigit()]


@pytest.fixture
def copied(tiny_run, tmp_path) -> pathlib.Path:
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run[0], workdir)
    return workdir


@pytest.mark.parametrize("best", [False, True], ids=["newest", "best"])
def test_a_checkpoint_that_a_training_replaced_is_not_missed(copied, best):
    folder, later = copied / "checkpoints" / BASELINE, str(2 * TINY_STEPS)
    with checkpoints(copied, BASELINE) as before, checkpoints(copied, BASELINE) as reader:
        network = before.restore_network(before.network_shapes(best), replicated(data_mesh()), best)
        kept = folder / str(before.step(best))
        for path in steps(folder):
            if path != kept:
                shutil.rmtree(path)
        kept.rename(folder / later)
        shapes = reader.network_shapes(best)
        found = reader.restore_network(shapes, replicated(data_mesh()), best)
        assert reader.step(best) == int(later)
    jax.tree.map(np.testing.assert_array_equal, found, network)


def test_what_is_kept_of_the_data_is_read_where_the_training_is_now(copied):
    folder = copied / "checkpoints" / BASELINE
    with checkpoints(copied, BASELINE) as reader:
        for path in steps(folder):
            if path.name == str(TINY_STEPS):
                path.rename(folder / str(2 * TINY_STEPS))
            else:
                shutil.rmtree(path)
        assert reader.kept_dataset()["train_size"] == 1347


def test_a_checkpoint_that_is_damaged_and_still_the_newest_is_refused(copied):
    for path in steps(copied / "checkpoints" / BASELINE):
        shutil.rmtree(path / "network")
    with (
        checkpoints(copied, BASELINE) as reader,
        pytest.raises(UserError, match="is damaged"),
    ):
        reader.network_shapes()
