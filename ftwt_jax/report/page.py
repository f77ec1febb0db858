"""Renders and writes the page: one self-contained HTML file, and the plots as PNG files beside it."""

import base64
import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2

from ftwt_jax.files import AnyPath, written_whole
from ftwt_jax.printing import four_digits, shorten_data
from ftwt_jax.report.classes import ClassFigures
from ftwt_jax.report.images import Thumbnail
from ftwt_jax.report.mask_plots import count
from ftwt_jax.report.plotting import save_png, to_svg
from ftwt_jax.report.run_plots import Plot, color_of
from ftwt_jax.report.runs import RecordedRun, is_number

PAGE = "index.html"
# With this many runs or more, the page has no card per run and begins with their table.
MANY = 7


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the page shows of a run's gated network, and of its subnets, on the held-out images.

    Attributes:
      macs: histogram of the MACs per image.
      cheapest, most_expensive: the images with the fewest and with the most MACs.
      dense_macs: exact MACs of the dense network.
      unit: the unit whose masks are shown.
      units: name, number of filters and number of dynamic filters of each unit.
      co_activation: plots of the masks of `unit`.
      routed: some of the images that each subnet is given.
      note: why something is missing; empty if nothing is.
    """

    macs: Plot | None = None
    cheapest: Sequence[Thumbnail] = ()
    most_expensive: Sequence[Thumbnail] = ()
    dense_macs: float = 0.0
    unit: str = ""
    units: Sequence[tuple[str, int, int]] = ()
    co_activation: Sequence[Plot] = ()
    routed: Sequence[Sequence[Thumbnail]] = ()
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    """Everything that the page shows of one run."""

    run: RecordedRun
    seen: Seen
    training: Sequence[Plot]
    corruptions: Plot | None
    confusion: Plot | None
    classes: Sequence[ClassFigures]
    subnets: Sequence[Plot]
    train_command: str | None
    evaluate_commands: Sequence[str]
    config: str

    @property
    def color(self) -> str:
        """Its color, in CSS notation."""
        return color_of(self.run)

    @property
    def plots(self) -> list[Plot]:
        """The plots of this run alone."""
        single = [plot for plot in (self.seen.macs, self.corruptions, self.confusion) if plot is not None]
        return [*single, *self.subnets, *self.seen.co_activation, *self.training]


def embed(plot: Plot) -> str:
    """A plot as the data URI of an SVG file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        text = to_svg(plot.figure)
    return f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode('ascii')}"


def render(sections: Sequence[Section], **others: Any) -> str:
    """The HTML of the page; `others` are further variables of the template."""
    loader = jinja2.PackageLoader("ftwt_jax", "report")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    figures = {"cost": count, "figure": _figure, "percent": _percent, "digits": _digits}
    environment.filters |= {"embed": embed, "shorten": shorten_data, **figures}
    page = environment.get_template("page.html").render(sections=sections, many=MANY, **others)
    return page.encode(errors="backslashreplace").decode()  # Names of folders may hold bytes that are not UTF-8.


def _figure(value: Any, digits: int = 4) -> str:
    """A number in a table; a dash if it is missing."""
    return f"{value:.{digits}f}" if is_number(value) else "-"


def _digits(value: Any) -> str:
    """A number with four significant digits; a dash if it is missing."""
    return four_digits(value) if is_number(value) else "-"


def _percent(value: float) -> str:
    return f"{100 * value + 0.0:.0f}"


def write(folder: AnyPath, page: str, plots: Iterable[Plot]) -> AnyPath:
    """Writes the page and its plots into an existing folder, each file whole or not at all; returns the page's path."""
    for plot in plots:
        plot.figure.set_layout_engine("none")  # `embed` has laid it out; doing so again would double the time.
        with warnings.catch_warnings():
            # A name may have characters that the plot's font lacks; on the page, the browser's fonts are used.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            save_png(plot.figure, folder / f"{plot.name}.png")
    path = folder / PAGE
    with written_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path
