"""Images that are corrupted already, as TFDS prepares them: a configuration for each corruption and severity."""

import os
import re
from typing import Any, NamedTuple

from ftwt_jax.data.build import in_memory
from ftwt_jax.data.skipped import Skipped
from ftwt_jax.data.source import ArraySource, Dataset
from ftwt_jax.data.tfds_sets import (
    FORMAT,
    HELD_OUT,
    PREFIX,
    RecordSource,
    image_and_label,
    open_builder,
    prepare_command,
)
from ftwt_jax.errors import UserError, one_line

FLAG, EXAMPLE = "--corruptions_from", f"{PREFIX}cifar10_corrupted"
# `gaussian_noise_1`: the corruption and its severity.
CONFIGURATION = re.compile(r"(.+)_(\d+)")


class CorruptedSet(NamedTuple):
    """One configuration: what was done to its images, and the images, encoded."""

    corruption: str
    severity: int
    records: RecordSource

    def load(self, dataset: Dataset) -> ArraySource:
        """All of them, decoded, labelled as in `dataset`; what cannot be decoded is left out."""
        return in_memory(self.records, dataset.image_shape, dataset.num_classes, Skipped(len(self.records)))


def open_corrupted(place: str, data_dir: str | None, dataset: Dataset) -> list[CorruptedSet]:
    """Opens every configuration of `tfds:NAME` that is prepared, in the order of their names and severities.

    Args:
      place: such as `tfds:cifar10_corrupted`.
      data_dir: where TFDS keeps its data; None: where it does by itself.
      dataset: that of the network, whose classes and image size these must be.

    Raises:
      UserError: unknown, nothing prepared, or images that the network is not for.
    """
    name = place.removeprefix(PREFIX)
    if not place.startswith(PREFIX) or not name:
        raise UserError(f"{FLAG} takes {PREFIX}NAME, such as {EXAMPLE}; got {place!r}")
    if "/" in name or ":" in name:
        raise UserError(f"{FLAG} takes a data set with all that is prepared of it: {PREFIX}{re.split('[/:]', name)[0]}")
    # Where TensorFlow is installed, paths such as gs:// would be opened by it.
    os.environ.setdefault("EPATH_USE_TF", "false")
    any_builder = open_builder(name, data_dir)
    if any_builder.builder_config is None or not CONFIGURATION.fullmatch(any_builder.builder_config.name):
        raise UserError(f"{place} is no set of corrupted images with severities; {FLAG} takes one as {EXAMPLE}")
    _check_fits(any_builder, place, dataset)
    folder = any_builder.data_path.parent.parent
    found = []
    for path in folder.iterdir() if folder.exists() else ():
        matched = CONFIGURATION.fullmatch(path.name)
        if matched is None:
            continue
        configuration = f"{name}/{path.name}"
        builder = open_builder(configuration, data_dir)
        if builder.info.splits and FORMAT in {form.value for form in builder.info.available_file_formats()}:
            _check_fits(builder, f"{PREFIX}{configuration}", dataset)
            found.append(CorruptedSet(matched[1], int(matched[2]), _records(builder, configuration)))
    if not found:
        command = prepare_command(f"{name}/{any_builder.builder_config.name}", data_dir)
        raise UserError(f"nothing of {place} is prepared in {folder}: run `{command}`, and so for others of its kind")
    return sorted(found, key=lambda one: one[:2])


def _records(builder: Any, name: str) -> RecordSource:
    import tensorflow_datasets as tfds

    image, label = image_and_label(builder, name)
    split = next((split for split in HELD_OUT if split in builder.info.splits), None)
    if split is None:
        raise UserError(f"{PREFIX}{name} has neither of the splits {', '.join(HELD_OUT)}: it cannot be evaluated on")
    try:
        records = builder.as_data_source(split=split, decoders={image: tfds.decode.SkipDecoding()})
        len(records)
    except RuntimeError as error:
        raise UserError(f"{PREFIX}{name} cannot be read: {one_line(error)}; delete its folder and prepare it") from None
    return RecordSource(records, image, label, f"{PREFIX}{name} {split}")


def _check_fits(builder: Any, place: str, dataset: Dataset) -> None:
    """Raises `UserError` for images of another size or other classes than the network's."""
    image, label = image_and_label(builder, place.removeprefix(PREFIX))
    features = builder.info.features
    shape, own, classes = tuple(features[image].shape), tuple(dataset.image_shape), features[label].num_classes
    if shape != own:
        given, wanted = ("x".join("?" if side is None else str(side) for side in one) for one in (shape, own))
        raise UserError(
            f"{place} has images of {given}, and this network is given {wanted}: --corruptions alone corrupts "
            "images of its own"
        )
    # Classes that are only numbers may be anybody's.
    numbered = tuple(map(str, range(classes)))
    named = {
        names for names in (tuple(features[label].names or ()), dataset.class_names) if names not in ((), numbered)
    }
    if classes != dataset.num_classes or len(named) > 1:
        raise UserError(
            f"{place} has {classes} classes, and they are not the {dataset.num_classes} of this network: "
            "--corruptions alone corrupts images of its own"
        )
