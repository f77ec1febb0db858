"""Accuracy of each class, and which classes are taken for which."""

import dataclasses

import matplotlib
import numpy as np

from ftwt_jax.report.mask_plots import MOST_ROWS
from ftwt_jax.report.plotting import look, new_plot
from ftwt_jax.report.run_plots import Plot, distinct
from ftwt_jax.report.runs import RecordedRun

# With more classes than this, the cells of the matrix do not show their numbers.
MOST_NUMBERED = 12
SHADES = matplotlib.colormaps["Blues"].resampled(25)


@dataclasses.dataclass(frozen=True)
class ClassFigures:
    """Figures of one class.

    Attributes:
      images: number of its held-out images; None where it is not recorded.
      dense, accuracy: share of them that are classified as such, by the dense network and by the gated one (without
        gates, the same); None without images.
      taken_for: the class that they are most often mistaken for, and how often; empty if they never are.
    """

    name: str
    images: int | None
    dense: float | None
    accuracy: float | None
    taken_for: str


def class_figures(run: RecordedRun) -> list[ClassFigures]:
    """The figures of each class, in the order of the labels; empty if an older version evaluated the run."""
    found = run.evaluation
    accuracies, matrix = found.get("class_accuracy") or [], found.get("confusion")
    names = class_names(run)
    rows = []
    for label, (dense, accuracy) in enumerate(zip(found.get("dense_class_accuracy") or [], accuracies, strict=True)):
        images, taken_for = None, ""
        if matrix:
            wrong = np.array(matrix[label])
            images, wrong[label] = int(wrong.sum()), 0
            if wrong.any():
                taken_for = f"{names[int(wrong.argmax())]} ({wrong.max()})"
        rows.append(ClassFigures(names[label], images, dense, accuracy, taken_for))
    return rows


def class_names(run: RecordedRun) -> list[str]:
    """The names of the classes, or their numbers."""
    found = run.evaluation
    return found.get("class_names") or list(map(str, range(len(found.get("class_accuracy") or []))))


@look()
def confusion_plot(run: RecordedRun) -> Plot | None:
    """Heat map of true and predicted classes; None where the matrix is not recorded."""
    if not run.evaluation.get("confusion"):
        return None
    counts = np.array(run.evaluation["confusion"])
    names, number = distinct(class_names(run), 18), len(counts)
    side = min(max(3.4, 0.2 * number + 1.6), 8.0)
    figure, axes = new_plot("classified as", "true class", side + 0.9, side)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap=SHADES, vmin=0, vmax=1, interpolation="none")
    axes.grid(visible=False)
    if number <= MOST_ROWS:
        axes.set_xticks(range(number), names, rotation=90, fontsize=8)
        axes.set_yticks(range(number), names, fontsize=8)
    if number <= MOST_NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, label="share of the class's images", shrink=0.8)
    wrong = counts * ~np.eye(number, dtype=bool)
    row, column = np.unravel_index(int(wrong.argmax()), wrong.shape)
    text = f"True and predicted classes of the {'gated' if run.gated else 'dense'} network, held-out images."
    if wrong.any():
        all_names = class_names(run)
        text += f" Most frequent mistake: {all_names[row]} taken for {all_names[column]}, {wrong.max()} images."
    return Plot(f"run{run.number}_confusion", figure, f"Heat map. {text}", text, wide=number > MOST_NUMBERED)
