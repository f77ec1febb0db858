"""What it costs a training that its images come from the host batch by batch, and what if they are on the device."""

import statistics
import time
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from ftwt_jax.config import default_config
from ftwt_jax.data import resident
from ftwt_jax.data.build import SIDE_OVER_PADDING
from ftwt_jax.data.source import ArraySource, Dataset
from ftwt_jax.parallel.sharding import data_mesh, put_whole
from ftwt_jax.training.feed import DeviceFeed, Feed, HostFeed, runs_in_loop
from ftwt_jax.training.run import Run
from ftwt_jax.training.settings import BASELINE
from ftwt_jax.training.stage import make_stage
from ftwt_jax.training.step import TrainState, create_state, normalizer

_IMAGES, _ROUNDS, _SECONDS, _MOST_STEPS = 4096, 5, 1.0, 64
# Of large images, which would take long to make, fewer.
_BYTES = 2**28


def time_feeds(arch: str, model: nn.Module, image_shape: tuple[int, ...], batch: int) -> dict[str, Any]:
    """Images per second of a dense network's training with random crops and flips, both ways, in alternating blocks.

    The share of time that the host takes is what is left of a block besides its steps on a batch that is there already.

    Args:
      arch: the name of the network.
      image_shape: (H, W, channels).
      batch: images of a step.
    """
    source = _random_images(image_shape, batch)
    run = _synthetic_run(arch, model, batch, source)
    stage = make_stage(run, BASELINE)
    in_loop = runs_in_loop(run.mesh)
    placed = resident.put(source, run.mesh, shard=False)
    from_host = HostFeed(run, stage, 0)
    from_device = DeviceFeed(run, stage, placed, _MOST_STEPS if in_loop else 1, in_loop)

    def fresh() -> TrainState:
        variables = jax.jit(model.init)(run.key(BASELINE), run.example_images)
        return put_whole(create_state(variables, stage.optimizer), stage.shardings)

    blocks = [_Block(from_host, fresh()), _Block(from_device, fresh()), _Block(_OneBatch(from_host), fresh())]
    for block in blocks:
        block.run(block.feed.most)  # The first compiles.
    second = blocks[-1].run(2) / 2
    steps = -(-max(int(_SECONDS / second), 2) // from_device.most) * from_device.most
    seconds = [[block.run(steps) for block in blocks] for _ in range(_ROUNDS)]
    host, device, step = (statistics.median(times) for times in zip(*seconds, strict=True))
    result: dict[str, Any] = {}
    for name, taken in (("host", host), ("device", device)):
        result[f"train_{name}_images_per_second"] = steps * batch / taken
        result[f"train_{name}_share"] = max(1 - step / taken, 0.0)
    return result


def _random_images(image_shape: tuple[int, ...], batch: int) -> ArraySource:
    count = max(min(_IMAGES, _BYTES // int(np.prod(image_shape))), batch)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *image_shape), np.uint8)
    return ArraySource(images, rng.integers(0, 10, count).astype(np.int32))


def _synthetic_run(arch: str, model: nn.Module, batch: int, source: ArraySource) -> Run:
    """A run of this network on these images."""
    config = default_config(arch, "cifar")
    config.batch_size = batch
    config.baseline.lr = 1e-3  # There is nothing to learn, and a network that diverges computes at another speed.
    _, height, width, channels = source.images.shape
    half, padding = (0.5,) * channels, height // SIDE_OVER_PADDING
    dataset = Dataset(source, source, 10, (height, width, channels), half, half, padding, flip=True)
    return Run(config, None, dataset, data_mesh(), normalizer(dataset), {BASELINE: model})


class _OneBatch:
    """The same batch for every step."""

    most = 1

    def __init__(self, feed: HostFeed):
        self._feed = feed
        self._inputs = feed.placed(feed.inputs(0, 1))

    def inputs(self, step: int, count: int) -> Any:
        return self._inputs

    def run(self, state: TrainState, inputs: Any, r: float, offsets: list[float]) -> Any:
        return self._feed.run(state, inputs, r, offsets)


class _Block:
    """Steps of a feed in a row, as the training loop makes them: one call ahead of the device."""

    def __init__(self, feed: Feed, state: TrainState):
        self.feed, self._state, self._step = feed, state, 0

    def run(self, steps: int) -> float:
        """Seconds for this many steps, until the device has done them."""
        start, before = time.perf_counter(), None
        for _ in range(0, steps, self.feed.most):
            count = self.feed.most
            inputs = self.feed.inputs(self._step, count)
            self._state, calls = self.feed.run(self._state, inputs, 1.0, [0.0] * count)
            self._step += count
            if before is not None:
                before.block_until_ready()
            before = calls[-1][0]["loss"]
        jax.block_until_ready(self._state)
        return time.perf_counter() - start
