"""Kernels of our own for CPUs, in C++: how they are built, and those that training uses.

The machine's own compiler builds a library on first use; the user's cache folder keeps it. Without a compiler,
`available()` is False, and XLA's operations do the work.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import jaxlib
from jaxtyping import Array, Float

from ftwt_jax.errors import UserError
from ftwt_jax.files import written_whole
from ftwt_jax.ops.compiling import cache_folder

_FOLDER = pathlib.Path(__file__).parent
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared")
# Tried in this order until the compiler accepts one: processors differ, and so do compilers.
TUNINGS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
# Handlers of this folder's library by the names under which XLA knows them.
_SYMBOLS = {
    (_DEPTHWISE := "ftwt_depthwise"): "FtwtDepthwise",
    (_DEPTHWISE_GRADIENT := "ftwt_depthwise_weight_gradient"): "FtwtDepthwiseWeightGradient",
    (_ORDINARY_GRADIENT := "ftwt_weight_gradient"): "FtwtWeightGradient",
    (_CHANNEL_SUMS := "ftwt_channel_sums"): "FtwtChannelSums",
}


@functools.cache
def available() -> bool:
    """Whether the kernels of this folder work here, which builds them if need be. `CXX` may name the compiler."""

    def build_in(folder: pathlib.Path) -> None:
        library = build(_FOLDER, folder)
        for target, symbol in _SYMBOLS.items():
            register(library, symbol, target)

    return works(build_in)


def works(build_in: Callable[[pathlib.Path], None]) -> bool:
    """Whether a library can be built: in the user's cache or, if that is not writable, in a temporary folder."""
    try:
        build_in(cache_folder())
    except (OSError, UserError):
        try:
            build_in(pathlib.Path(tempfile.mkdtemp(prefix="ftwt_jax-")))
        except OSError:
            return False
    return True


def register(library: pathlib.Path, symbol: str, target: str) -> None:
    """Makes a handler of a built library known to XLA as `target`."""
    handler = getattr(ctypes.CDLL(str(library)), symbol)
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")


def build(sources_in: pathlib.Path, folder: pathlib.Path, tunings: Sequence[Sequence[str]] = TUNINGS) -> pathlib.Path:
    """The built library in this folder; builds it if it is not there.

    Args:
      sources_in: folder of the C++ files; they may include headers of it and of this one.
      tunings: sets of compiler flags for the processor; the first that the compiler accepts is used.

    Raises:
      OSError: there is no compiler, or it failed.
      UserError: the folder cannot be written.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or _COMPILERS[0], *_COMPILERS))), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")
    sources = sorted(sources_in.glob("*.cc"))
    headers = sorted(file for place in {sources_in, _FOLDER} for file in place.glob("*.h"))
    contents = [file.read_bytes() for file in (*sources, *headers)]
    ingredients = repr((contents, jaxlib.__version__, compiler, tunings, _processor())).encode()
    library = folder / f"{sources_in.parent.name}-{hashlib.sha256(ingredients).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(library) as temporary:
            if not any(_compiles(compiler, flags, sources, temporary) for flags in tunings):
                raise OSError(f"{compiler} does not compile {sources_in}")
    return library


def _processor() -> list[str]:
    """What distinguishes processors that cannot run each other's code; several machines may share a cache."""
    known = pathlib.Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    return [platform.machine(), *sorted({line for line in lines if line.startswith(("flags", "Features"))})]


def _compiles(compiler: str, flags: Sequence[str], sources: Sequence[pathlib.Path], out: pathlib.Path) -> bool:
    includes = (f"-I{jax.ffi.include_dir()}", f"-I{_FOLDER}")
    command = [compiler, *_FLAGS, *flags, *includes, *map(str, sources), "-o", str(out)]
    try:
        return subprocess.run(command, capture_output=True, timeout=300).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def depthwise(
    x: Float[Array, "N H W C"],
    kernel: Float[Array, "k_h k_w 1 C"],
    sides: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int] = (1, 1),
) -> Float[Array, "N H_out W_out C"]:
    """Depthwise convolution, float32; needs `available()`, on a CPU.

    Args:
      sides: [H_out, W_out].
      padding: rows and columns of zeros before and behind; those behind follow from `sides`.
      dilation: distance of neighbouring rows and columns of `x`, with zeros between them.
    """
    shape = jax.ShapeDtypeStruct((x.shape[0], *sides, x.shape[-1]), jnp.float32)
    return jax.ffi.ffi_call(_DEPTHWISE, shape, vmap_method="sequential")(
        x,
        kernel,
        stride_rows=strides[0],
        stride_columns=strides[1],
        dilation_rows=dilation[0],
        dilation_columns=dilation[1],
        pad_top=padding[0][0],
        pad_left=padding[1][0],
    )


def weight_gradient(
    x: Float[Array, "N H W C_in"],
    cotangent: Float[Array, "N H_out W_out C"],
    kernel: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> Float[Array, "k_h k_w C_group C"]:
    """Gradient of the kernel of a convolution, float32; needs `available()`, on a CPU.

    Args:
      kernel: shape of the gradient: [3, 3, 1, C] for a depthwise convolution, [k_h, k_w, C_in, C] for an ordinary one.
      padding: rows and columns of zeros before and behind, none negative.
    """
    depthwise = kernel[2] != x.shape[-1]
    call = jax.ffi.ffi_call(
        _DEPTHWISE_GRADIENT if depthwise else _ORDINARY_GRADIENT,
        jax.ShapeDtypeStruct(tuple(kernel), jnp.float32),
        vmap_method="sequential",
    )
    return call(
        x,
        cotangent,
        stride_rows=strides[0],
        stride_columns=strides[1],
        pad_top=padding[0][0],
        pad_left=padding[1][0],
    )


def channel_sums(
    a: Float[Array, "N H W C"], b: Float[Array, "N H W C"], shift: Float[Array, " C"]
) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    """Sums of a and of a * (b - shift) over images and positions, float32; needs `available()`, on a CPU."""
    shape = jax.ShapeDtypeStruct(shift.shape, jnp.float32)
    sums, products = jax.ffi.ffi_call(_CHANNEL_SUMS, (shape, shape), vmap_method="sequential")(a, b, shift)
    return sums, products
