"""The order of the images of a training: a permutation for each epoch, without a list of it.

Any position of the endless stream of epochs is looked up by itself, so nothing has to be kept to resume. The order is
that of Grain's `MapDataset.range(length).seed(seed).shuffle().repeat()`, but computed for many positions at once: Grain
computes one at a time, which kept a GPU waiting.
"""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Int64, UInt32

# Rounds of the cipher, and the fewest bits that it permutes.
_ROUNDS, _FEWEST_BITS = 4, 16
# Epochs of small sets whose order is kept; a call of many steps may span several.
_KEPT = 64
_WORD = np.uint64(0xFFFFFFFF)


class Order:
    """Which image stands where in the stream of all epochs.

    Args:
      length: number of images.
      seed: two seeds, or two epochs, have different orders.
    """

    def __init__(self, length: int, seed: int):
        self._length = length
        # As Grain derives the seed of a step of its pipeline, here of the one after `seed`.
        self._seed = int(np.random.SeedSequence((seed, 1)).generate_state(1, np.uint32)[0])

    def __call__(self, positions: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The images at these positions, counted from 0 over all epochs."""
        epochs, places = np.divmod(positions, self._length)
        images = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            images[chosen] = _permuted(places[chosen], self._length, (self._seed + int(epoch)) % 2**32)
        return images


def _permuted(places: Int64[np.ndarray, " n"], length: int, seed: int) -> Int64[np.ndarray, " n"]:
    """Places in [0, length) under a permutation of that range: a Simon cipher that is applied again to what leaves it.

    The cipher: Beaulieu et al. 2013, https://eprint.iacr.org/2013/404; the repetition: Black and Rogaway 2002, "Ciphers
    with arbitrary finite domains". It differs from Grain's where the length is 2**16 + 1, 2**18 + 1 and so on: Grain
    permutes too few bits there, so that an image appears twice in an epoch, and the last one not at all.
    """
    if length == 1:
        return np.zeros_like(places)
    bits = max(_even((length - 1).bit_length()), _FEWEST_BITS)
    if length <= 2**_FEWEST_BITS:
        return _whole(length, seed)[places]
    return _walked(places.astype(np.uint64), length, lambda values: _encrypted(values, _keys(seed), bits // 2))


@functools.lru_cache(_KEPT)
def _whole(length: int, seed: int) -> Int64[np.ndarray, " length"]:
    """The permutation of a short range: most repetitions leave it again, so the cipher is looked up in a table."""
    table = _encrypted(np.arange(2**_FEWEST_BITS, dtype=np.uint64), _keys(seed), _FEWEST_BITS // 2)
    return _walked(np.arange(length, dtype=np.uint64), length, table.__getitem__)


def _walked(values: np.ndarray, length: int, step: Callable[[np.ndarray], np.ndarray]) -> Int64[np.ndarray, " n"]:
    """Each value after the first step, or the first few, that leave it below `length`."""
    outside = np.arange(len(values))
    while outside.size:
        values[outside] = step(values[outside])
        outside = outside[values[outside] >= length]
    return values.astype(np.int64)


def _even(number: int) -> int:
    return number + number % 2


def _encrypted(values: np.ndarray, keys: UInt32[np.ndarray, " rounds"], word: int) -> np.ndarray:
    """uint64 values of 2 * `word` bits, encrypted."""
    mask = np.uint64(2**word - 1)

    def rotated(x: np.ndarray, by: int) -> np.ndarray:
        return (x << np.uint64(by) | x >> np.uint64(word - by)) & mask

    left, right = values >> np.uint64(word) & mask, values & mask
    for key in keys.astype(np.uint64):
        left ^= rotated(right, 1) & rotated(right, 8) ^ rotated(right, 2) ^ key & mask
        left, right = right, left
    # An even number of rounds leaves the halves where they were.
    return left << np.uint64(word) | right


def _keys(seed: int) -> UInt32[np.ndarray, " rounds"]:
    """The keys of the rounds: what `std::seed_seq{seed}` of the C++ standard ([rand.util.seedseq]) generates."""
    count = _ROUNDS
    shift = (count - 1) // 2
    middle = (count - shift) // 2
    after = middle + shift
    out = np.full(count, 0x8B8B8B8B, np.uint64)

    def mixed(x: np.uint64) -> np.uint64:
        return x ^ (x >> np.uint64(27))

    for k in range(count):
        last = out[(k - 1) % count]
        step = np.uint64(1664525) * mixed(out[k] ^ out[(k + middle) % count] ^ last) & _WORD
        out[(k + middle) % count] = out[(k + middle) % count] + step & _WORD
        # The length of the seed first, then the seed, then nothing more.
        step = step + np.uint64(1 if k == 0 else k + (seed if k == 1 else 0)) & _WORD
        out[(k + after) % count] = out[(k + after) % count] + step & _WORD
        out[k] = step
    for k in range(count):
        step = np.uint64(1566083941) * mixed(out[k] + out[(k + middle) % count] + out[(k - 1) % count] & _WORD) & _WORD
        out[(k + middle) % count] ^= step
        step = step - np.uint64(k) & _WORD
        out[(k + after) % count] ^= step
        out[k] = step
    return out.astype(np.uint32)
