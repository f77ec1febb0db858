"""Plots of single images in a gated network: their MACs, and the filters of a unit that fire together."""

import functools
from typing import Any

import matplotlib
import numpy as np

from ftwt_jax.report.co_activation import CoActivation, average_blocks
from ftwt_jax.report.images import ImageMeasurements
from ftwt_jax.report.plotting import INK, look, new_grid, new_plot
from ftwt_jax.report.run_plots import HEIGHT, WIDTH, Plot, color_of, legend, plain
from ftwt_jax.report.runs import RecordedRun

# Most classes of the heat map, and most small maps; most cells along a side of a large map, and of a small one.
MOST_ROWS, MOST_CLASSES, LARGE_CELLS, SMALL_CELLS = 40, 12, 128, 64
# Few colors keep the page small.
SHARE, SIGNED = (matplotlib.colormaps[name].resampled(25) for name in ("viridis", "RdBu_r"))


def scale_of(macs: float) -> tuple[float, str]:
    """The factor and prefix in which to print a number of MACs, such as (1e6, "M")."""
    return next((pair for pair in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if macs >= pair[0]), (1.0, ""))


def count(macs: float, dense: float) -> str:
    """MACs with the prefix of those of the dense network, such as "0.774 M" or "61.6 M"."""
    size, prefix = scale_of(dense)
    value = macs / size
    return f"{value:.{1 if value >= 10 else 3}f}\u00a0{prefix}" if prefix else f"{macs:.0f}"


@look()
def macs_plot(run: RecordedRun, images: ImageMeasurements) -> Plot:
    """Histogram of the MACs per image."""
    size, prefix = scale_of(images.dense_macs)
    figure, axes = new_plot(
        "exact MACs per image" + (f" ({prefix})" if prefix else ""), "held-out images", WIDTH, HEIGHT
    )
    values, dense = images.macs / size, images.dense_macs / size
    axes.hist(values, bins=min(40, max(8, round(len(values) ** 0.5) * 2)), color=color_of(run), alpha=0.85)
    mean = axes.axvline(values.mean(), color=INK, linestyle="--", linewidth=1, label=f"mean {values.mean():.3f}")

    def reduction(x: Any) -> Any:
        return 1 - x / dense

    def work(x: Any) -> Any:
        return (1 - x) * dense

    top = axes.secondary_xaxis("top", functions=(reduction, work))
    top.set_xlabel("MACs reduction")
    legend(figure, [mean], columns=1)
    counted = functools.partial(count, dense=images.dense_macs)
    low, median, high = map(counted, np.percentile(images.macs, [0, 50, 100]))
    text = (
        f"Exact MACs per image: {low} to {high}, median {median} ({len(values):,} held-out images); dense network: "
        f"{counted(images.dense_macs)}."
    )
    return Plot(f"run{run.number}_macs", figure, f"Histogram. {text}", text)


@look()
def rates_plot(run: RecordedRun, images: ImageMeasurements, unit: str, found: CoActivation) -> Plot:
    """Heat map of classes and filters: how often a filter is on for a class."""
    shown = _choose_classes(found)
    height = min(max(1.9, 0.19 * len(shown) + 1.2), 7.5)
    figure, axes = new_plot(f"filters of {plain(unit)}, similar ones side by side", "class", 7.4, height)
    image = axes.imshow(found.rates[shown], cmap=SHARE, vmin=0, vmax=1, aspect="auto", interpolation="none")
    axes.grid(visible=False)
    axes.set_yticks(range(len(shown)), [plain(images.class_names[c], 22) for c in shown], fontsize=8)
    _number_filters(axes, found.order)
    figure.colorbar(image, label="share of images\nwith the filter on", pad=0.01)
    filters, dynamic = len(found.order), int(found.dynamic.sum())
    caption = (
        f"Share of each class's held-out images in which a filter of {unit} is on. {dynamic} of its {filters} "
        f"filters are dynamic; the class of an image explains {100 * found.explained:.0f}\u00a0% of their variance."
    )
    if dynamic < filters:
        caption += " Filters that are always on are at the left, those that are always off at the right."
    classes = np.count_nonzero(found.counts)
    if len(shown) < classes:
        caption += f" Only the {len(shown)} of {classes} classes that differ most from the mean are shown."
    alt = f"Heat map of {len(shown)} classes and {filters} filters of unit {unit}, {dynamic} of them dynamic."
    return Plot(f"run{run.number}_rates", figure, alt, caption, wide=True)


def _choose_classes(found: CoActivation) -> np.ndarray:
    """The labels of the classes with images; of many, those whose rates differ most from the mean."""
    labels = np.flatnonzero(found.counts)
    if len(labels) <= MOST_ROWS:
        return labels
    distances = np.abs(found.rates[labels] - found.rates[labels].mean(axis=0)).sum(axis=1)
    return np.sort(labels[np.argsort(-distances, kind="stable")[:MOST_ROWS]])


def _number_filters(axes: matplotlib.axes.Axes, order: np.ndarray) -> None:
    places = range(0, len(order), -(-len(order) // 64))
    axes.set_xticks(places, [str(order[place]) for place in places], rotation=90, fontsize=6)


@look()
def correlation_plot(run: RecordedRun, unit: str, found: CoActivation) -> Plot:
    """Correlation of each pair of dynamic filters, over all images and within a class."""
    figure, grid = new_grid(2, 7.4, 3.7, 2)
    titles = ("all images", "within classes (class means subtracted)")
    means = []
    for axes, matrix, title in zip(grid, (found.correlation, found.within), titles, strict=True):
        cells, side = average_blocks(matrix, LARGE_CELLS)
        image = axes.imshow(cells, cmap=SIGNED, vmin=-1, vmax=1, interpolation="none")
        _bare(axes, title)
        axes.set_xlabel("dynamic filters, in the same order")
        apart = ~np.eye(len(matrix), dtype=bool)
        means.append(float(np.abs(matrix[apart]).mean()) if apart.any() else 0.0)
    figure.colorbar(image, ax=grid, label="correlation of masks", shrink=0.85)
    caption = (
        f"Correlation of the masks of each pair of dynamic filters of {unit}. Red: they fire together; blue: one "
        f"fires when the other does not. Mean absolute correlation {means[0]:.2f} over all images, {means[1]:.2f} "
        "within classes: what is left on the right depends on the image beyond its class."
    )
    if side > 1:
        caption += f" Each cell is the mean of {side} by {side} neighbors."
    alt = f"Two maps of correlations between {len(found.correlation)} dynamic filters of unit {unit}; " + (
        f"mean absolute correlation {means[0]:.2f}, within classes {means[1]:.2f}."
    )
    return Plot(f"run{run.number}_correlation", figure, alt, caption, wide=True)


@look()
def classes_plot(run: RecordedRun, images: ImageMeasurements, unit: str, found: CoActivation) -> Plot:
    """For each class, a small map of how often two dynamic filters are both on."""
    chosen = found.largest
    columns = min(5, len(chosen)) if len(chosen) != 12 else 6
    rows = -(-len(chosen) // columns)
    figure, grid = new_grid(len(chosen), 7.4, 1.55 * rows + 0.2, columns)
    for axes, label, matrix in zip(grid, chosen, found.both, strict=True):
        cells, side = average_blocks(matrix, SMALL_CELLS)
        image = axes.imshow(cells, cmap=SHARE, vmin=0, vmax=1, interpolation="none")
        _bare(axes, plain(images.class_names[label], 16))
    figure.colorbar(image, ax=grid, label="share of images\nwith both on", shrink=0.8)
    caption = f"For each class, the share of its held-out images in which two dynamic filters of {unit} are both on; "
    caption += "filters are in the same order as above."
    if len(chosen) < np.count_nonzero(found.counts):
        caption += f" Only the {len(chosen)} classes with the most images are shown."
    if side > 1:
        caption += f" Each cell is the mean of {side} by {side} neighbors."
    alt = f"{len(chosen)} maps, one per class, of how often two dynamic filters of unit {unit} are both on."
    return Plot(f"run{run.number}_together", figure, alt, caption, wide=True)


def _bare(axes: matplotlib.axes.Axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def unit_plots(run: RecordedRun, images: ImageMeasurements, unit: str, found: CoActivation) -> list[Plot]:
    """The plots of one unit; only the rates if it has fewer than two dynamic filters."""
    plots = [rates_plot(run, images, unit, found)]
    if int(found.dynamic.sum()) > 1:
        plots += [correlation_plot(run, unit, found), classes_plot(run, images, unit, found)]
    return plots
