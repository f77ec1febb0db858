"""Sets of corrupted images that TFDS prepares, with a configuration for each corruption and severity."""

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
    avoid_tensorflow,
    image_and_label,
    open_builder,
    open_split,
    prepare_command,
)
from ftwt_jax.errors import UserError

FLAG, EXAMPLE = "--corruptions_from", f"{PREFIX}cifar10_corrupted"
# `gaussian_noise_1`: the corruption and its severity.
CONFIGURATION = re.compile(r"(.+)_(\d+)")


class CorruptedSet(NamedTuple):
    """One configuration: its corruption and severity, and its images, encoded."""

    corruption: str
    severity: int
    records: RecordSource

    def load(self, dataset: Dataset) -> ArraySource:
        """All images, decoded, labelled as in `dataset`; those that cannot be decoded are left out."""
        return in_memory(self.records, dataset.image_shape, dataset.num_classes, Skipped(len(self.records)))


def open_corrupted(place: str, data_dir: str | None, dataset: Dataset) -> list[CorruptedSet]:
    """Opens every prepared configuration of `tfds:NAME`, ordered by corruption and severity.

    Args:
      place: such as `tfds:cifar10_corrupted`.
      data_dir: where TFDS keeps its data; None is TFDS's default.
      dataset: the network's own, whose classes and image size these must have.

    Raises:
      UserError: unknown, nothing prepared, or images that do not suit the network.
    """
    name = place.removeprefix(PREFIX)
    if not place.startswith(PREFIX) or not name:
        raise UserError(f"{FLAG} takes {PREFIX}NAME, such as {EXAMPLE}; got {place!r}")
    if "/" in name or ":" in name:
        whole = f"{PREFIX}{re.split('[/:]', name)[0]}"
        raise UserError(f"{FLAG} takes a data set without a configuration: {whole}; all that are prepared are used")
    avoid_tensorflow()
    any_builder = open_builder(name, data_dir)
    if any_builder.builder_config is None or not CONFIGURATION.fullmatch(any_builder.builder_config.name):
        raise UserError(f"{place} is not a set of corrupted images with severities; {FLAG} takes one such as {EXAMPLE}")
    _check_fits(any_builder, place, dataset)
    folder = any_builder.data_path.parent.parent
    sets = []
    for path in folder.iterdir() if folder.exists() else ():
        matched = CONFIGURATION.fullmatch(path.name)
        if matched is None:
            continue
        configuration = f"{name}/{path.name}"
        builder = open_builder(configuration, data_dir)
        if builder.info.splits and FORMAT in {form.value for form in builder.info.available_file_formats()}:
            _check_fits(builder, f"{PREFIX}{configuration}", dataset)
            sets.append(CorruptedSet(matched[1], int(matched[2]), _records(builder, configuration)))
    if not sets:
        command = prepare_command(f"{name}/{any_builder.builder_config.name}", data_dir)
        raise UserError(
            f"no configuration of {place} is prepared in {folder}: run `{command}`, and so on for the others"
        )
    return sorted(sets, key=lambda configuration: configuration[:2])


def _records(builder: Any, name: str) -> RecordSource:
    split = next((split for split in HELD_OUT if split in builder.info.splits), None)
    if split is None:
        raise UserError(f"{PREFIX}{name} has no split to evaluate on: neither {' nor '.join(HELD_OUT)}")
    return open_split(builder, name, split)


def _check_fits(builder: Any, place: str, dataset: Dataset) -> None:
    """Raises `UserError` if the images have another size than the network takes, or other classes."""
    image, label = image_and_label(builder, place.removeprefix(PREFIX))
    features = builder.info.features
    shape, wanted, classes = tuple(features[image].shape), tuple(dataset.image_shape), features[label].num_classes
    if shape != wanted:
        sizes = ["x".join("?" if side is None else str(side) for side in sides) for sides in (shape, wanted)]
        raise UserError(
            f"{place} has images of {sizes[0]}, but this network takes {sizes[1]}: use --corruptions without {FLAG} "
            "to corrupt its own images"
        )
    # Classes that are only numbers may stand for any names.
    numbered = tuple(map(str, range(classes)))
    named = {
        names for names in (tuple(features[label].names or ()), dataset.class_names) if names not in ((), numbered)
    }
    if classes != dataset.num_classes or len(named) > 1:
        raise UserError(
            f"{place} has {classes} classes, which are not the {dataset.num_classes} of this network: use "
            f"--corruptions without {FLAG} to corrupt its own images"
        )
