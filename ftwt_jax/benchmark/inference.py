"""The command `benchmark`: what a gated network's masks save in time, against the dense network in the same run."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from ftwt_jax import workdir
from ftwt_jax.benchmark.synthetic import random_gates
from ftwt_jax.errors import UserError
from ftwt_jax.gating.gates import GateConfig
from ftwt_jax.gating.macs import dense_macs, macs
from ftwt_jax.inference.compact import compact, fold
from ftwt_jax.models import create_model, options_of
from ftwt_jax.printing import say
from ftwt_jax.workdir.checkpoints import has_checkpoint

BENCHMARK = "benchmark.json"
# Images from which compact execution learns, and those that it is timed and compared on; never the same.
CALIBRATION, HELD_OUT = 256, 128
# Synthetic heads are made on so many images, fewer of large ones: on few, a deep network misses its budget on others.
_HEAD_IMAGES, _LARGE_HEAD_IMAGES = CALIBRATION, 64
# Each network runs so many batches before the next one's turn: in use it would find its own weights in the caches too.
_BLOCK, _ROUNDS = 16, 3


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
      gates: "trained", or "synthetic": random heads on random weights.
      dense, gated: the two networks.
      dense_variables, gated_variables: theirs.
      calibration, held_out: images as the networks are given them, [S, H, W, channels].
      normalize: makes such images from those of the data set, uint8.
    """

    arch: str
    gates: str
    dense: nn.Module
    gated: nn.Module
    dense_variables: Any
    gated_variables: Any
    calibration: jax.Array
    held_out: jax.Array
    normalize: Callable[[jax.Array], jax.Array]


def trained_subject(folder: str, best: bool = False, budget: float | None = None) -> Subject:
    """The newest (or best) networks of a workdir, on its data: training images to calibrate, held-out to measure.

    Args:
      budget: MACs reduction to bring the gates to; None: as they were trained.
    """
    from ftwt_jax.commands.estimate import known_estimate
    from ftwt_jax.commands.evaluate.budgets import any_budget
    from ftwt_jax.data.pipeline import eval_batches
    from ftwt_jax.training.run import BASELINE, GATED, make_run

    path, config = workdir.load(folder)
    if not has_checkpoint(path, GATED):
        raise UserError(f"{path} has no trained gates: train them, or take --arch and --budget for synthetic ones")
    run = make_run(config, path)
    gated = run.trained(GATED, best)
    if budget is not None:
        gated = any_budget(run, gated, known_estimate(run)["r"]).at(budget)

    def first_images(split: Any, most: int) -> jax.Array:
        batches = eval_batches(run.dataset, split, config.eval_batch_size, limit=most)
        found = [run.normalize(jnp.asarray(batch["image"][batch["weight"] > 0])) for batch in batches]
        return jnp.concatenate(found)[:most]

    return Subject(
        config.model.name,
        "trained",
        run.models[BASELINE],
        run.models[GATED],
        run.trained(BASELINE),
        gated,
        first_images(run.dataset.train, CALIBRATION),
        first_images(run.dataset.test, HELD_OUT),
        run.normalize,
    )


def synthetic_subject(arch: str, budget: float, size: int | None = None, seed: int = 0) -> Subject:
    """A network of random weights whose gates are random too and save the share `budget` of its MACs.

    Args:
      size: side of the images; None: 224 for networks that have ImageNet's stem by themselves, otherwise 32.
    """
    if not 0 < budget < 1:
        raise UserError(f"--budget is the MACs reduction of the gates to make, between 0 and 1; got {budget}")
    model = create_model(arch, 10)
    size = size or (224 if getattr(model, "stem", "cifar") == "imagenet" else 32)
    classes = 10 if size < 64 else 1000
    stem: dict[str, Any] = {"stem": "imagenet"} if size >= 64 and "stem" in options_of(arch) else {}
    dense = create_model(arch, classes, **stem)
    gated = create_model(arch, classes, gates=GateConfig(), **stem)
    keys = jax.random.split(jax.random.key(seed), 3)
    # Large blobs of colour, so that images differ by more than their noise.
    blobs = jax.random.normal(keys[0], (CALIBRATION + HELD_OUT, 4, 4, 3))
    images = 2 * jax.image.resize(blobs, (len(blobs), size, size, 3), "bilinear")
    images += 0.3 * jax.random.normal(keys[2], images.shape)
    variables = jax.jit(gated.init)(keys[1], images[:1])
    seen = images[: _HEAD_IMAGES if size < 64 else _LARGE_HEAD_IMAGES]
    variables, _ = random_gates(gated, variables, seen, budget, seed)
    return Subject(
        arch,
        "synthetic",
        dense,
        gated,
        variables,
        variables,
        images[:CALIBRATION],
        images[CALIBRATION:],
        lambda x: x / 128 - 1,
    )


def benchmark(
    subject: Subject, batch: int, console: Console, torch: bool = False, train: bool = False, out: str | None = None
) -> dict[str, Any]:
    """Times the dense, the masked and the compact network in alternating blocks of the same images; prints a table.

    Every time is the median over images that compact execution has not seen, each blocked until its logits are ready.
    The dense network is our own at its fastest: batch norm folded in, compiled.

    Args:
      batch: images at once; 1 is what latency is about.
      torch: time the dense network in eager PyTorch too.
      train: time a training step of the dense and of the gated network too.
      out: workdir to write `benchmark.json` into.
    """
    if batch < 1 or batch > len(subject.held_out):
        raise UserError(f"--batch lies between 1 and the {len(subject.held_out)} held-out images; got {batch}")
    start = time.perf_counter()
    quick = compact(subject.gated, subject.gated_variables, subject.calibration)
    ready = time.perf_counter() - start
    masked = fold(subject.gated, subject.gated_variables)
    dense = fold(subject.dense, _dense_part(subject.dense_variables))
    whole = len(subject.held_out) // batch * batch
    batches = [subject.held_out[index : index + batch] for index in range(0, whole, batch)]

    compared = [_compare(masked(images), *quick.run(images)) for images in batches]
    times = _in_blocks([dense.logits, masked.logits, quick.logits], batches)
    result = {
        "arch": subject.arch,
        "gates": subject.gates,
        "batch": batch,
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "samples": whole,
        "macs_reduction": float(np.mean([one["reduction"] for one in compared])),
        **dict(zip(("dense_ms", "masked_ms", "compact_ms"), times, strict=True)),
        "max_abs_diff": max(one["difference"] for one in compared),
        "flipped": float(np.mean([one["flipped"] for one in compared])),
        "max_abs_logit": max(one["largest"] for one in compared),
        "outside": float(np.mean([one["outside"] for one in compared])),
        "prepare_s": ready,
    }
    result["speedup"] = result["dense_ms"] / result["compact_ms"]
    result["realisation"] = result["speedup"] * (1 - result["macs_reduction"])
    if torch:
        result["torch_ms"], result["torch_compact_ms"] = _against_torch(subject, quick.logits, batches)
    if train:
        from ftwt_jax.benchmark.training import time_steps

        result |= time_steps(subject.dense, subject.gated, subject.held_out.shape[1:])
    _print(result, console)
    if out is not None:
        folder = workdir.absolute(out)
        folder.mkdir(parents=True, exist_ok=True)
        workdir.write_json(folder / BENCHMARK, result)
        say(console, f"wrote {folder / BENCHMARK}")
    return result


def _dense_part(variables: Any) -> Any:
    """Variables that a dense network can take; the heads of a gated one are in nobody's way."""
    return {kind: variables[kind] for kind in ("params", "batch_stats")}


def _compare(masked: Any, compacted: Any, outside: Any) -> dict[str, Any]:
    """A gate logit within rounding of zero turns its filter on in one network and not in the other: counted apart."""
    masked, compacted = jax.device_get((masked, compacted))
    pairs = zip(masked.gates, compacted.gates, strict=True)
    flipped = np.any([np.any(one.mask != other.mask, axis=-1) for one, other in pairs], axis=0)
    difference = np.max(np.abs(masked.logits - compacted.logits), axis=-1)
    return {
        "difference": float(np.max(difference, initial=0, where=~flipped)),
        "flipped": float(np.mean(flipped)),
        "largest": float(np.max(np.abs(masked.logits))),
        "reduction": float(np.mean(1 - macs(masked) / dense_macs(masked))),
        "outside": float(np.mean(outside)),
    }


def _in_blocks(
    functions: Sequence[Callable], batches: Sequence[Any], wait: Callable = jax.block_until_ready
) -> list[float]:
    """Median milliseconds of each function over all batches, a block of calls of each after the other."""
    for function in functions:
        wait(function(batches[0]))
    milliseconds: list[list[float]] = [[] for _ in functions]
    for _ in range(_ROUNDS):
        for first in range(0, len(batches), _BLOCK):
            for function, times in zip(functions, milliseconds, strict=True):
                for images in batches[first : first + _BLOCK]:
                    start = time.perf_counter()
                    wait(function(images))
                    times.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(times) for times in milliseconds]


def _against_torch(subject: Subject, quick: Callable, batches: Sequence[Any]) -> tuple[float, float]:
    """Milliseconds of PyTorch's dense network and of the compact one, in alternating blocks.

    Not call by call: the threads of either go on spinning for a while and take the cores from the other.
    """
    try:
        import torch
    except ImportError:
        raise UserError("--torch needs PyTorch: pip install -e '.[convert]'") from None
    from ftwt_jax.benchmark.torch_dense import torch_network

    network = torch_network(subject.dense, _dense_part(subject.dense_variables))
    inputs = [torch.from_numpy(np.array(images).transpose(0, 3, 1, 2).copy()) for images in batches]
    theirs: list[float] = []
    ours: list[float] = []
    with torch.inference_mode():
        for _ in range(_ROUNDS):
            for times, function, given in ((theirs, network, inputs), (ours, quick, batches)):
                time.sleep(0.3)
                times += _in_blocks([function], given, lambda done: jax.block_until_ready(done))
    return statistics.median(theirs), statistics.median(ours)


def _print(result: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{result['arch']}, {result['gates']} gates, batch {result['batch']} on {result['device']}")
    table.add_column("", no_wrap=True)
    table.add_column("ms", justify="right")
    table.add_column("against dense", justify="right")
    dense = result["dense_ms"]
    rows = [("dense", dense), ("masked", result["masked_ms"]), ("compact", result["compact_ms"])]
    for name, milliseconds in rows:
        table.add_row(name, f"{milliseconds:.2f}", f"{dense / milliseconds:.2f} x")
    if "torch_ms" in result:
        table.add_row("PyTorch, dense", f"{result['torch_ms']:.2f}", "")
    console.print(table)
    lines = [
        f"MACs reduction {result['macs_reduction']:.3f}, of which {result['realisation']:.2f} are realised in time",
        f"largest difference of a logit from the masked network {result['max_abs_diff']:.1e}, "
        f"the largest logit {result['max_abs_logit']:.3g}",
        f"samples outside what calibration prepared: {result['outside']:.3f}",
    ]
    if result["flipped"]:
        lines.append(
            f"samples not compared, a gate within rounding of zero fell on either side: {result['flipped']:.3f}"
        )
    if "torch_ms" in result:
        factor = result["torch_ms"] / result["torch_compact_ms"]
        lines.append(f"compact against PyTorch's dense, in alternating blocks: {factor:.2f} x")
    if "train_overhead" in result:
        lines.append(
            f"training at batch {result['train_batch']}: dense {result['train_dense_images_per_second']:.0f}, gated "
            f"{result['train_gated_images_per_second']:.0f} images/s; a gated step costs {result['train_overhead']:.2f}"
        )
    for line in lines:
        say(console, line)
