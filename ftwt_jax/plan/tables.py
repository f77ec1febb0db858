"""The tables that the command `plan` prints."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ftwt_jax.plan.collectives import OTHER
from ftwt_jax.plan.roofline import GIB, Slice
from ftwt_jax.printing import say

_NETWORKS = {
    "dense": "dense",
    "router": "router alone",
    "subnet": "largest subnet alone",
    "subnets": "subnets, router included",
}


def print_plan(result: dict[str, Any], tpu_slice: Slice, console: Console) -> None:
    """Prints the figures of a plan as tables, with notes on how to read them.

    Args:
      result: the contents of `plan.json`.
      tpu_slice: the slice that the steps were compiled for.
    """
    steps, chip = result["steps"], tpu_slice.chip
    batch, parts = result["batch_size"], result["accumulate"]
    share = f"{batch // tpu_slice.size} per chip" + (f", in {parts} parts" if parts > 1 else "")
    say(
        console,
        f"{result['arch']} in {result['dtype']}, batch {batch:,} ({share}), on {tpu_slice}: {tpu_slice.size} chips of "
        f"{chip.flops / 1e12:.0f} TFLOP/s and {chip.memory / GIB:.2f} GiB of HBM at {chip.bandwidth / 1e9:.0f} GB/s, "
        f"links of {chip.link / 1e9:.0f} GB/s in each direction",
    )
    _print_memory(steps, result["hbm_bytes"], console)
    _print_work(steps, console)
    _print_collectives(steps, console)
    columns = ("compute\nms", "HBM\nms", "interconnect\nms", "step\nms", "\nimages/s")
    table = _table("Lower bound on the time of a step", "\nstep", *columns, "\nlimited by")
    for name, step in steps.items():
        table.add_row(name, *_times(step["bound"]), step["bound"]["limit"])
    _show(table, console)
    first = next(iter(steps))
    title = f"Lower bound for the {first} step on slices of other sizes, with the same batch per chip"
    table = _table(title, "\nslice", "\nchips", "\nbatch", *columns, "\nefficiency")
    for row in steps[first]["growth"]:
        size = row["topology"], str(row["chips"]), f"{row['batch_size']:,}"
        table.add_row(*size, *_times(row), f"{row['efficiency']:.1%}")
    _show(table, console)
    if "inference" in result:
        _print_inference(result["inference"], console)
    _print_notes(steps, tpu_slice, console)
    if "inference" in result:
        _print_inference_notes(result["inference"], console)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _show(table: Table, console: Console) -> None:
    # Lines to a file or a pipe can be long.
    console.print(table, width=None if console.is_terminal else max(console.width, 120))


def _figure(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}" if value >= 1e-4 else f"{value:.4f}"


def _print_memory(steps: dict[str, Any], hbm: float, console: Console) -> None:
    parts = ("argument", "output", "temporary", "program", "memory")
    table = _table(
        "Memory per chip (GiB)", "step", "arguments", "new outputs", "temporaries", "program", "total", "share of HBM"
    )
    for name, step in steps.items():
        sizes = (_figure(step[f"{part}_bytes"] / GIB) for part in parts)
        table.add_row(name, *sizes, f"{step['memory_bytes'] / hbm:.0%}")
    _show(table, console)


def _print_work(steps: dict[str, Any], console: Console) -> None:
    table = _table("Work per chip and step", "step", "GFLOP", "HBM traffic (GB)", "with on-chip memory (GB)")
    for name, step in steps.items():
        work = step["flops"], step["hbm_traffic_bytes"], step["accessed_bytes"]
        table.add_row(name, *(_figure(value / 1e9) for value in work))
    _show(table, console)


def _print_collectives(steps: dict[str, Any], console: Console) -> None:
    table = _table("Collectives per step", "step", "kind", "carries", "dtype", "count", "MB")
    for name, step in steps.items():
        for group in step["collectives"]:
            amounts = f"{group['collectives']:,}", _figure(group["bytes"] / 1e6)
            table.add_row(name, group["kind"], group["carries"], group["dtype"], *amounts)
    _show(table, console)


def _print_inference(found: dict[str, Any], console: Console) -> None:
    columns = ("\nGFLOP", "HBM traffic\nGB", "lower bound\nms", "\nimages/s")
    table = _table("Inference per chip and batch", "\nnetwork", *columns)
    for name, row in found["networks"].items():
        work = row["flops"] / 1e9, row["hbm_traffic_bytes"] / 1e9, row["bound_s"] * 1e3
        table.add_row(_NETWORKS[name], *map(_figure, work), f"{row['images_per_second']:,.0f}")
    table.add_row("saved by subnets", *(f"{share:.1%}" for share in found["saved"].values()), "")
    _show(table, console)


def _times(row: dict[str, Any]) -> list[str]:
    seconds = (row[name] for name in ("compute_s", "hbm_s", "interconnect_s", "step_s"))
    return [*(_figure(value * 1e3) for value in seconds), f"{row['images_per_second']:,.0f}"]


def _print_notes(steps: dict[str, Any], tpu_slice: Slice, console: Console) -> None:
    say(
        console,
        "All times are lower bounds computed from published peaks, not measurements: nothing was run. A real step "
        "usually takes longer, because no chip sustains its peaks. Reading images is not included.",
    )
    say(
        console,
        f"Compiled for {tpu_slice}. With the same batch per chip, each chip runs the same program on every slice; only "
        "the time of its collectives differs (their bytes over the links, plus 1 us per hop). Efficiency: images/s "
        "relative to chips that never wait for each other.",
    )
    for name, step in steps.items():
        for group in step["collectives"]:
            for source in group["sources"] if group["carries"] == OTHER else ():
                say(console, f"warning: the {name} step has an unexpected {group['kind']}: {source}")


def _print_inference_notes(found: dict[str, Any], console: Console) -> None:
    if found["masks"] == "random":
        assumed = ", which is assumed because config.gates.budget is not set" if found["budget_assumed"] else ""
        masks = f"cut from random masks at a MACs reduction of {found['budget']:g}{assumed}"
    else:
        masks = f"those of {found['masks']} in the workdir"
    say(
        console,
        f"Inference: {found['batch_per_chip']:,} images per chip, batch norm folded in. The {found['count']} subnets "
        f"are {masks}. The largest, with the router, saves {found['macs_reduction']:.1%} of the exact MACs. All images "
        "run in it, as one batch; gathering those of each subnet, and reading the weights of several, is not included. "
        "Peak rates flatter subnets: their narrower layers fill less of the chip's matrix unit.",
    )
