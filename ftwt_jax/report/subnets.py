"""Which classes each subnet takes, and which filters subnets share; from `evaluation.json` alone."""

import numpy as np

from ftwt_jax.report.classes import SHADES, class_names
from ftwt_jax.report.mask_plots import MOST_ROWS
from ftwt_jax.report.plotting import COLORS, look, new_plot
from ftwt_jax.report.run_plots import WIDTH, Plot, distinct, legend, mark, name_ticks
from ftwt_jax.report.runs import RecordedRun


def subnet_plots(run: RecordedRun) -> list[Plot]:
    """The plots of a run's subnets; none without subnets."""
    if not run.evaluation.get("subnets"):
        return []
    return [plot for plot in (_classes(run), _filters(run)) if plot is not None]


@look()
def _classes(run: RecordedRun) -> Plot | None:
    """Heat map of classes and subnets; None where classes are too many to be recorded."""
    rows = run.evaluation["subnets"]["subnets"]
    if any(row["classes"] is None for row in rows):
        return None
    counts = np.array([row["classes"] for row in rows]).T
    number, names = len(counts), distinct(class_names(run), 18)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    height = min(max(2.6, 0.2 * number + 1.2), 8.0)
    figure, axes = new_plot("subnet", "class", min(max(4.0, 0.5 * len(rows) + 2.4), 8.0), height)
    image = axes.imshow(shares, cmap=SHADES, vmin=0, vmax=1, interpolation="none", aspect="auto")
    axes.grid(visible=False)
    axes.set_xticks(range(len(rows)))
    if number <= MOST_ROWS:
        axes.set_yticks(range(number), names, fontsize=8)
    figure.colorbar(image, label="share of the class's images", shrink=0.8)
    images = ", ".join(f"{index}: {row['images']:,}" for index, row in enumerate(rows))
    text = f"Where the router sends the held-out images of each class. Images of each subnet: {images}."
    return Plot(f"run{run.number}_routes", figure, f"Heat map. {text}", text)


@look()
def _filters(run: RecordedRun) -> Plot:
    """For each layer, the share of filters that all subnets keep, that some do, and that none does."""
    found = run.evaluation["subnets"]
    units = found["units"]
    whole = np.array([unit["filters"] for unit in units.values()])
    every, some = (np.array([unit[key] for unit in units.values()]) / whole for key in ("all", "any"))
    width = max(WIDTH, 0.17 * len(units) + 0.9)
    figure, axes = new_plot("", "share of filters", width, 3.2)
    places = np.arange(len(units))
    axes.bar(places, every, color=COLORS[0])
    axes.bar(places, some - every, bottom=every, color=COLORS[5])
    axes.set_ylim(0, 1)
    name_ticks(axes, list(units))
    labels = {"all subnets keep": COLORS[0], "some of them keep": COLORS[5]}
    legend(figure, [mark(label, color=color, linewidth=4) for label, color in labels.items()], columns=2)
    text = (
        f"Filters that the {len(found['subnets'])} subnets share, by layer. Of all filters that any of them keeps, "
        f"{found['shared']:.0%} are in all."
    )
    return Plot(f"run{run.number}_shared", figure, f"Stacked bars. {text}", text, wide=width > 1.3 * WIDTH)
