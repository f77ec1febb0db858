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


def _kept(logits: Float[np.ndarray, "S C"], margin: float) -> Bool[np.ndarray, " C"]:
    largest = np.max(logits, axis=0)
    kept = largest > -margin * np.std(logits, axis=0)
    kept[np.argmax(largest)] = True  # A layer without filters is more trouble than one filter.
    return kept


def _named(gate_logits: GateLogits, margin: float) -> dict[str, Channels]:
    kept = {name: _kept(logits, margin) for name, logits in gate_logits.items()}
    return {name: tuple(map(int, np.flatnonzero(on))) for name, on in kept.items() if not on.all()}
