"""Data sets prepared by TensorFlow Datasets: read without TensorFlow, prepared with it."""

import dataclasses
import importlib.util
import os
import shlex
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from ftwt_jax.data.build import UNKNOWN_LENGTH, build_blank, build_dataset
from ftwt_jax.data.decoding import MAX_PIXELS
from ftwt_jax.data.source import Dataset, Example, Source
from ftwt_jax.errors import UserError, shortened, unknown_name
from ftwt_jax.printing import say

PREFIX = "tfds:"
FORMAT = "array_record"
NEEDS = "preparing data needs TensorFlow (training does not): pip install tensorflow, or this project's extra [prepare]"
TRAIN, HELD_OUT = "train", ("test", "validation")
LARGE_SIDE = 224


class Sources(NamedTuple):
    """The two splits of a prepared data set, encoded, and what it says of them."""

    train: Source
    test: Source
    class_names: tuple[str, ...]
    shape: tuple[int | None, int | None, int]


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """Encoded images from TFDS's records; `image` and `label` are its names of the two features."""

    records: Any
    image: str
    label: str
    name: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        try:
            row = self.records[index]
        except (RuntimeError, ValueError) as error:
            raise _damaged(self.name, error) from None
        return {"image": row[self.image], "label": row[self.label], "name": f"{self.name}, image {index}"}


def load_tfds(
    place: str,
    image_size: int | None = None,
    augment: str = "crop",
    flip: bool = True,
    train_split: str | None = None,
    test_split: str | None = None,
    data_dir: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Dataset:
    """Loads `tfds:NAME`, a classification data set that has been prepared.

    Args:
      place: name of the data set, optionally with configuration and version: `cifar10`, `imagenet2012_subset/1pct`.
      image_size: None is the side of the images themselves, or 224 for `resized_crop`.
      augment, flip, max_pixels: see `build_dataset`.
      train_split, test_split: split expressions such as `train[:90%]`; by default `train` and `test` or `validation`.
      data_dir: where TFDS keeps its data, also `gs://BUCKET/FOLDER`; None is TFDS's default.

    Raises:
      UserError: unknown, not prepared, or not a set of images with class labels.
    """
    sources = open_sources(place, train_split, test_split, data_dir)
    height, width, channels = sources.shape
    if image_size is None:
        image_size = _default_size(height, width, augment)
    splits, names = (sources.train, sources.test), sources.class_names
    return build_dataset(*splits, names, image_size, augment, flip, 1 if channels == 1 else 3, max_pixels)


def describe_tfds(
    place: str,
    num_classes: int | None,
    image_size: int | None,
    augment: str,
    flip: bool,
    train_split: str | None,
    data_dir: str | None,
    **_: Any,
) -> Dataset:
    """`load_tfds` without images, prepared or not; of a bucket, only what TFDS's own code says is known."""
    builder = open_builder(place, None if data_dir and "://" in data_dir else data_dir)
    image, label = image_and_label(builder, place)
    classes = num_classes or builder.info.features[label].num_classes
    if not classes:
        raise UserError(f"TFDS does not say how many classes {PREFIX}{place} has: set --num_classes")
    height, width, channels = builder.info.features[image].shape
    split, splits = train_split or TRAIN, builder.info.splits
    try:
        length = splits[split].num_examples if splits else UNKNOWN_LENGTH
    except (KeyError, ValueError, AssertionError):
        raise UserError(f"{PREFIX}{place} has no split {split!r}; its splits: {', '.join(splits)}") from None
    size = _default_size(height, width, augment) if image_size is None else image_size
    return build_blank(classes, 1 if channels == 1 else 3, size, augment, flip, length)


def _default_size(height: int | None, width: int | None, augment: str) -> int:
    return LARGE_SIDE if augment == "resized_crop" or not (height and width) else min(height, width)


def open_sources(
    name: str, train_split: str | None = None, test_split: str | None = None, data_dir: str | None = None
) -> Sources:
    """Opens both splits of a prepared data set; raises `UserError` as `load_tfds` does."""
    avoid_tensorflow()
    builder = open_builder(name, data_dir)
    if not _prepared(builder):
        raise UserError(
            f"{PREFIX}{name} is not prepared in {data_dir or builder.data_dir}: run `{prepare_command(name, data_dir)}`"
        )
    image, label = image_and_label(builder, name)
    if test_split is None:
        test_split = next((split for split in HELD_OUT if split in builder.info.splits), None)
    if test_split is None:
        raise UserError(
            f"{PREFIX}{name} has no split to hold out, only {', '.join(builder.info.splits)}: divide one, as in "
            "config.data.train_split='train[:90%]' and config.data.test_split='train[90%:]'"
        )

    train_split = train_split or TRAIN
    _check_disjoint(builder, name, train_split, test_split)
    train, test = (open_split(builder, name, split) for split in (train_split, test_split))
    features = builder.info.features
    names = tuple(features[label].names or map(str, range(features[label].num_classes)))
    return Sources(train, test, names, features[image].shape)


def avoid_tensorflow() -> None:
    """Keeps TFDS from opening paths such as gs:// with TensorFlow where that is installed."""
    os.environ.setdefault("EPATH_USE_TF", "false")


def open_split(builder: Any, name: str, split: str) -> RecordSource:
    """One split of a prepared data set, encoded; raises `UserError` if it is damaged."""
    import tensorflow_datasets as tfds

    image, label = image_and_label(builder, name)
    try:
        records = builder.as_data_source(split=split, decoders={image: tfds.decode.SkipDecoding()})
        len(records)
    except RuntimeError as error:
        raise _damaged(f"{PREFIX}{name} {split}", error) from None
    return RecordSource(records, image, label, f"{PREFIX}{name} {split}")


class Piece(NamedTuple):
    """Some examples of one file: `start` up to, but not including, `stop`."""

    file: str
    start: int
    stop: int


def _pieces(builder: Any, name: str, split: str) -> list[Piece]:
    """Where the examples of a split expression are; raises `UserError` if it is empty or not valid."""
    try:
        parts = builder.info.splits[split].file_instructions
    except (ValueError, KeyError, AssertionError) as error:
        known = ", ".join(builder.info.splits)
        raise UserError(
            f"{PREFIX}{name} has no split {split!r}: {shortened(error, 600)}; its splits: {known}"
        ) from None
    counts = ((part, part.examples_in_shard if part.take == -1 else part.take) for part in parts)
    pieces = [Piece(str(part.filename), part.skip, part.skip + count) for part, count in counts if count > 0]
    if not pieces:
        raise UserError(
            f"the split {split!r} of {PREFIX}{name} is empty: choose another with config.data.train_split or "
            "config.data.test_split"
        )
    return pieces


def _check_disjoint(builder: Any, name: str, train: str, test: str) -> None:
    """Raises `UserError` if an image is in both splits."""
    for a in _pieces(builder, name, train):
        for b in _pieces(builder, name, test):
            if a.file == b.file and max(a.start, b.start) < min(a.stop, b.stop):
                raise UserError(
                    f"the splits {train!r} and {test!r} of {PREFIX}{name} share images: set config.data.train_split "
                    "and config.data.test_split so that they do not overlap"
                )


def _damaged(name: str, error: Exception) -> UserError:
    return UserError(
        f"{name} cannot be read: {shortened(error, 600)}; delete the data set's folder and prepare it again"
    )


def is_prepared(name: str, data_dir: str | None = None) -> bool:
    """Whether a data set that TFDS knows has been prepared, in any format; without TFDS, none is."""
    installed = importlib.util.find_spec("tensorflow_datasets") is not None
    return installed and bool(open_builder(name, data_dir).info.splits)


def prepare_command(name: str, data_dir: str | None = None) -> str:
    """The command that prepares a data set."""
    place = f" --data_dir={shlex.quote(data_dir)}" if data_dir else ""
    return f"python -m ftwt_jax prepare {PREFIX}{name}{place}"


def prepare(name: str, data_dir: str | None, console: Console) -> None:
    """Downloads a data set and writes it as ArrayRecord, which allows random access; if it is there, only converts it.

    Raises:
      UserError: TensorFlow is missing, there is no such data set, or the download failed.
    """
    builder = open_builder(name, data_dir)
    if not _prepared(builder):
        if importlib.util.find_spec("tensorflow") is None:
            raise UserError(NEEDS)
        try:
            if builder.info.splits:
                _convert(builder)
            else:
                builder.download_and_prepare(file_format=FORMAT)
        except Exception as error:
            # The data set's own code can raise anything: downloads, archives, checksums, manual downloads.
            raise UserError(f"{PREFIX}{name} cannot be prepared: {shortened(error, 600)}") from error
    builder = open_builder(name, data_dir)
    sizes = ", ".join(f"{split} {info.num_examples:,}" for split, info in builder.info.splits.items())
    done = f"{PREFIX}{name} is prepared in {builder.data_dir}: {sizes}"
    say(console, done)


def _convert(builder: Any) -> None:
    """Copies TFRecord files to ArrayRecord beside them, and adds the format to the data set's description."""
    import tensorflow as tf
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core import dataset_info

    old = builder.info.file_format
    for split in builder.info.splits.values():
        for path in split.filepaths:
            wanted = path.parent / path.name.replace(f".{old.file_suffix}-", f".{FORMAT}-")
            if old.value != "tfrecord" or wanted == path:
                raise UserError(
                    f"{path} is in the format {old.value}, which cannot be converted: delete it and prepare it again"
                )
            unfinished = path.parent / f"incomplete.{wanted.name}"
            writer = ArrayRecordWriter(os.fspath(unfinished), "group_size:1")
            try:
                for record in tf.data.TFRecordDataset(os.fspath(path)).as_numpy_iterator():
                    writer.write(record)
            except BaseException:
                writer.close()
                unfinished.unlink(missing_ok=True)
                raise
            writer.close()
            unfinished.replace(wanted)
    description = builder.info.as_proto
    description.alternative_file_formats.append(FORMAT)
    dataset_info.write_dataset_info_proto(description, dataset_info_dir=builder.data_path)


def open_builder(name: str, data_dir: str | None) -> Any:
    """TFDS's builder of a data set, prepared or not; raises `UserError` if there is none."""
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=os.path.expanduser(data_dir) if data_dir else None)
    except tfds.core.DatasetNotFoundError:
        elsewhere = f", nor in {data_dir}" if data_dir else ""
        known = tfds.list_builders(with_community_datasets=False)
        # All the names would fill the screen.
        hint = str(unknown_name("TFDS data set", name, known)).partition("known:")[0]
        raise UserError(f"{hint}not one of TFDS's {len(known):,} data sets{elsewhere}") from None
    except Exception as error:
        # A data set's code and remote file systems can raise anything; for gs:// the error names the missing package.
        if "No module named 'tensorflow'" in str(error):
            raise UserError(
                f"{PREFIX}{name} is not prepared: run `{prepare_command(name, data_dir)}`; {NEEDS}"
            ) from None
        raise UserError(f"{PREFIX}{name} cannot be opened: {shortened(error, 600)}") from None


def _prepared(builder: Any) -> bool:
    return bool(builder.info.splits) and FORMAT in {form.value for form in builder.info.available_file_formats()}


def image_and_label(builder: Any, name: str) -> tuple[str, str]:
    """Names of the two features that hold the image and its class; raises `UserError` if there are none."""
    import tensorflow_datasets as tfds

    features, supervised = builder.info.features, builder.info.supervised_keys
    image, label = supervised if supervised and len(supervised) == 2 else ("image", "label")
    wanted = {image: tfds.features.Image, label: tfds.features.ClassLabel}
    fits = all(key in features and isinstance(features[key], kind) for key, kind in wanted.items())
    if not fits or features[image].np_dtype not in (np.uint8, np.uint16):
        raise UserError(f"{PREFIX}{name} is not a set of images with classes: its features are {', '.join(features)}")
    return image, label
