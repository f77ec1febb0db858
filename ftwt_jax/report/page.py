"""The page: one HTML file that needs nothing else, and the plots as PNG beside it."""

import base64
import dataclasses
import pathlib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2

from ftwt_jax.files import written_whole
from ftwt_jax.report.mask_plots import count
from ftwt_jax.report.plotting import save_png, to_svg
from ftwt_jax.report.run_plots import Plot, color_of
from ftwt_jax.report.runs import RecordedRun, is_number
from ftwt_jax.report.samples import Thumbnail

PAGE = "index.html"
# From so many runs on, the page begins with their table, without a card for each.
MANY = 7


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a run's network did with the held-out images: plots and images, the unit that was looked at, and notes.

    `units`: name, filters and dynamic filters of each unit.
    """

    macs: Plot | None = None
    cheapest: Sequence[Thumbnail] = ()
    dearest: Sequence[Thumbnail] = ()
    dense_macs: float = 0.0
    unit: str = ""
    units: Sequence[tuple[str, int, int]] = ()
    together: Sequence[Plot] = ()
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    """All that the page shows of one run."""

    run: RecordedRun
    seen: Seen
    training: Sequence[Plot]
    corruptions: Plot | None
    train_command: str | None
    evaluate_commands: Sequence[str]
    config: str

    @property
    def color(self) -> str:
        """As CSS has it."""
        return color_of(self.run)

    @property
    def plots(self) -> list[Plot]:
        """Those of this run alone."""
        single = [plot for plot in (self.seen.macs, self.corruptions) if plot is not None]
        return [*single, *self.seen.together, *self.training]


def embed(plot: Plot) -> str:
    """A plot as the data URI of an SVG file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        text = to_svg(plot.figure)
    return f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode('ascii')}"


def render(sections: Sequence[Section], **others: Any) -> str:
    """The whole page; `others` are handed to the template."""
    loader = jinja2.PackageLoader("ftwt_jax", "report")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"embed": embed, "cost": count, "figure": _figure, "percent": _percent}
    return environment.get_template("page.html").render(sections=sections, many=MANY, **others)


def _figure(value: Any, digits: int = 4) -> str:
    """A figure of a table; a dash for one that is not there."""
    return f"{value:.{digits}f}" if is_number(value) else "-"


def _percent(value: float) -> str:
    return f"{100 * value + 0.0:.0f}"


def write(folder: pathlib.Path, page: str, plots: Iterable[Plot]) -> pathlib.Path:
    """Writes the page and its plots into a folder that is there, each whole or not at all."""
    for plot in plots:
        plot.figure.set_layout_engine("none")  # What `embed` has laid out stays where it is; it takes half the time.
        with warnings.catch_warnings():
            # A name in signs that the font lacks; on the page, the reader's own fonts have them.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            save_png(plot.figure, folder / f"{plot.name}.png")
    path = folder / PAGE
    with written_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path
