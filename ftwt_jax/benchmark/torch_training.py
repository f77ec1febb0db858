"""Our dense training step against eager PyTorch's."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen
import numpy as np

_ROUNDS, _BLOCK = 5, 3


def time_torch_steps(
    dense: flax.linen.Module, variables: dict[str, Any], images: np.ndarray, labels: np.ndarray, ours: Callable[[], Any]
) -> dict[str, Any]:
    """Images/s of an eager PyTorch training step of the same network on the same batch, those of ours, and
    ours over PyTorch's.

    PyTorch's step: forward in train mode, cross-entropy, backward, SGD with momentum 0.9, with its default threads.
    Both run in alternating blocks, not step by step: the threads of either go on spinning for a while and take the
    cores from the other. The first step of a block is not counted.

    Args:
      images: float32 [N, H, W, channels].
      labels: [N].
      ours: takes one of our steps on as many images, and waits for it.
    """
    import torch

    from ftwt_jax.benchmark.torch_dense import torch_network

    network = torch_network(dense, variables).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    inputs = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    targets = torch.from_numpy(labels.astype(np.int64))

    def theirs() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(inputs), targets).backward()
        optimizer.step()

    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS):
        for step, times in zip((ours, theirs), seconds, strict=True):
            for turn in range(_BLOCK):
                start = time.perf_counter()
                step()
                if turn:
                    times.append(time.perf_counter() - start)
    mine, torchs = (statistics.median(times) for times in seconds)
    return {
        "train_torch_images_per_second": len(labels) / torchs,
        "train_torch_dense_images_per_second": len(labels) / mine,
        "train_torch_ratio": torchs / mine,
    }
