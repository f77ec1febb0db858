"""MACs, masks and predictions of each held-out image, from one pass of a network over the split."""

import base64
import dataclasses
import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ftwt_jax.data.build import Selection
from ftwt_jax.data.pipeline import eval_batches
from ftwt_jax.data.source import ArraySource, Dataset
from ftwt_jax.gating.gates import GateControl
from ftwt_jax.gating.macs import dense_macs, macs
from ftwt_jax.parallel.sharding import jit_on, put_batch, replicated, split
from ftwt_jax.training.run import Run
from ftwt_jax.training.settings import GATED

# Longest side of an image on the page in pixels, and its number of colors.
SIDE, PALETTE = 96, 64


@dataclasses.dataclass(frozen=True)
class ImageMeasurements:
    """What was measured on the n held-out images that could be decoded.

    Attributes:
      indices: int64 [n], the position of each image in the split.
      labels, predicted: int32 [n].
      macs: float64 [n], exact MACs, accurate to 1e-7.
      dense_macs: exact MACs of the dense network.
      units: the names of the gated units.
      widths: the number of filters C of each.
      packed: the masks of each unit, uint8 [n, ceil(C / 8)], one bit per filter: 70 MB for the largest network
        here on ImageNet.
      class_names: by label.
      choice: int32 [n], the subnet that each image is sent to; None without subnets.
    """

    indices: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    macs: np.ndarray
    dense_macs: float
    units: tuple[str, ...]
    widths: tuple[int, ...]
    packed: tuple[np.ndarray, ...]
    class_names: tuple[str, ...]
    choice: np.ndarray | None = None

    def masks(self, unit: str) -> np.ndarray:
        """The masks of a unit, bool [n, C]."""
        place = self.units.index(unit)
        return np.unpackbits(self.packed[place], axis=1, count=self.widths[place]).astype(bool)

    def dynamic(self, unit: str) -> int:
        """Number of filters of a unit that are on for some images and off for others."""
        on = self.masks(unit).sum(axis=0)
        return int(np.sum((on > 0) & (on < len(self.labels))))

    @property
    def most_dynamic(self) -> str:
        """The unit with the most dynamic filters."""
        return max(self.units, key=self.dynamic)


def measure_images(run: Run, best: bool, stage: str = GATED) -> ImageMeasurements:
    """Runs the newest (or best) gated network of a run over its held-out split; for a single process.

    Args:
      stage: `subnets` for the network with subnets in its place, whose masks are those of the chosen subnet.
    """
    model, mesh = run.models[stage], run.mesh
    known: dict[str, Any] = {}

    def step(variables: Any, batch: dict[str, jax.Array]) -> dict[str, Any]:
        control = GateControl(targets=False)
        applied: Any = model.apply(variables, run.normalize(batch["image"]), train=False, control=control)
        # Static facts, recorded while tracing.
        known["units"], known["dense"] = applied.gate_names, float(dense_macs(applied))
        known["widths"] = tuple(gate.mask.shape[1] for gate in applied.gates)
        return {
            "macs": macs(applied),
            "predicted": jnp.argmax(applied.logits, axis=-1),
            "packed": tuple(jnp.packbits(gate.mask, axis=1) for gate in applied.gates),
            "choice": applied.routes and applied.routes.choice,
        }

    whole, parts = replicated(mesh), split(mesh)
    jitted = jit_on(mesh, step, in_shardings=(whole, parts), out_shardings=parts)
    variables = run.trained(stage, best)
    outputs, counted, labels = [], [], []
    for batch in run.test_batches():
        inputs = {name: batch[name] for name in ("image", "label")}
        outputs.append(jax.device_get(jitted(variables, put_batch(inputs, mesh))))
        counted.append(batch["weight"] > 0)
        labels.append(batch["label"])
    keep = np.flatnonzero(np.concatenate(counted))
    columns: dict[str, Any] = jax.tree.map(lambda *xs: np.concatenate(xs)[keep], *outputs)
    names = run.dataset.class_names or tuple(map(str, range(run.dataset.num_classes)))
    return ImageMeasurements(
        indices=keep,
        labels=np.concatenate(labels)[keep],
        predicted=columns["predicted"],
        macs=columns["macs"].astype(np.float64),
        dense_macs=known["dense"],
        units=known["units"],
        widths=known["widths"],
        packed=columns["packed"],
        class_names=names,
        choice=columns["choice"],
    )


@dataclasses.dataclass(frozen=True)
class Thumbnail:
    """A small image: PNG as a data URI, exact MACs, class, and the predicted class if that is wrong."""

    uri: str
    macs: float
    name: str
    mistaken_for: str | None


def find_extremes(measured: ImageMeasurements, dataset: Dataset, count: int) -> tuple[list[Thumbnail], list[Thumbnail]]:
    """The images with the fewest MACs, and those with the most, each from the extreme inwards; none is in both."""
    count = min(count, len(measured.macs) // 2)
    order = np.argsort(measured.macs, kind="stable")
    return _make_thumbnails(measured, dataset, order[:count]), _make_thumbnails(measured, dataset, order[::-1][:count])


def find_routed(measured: ImageMeasurements, dataset: Dataset, count: int) -> list[list[Thumbnail]]:
    """For each subnet up to the last that is given images, at most `count` of them, spread evenly over all of them."""
    choice = measured.choice
    assert choice is not None
    groups = [np.flatnonzero(choice == subnet) for subnet in range(int(choice.max()) + 1)]
    spread = (group[np.linspace(0, len(group) - 1, min(count, len(group)), dtype=int)] for group in groups)
    return [_make_thumbnails(measured, dataset, places) for places in spread]


def _make_thumbnails(measured: ImageMeasurements, dataset: Dataset, places: np.ndarray) -> list[Thumbnail]:
    if not len(places):
        return []
    images = _load_images(dataset, measured.indices[places])
    thumbnails = []
    for place, image in zip(places, images, strict=True):
        label, predicted = measured.labels[place], measured.predicted[place]
        mistaken_for = None if label == predicted else measured.class_names[predicted]
        thumbnails.append(Thumbnail(to_png(image), measured.macs[place], measured.class_names[label], mistaken_for))
    return thumbnails


def _load_images(dataset: Dataset, indices: np.ndarray) -> np.ndarray:
    """Held-out images as the network receives them, uint8 [k, H, W, channels]."""
    source: Any = dataset.test
    if isinstance(source, ArraySource):
        chosen: Any = ArraySource(source.images[indices], source.labels[indices])
    else:
        chosen = Selection(source, indices)
    return next(eval_batches(dataset, chosen, len(indices)))["image"]


def to_png(image: np.ndarray) -> str:
    """An image, uint8 [H, W, 1 or 3], as the data URI of a PNG, reduced to at most 96 pixels per side."""
    thumbnail = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    thumbnail.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    if thumbnail.mode == "RGB":
        thumbnail = thumbnail.quantize(PALETTE)
    file = io.BytesIO()
    thumbnail.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
