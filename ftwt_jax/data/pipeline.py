"""Batches for training and evaluation, fed through Grain: deterministic, sharded per process, resumable."""

from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np

from ftwt_jax.data.source import Dataset, Example, Source


def augment(example: Example, rng: np.random.Generator, crop_padding: int, flip: bool) -> Example:
    """Random crop of the padded picture, and random mirroring."""
    image = example["image"]
    if crop_padding:
        height, width = image.shape[:2]
        padded = np.pad(image, ((crop_padding, crop_padding), (crop_padding, crop_padding), (0, 0)))
        top, left = rng.integers(0, 2 * crop_padding + 1, size=2)
        image = padded[top : top + height, left : left + width]
    if flip and rng.random() < 0.5:
        image = image[:, ::-1]
    return {**example, "image": image}


def train_batches(dataset: Dataset, batch_size: int, seed: int) -> grain.DatasetIterator:
    """Endless shuffled and augmented batches: image uint8 [B, H, W, channels], label int32 [B].

    Every epoch has its own order and its own crops, both decided by (seed, epoch, index) alone. The iterator's state,
    which Orbax saves and restores, is its position. `batch_size` is that of all processes together; each reads its
    share.
    """
    examples = grain.MapDataset.source(dataset.train).seed(seed).shuffle().repeat()
    if dataset.crop_padding or dataset.flip:
        examples = examples.random_map(lambda e, rng: augment(e, rng, dataset.crop_padding, dataset.flip))
    shard = examples[jax.process_index() :: jax.process_count()]
    batches = shard.batch(batch_size // jax.process_count(), drop_remainder=True)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)))


def eval_batches(source: Source, batch_size: int, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The source once, in order, in batches of one size; the last is filled up with examples of weight 0.

    Args:
      source: what to read.
      batch_size: examples a batch over all processes; each process reads its share.
      limit: read the first so many examples only.

    Yields:
      image uint8 [B, H, W, channels], label int32 [B], weight float32 [B].
    """
    count = len(source) if limit is None else min(limit, len(source))
    share = batch_size // jax.process_count()
    first = jax.process_index() * share
    for start in range(0, count, batch_size):
        indices = np.arange(start + first, start + first + share)
        examples = [source[int(i)] for i in np.minimum(indices, count - 1)]
        yield {
            "image": np.stack([e["image"] for e in examples]),
            "label": np.asarray([e["label"] for e in examples], np.int32),
            "weight": (indices < count).astype(np.float32),
        }
