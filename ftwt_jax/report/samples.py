"""What a gated network did with each held-out image: its work and its masks, from one pass over the split."""

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

# Longest side of an image on the page, in pixels, and its number of colours.
SIDE, PALETTE = 96, 64


@dataclasses.dataclass(frozen=True)
class Samples:
    """Figures of every held-out image that could be decoded, n of them.

    Attributes:
      indices: int64 [n], its place in the split.
      labels, predicted: int32 [n].
      macs: float64 [n], exact MACs, to one part in 10^7.
      dense_macs: those of the dense network.
      units: the names of the gated units.
      widths: their numbers of filters, C.
      packed: the masks of each unit, uint8 [n, ceil(C / 8)]. A bit an image and filter: 70 MB for the largest network
        here on ImageNet.
      class_names: in the order of the labels.
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

    def masks(self, unit: str) -> np.ndarray:
        """The masks of a unit, bool [n, C]."""
        place = self.units.index(unit)
        return np.unpackbits(self.packed[place], axis=1, count=self.widths[place]).astype(bool)

    def dynamic(self, unit: str) -> int:
        """How many filters of a unit are neither on for every image nor off for every image."""
        on = self.masks(unit).sum(axis=0)
        return int(np.sum((on > 0) & (on < len(self.labels))))

    @property
    def most_dynamic(self) -> str:
        """The unit with most dynamic filters."""
        return max(self.units, key=self.dynamic)


def look_at(run: Run, best: bool) -> Samples:
    """Runs the newest (or best) gated network of a run over its held-out split; one process alone does so."""
    model, mesh = run.models[GATED], run.mesh
    known: dict[str, Any] = {}

    def step(variables: Any, batch: dict[str, jax.Array]) -> dict[str, Any]:
        control = GateControl(targets=False)
        outputs: Any = model.apply(variables, run.normalize(batch["image"]), train=False, control=control)
        # What is known without running anything is noted while tracing.
        known["units"], known["dense"] = outputs.gate_names, float(dense_macs(outputs))
        known["widths"] = tuple(gate.mask.shape[1] for gate in outputs.gates)
        return {
            "macs": macs(outputs),
            "predicted": jnp.argmax(outputs.logits, axis=-1),
            "packed": tuple(jnp.packbits(gate.mask, axis=1) for gate in outputs.gates),
        }

    whole, parts = replicated(mesh), split(mesh)
    jitted = jit_on(mesh, step, in_shardings=(whole, parts), out_shardings=parts)
    variables = run.trained(GATED, best)
    found, counts, labels = [], [], []
    for batch in run.test_batches():
        given = {name: batch[name] for name in ("image", "label")}
        found.append(jax.device_get(jitted(variables, put_batch(given, mesh))))
        counts.append(batch["weight"] > 0)
        labels.append(batch["label"])
    keep = np.flatnonzero(np.concatenate(counts))
    together: dict[str, Any] = jax.tree.map(lambda *xs: np.concatenate(xs)[keep], *found)
    names = run.dataset.class_names or tuple(map(str, range(run.dataset.num_classes)))
    return Samples(
        indices=keep,
        labels=np.concatenate(labels)[keep],
        predicted=together["predicted"],
        macs=together["macs"].astype(np.float64),
        dense_macs=known["dense"],
        units=known["units"],
        widths=known["widths"],
        packed=together["packed"],
        class_names=names,
    )


@dataclasses.dataclass(frozen=True)
class Thumbnail:
    """A small image: PNG as a data URI, its exact MACs, class, and what it was taken for where that is another."""

    uri: str
    macs: float
    name: str
    taken_for: str | None


def extremes(samples: Samples, dataset: Dataset, count: int) -> tuple[list[Thumbnail], list[Thumbnail]]:
    """The cheapest images, from the cheapest on, and the dearest, from the dearest on; no image is both."""
    count = min(count, len(samples.macs) // 2)
    order = np.argsort(samples.macs, kind="stable")
    return _thumbnails(samples, dataset, order[:count]), _thumbnails(samples, dataset, order[::-1][:count])


def _thumbnails(samples: Samples, dataset: Dataset, places: np.ndarray) -> list[Thumbnail]:
    if not len(places):
        return []
    images = _images(dataset, samples.indices[places])
    found = []
    for place, image in zip(places, images, strict=True):
        label, predicted = samples.labels[place], samples.predicted[place]
        taken_for = None if label == predicted else samples.class_names[predicted]
        found.append(Thumbnail(to_png(image), samples.macs[place], samples.class_names[label], taken_for))
    return found


def _images(dataset: Dataset, indices: np.ndarray) -> np.ndarray:
    """Held-out images as the network is given them, uint8 [k, H, W, channels]."""
    source: Any = dataset.test
    if isinstance(source, ArraySource):
        chosen: Any = ArraySource(source.images[indices], source.labels[indices])
    else:
        chosen = Selection(source, indices)
    return next(eval_batches(dataset, chosen, len(indices)))["image"]


def to_png(image: np.ndarray) -> str:
    """An image, uint8 [H, W, 1 or 3], as the data URI of a PNG of at most 96 pixels a side; small ones as they are."""
    thumbnail = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    thumbnail.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    if thumbnail.mode == "RGB":
        thumbnail = thumbnail.quantize(PALETTE)
    file = io.BytesIO()
    thumbnail.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
