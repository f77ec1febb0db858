"""Inference at several batch sizes: the dense network, the masked one, and compact execution.

python results/time_inference.py FIGURES.jsonl SECONDS [--trained=WORKDIR] [--tiny]      called by results/gpu.sh

Medians over images that compact execution has not been calibrated with, each batch blocked until its logits are ready,
the three networks in turns. Random gates are the worst case for compact execution off a CPU: no filter is always off.
"""

import argparse
import concurrent.futures
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from figures import Figures

from ftwt_jax.benchmark.synthetic import synthetic_subject
from ftwt_jax.budget.trained import Subject, trained_subject
from ftwt_jax.inference.compact import compact, fold
from ftwt_jax.ops.compiling import keep_compiled

# Networks with random gates and their MACs reduction: what says most comes first.
NETWORKS = (("resnet20", 0.5), ("resnet34", 0.5), ("vgg16_bn", 0.73))
TINY = (("resnet8", 0.5),)
BATCHES, TINY_BATCHES = (1, 64, 256), (4,)
# Batches that a network runs before the next one's turn, and how many turns it has.
BLOCK, ROUNDS = 16, 4


def measure(networks: dict[str, Any], images: jax.Array, batch: int) -> dict[str, float]:
    """Milliseconds of each network for a batch of images [n, H, W, channels]."""
    parts = [images[start : start + batch] for start in range(0, min(len(images), BLOCK * batch), batch)]
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(len(networks)) as pool:
        list(pool.map(lambda network: jax.block_until_ready(network.logits(parts[0])), networks.values()))
    found = {"compile_s": time.perf_counter() - start}
    times: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(ROUNDS):
        for name, network in networks.items():
            for turn in range(BLOCK):
                given = parts[turn % len(parts)]
                start = time.perf_counter()
                jax.block_until_ready(network.logits(given))
                times[name].append((time.perf_counter() - start) * 1e3)
    return found | {f"{name}_ms": statistics.median(took) for name, took in times.items()}


def measure_subject(figures: Figures, title: str, make: Any, batches: tuple[int, ...]) -> None:
    """All batch sizes of one pair of networks that are not there yet."""
    wanted = {batch: f"{title}, batch {batch}" for batch in batches}
    if not any(figures.wants(name) for name in wanted.values()):
        return
    subject: Subject = make()
    networks = {
        "dense": fold(subject.dense, {kind: subject.dense_variables[kind] for kind in ("params", "batch_stats")}),
        "masked": fold(subject.gated, subject.gated_variables),
        "compact": compact(subject.gated, subject.gated_variables, subject.calibration),
    }
    # The largest batch takes more images than are held out: each of them mirrored, too.
    images = jnp.concatenate([subject.held_out, subject.held_out[:, :, ::-1]])
    for batch, name in wanted.items():
        if figures.wants(name):
            figures.write(name, batch=batch, **measure(networks, images, batch))


def main() -> None:
    """Measures what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--trained", help="workdir of a finished run")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    keep_compiled()
    figures = Figures(given.figures, "inference", math.inf if given.tiny else given.seconds)
    batches = TINY_BATCHES if given.tiny else BATCHES
    if given.trained:
        measure_subject(figures, "digits, trained gates", lambda: trained_subject(given.trained), batches)
    for arch, budget in TINY if given.tiny else NETWORKS:
        title = f"{arch}, random gates, {budget:.0%} of the MACs saved"
        measure_subject(figures, title, lambda arch=arch, budget=budget: synthetic_subject(arch, budget), batches)


if __name__ == "__main__":
    main()
