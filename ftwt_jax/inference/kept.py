"""Which filters a compact network has to hold ready, from what its gates do on calibration images."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Bool, Float

from ftwt_jax.inference.packed import Channels

GateLogits = Mapping[str, Float[np.ndarray, "S C"]]
# How far below zero the largest gate logit of a filter may stay for it to be kept, in standard deviations of it.
MARGINS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
# Time of an image that has to be computed again, in units of the dense network's.
REPEAT = 1.5


def choose_kept(
    gate_logits: GateLogits, share_of_work: Callable[[Mapping[str, Channels]], float]
) -> dict[str, Channels]:
    """The filters of each unit to hold ready: those that were on, and those that came close enough to expect it.

    One filter more costs every image a little; one filter too few costs the images that want it a whole pass of the
    masked network. To see how often that happens, filters are chosen on one half of the images and the images that
    want others are counted in the other half; the margin with the least expected time wins.

    Args:
      gate_logits: of every gated unit, the images in any order.
      share_of_work: MACs with these filters kept, as a share of the dense network's.

    Returns:
      Ascending filters for each unit that leaves some out.
    """
    images = len(next(iter(gate_logits.values())))
    if images == 1:
        return _named(gate_logits, MARGINS[0])
    halves = np.arange(images) % 2 == 0

    def expected_time(margin: float) -> float:
        outside = np.zeros(images, bool)
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
