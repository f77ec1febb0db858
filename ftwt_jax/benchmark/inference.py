"""What a gated network's masks save in time, against the dense network in the same run."""

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from ftwt_jax import workdir
from ftwt_jax.benchmark.feeds import time_feeds
from ftwt_jax.benchmark.training import time_steps
from ftwt_jax.budget.trained import Subject
from ftwt_jax.engines.timing import time_in_turns
from ftwt_jax.errors import UserError
from ftwt_jax.gating.macs import dense_macs, macs
from ftwt_jax.inference.compact import compact, fold
from ftwt_jax.printing import four_digits, say, say_compiling

# Turns of ours and of PyTorch's.
_ROUNDS = 3


def benchmark(
    subject: Subject, batch: int, console: Console, torch: bool = False, train: bool = False, out: str | None = None
) -> dict[str, Any]:
    """Times the dense, the masked and the compact network in alternating blocks of the same images; prints a table.

    Every time is the median over images that compact execution has not seen, each blocked until its logits are ready.
    The dense network is our own at its fastest: batch norm folded in, compiled.

    Args:
      batch: images at once; 1 is what latency is about.
      torch: time the dense network in eager PyTorch too.
      train: time a training step of the dense and of the gated network too; with `torch`, of PyTorch's dense one.
      out: workdir to write `benchmark.json` into.
    """
    if batch < 1 or batch > len(subject.held_out):
        raise UserError(
            f"--batch must lie between 1 and {len(subject.held_out)}, the number of held-out images; got {batch}"
        )
    if torch and importlib.util.find_spec("torch") is None:
        raise UserError("--torch needs PyTorch: pip install -e '.[convert]'")
    say_compiling(console, f"{subject.arch}, dense, masked and compact")
    start = time.perf_counter()
    quick: Any = compact(subject.gated, subject.gated_variables, subject.calibration)
    ready = time.perf_counter() - start
    masked = fold(subject.gated, subject.gated_variables)
    dense = fold(subject.dense, _dense_part(subject.dense_variables))
    whole = len(subject.held_out) // batch * batch
    batches = [subject.held_out[index : index + batch] for index in range(0, whole, batch)]

    compared = [_compare(masked(images), *quick.run(images)) for images in batches]
    times = time_in_turns([dense.logits, masked.logits, quick.logits], batches)
    result = {
        "arch": subject.arch,
        "gates": subject.gates,
        "batch": batch,
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "samples": whole,
        "images": "random" if subject.note or subject.gates == "synthetic" else "held out",
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
        result |= time_steps(subject.dense, subject.gated, subject.held_out.shape[1:], torch)
        result |= time_feeds(subject.arch, subject.dense, subject.held_out.shape[1:], result["train_batch"])
    _print(result, console)
    if subject.note:
        say(console, f"timed on {subject.note}: masks and MACs reduction are those of other images")
    if out is not None:
        folder = workdir.absolute(out)
        folder.mkdir(parents=True, exist_ok=True)
        workdir.write_json(folder / workdir.BENCHMARK, result)
        say(console, f"wrote {folder / workdir.BENCHMARK}")
    return result


def _dense_part(variables: Any) -> Any:
    """Variables for a dense network; heads of a gated one do no harm."""
    return {kind: variables.get(kind, {}) for kind in ("params", "batch_stats")}


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


def _against_torch(subject: Subject, quick: Callable, batches: Sequence[Any]) -> tuple[float, float]:
    """Milliseconds of PyTorch's dense network and of the compact one, in alternating blocks.

    Not call by call: the threads of either go on spinning for a while and take the cores from the other.
    """
    import torch

    from ftwt_jax.benchmark.torch_dense import torch_network

    network = torch_network(subject.dense, _dense_part(subject.dense_variables))
    inputs = [torch.from_numpy(np.array(images).transpose(0, 3, 1, 2).copy()) for images in batches]
    theirs: list[float] = []
    ours: list[float] = []
    with torch.inference_mode():
        for _ in range(_ROUNDS):
            for times, function, given in ((theirs, network, inputs), (ours, quick, batches)):
                time.sleep(0.3)
                times += time_in_turns([function], given, lambda done: jax.block_until_ready(done))
    return statistics.median(theirs), statistics.median(ours)


def _times(factor: float) -> str:
    return f"{factor:#.3g} x".replace(". x", " x")


def _print(result: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{result['arch']}, {result['gates']} gates, batch {result['batch']} on {result['device']}")
    table.add_column("", no_wrap=True)
    table.add_column("ms", justify="right")
    table.add_column("speed-up", justify="right")
    dense = result["dense_ms"]
    rows = [("dense", dense), ("masked", result["masked_ms"]), ("compact", result["compact_ms"])]
    for name, milliseconds in rows:
        table.add_row(name, four_digits(milliseconds), _times(dense / milliseconds))
    console.print(table)
    possible, slower = 1 / (1 - result["macs_reduction"]), result["speedup"] < 1
    lines = [
        f"MACs reduction {result['macs_reduction']:.3f}: at most {_times(possible)} if time followed MACs; compact: "
        + (f"{_times(result['speedup'])}, slower than dense" if slower else _times(result["speedup"])),
        f"largest difference of a logit from the masked network {result['max_abs_diff']:.1e}, "
        f"the largest logit {result['max_abs_logit']:.3g}",
        f"images recomputed with all filters: {result['outside']:.3f}",
    ]
    if result["flipped"]:
        lines.append(f"images not compared, as a gate within rounding of zero went either way: {result['flipped']:.3f}")
    if "torch_ms" in result:
        theirs, ours = result["torch_ms"], result["torch_compact_ms"]
        lines.append(
            f"in turns with PyTorch: its dense network {four_digits(theirs)} ms, compact {four_digits(ours)} ms, "
            f"{_times(theirs / ours)}"
        )
    if "train_overhead" in result:
        lines.append(
            f"training at batch {result['train_batch']}: dense {result['train_dense_images_per_second']:.4g}, gated "
            f"{result['train_gated_images_per_second']:.4g} images/s; a gated step takes "
            f"{result['train_overhead']:.3g} times as long"
        )
    for place in ("host", "device"):
        if f"train_{place}_share" in result:
            rate, share = result[f"train_{place}_images_per_second"], result[f"train_{place}_share"]
            lines.append(f"dense, images from the {place}: {rate:.0f} images/s; the host takes {share:.0%} of the time")
    if "train_torch_ratio" in result:
        lines.append(
            f"in turns with PyTorch: its dense network trains at {result['train_torch_images_per_second']:.4g} "
            f"images/s, the dense one here at {result['train_torch_dense_images_per_second']:.4g}, "
            f"{_times(result['train_torch_ratio'])}"
        )
    for line in lines:
        say(console, line)
