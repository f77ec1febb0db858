"""What a gated training step costs beside a dense one."""

import statistics
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ftwt_jax.benchmark.torch_training import time_torch_steps
from ftwt_jax.models.vgg import VGG
from ftwt_jax.parallel.sharding import data_mesh, put_batch
from ftwt_jax.training.step import GateTraining, create_state, make_train_step

_ROUNDS = 7


def time_steps(dense: nn.Module, gated: nn.Module, image_shape: tuple[int, ...], torch: bool = False) -> dict[str, Any]:
    """Median times of both training steps, in turns on the same random batch of 64 (VGG) or 128 images.

    Args:
      image_shape: (H, W, channels).
      torch: time a dense step in eager PyTorch too.
    """
    batch = 64 if isinstance(dense, VGG) else 128
    mesh = data_mesh()
    keys = jax.random.split(jax.random.key(0), 3)
    example = {
        "image": jax.random.randint(keys[0], (batch, *image_shape), 0, 256, jnp.uint8),
        "label": jnp.arange(batch) % 10,
        "position": jnp.arange(batch),
    }
    data = put_batch(example, mesh)
    optimizer = optax.sgd(1e-3, momentum=0.9, nesterov=False)
    steps, states, initial = [], [], []
    for model, gates in ((dense, None), (gated, GateTraining(optax.constant_schedule(1.0)))):
        variables = jax.jit(model.init)(keys[1], jnp.zeros((1, *image_shape)))
        initial.append(variables)
        states.append(create_state(variables, optimizer))
        steps.append(make_train_step(model, optimizer, lambda batch: batch["image"] / 128.0 - 1, mesh, gates))
    r = jnp.float32(0.9)
    seconds: list[list[float]] = [[], []]
    for turn in range(_ROUNDS + 1):
        for index, step in enumerate(steps):
            start = time.perf_counter()
            states[index], metrics = step(states[index], data, r)
            jax.block_until_ready((states[index], metrics))
            if turn:  # The first compiles.
                seconds[index].append(time.perf_counter() - start)
    against: dict[str, Any] = {}
    if torch:

        def dense_step() -> None:
            states[0], metrics = steps[0](states[0], data, r)
            jax.block_until_ready((states[0], metrics))

        images, labels = np.array(example["image"] / 128.0 - 1), np.array(example["label"])
        against = time_torch_steps(dense, initial[0], images, labels, dense_step)
    plain, with_gates = (statistics.median(times) for times in seconds)
    return {
        "train_batch": batch,
        "train_dense_images_per_second": batch / plain,
        "train_gated_images_per_second": batch / with_gates,
        "train_overhead": with_gates / plain,
        **against,
    }
