"""A kernel of our own for CPUs, in C++, for what XLA has no operation for: a convolution that differs by image.

It is built as `ops.native` says. Where `available()` is False, compact execution uses XLA's operations alone.
"""

import functools
import pathlib
from collections.abc import Sequence

from ftwt_jax.inference.native.kernels import TARGET
from ftwt_jax.ops import native

_FOLDER = pathlib.Path(__file__).parent
_SYMBOL = "FtwtGatedUnit"


@functools.cache
def available() -> bool:
    """Whether the kernel works here, which builds it if need be. The variable `CXX` may name the compiler."""
    return native.works(lambda folder: register(build(folder)))


def register(library: pathlib.Path, target: str = TARGET) -> None:
    """Makes a built library known to XLA."""
    native.register(library, _SYMBOL, target)


def build(folder: pathlib.Path, tunings: Sequence[Sequence[str]] = native.TUNINGS) -> pathlib.Path:
    """The built library in this folder; see `ops.native.build`."""
    return native.build(_FOLDER, folder, tunings)
