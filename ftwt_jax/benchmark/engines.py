"""One network in several engines, side by side: what gates save where, against networks that save as much by width."""

import contextlib
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from ftwt_jax.benchmark.rows import Row, Run, wait
from ftwt_jax.benchmark.subnets import subnet_rows
from ftwt_jax.benchmark.synthetic import random_variables
from ftwt_jax.budget.trained import Subject
from ftwt_jax.engines import sessions
from ftwt_jax.engines.graph import onnx_model
from ftwt_jax.engines.nodes import UnknownOperatorError
from ftwt_jax.engines.timing import time_engines_in_turns
from ftwt_jax.errors import UserError, unknown_name
from ftwt_jax.gating.macs import dense_macs
from ftwt_jax.inference import native
from ftwt_jax.inference.compact import CompactNetwork, compact, fold
from ftwt_jax.printing import four_digits, say

XLA, NATIVE = "xla", "native"
ENGINES = (XLA, NATIVE, *sessions.ENGINES)
BATCHES = (1, 32)
# Batches in each of a network's turns, at most.
_MOST = 16
# How near the MACs of a narrower network come to those wanted, where its widths allow.
_NEAR = 0.02
# Widths that are tried for that, each half as far from the one before: the last moves a layer of 4,096 by one filter.
_WIDTHS = 12


def check_engines(engines: Sequence[str]) -> None:
    """Refuses engines that are not known, not installed, or not for this machine, by a `UserError`."""
    for engine in engines:
        if engine not in ENGINES:
            raise unknown_name("engine", engine, ENGINES)
        if engine in sessions.ENGINES:
            sessions.check_engine(engine, f"--engines={engine}")
    if NATIVE in engines and (jax.default_backend() != "cpu" or not native.available()):
        raise UserError(
            "--engines=native is for a CPU, and needs a C++ compiler: install g++ or clang++, or leave it out"
        )


def time_engines(
    subject: Subject,
    reduction: float,
    engines: Sequence[str],
    console: Console,
    batches: Sequence[int] = BATCHES,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """Times dense, narrower, masked and compact networks in these engines, in turns in this process; prints a table.

    The narrower network is the dense one with fewer filters in every layer, at the MACs of the gated one, and random
    weights.

    Args:
      reduction: the share of its MACs that the gated network saves on the images held out, as `benchmark` measures it.
      engines: of `ENGINES`.
      batches: numbers of images at once.
      threads: cores that an engine uses; None: all that this process may use.

    Returns:
      A dict for each time: "network", "engine", "dtype", "batch", "ms" (the median of a batch), "macs" (of an image);
      none for a network with an operator that the engine torch does not know.

    Raises:
      UserError: as `check_engines`, or an engine cannot run a network.
    """
    check_engines(engines)
    threads = threads or len(os.sched_getaffinity(0))
    images = np.asarray(subject.held_out)
    say(console, f"preparing {subject.arch} for {', '.join(engines)}; this can take minutes")
    rows = _rows(subject, reduction, engines, threads)
    if subject.subnets is not None:
        rows |= subnet_rows(*subject.subnets, subject, engines, threads)
    found: list[dict[str, Any]] = []
    for batch in batches:
        enough = np.resize(images, (max(batch, len(images)), *images.shape[1:]))
        parts = [enough[at : at + batch] for at in range(0, len(enough) - batch + 1, batch)][:_MOST]
        runs = [
            (name, *key, run, row.macs)
            for name, row in rows.items()
            if row.most is None or batch <= row.most
            for key, run in row.runs.items()
        ]
        times = map(statistics.median, time_engines_in_turns([run for *_, run, _ in runs], parts))
        found += [
            {"network": name, "engine": engine, "dtype": dtype, "batch": batch, "ms": ms, "macs": count}
            for (name, engine, dtype, _, count), ms in zip(runs, times, strict=True)
        ]
    _print(found, subject, threads, console)
    return found


def _rows(subject: Subject, reduction: float, engines: Sequence[str], threads: int) -> dict[str, Row]:
    dense_variables = {kind: subject.dense_variables.get(kind, {}) for kind in ("params", "batch_stats")}
    dense = fold(subject.dense, dense_variables)
    masked = fold(subject.gated, subject.gated_variables)
    shape = subject.held_out.shape[1:]
    whole, gated = network_macs(subject.dense, shape), network_macs(subject.gated, shape)
    average = (1 - reduction) * gated
    rows = {"dense": Row(_everywhere(dense, shape, engines, threads), whole)}
    narrow = narrower(subject.dense, shape, average)
    if narrow is not None:
        drawn = fold(narrow, random_variables(narrow, shape))
        rows["narrower"] = Row(_everywhere(drawn, shape, engines, threads), network_macs(narrow, shape))
    rows["masked"] = Row(_everywhere(masked, shape, engines, threads), gated)
    quick: dict[tuple[str, str], Run] = {}
    for engine, portable in ((XLA, True), (NATIVE, False)):
        if engine in engines:
            network = compact(subject.gated, subject.gated_variables, subject.calibration, portable=portable)
            quick[engine, "float32"] = wait(network.logits)
    if quick:
        rows["compact"] = Row(quick, average)
    return rows


def _everywhere(
    network: CompactNetwork, shape: Sequence[int], engines: Sequence[str], threads: int
) -> dict[tuple[str, str], Run]:
    """A network of images of this shape in all engines that run it."""
    runs: dict[tuple[str, str], Run] = {(XLA, "float32"): wait(network.logits)} if XLA in engines else {}
    others = [engine for engine in engines if engine in sessions.ENGINES]
    if others:
        images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        model = onnx_model(lambda images: network(images).logits, images, "network")
        for engine in others:
            for dtype in sessions.DTYPES[engine]:
                with contextlib.suppress(UnknownOperatorError):
                    runs[engine, dtype] = sessions.open_session(engine, model, threads, dtype)
    return runs


def network_macs(model: nn.Module, shape: Sequence[int]) -> float:
    """Exact MACs of a dense network for an image [H, W, channels]."""
    outputs, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((1, *shape)))
    return float(np.mean(dense_macs(outputs)))


def narrower(model: nn.Module, shape: Sequence[int], wanted: float) -> nn.Module | None:
    """The network whose `width` brings its exact MACs nearest to those wanted; None if it has no width.

    Args:
      shape: of an image, [H, W, channels].
    """
    if not hasattr(model, "width"):
        return None
    low, high = 0.0, float(model.width)
    best, off = model, float("inf")
    for _ in range(_WIDTHS):
        middle = (low + high) / 2
        tried = model.clone(width=middle)
        count = network_macs(tried, shape)
        if abs(count / wanted - 1) < off:
            best, off = tried, abs(count / wanted - 1)
        if off <= _NEAR / 4:
            break
        low, high = (middle, high) if count < wanted else (low, middle)
    return best


def _print(found: Sequence[Mapping[str, Any]], subject: Subject, threads: int, console: Console) -> None:
    short = {"float32": "f32", "bfloat16": "bf16"}
    batches = list(dict.fromkeys(one["batch"] for one in found))
    keys = list(dict.fromkeys((one["engine"], one["dtype"]) for one in found))
    for batch in batches:
        table = Table(title=f"{subject.arch}, {subject.gates} gates: ms at batch {batch}, {threads} threads")
        table.add_column("", no_wrap=True)
        table.add_column("MMACs", justify="right")
        for engine, dtype in keys:
            table.add_column(f"{engine} · {short.get(dtype, dtype)}", justify="right")
        here = [one for one in found if one["batch"] == batch]
        for name in dict.fromkeys(one["network"] for one in here):
            mine = {(one["engine"], one["dtype"]): one for one in here if one["network"] == name}
            count = next(iter(mine.values()))["macs"] / 1e6
            times = [four_digits(mine[key]["ms"]) if key in mine else "" for key in keys]
            table.add_row(name, f"{count:.4g}", *times)
        console.print(table)
