"""How many images a second the input of training delivers, without a network."""

import statistics
import time
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from ftwt_jax.data import load_dataset
from ftwt_jax.data.pipeline import train_batches
from ftwt_jax.data.source import Dataset
from ftwt_jax.errors import UserError
from ftwt_jax.parallel.processes import cpu_count
from ftwt_jax.parallel.sharding import data_mesh
from ftwt_jax.printing import say
from ftwt_jax.training.settings import check_settings

ROUNDS = 5


def benchmark_input(config: ConfigDict, seconds: float, console: Console) -> dict[str, Any]:
    """Reads training batches for a while and prints images/s, the median of several rounds.

    Augmentation of small images, which runs on the device, is not part of it.
    """
    if not seconds > 0:
        raise UserError(f"--seconds is how long to measure and must be positive; got {seconds}")
    check_settings(config, data_mesh())
    dataset = load_dataset(**config.data)
    rates = measure_rates(dataset, config.batch_size, config.seed, seconds)
    rate, cores = statistics.median(rates), cpu_count()
    result = {
        "images_per_second": rate,
        "images_per_second_per_core": rate / cores,
        "cores": cores,
        "image_shape": list(dataset.image_shape),
        "batch": config.batch_size,
    }
    side = dataset.image_shape[0]
    say(
        console,
        f"input of {config.data.name} at {side}x{side}, batch {config.batch_size}: {rate:.0f} images/s on "
        f"{cores} cores, {rate / cores:.0f} per core (median of {ROUNDS} rounds, {min(rates):.0f} to {max(rates):.0f})",
    )
    if dataset.skipped.names:
        say(console, dataset.skipped.summary())
    return result


def measure_rates(dataset: Dataset, batch_size: int, seed: int, seconds: float) -> list[float]:
    """Images per second of `ROUNDS` rounds, after what was made ahead has been used up."""
    batches = train_batches(dataset, batch_size, seed)
    deadline = time.perf_counter() + seconds / ROUNDS
    next(batches)
    while time.perf_counter() < deadline:
        next(batches)
    rates = []
    for _ in range(ROUNDS):
        start, count = time.perf_counter(), 0
        while (passed := time.perf_counter() - start) < seconds / ROUNDS:
            next(batches)
            count += batch_size
        rates.append(count / passed)
    return rates
