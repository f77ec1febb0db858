"""Which filters a compact network has to hold ready, from what its gates do on calibration data."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Bool, Float

Channels = tuple[int, ...]
GateLogits = Mapping[str, Float[np.ndarray, "S C"]]
# How far below zero the largest gate logit of a filter may stay for it to be kept, in standard deviations of it.
MARGINS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
# Time of a sample that has to be computed again, in units of the dense network's.
REPEAT = 1.5
# Channels that a CPU handles at once, and the largest share of a layer that is still worth picking out.
VECTOR = 8
WORTH_PICKING = 0.8


def choose_kept(
    gate_logits: GateLogits, share_of_work: Callable[[Mapping[str, Channels]], float]
) -> dict[str, Channels]:
    """The filters of each unit to hold ready: those that were on, and those that came so near that they will be.

    Each filter more costs every sample a little; a filter too few costs a whole pass of the masked network to the
    samples that want it. How often that happens is seen by choosing on one half of the samples and counting in the
    other, and the margin with the least expected time wins.

    Args:
      gate_logits: of every gated unit, in any order of samples.
      share_of_work: MACs with these filters kept, as a share of the dense network's.

    Returns:
      Ascending filters for each unit that leaves some out.
    """
    samples = len(next(iter(gate_logits.values())))
    if samples == 1:
        return _named(gate_logits, MARGINS[0])
    halves = np.arange(samples) % 2 == 0

    def expected_time(margin: float) -> float:
        outside = np.zeros(samples, bool)
        for logits in gate_logits.values():
            for half in (halves, ~halves):
                dropped = ~_kept(logits[half], margin)
                outside[~half] |= np.any(logits[~half][:, dropped] > 0, axis=-1)
        return share_of_work(_named(gate_logits, margin)) + REPEAT * float(np.mean(outside))

    return _named(gate_logits, min(MARGINS, key=expected_time))


def choose_sizes(gate_logits: GateLogits, kept: Mapping[str, Channels]) -> dict[str, int]:
    """How many filters of each unit to compute for a single sample: as many as hardly any sample exceeds.

    A sample's own filters are picked out of those held ready into a layer of a fixed size. Their number varies much
    less than their choice, so one size a unit will do: the largest seen, rounded up to whole vectors.

    Returns:
      The size for each unit where it is enough below the filters held ready to be worth the picking.
    """
    sizes = {}
    for name, logits in gate_logits.items():
        ready = kept.get(name, tuple(range(logits.shape[1])))
        counts = np.sum(logits[:, list(ready)] > 0, axis=-1)
        size = VECTOR * max(1, -(-int(np.max(counts)) // VECTOR))
        if size <= WORTH_PICKING * len(ready):
            sizes[name] = size
    return sizes


def _kept(logits: Float[np.ndarray, "S C"], margin: float) -> Bool[np.ndarray, " C"]:
    largest = np.max(logits, axis=0)
    kept = largest > -margin * np.std(logits, axis=0)
    kept[np.argmax(largest)] = True  # A layer without filters is more trouble than one filter.
    return kept


def _named(gate_logits: GateLogits, margin: float) -> dict[str, Channels]:
    kept = {name: _kept(logits, margin) for name, logits in gate_logits.items()}
    return {name: tuple(map(int, np.flatnonzero(on))) for name, on in kept.items() if not on.all()}
