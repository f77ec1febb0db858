"""Data sets prepared by TensorFlow Datasets: read without TensorFlow, prepared with it."""

import dataclasses
import importlib.util
import os
import shlex
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from ftwt_jax.data.build import build_dataset
from ftwt_jax.data.source import Dataset, Example, Source
from ftwt_jax.errors import UserError, one_line, unknown_name
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
    """Encoded images out of TFDS's records."""

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
) -> Dataset:
    """Loads `tfds:NAME`, a classification data set that has been prepared.

    Args:
      place: name of the data set, with configuration and version if wanted: `cifar10`, `imagenet2012_subset/1pct`.
      image_size: None: the side of the images themselves, or 224 for `resized_crop`.
      augment, flip: see `build_dataset`.
      train_split, test_split: split expressions such as `train[:90%]`; by default `train` and `test` or `validation`.
      data_dir: where TFDS keeps its data, also `gs://BUCKET/FOLDER`; by default as TFDS has it.

    Raises:
      UserError: unknown, not prepared, or no set of images with classes.
    """
    sources = open_sources(place, train_split, test_split, data_dir)
    height, width, channels = sources.shape
    if image_size is None:
        own = min(height, width) if height and width else LARGE_SIDE
        image_size = LARGE_SIDE if augment == "resized_crop" else own
    return build_dataset(
        sources.train,
        sources.test,
        sources.class_names,
        image_size,
        augment,
        flip,
        channels=1 if channels == 1 else 3,
    )


def open_sources(
    name: str, train_split: str | None = None, test_split: str | None = None, data_dir: str | None = None
) -> Sources:
    """Opens both splits of a prepared data set; raises `UserError` as `load_tfds` does."""
    # Where TensorFlow is installed, paths such as gs:// would be opened by it.
    os.environ.setdefault("EPATH_USE_TF", "false")
    import tensorflow_datasets as tfds

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
            f"{PREFIX}{name} has no split to hold out, only {', '.join(builder.info.splits)}: cut one, as "
            "config.data.train_split='train[:90%]' and config.data.test_split='train[90%:]'"
        )

    def source(split: str) -> RecordSource:
        try:
            records = builder.as_data_source(split=split, decoders={image: tfds.decode.SkipDecoding()})
            len(records)
        except RuntimeError as error:
            raise _damaged(f"{PREFIX}{name} {split}", error) from None
        return RecordSource(records, image, label, f"{PREFIX}{name} {split}")

    _check_apart(builder, name, train_split or TRAIN, test_split)
    features = builder.info.features
    names = tuple(features[label].names or map(str, range(features[label].num_classes)))
    return Sources(source(train_split or TRAIN), source(test_split), names, features[image].shape)


class Piece(NamedTuple):
    """Some examples of one file: from `start` to before `stop`."""

    file: str
    start: int
    stop: int


def _pieces(builder: Any, name: str, split: str) -> list[Piece]:
    """Where the examples of a split expression lie; raises `UserError` if it is none, or empty."""
    try:
        parts = builder.info.splits[split].file_instructions
    except (ValueError, KeyError, AssertionError) as error:
        known = ", ".join(builder.info.splits)
        raise UserError(f"{PREFIX}{name} has no split {split!r}: {_shortened(error)}; its splits: {known}") from None
    counts = ((part, part.examples_in_shard if part.take == -1 else part.take) for part in parts)
    pieces = [Piece(str(part.filename), part.skip, part.skip + count) for part, count in counts if count > 0]
    if not pieces:
        raise UserError(f"the split {split!r} of {PREFIX}{name} is empty")
    return pieces


def _check_apart(builder: Any, name: str, train: str, test: str) -> None:
    """Raises `UserError` if an example is both trained on and held out."""
    for a in _pieces(builder, name, train):
        for b in _pieces(builder, name, test):
            if a.file == b.file and max(a.start, b.start) < min(a.stop, b.stop):
                raise UserError(
                    f"the splits {train!r} and {test!r} of {PREFIX}{name} share examples: set config.data.train_split "
                    "and config.data.test_split so that nothing that is held out is trained on"
                )


def _damaged(name: str, error: Exception) -> UserError:
    return UserError(f"{name} cannot be read: {_shortened(error)}; delete the data set's folder and prepare it again")


def is_prepared(name: str, data_dir: str | None = None) -> bool:
    """Whether a known data set has been prepared, in any format."""
    return bool(open_builder(name, data_dir).info.splits)


def prepare_command(name: str, data_dir: str | None = None) -> str:
    """The command that prepares a data set."""
    place = f" --data_dir={shlex.quote(data_dir)}" if data_dir else ""
    return f"python -m ftwt_jax prepare {PREFIX}{name}{place}"


def prepare(name: str, data_dir: str | None, console: Console) -> None:
    """Downloads a data set and writes it in the format that is read at random; one that is there is only converted.

    Raises:
      UserError: TensorFlow is missing, no such data set, or the download failed.
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
            # The data set's own code runs here: downloads, archives, checksums, instructions for manual downloads.
            raise UserError(f"{PREFIX}{name} cannot be prepared: {_shortened(error)}") from error
    builder = open_builder(name, data_dir)
    sizes = ", ".join(f"{split} {info.num_examples:,}" for split, info in builder.info.splits.items())
    done = f"{PREFIX}{name} is prepared in {builder.data_dir}: {sizes}"
    say(console, done)


def _convert(builder: Any) -> None:
    """Writes the records of another format again, beside the old ones, and notes it in the data set's description."""
    import tensorflow as tf
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core import dataset_info

    old = builder.info.file_format
    for split in builder.info.splits.values():
        for path in split.filepaths:
            wanted = path.parent / path.name.replace(f".{old.file_suffix}-", f".{FORMAT}-")
            if old.value != "tfrecord" or wanted == path:
                raise UserError(
                    f"{path} is of the format {old.value}, which cannot be converted; delete it and prepare"
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
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=os.path.expanduser(data_dir) if data_dir else None)
    except tfds.core.DatasetNotFoundError:
        where = f" or in {data_dir}" if data_dir else ""
        known = tfds.list_builders(with_community_datasets=False)
        near = unknown_name("TFDS data set", name, known)
        raise UserError(f"{str(near).partition('known:')[0]}it is none of TFDS's {len(known)}{where}") from None
    except Exception as error:
        # What a data set's code or a remote file system raises; for gs:// the missing package is named.
        if "No module named 'tensorflow'" in str(error):
            raise UserError(
                f"{PREFIX}{name} is not prepared: run `{prepare_command(name, data_dir)}`; {NEEDS}"
            ) from None
        raise UserError(f"{PREFIX}{name} cannot be opened: {_shortened(error)}") from None


def _prepared(builder: Any) -> bool:
    return bool(builder.info.splits) and FORMAT in {form.value for form in builder.info.available_file_formats()}


def image_and_label(builder: Any, name: str) -> tuple[str, str]:
    """Names of the image and its class among the features."""
    import tensorflow_datasets as tfds

    features, supervised = builder.info.features, builder.info.supervised_keys
    image, label = supervised if supervised and len(supervised) == 2 else ("image", "label")
    wanted = {image: tfds.features.Image, label: tfds.features.ClassLabel}
    fits = all(key in features and isinstance(features[key], kind) for key, kind in wanted.items())
    if not fits or features[image].np_dtype not in (np.uint8, np.uint16):
        raise UserError(f"{PREFIX}{name} is no set of images with classes: it has {', '.join(features)}")
    return image, label


def _shortened(error: BaseException) -> str:
    text = one_line(error)
    return text if len(text) <= 600 else f"{text[:600]} ..."
