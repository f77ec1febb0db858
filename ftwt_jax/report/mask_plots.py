"""The plots of what a gated network did with single images: their work, and the filters that fire together."""

import functools
from typing import Any

import matplotlib
import numpy as np

from ftwt_jax.report.plotting import INK, look, new_grid, new_plot
from ftwt_jax.report.run_plots import HEIGHT, WIDTH, Plot, color_of, legend, plain
from ftwt_jax.report.runs import RecordedRun
from ftwt_jax.report.samples import Samples
from ftwt_jax.report.together import Together, in_blocks

# Classes of the heat map, and of the small maps; filters of the large maps and of the small ones.
MOST_ROWS, MOST_CLASSES, MOST_CELLS, FEW_CELLS = 40, 12, 128, 64
# Few colours keep the page small.
SHARE, SIGNED = (matplotlib.colormaps[name].resampled(25) for name in ("viridis", "RdBu_r"))


def scale_of(macs: float) -> tuple[float, str]:
    """The size of a unit in which to tell so many MACs, and its name."""
    return next((pair for pair in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if macs >= pair[0]), (1.0, ""))


def count(macs: float, dense: float) -> str:
    """MACs on the scale of those of the dense network, such as "0.774 M"."""
    size, sign = scale_of(dense)
    return f"{macs / size:.3f}\u00a0{sign}" if sign else f"{macs:.0f}"


@look()
def macs_plot(run: RecordedRun, samples: Samples) -> Plot:
    """How many images took how many MACs."""
    size, sign = scale_of(samples.dense_macs)
    figure, axes = new_plot("exact MACs per image" + (f" ({sign})" if sign else ""), "held-out images", WIDTH, HEIGHT)
    values, dense = samples.macs / size, samples.dense_macs / size
    axes.hist(values, bins=min(40, max(8, round(len(values) ** 0.5) * 2)), color=color_of(run), alpha=0.85)
    mean = axes.axvline(values.mean(), color=INK, linestyle="--", linewidth=1, label=f"mean {values.mean():.3f}")

    def reduction(x: Any) -> Any:
        return 1 - x / dense

    def work(x: Any) -> Any:
        return (1 - x) * dense

    top = axes.secondary_xaxis("top", functions=(reduction, work))
    top.set_xlabel("MACs reduction")
    legend(figure, [mean], columns=1)
    told = functools.partial(count, dense=samples.dense_macs)
    low, middle, high = np.percentile(samples.macs, [0, 50, 100])
    text = (
        f"{len(values):,} held-out images took {told(low)} to {told(high)}\u00a0MACs, half of them at most "
        f"{told(middle)}; the dense network takes {told(samples.dense_macs)} for each."
    )
    return Plot(f"run{run.number}_macs", figure, f"Histogram of exact MACs per image. {text}", text)


@look()
def rates_plot(run: RecordedRun, samples: Samples, unit: str, found: Together) -> Plot:
    """Classes against filters: how often a filter is on for a class."""
    shown = _telling_classes(found)
    height = min(max(1.9, 0.19 * len(shown) + 1.2), 7.5)
    figure, axes = new_plot(f"filter of {plain(unit)}, ordered by likeness", "class", 7.4, height)
    image = axes.imshow(found.rates[shown], cmap=SHARE, vmin=0, vmax=1, aspect="auto", interpolation="none")
    axes.grid(visible=False)
    axes.set_yticks(range(len(shown)), [plain(samples.class_names[c], 22) for c in shown], fontsize=8)
    _number_filters(axes, found.order)
    figure.colorbar(image, label="share of images\nwith the filter on", pad=0.01)
    filters, dynamic = len(found.order), int(found.dynamic.sum())
    caption = (
        f"Share of each class's held-out images in which a filter of {unit} is on. {dynamic} of its {filters} "
        f"filters are dynamic; the class of an image explains {100 * found.explained:.0f}\u00a0% of their variance."
    )
    if dynamic < filters:
        caption += " Left of them lie those that are always on, right of them those that are always off."
    there = np.count_nonzero(found.counts)
    if len(shown) < there:
        caption += f" Shown are the {len(shown)} of {there} classes that differ most from the mean."
    alt = f"Heat map of {len(shown)} classes and {filters} filters of unit {unit}, {dynamic} of them dynamic."
    return Plot(f"run{run.number}_rates", figure, alt, caption, wide=True)


def _telling_classes(found: Together) -> np.ndarray:
    """The classes with images, in order; of many, those whose rates differ most from the mean."""
    there = np.flatnonzero(found.counts)
    if len(there) <= MOST_ROWS:
        return there
    far = np.abs(found.rates[there] - found.rates[there].mean(axis=0)).sum(axis=1)
    return np.sort(there[np.argsort(-far, kind="stable")[:MOST_ROWS]])


def _number_filters(axes: matplotlib.axes.Axes, order: np.ndarray) -> None:
    places = range(0, len(order), -(-len(order) // 64))
    axes.set_xticks(places, [str(order[place]) for place in places], rotation=90, fontsize=6)


@look()
def correlation_plot(run: RecordedRun, unit: str, found: Together) -> Plot:
    """Filters against filters: correlation over all images, and what of it the class does not explain."""
    figure, grid = new_grid(2, 7.4, 3.7, 2)
    titles = ("all images", "within a class (class means taken away)")
    means = []
    for axes, matrix, title in zip(grid, (found.correlation, found.within), titles, strict=True):
        cells, side = in_blocks(matrix, MOST_CELLS)
        image = axes.imshow(cells, cmap=SIGNED, vmin=-1, vmax=1, interpolation="none")
        _bare(axes, title)
        axes.set_xlabel("dynamic filters, in the same order")
        apart = ~np.eye(len(matrix), dtype=bool)
        means.append(float(np.abs(matrix[apart]).mean()) if apart.any() else 0.0)
    figure.colorbar(image, ax=grid, label="correlation of masks", shrink=0.85)
    caption = (
        f"Correlation of the masks of each two dynamic filters of {unit}: red fire together, blue in each other's "
        f"place. Mean size {means[0]:.2f} over all images, {means[1]:.2f} within a class: what remains at the right "
        "follows the image, not its class."
    )
    if side > 1:
        caption += f" A cell is the mean of {side} by {side} neighbours."
    alt = f"Two maps of correlations between {len(found.correlation)} dynamic filters of unit {unit}; " + (
        f"mean absolute correlation {means[0]:.2f}, within a class {means[1]:.2f}."
    )
    return Plot(f"run{run.number}_correlation", figure, alt, caption, wide=True)


@look()
def classes_plot(run: RecordedRun, samples: Samples, unit: str, found: Together) -> Plot:
    """Filters against filters, a small map for each class: how often both are on."""
    chosen = found.largest
    columns = min(5, len(chosen)) if len(chosen) != 12 else 6
    rows = -(-len(chosen) // columns)
    figure, grid = new_grid(len(chosen), 7.4, 1.55 * rows + 0.2, columns)
    for axes, label, matrix in zip(grid, chosen, found.both, strict=True):
        cells, side = in_blocks(matrix, FEW_CELLS)
        image = axes.imshow(cells, cmap=SHARE, vmin=0, vmax=1, interpolation="none")
        _bare(axes, plain(samples.class_names[label], 16))
    figure.colorbar(image, ax=grid, label="share of images\nwith both on", shrink=0.8)
    caption = f"For each class, the share of its held-out images in which two dynamic filters of {unit} are both on; "
    caption += "filters in the same order as above."
    if len(chosen) < np.count_nonzero(found.counts):
        caption += f" Shown are the {len(chosen)} classes with most images."
    if side > 1:
        caption += f" A cell is the mean of {side} by {side} neighbours."
    alt = f"{len(chosen)} maps, one a class, of how often two dynamic filters of unit {unit} are both on."
    return Plot(f"run{run.number}_together", figure, alt, caption, wide=True)


def _bare(axes: matplotlib.axes.Axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def unit_plots(run: RecordedRun, samples: Samples, unit: str, found: Together) -> list[Plot]:
    """The plots of one unit; without dynamic filters, the rates alone."""
    plots = [rates_plot(run, samples, unit, found)]
    if int(found.dynamic.sum()) > 1:
        plots += [correlation_plot(run, unit, found), classes_plot(run, samples, unit, found)]
    return plots
