"""Batches for training and evaluation: deterministic, sharded per process, resumable.

Images that are read from files come through Grain, which reads ahead; those in memory are only copied.
"""

import concurrent.futures
import sys
from collections.abc import Callable, Iterator

import jax
import numpy as np

from ftwt_jax.data.build import checked_label
from ftwt_jax.data.decoding import BrokenImageError, LazyImage
from ftwt_jax.data.order import Order
from ftwt_jax.data.source import Dataset, Source
from ftwt_jax.data.views import central_view, random_view
from ftwt_jax.parallel.processes import cpu_count

Batch = dict[str, np.ndarray]
# Batches that are prepared ahead.
AHEAD = 4


def train_batches(
    dataset: Dataset, batch_size: int, seed: int, start: int = 0, stop: int = sys.maxsize
) -> Iterator[Batch]:
    """Shuffled batches for the steps `start` to `stop` of training, over as many epochs as that takes.

    Every epoch has its own order. Step s takes the positions s * batch_size to (s + 1) * batch_size of the stream of
    all epochs. An image's position alone, and so (seed, epoch, index), determines its augmentation: here for
    `resized_crop`, in the training step for small images (see `make_augment`). So a step's batch does not depend on
    interruptions, nor on the number of processes.

    Args:
      dataset: its `train` is read.
      batch_size: images over all processes; each process reads its share.
      seed: of the order and of the random regions.

    Yields:
      image uint8 [B, H, W, channels], label int32 [B], index int32 [B] (of the image in its source) and position
      uint32 [B].
    """
    first, share = _part(batch_size)
    order = Order(len(dataset.train), seed)
    size, flip = dataset.image_shape[0], dataset.flip

    def view(image: LazyImage, position: int) -> np.ndarray:
        return random_view(image, size, flip, np.random.Generator(np.random.Philox(key=[seed, position])))

    read = _reader(dataset, dataset.train, view)

    def gather(step: int) -> Batch:
        positions = step * batch_size + first + np.arange(share)
        indices = order(positions)
        batch, missing = read(indices, positions)
        while missing.any():
            # An image that cannot be decoded is replaced by the next one that can.
            places = np.flatnonzero(missing)
            indices[places] = (indices[places] + 1) % len(dataset.train)
            others, missing[places] = read(indices[places], positions[places])
            for key, values in others.items():
                batch[key][places] = values
        return batch | {"index": indices.astype(np.int32), "position": positions.astype(np.uint32)}

    yield from _read_ahead(range(start, stop), gather, dataset.arrays(dataset.train) is not None)


def eval_batches(dataset: Dataset, source: Source, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
    """The source once, in order, in batches of one size; the last is padded with images of weight 0.

    Args:
      dataset: the data set of the source.
      source: its `test` or `train`.
      batch_size: images over all processes; each process reads its share.
      limit: reads only this many images, spread evenly over the source.

    Yields:
      image uint8 [B, H, W, channels], label int32 [B], weight float32 [B]. Images that cannot be decoded have weight 0.
    """
    count = len(source) if limit is None else min(limit, len(source))
    first, share = _part(batch_size)
    read = _reader(dataset, source, lambda image, position: central_view(image, dataset.image_shape[0]))

    def gather(start: int) -> Batch:
        places = np.arange(start + first, start + first + share)
        batch, missing = read(np.minimum(places, count - 1) * len(source) // count, places)
        return batch | {"weight": ((places < count) & ~missing).astype(np.float32)}

    yield from _read_ahead(range(0, count, batch_size), gather, dataset.arrays(source) is not None)


def _read_ahead(numbers: range, gather: Callable[[int], Batch], at_hand: bool) -> Iterator[Batch]:
    """A batch for each number, `AHEAD` of them read before they are asked for; `at_hand`: made when asked for."""
    if at_hand:
        return map(gather, numbers)
    import grain

    batches = grain.MapDataset.range(numbers.start, numbers.stop, numbers.step).map(gather)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)))


def _part(batch_size: int) -> tuple[int, int]:
    """Where in a batch this process's images begin, and their number."""
    share = batch_size // jax.process_count()
    return jax.process_index() * share, share


def _reader(
    dataset: Dataset, source: Source, view: Callable[[LazyImage, int], np.ndarray]
) -> Callable[[np.ndarray, np.ndarray], tuple[Batch, np.ndarray]]:
    """A function from indices and positions, int64 [B], to a batch and to which images cannot be decoded, bool [B]."""
    arrays = dataset.arrays(source)
    if arrays is not None:
        return lambda indices, positions: (
            {"image": arrays.images[indices], "label": arrays.labels[indices].astype(np.int32)},
            np.zeros(len(indices), bool),
        )
    # Threads, not processes: decoders release Python's lock, and nothing outlives a run that is killed.
    workers = cpu_count()
    pool = concurrent.futures.ThreadPoolExecutor(workers)

    def read(indices: np.ndarray, positions: np.ndarray) -> tuple[Batch, np.ndarray]:
        images = np.zeros((len(indices), *dataset.image_shape), np.uint8)
        labels = np.zeros(len(indices), np.int32)
        missing = np.zeros(len(indices), bool)

        def work(part: int) -> None:
            for place in range(part, len(indices), workers):
                example = source[int(indices[place])]
                labels[place] = checked_label(example, dataset.num_classes)
                try:
                    image = LazyImage(example["image"], dataset.image_shape[-1], dataset.skipped.max_pixels)
                    images[place] = view(image, int(positions[place]))
                except BrokenImageError as error:
                    missing[place] = True
                    dataset.skipped.add(example.get("name", f"image {indices[place]}"), str(error))

        for done in [pool.submit(work, part) for part in range(workers)]:
            done.result()
        return {"image": images, "label": labels}, missing

    return read
