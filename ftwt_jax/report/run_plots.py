"""Plots of the figures in workdirs: accuracy against MACs, density, training, corruptions."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation

from ftwt_jax.data.corruptions import CLEAN
from ftwt_jax.errors import printable
from ftwt_jax.report.plotting import COLORS, INK, look, new_grid, new_plot
from ftwt_jax.report.runs import RecordedRun, Row, is_number
from ftwt_jax.training.settings import BASELINE, STAGES

# Inches; as wide as the page on a phone, with text at its normal size.
WIDTH, HEIGHT = 4.8, 3.3
LEGEND_ROW = 0.21
# A curve with more points is averaged down to this many.
MOST_POINTS = 240
LONGEST_LABEL = 34
# Times the usual distance from the highest accuracy: what is further away is cut off. And that plot's least height.
FAR, LEAST_REACH = 4, 0.02
# Numbers of one colour at arrows closer than this would cover each other.
NEAR = 0.1
MARKERS = "osD^vPX"


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plot of the page.

    Attributes:
      name: name of its file, without the ending.
      alt: a description for readers who cannot see it.
      wide: whether it is wider than a phone, which then scrolls it.
    """

    name: str
    figure: Figure
    alt: str
    caption: str
    wide: bool = False

    @property
    def most(self) -> int:
        """Its largest width in pixels: there its text is as large as the text of the page."""
        return round(self.figure.get_figwidth() * 108)

    @property
    def least(self) -> int:
        """The smallest width in pixels at which its text is legible."""
        return round(self.figure.get_figwidth() * 76)


def color_of(run: RecordedRun) -> str:
    """The color of a run on the whole page; without black, which a dark page would hide."""
    colors = [*COLORS[:-1], "#8C6BB1"]
    return colors[(run.number - 1) % len(colors)]


def plain(text: str, longest: int = LONGEST_LABEL) -> str:
    """A name as text of a plot: shortened, and with no part read as a formula."""
    text = printable(text)
    short = text if len(text) <= longest else f"{text[: longest // 2 - 1]}…{text[-(longest // 2) :]}"
    return short.replace("$", r"\$")


def distinct(names: Sequence[str], longest: int = LONGEST_LABEL) -> list[str]:
    """Names as text of a plot, shortened only as far as names that differ still do."""
    most = max(map(len, names), default=longest)
    lengths = (length for length in range(longest, most + 1) if _differ(names, length))
    length = next(lengths, most)
    return [plain(name, length) for name in names]


def _differ(names: Sequence[str], longest: int) -> bool:
    return len({plain(name, longest) for name in names}) == len(set(names))


def legend(figure: Figure, handles: Sequence[Line2D], columns: int) -> None:
    """Adds a legend below the plot."""
    rows = -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * rows)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9)


def mark(label: str, **options: Any) -> Line2D:
    return Line2D([], [], label=label, **options)


@look()
def accuracy_plot(runs: Sequence[RecordedRun]) -> Plot:
    """Accuracy against exact MACs reduction: gated networks, their dense networks at 0, and curves over budgets."""
    figure, axes = new_plot("MACs reduction, exact", "held-out accuracy", WIDTH, HEIGHT)
    handles = []
    for run in runs:
        color, marker = color_of(run), MARKERS[(run.number - 1) // len(COLORS) % len(MARKERS)]
        found = run.evaluation
        start = (0.0, found["dense_accuracy"])
        axes.plot(*start, "s", color=color, markerfacecolor="none", markersize=8, clip_on=False, zorder=3)
        if run.gated:
            end = (found["macs_reduction"], found["accuracy"])
            axes.plot(*zip(start, end, strict=True), ":", color=color, linewidth=1, alpha=0.6, zorder=1)
            axes.plot(*end, marker, color=color, markersize=8, clip_on=False, zorder=4)
        if run.budgets:
            axes.plot(*_curve(run.budgets, "macs_reduction", "accuracy"), "-", color=color, marker=".", zorder=2)
            static = [row for row in run.budgets if is_number(row.get("static_accuracy"))]
            line = _curve(static, "static_macs_reduction", "static_accuracy")
            axes.plot(*line, "--", color=color, linewidth=1, alpha=0.8, zorder=1)
        handles.append(mark(plain(run.label), color=color, marker=marker, linestyle="none", markersize=7))
    kinds = [mark("dense", color=INK, marker="s", markerfacecolor="none", linestyle="none", markersize=7)]
    if any(run.budgets for run in runs):
        kinds.append(mark("other budgets, without more training", color=INK, marker="."))
    if any("static_accuracy" in row for run in runs for row in run.budgets):
        kinds.append(mark("fixed masks", color=INK, linestyle="--", linewidth=1))
    axes.set_xlim(left=-0.02)
    _cut_off_low(axes)
    legend(figure, [*handles, *kinds], columns=2)
    points = "; ".join(
        f"{run.name}: dense {run.evaluation['dense_accuracy']:.4f}"
        + (f", gated {run.evaluation['accuracy']:.4f} at {run.evaluation['macs_reduction']:.3f}" if run.gated else "")
        for run in runs
    )
    caption = (
        "Held-out accuracy against the share of MACs saved. Open squares: dense networks. Filled markers: gated "
        "networks trained from them."
    )
    if axes.texts:
        caption += " Arrows at the lower edge, with the highest value: networks and curves far below the others."
    if any(run.budgets for run in runs):
        caption += " Solid lines: the same network at other budgets, without more training."
    if len(kinds) > 2:
        caption += " Dashed lines: one fixed mask for all images, at the same MACs."
    return Plot("accuracy", figure, f"Accuracy against MACs reduction. {points}.", caption)


def _cut_off_low(axes: Axes) -> None:
    """Keeps a bad curve from squeezing the others: the axis ends below most points, and arrows stand for lower ones.

    It reaches down to at most `FAR` times the distance from the highest point that half of networks and curves have,
    unless twice that shows all.
    """
    drawn = ((line, np.asarray(line.get_ydata(), float)) for line in axes.get_lines() if line.get_linestyle() != ":")
    lines, values = zip(*((line, ys) for line, ys in drawn if ys.size), strict=True)
    top = max(map(np.max, values))
    distances, usual = top - np.concatenate(values), np.median([top - np.median(ys) for ys in values])
    reach = max(FAR * float(usual), LEAST_REACH)
    if distances.max() <= 2 * reach:
        return
    height = max(1.15 * distances[distances <= reach].max(), LEAST_REACH)
    bottom = top - height
    axes.set_ylim(bottom, top + 0.05 * height)
    labels: list[Annotation] = []
    for line, ys in zip(lines, values, strict=True):
        if ys.min() >= bottom:
            continue
        line.set_clip_on(True)
        if ys.max() < bottom:
            x, color = float(np.mean(np.asarray(line.get_xdata(), float))), line.get_color()
            axes.plot(x, bottom, "v", color=color, markersize=6, clip_on=False, zorder=5)
            place: dict[str, Any] = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
            if not any(text.get_color() == color and abs(text.xy[0] - x) < NEAR for text in labels):
                labels.append(axes.annotate(f"{ys.max():.2f}", (x, bottom), **place, fontsize=8, color=color))


def _curve(rows: Sequence[Row], x: str, y: str) -> tuple[list[float], list[float]]:
    rows = sorted(rows, key=lambda row: row[x])
    return [row[x] for row in rows], [row[y] for row in rows]


@look()
def density_plots(runs: Sequence[RecordedRun]) -> list[Plot]:
    """Density of each unit, one plot per network architecture: bars for one run, lines for several."""
    kinds: dict[tuple[str, ...], list[RecordedRun]] = {}
    for run in runs:
        if run.units:
            kinds.setdefault(run.units, []).append(run)
    plots = []
    for number, (units, group) in enumerate(kinds.items(), start=1):
        width = max(WIDTH, 0.17 * len(units) + 0.9)
        figure, axes = new_plot("", "density (share of filters on)", width, HEIGHT)
        places = np.arange(len(units))
        for run in group:
            values, color = run.evaluation["density"], color_of(run)
            if len(group) == 1:
                axes.bar(places, values, color=color)
            else:
                axes.plot(places, values, marker="o", markersize=4, color=color)
        name_ticks(axes, units)
        axes.set_ylim(0, 1)
        handles = [mark(plain(run.label), color=color_of(run), linewidth=4) for run in group]
        legend(figure, handles, columns=2)
        means = "; ".join(f"{run.name}: {min(d := run.evaluation['density']):.2f} to {max(d):.2f}" for run in group)
        network = f"{group[0].config.model.name}, {len(units)} gated units"
        plots.append(
            Plot(
                f"density{number if len(kinds) > 1 else ''}",
                figure,
                f"Density per unit of {network}. {means}.",
                f"Share of filters that are on in each unit of {network}; mean over held-out images.",
                wide=width > 1.3 * WIDTH,
            )
        )
    return plots


def name_ticks(axes: Axes, names: Sequence[str]) -> None:
    many = len(names) > 6 or max(map(len, names)) > 8
    axes.set_xticks(
        range(len(names)),
        distinct(names),
        rotation=90 if many else 0,
        fontsize=8 if many else 10,
    )
    axes.grid(visible=False, axis="x")


# The plots of `metrics.jsonl`: title, name of the file, and keys with their labels.
CURVES = (
    ("Loss", "loss", {"loss": "training, including the gate loss"}),
    ("Accuracy", "accuracy", {"accuracy": "training (augmented)", "eval_accuracy": "held out"}),
    (
        "Gate accuracy",
        "gate_accuracy",
        {
            "gate_accuracy": "training",
            "eval_gate_accuracy": "held out",
            "eval_static_gate_accuracy": "held out, best fixed mask",
        },
    ),
    (
        "MACs reduction and density",
        "work",
        {"eval_macs_reduction": "held out, MACs reduction (exact)", "density": "training, density"},
    ),
)


@look()
def training_plots(run: RecordedRun) -> list[Plot]:
    """Curves over the steps of both stages, one after the other."""
    last = {stage: max((row["step"] for row in run.metrics if row["stage"] == stage), default=0) for stage in STAGES}
    offsets = {stage: sum(last[name] for name in STAGES[:index]) for index, stage in enumerate(STAGES)}
    plots = []
    for title, name, keys in CURVES:
        figure, axes = new_plot("step", title[0].lower() + title[1:] if title[1].islower() else title, WIDTH, 2.6)
        handles, ends = [], []
        for (key, label), color in zip(keys.items(), COLORS, strict=False):
            drawn = False
            for stage, offset in offsets.items():
                rows = [row for row in run.metrics if row["stage"] == stage and is_number(row.get(key))]
                if not rows:
                    continue
                steps, values = thin_out([row["step"] + offset for row in rows], [row[key] for row in rows])
                axes.plot(steps, values, color=color, marker="." if len(steps) < 12 else "", linewidth=1.5)
                ends.append(f"{label}: {rows[-1][key]:.3f} at the end of stage {stage}")
                drawn = True
            if drawn:
                handles.append(mark(label, color=color))
        if not handles:
            continue
        axes.set_xlim(-0.02 * sum(last.values()), 1.02 * sum(last.values()))
        if all(last.values()):
            axes.axvline(last[BASELINE], color=INK, linewidth=1, linestyle=":")
            place: dict[str, Any] = {"xy": (last[BASELINE], 1), "xycoords": axes.get_xaxis_transform()}
            for stage, side, points in ((BASELINE, "right", -4), ("gates", "left", 4)):
                axes.annotate(stage, **place, xytext=(points, 2), textcoords="offset points", ha=side, fontsize=9)
        if name == "loss":
            axes.set_yscale("log")
        legend(figure, handles, columns=1)
        caption = f"{title} over training steps."
        plots.append(Plot(f"run{run.number}_{name}", figure, f"{title}: {'; '.join(ends)}.", caption))
    return plots


def thin_out(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Reduces a curve to at most `MOST_POINTS` points, means of equal parts."""
    count = min(len(steps), MOST_POINTS)
    first, second = (
        np.array([part.mean() for part in np.array_split(np.asarray(xs, float), count)]) for xs in (steps, values)
    )
    return first, second


@look()
def corruption_plot(run: RecordedRun) -> Plot:
    """Accuracy against severity, one small plot per corruption."""
    clean = [row for row in run.corruptions if row["corruption"] == CLEAN]
    named = [row for row in run.corruptions if row["corruption"] != CLEAN]
    groups = {name: list(rows) for name, rows in itertools.groupby(named, lambda row: row["corruption"])}
    columns = 3 if len(groups) > 2 else max(len(groups), 1)
    rows_of_plots = -(-len(groups) // columns) or 1
    options = {"sharex": True, "sharey": True}
    figure, grid = new_grid(max(len(groups), 1), 7.4, 1.75 * rows_of_plots + 0.4, columns, **options)
    for axes, (name, rows) in zip(grid, groups.items(), strict=False):
        line = sorted([*clean, *rows], key=lambda row: row["severity"])
        severity = [row["severity"] for row in line]
        axes.plot(severity, [row["dense_accuracy"] for row in line], "--", color=INK, marker=".")
        if run.gated:
            values = [row["accuracy"] if is_number(row.get("accuracy")) else np.nan for row in line]
            axes.plot(severity, values, color=color_of(run), marker=".")
        axes.set_title(plain(str(name).replace("_", " ")), fontsize=10)
        axes.set_xticks(sorted({int(row["severity"]) for row in run.corruptions}))
    for axes in grid[-columns:]:
        axes.set_xlabel("severity (0: original)" if clean else "severity")
        axes.tick_params(labelbottom=True)
    figure.supylabel("held-out accuracy", fontsize=10)
    handles = [mark("dense", color=INK, linestyle="--", marker=".")]
    if run.gated:
        handles.append(mark("gated", color=color_of(run), marker="."))
    legend(figure, handles, columns=2)
    worst = min(named or run.corruptions, key=lambda row: row["dense_accuracy"])
    return Plot(
        f"run{run.number}_corruptions",
        figure,
        f"Accuracy against severity of {len(groups)} corruptions; the dense network's lowest accuracy is "
        f"{worst['dense_accuracy']:.3f}, for {worst['corruption']} at severity {worst['severity']}.",
        "Held-out accuracy of the dense and the gated network against the severity of each corruption.",
        wide=True,
    )
