"""Calls a built kernel for gated units with what fits and with what does not; run as a program, under sanitizers.

python -m tests.helpers.fuzz_kernel LIBRARY CALLS SEED    prints how many calls were answered and how many refused
"""

import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftwt_jax.inference import native
from ftwt_jax.inference.native import kernels

TARGET = "fuzzed"
SIZES = [0, 1, 2, 3, 7, 16, 17]
SETTINGS = [-(2**40), -1, 0, 1, 2, 3, 5, 2**40]
BUFFERS = ("x", "kernel", "bias", "head_kernel", "head_sum", "head_bias", "head_place", "kept", "source", "shortcut")


def fitting(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, Any], list[tuple[int, ...]]]:
    """Buffers, settings and shapes of results of a random call that is right."""
    images, channels, filters = (int(rng.integers(1, most)) for most in (4, 40, 70))
    depthwise, own = (bool(rng.integers(2)) for _ in range(2))
    window, strides, pads = rng.integers(1, 5, 2), rng.integers(1, 4, 2), rng.integers(0, 3, (2, 2))
    sides = np.maximum(rng.integers(1, 12, 2), window - pads.sum(1))
    left_out = int(rng.integers(0, 3))
    filters = channels if depthwise else filters
    all_filters = channels + left_out if own else filters + int(rng.integers(0, 3))
    filters = min(filters, all_filters)
    height, width = (int(side) for side in (sides + pads.sum(1) - window) // strides + 1)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    if depthwise:
        kernel = normal(int(window.prod()), filters)
    else:
        kernel = kernels.blocked(normal(*map(int, window), channels, filters)).blocks
    buffers = {
        "x": normal(images, *map(int, sides), channels) * (rng.random(channels) < rng.choice([0.3, 1])),
        "kernel": kernel,
        "bias": normal(filters),
        "head_kernel": normal(channels, 1 if own else all_filters),
        "head_sum": normal(all_filters),
        "head_bias": normal(all_filters) + rng.choice([-3, 0, 3]),
        "head_place": rng.permutation(all_filters)[: channels if own else 0].astype(np.int32),
        "kept": np.sort(rng.permutation(all_filters)[:filters]).astype(np.int32),
        "source": rng.integers(-1, channels, filters).astype(np.int32),
    }
    results = [(images, height, width, filters), (images, all_filters)]
    if rng.integers(2):
        buffers["shortcut"] = normal(*results[0])
    settings = {
        "kernel_height": int(window[0]), "kernel_width": int(window[1]), "row_stride": int(strides[0]),
        "column_stride": int(strides[1]), "top": int(pads[0, 0]), "bottom": int(pads[0, 1]), "left": int(pads[1, 0]),
        "right": int(pads[1, 1]),
        "relu": bool(rng.integers(2)), "depthwise": depthwise, "left_out": left_out,
        "max_pool": bool(rng.integers(2)), "norm": int(rng.integers(3)),
    }  # fmt: skip
    buffers = {
        name: values.astype(np.int32 if values.dtype.kind == "i" else np.float32) for name, values in buffers.items()
    }
    return buffers, settings, results


def other_shape(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape near this one, or of another rank."""
    sizes = list(shape)
    change = rng.integers(4) if sizes else 0
    if change == 0:
        sizes.insert(int(rng.integers(len(sizes) + 1)), int(rng.choice([1, 2])))
    elif change == 1:
        sizes.pop(int(rng.integers(len(sizes))))
    else:
        at = int(rng.integers(len(sizes)))
        sizes[at] = int(rng.choice([*SIZES, max(sizes[at] - 1, 0), sizes[at] + 1]))
    return tuple(sizes)


def spoil(rng: np.random.Generator, buffers: dict, settings: dict, results: list) -> None:
    """Changes one thing, which may still fit."""
    kind = rng.integers(5)
    name = str(rng.choice(BUFFERS))
    if kind == 0:
        settings[str(rng.choice([name for name, value in settings.items() if not isinstance(value, bool)]))] = int(
            rng.choice(SETTINGS)
        )
    elif kind == 1:
        at = int(rng.integers(len(results)))
        results[at] = other_shape(rng, results[at])
    elif kind == 2 and name in buffers:
        buffers[name] = np.resize(buffers[name], other_shape(rng, buffers[name].shape))
    elif kind == 3:
        numbers = buffers[str(rng.choice(["head_place", "kept", "source"]))]
        if numbers.size:
            # It may be of another dtype by now.
            wrong = rng.choice([-(2**31), -2, -1, 40, 2**31 - 1])
            numbers.flat[int(rng.integers(numbers.size))] = wrong.astype(numbers.dtype)
    elif name in buffers:
        buffers[name] = buffers[name].astype(rng.choice([np.float16, np.int8, np.int32]))
    settings["depthwise"] ^= bool(rng.integers(8) == 0)


@np.errstate(over="ignore", invalid="ignore")
def main() -> None:
    library, calls, seed = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    native.register(library, TARGET)
    rng = np.random.default_rng(seed)
    answered = refused = 0
    for made in range(calls):
        if made % 100 == 0:
            jax.clear_caches()  # Each call is a program of its own.
        buffers, settings, results = fitting(rng)
        spoilt = int(rng.integers(3))
        for _ in range(spoilt):
            spoil(rng, buffers, settings, results)
        given = jax.device_put([buffers[name] for name in BUFFERS if name in buffers])
        call = jax.ffi.ffi_call(TARGET, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results])
        try:
            jax.block_until_ready(call(*given, **settings))
            answered += 1
        except jax.errors.JaxRuntimeError:
            if not spoilt:
                raise
            refused += 1
    print(f"{answered} answered, {refused} refused")


if __name__ == "__main__":
    main()
