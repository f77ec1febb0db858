"""Times of functions, in turns, so that what slows the machine for a while slows all of them."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

# Batches that each network runs before the next one's turn: in use, too, it would find its weights in the caches.
_BLOCK, _ROUNDS = 16, 3
# An engine's turns. Threads that it leaves spinning would take cores from the next one.
_TURNS, _PAUSE_S = 3, 0.3
# Slow batches get a shorter turn: 32 images at 224x224 take about a second.
_TURN_MS = 3e3


def time_in_turns(
    functions: Sequence[Callable],
    batches: Sequence[Any],
    wait: Callable = jax.block_until_ready,
    most_ms: float = float("inf"),
) -> list[float]:
    """Median milliseconds of each function over all batches, a block of calls of each after the other.

    Args:
      most_ms: a function that has run for so long is not called again.
    """
    for function in functions:
        wait(function(batches[0]))
    milliseconds: list[list[float]] = [[] for _ in functions]
    for _ in range(_ROUNDS):
        for first in range(0, len(batches), _BLOCK):
            for function, times in zip(functions, milliseconds, strict=True):
                for images in batches[first : first + _BLOCK]:
                    if sum(times) > most_ms:
                        break
                    start = time.perf_counter()
                    wait(function(images))
                    times.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(times) for times in milliseconds]


def time_engines_in_turns(runs: Sequence[Callable], batches: Sequence[Any]) -> list[list[float]]:
    """The same of functions that run in engines with threads of their own: the median of each of their turns."""
    milliseconds: list[list[float]] = [[] for _ in runs]
    for _ in range(_TURNS):
        for run, times in zip(runs, milliseconds, strict=True):
            time.sleep(_PAUSE_S)
            times += time_in_turns([run], batches, most_ms=_TURN_MS)
    return milliseconds
