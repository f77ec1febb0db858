"""One style for all plots, drawn without a display."""

import functools
import io
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ftwt_jax.files import AnyPath, written_whole

# The palette of Okabe and Ito, which color-blind readers can distinguish too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Color of text and axes.
INK = "#24292f"
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "axes.prop_cycle": cycler(color=COLORS),
    "font.size": 10,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "ftwt_jax",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}
# CSS of an SVG file: `currentColor` on a light and on a dark page.
SCHEMES = (
    f"svg{{color:{INK}}}text{{font-family:system-ui,sans-serif!important}}"
    "@media(prefers-color-scheme:dark){svg{color:#d5dae1}}"
)


# Applies the style: `with look():`, or `@look()` before a function.
look = functools.partial(matplotlib.rc_context, STYLE)


def new_plot(xlabel: str, ylabel: str, width: float = 7, height: float = 4) -> tuple[Figure, Axes]:
    """A figure of this size in inches with one pair of axes; pyplot does not know it and so does not keep it alive."""
    figure, axes = new_grid(1, width, height)
    axes[0].set_xlabel(xlabel)
    axes[0].set_ylabel(ylabel)
    return figure, axes[0]


@look()
def new_grid(count: int, width: float, height: float, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of this size in inches with `count` pairs of axes in rows of `columns`; see `new_plot`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    rows = -(-count // columns)
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def save_png(figure: Figure, path: AnyPath) -> None:
    """Writes a figure as PNG, whole or not at all."""
    with written_whole(path) as temporary, look():
        figure.savefig(temporary, format="png", dpi=144)


def to_svg(figure: Figure) -> str:
    """A figure as an SVG element without background; text and axes follow the light or dark scheme of the reader."""
    file = io.StringIO()
    with look():
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    head, rest = text[text.index("<svg") :].split(">", 1)
    return f"{head}><style>{SCHEMES}</style>{rest.replace(INK, 'currentColor')}"
