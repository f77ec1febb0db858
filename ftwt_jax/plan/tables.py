"""What the command `plan` prints."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ftwt_jax.plan.collectives import OTHER
from ftwt_jax.plan.roofline import GIB, Slice
from ftwt_jax.printing import say


def print_plan(result: dict[str, Any], where: Slice, console: Console) -> None:
    """Prints a plan's figures as tables, and what they are worth.

    Args:
      result: what `plan.json` holds.
      where: the slice.
    """
    steps, chip = result["steps"], where.chip
    batch, parts = result["batch_size"], result["accumulate"]
    share = f"{batch // where.size} on a chip" + (f", in {parts} parts" if parts > 1 else "")
    say(
        console,
        f"{result['arch']} in {result['dtype']}, batch {batch:,} ({share}), on {where}: {where.size} chips of "
        f"{chip.flops / 1e12:.0f} TFLOP/s and {chip.memory / GIB:.2f} GiB of HBM at {chip.bandwidth / 1e9:.0f} GB/s, "
        f"links of {chip.link / 1e9:.0f} GB/s each way",
    )
    _print_memory(steps, result["hbm_bytes"], console)
    _print_work(steps, console)
    _print_collectives(steps, console)
    columns = ("compute\nms", "HBM\nms", "links\nms", "step\nms", "\nimages/s")
    table = _table("shortest step", "\nstep", *columns, "\nlimit")
    for name, step in steps.items():
        table.add_row(name, *_times(step["bound"]), step["bound"]["limit"])
    _show(table, console)
    first = next(iter(steps))
    title = f"shortest {first} step, the same batch on each chip"
    table = _table(title, "\nslice", "\nchips", "\nbatch", *columns, "\nefficiency")
    for row in steps[first]["growth"]:
        size = row["topology"], str(row["chips"]), f"{row['batch_size']:,}"
        table.add_row(*size, *_times(row), f"{row['efficiency']:.1%}")
    _show(table, console)
    _print_notes(steps, where, console)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _show(table: Table, console: Console) -> None:
    # Into a file or a pipe, lines may be as long as they have to be.
    console.print(table, width=None if console.is_terminal else max(console.width, 120))


def _figure(value: float) -> str:
    """Three digits that count, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}" if value >= 1e-4 else f"{value:.4f}"


def _print_memory(steps: dict[str, Any], hbm: float, console: Console) -> None:
    parts = ("argument", "output", "temporary", "program", "memory")
    table = _table(
        "memory of a chip, GiB", "step", "arguments", "new outputs", "temporaries", "program", "sum", "of HBM"
    )
    for name, step in steps.items():
        sizes = (_figure(step[f"{part}_bytes"] / GIB) for part in parts)
        table.add_row(name, *sizes, f"{step['memory_bytes'] / hbm:.0%}")
    _show(table, console)


def _print_work(steps: dict[str, Any], console: Console) -> None:
    table = _table("work of a chip in a step", "step", "GFLOP", "GB to and from HBM", "GB with on-chip memory")
    for name, step in steps.items():
        work = step["flops"], step["hbm_traffic_bytes"], step["accessed_bytes"]
        table.add_row(name, *(_figure(value / 1e9) for value in work))
    _show(table, console)


def _print_collectives(steps: dict[str, Any], console: Console) -> None:
    table = _table("collectives of a step", "step", "kind", "of", "type", "how many", "MB")
    for name, step in steps.items():
        for group in step["collectives"]:
            amounts = f"{group['collectives']:,}", _figure(group["bytes"] / 1e6)
            table.add_row(name, group["kind"], group["carries"], group["dtype"], *amounts)
    _show(table, console)


def _times(row: dict[str, Any]) -> list[str]:
    seconds = (row[name] for name in ("compute_s", "hbm_s", "interconnect_s", "step_s"))
    return [*(_figure(value * 1e3) for value in seconds), f"{row['images_per_second']:,.0f}"]


def _print_notes(steps: dict[str, Any], where: Slice, console: Console) -> None:
    say(
        console,
        "Times are bounds from published peaks, not measurements: nothing has run. A step takes at least so long, and "
        "usually longer, for no chip reaches its peaks; reading images is not counted.",
    )
    say(
        console,
        f"Compiled for {where}. With the same batch on each chip the program of a chip is the same on every slice, and "
        "only its collectives take another time: their bytes over the links, and 1 us a hop. Efficiency: images/s as a "
        "share of those of chips that need not wait for each other.",
    )
    for name, step in steps.items():
        for group in step["collectives"]:
            for source in group["sources"] if group["carries"] == OTHER else ():
                say(console, f"warning: the {name} step has an unexpected {group['kind']}: {source}")
